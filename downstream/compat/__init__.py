"""Every place that reaches into mmengine, mmcv, mmdet or mmseg, or stands in for a package that they import."""

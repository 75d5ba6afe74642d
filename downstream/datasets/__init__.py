"""Datasets for detection and segmentation. They need mmdet or mmseg, so no module imports them at load time."""

"""Base: what the small labelled sets share: 224 px and MAE's augmentation. A set adds data.train, data.val and data.num_images."""

data = dict(image_size=224, augmentation=dict(ramp="randaugment", min_scale=0.08, color_jitter=0.0))

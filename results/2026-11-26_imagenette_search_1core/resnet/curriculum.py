"""A curriculum found by the sequential search of mae_et: 4 stages, score top1.

Use it with any config: --cfg-options curriculum.file=PATH_OF_THIS_FILE, or as _base_ of a config.
"""

curriculum = dict(
    preset="custom",
    equivalent_epochs=3.333333333333333,
    stages=[
        dict(compute_fraction=0.25, bandwidth=48),
        dict(compute_fraction=0.25, bandwidth=80),
        dict(compute_fraction=0.25, bandwidth=80),
        dict(compute_fraction=0.25, bandwidth=112),
    ],
)

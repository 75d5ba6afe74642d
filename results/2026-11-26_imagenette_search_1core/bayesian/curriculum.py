"""A curriculum found by the bayesian search of mae_et: 4 stages, score knn.

Use it with any config: --cfg-options curriculum.file=PATH_OF_THIS_FILE, or as _base_ of a config.
"""

curriculum = dict(
    preset="custom",
    equivalent_epochs=0.39999999999999997,
    stages=[
        dict(compute_fraction=0.3314, bandwidth=48),
        dict(compute_fraction=0.2741, bandwidth=48),
        dict(compute_fraction=0.2413, bandwidth=80),
        dict(compute_fraction=0.1532, bandwidth=112),
    ],
)

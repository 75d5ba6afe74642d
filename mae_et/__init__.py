"""mae_et: vision backbones trained under the EfficientTrain++ curriculum, centred on masked autoencoders.

    import mae_et

    summary = mae_et.pretrain("/data/photos", "work_dirs/photos")
    model = mae_et.load_encoder("work_dirs/photos")

Names are imported on first use, so `import mae_et` is fast and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae_et.api import classify, load_encoder, make_plan, pretrain, train_classifier
    from mae_et.config.schema import ClassifyConfig, PretrainConfig
    from mae_et.config.supervised import SupervisedConfig
    from mae_et.lowfreq import low_frequency_crop
    from mae_et.models.mae import MaskedAutoencoder

__version__ = "0.1.0.dev0"
__all__ = [
    "ClassifyConfig",
    "MaskedAutoencoder",
    "PretrainConfig",
    "SupervisedConfig",
    "classify",
    "load_encoder",
    "low_frequency_crop",
    "make_plan",
    "pretrain",
    "train_classifier",
]

_MODULES = {
    "ClassifyConfig": "mae_et.config.schema",
    "MaskedAutoencoder": "mae_et.models.mae",
    "PretrainConfig": "mae_et.config.schema",
    "SupervisedConfig": "mae_et.config.supervised",
    "low_frequency_crop": "mae_et.lowfreq",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "mae_et.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

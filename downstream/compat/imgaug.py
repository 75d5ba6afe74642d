"""A stand-in for imgaug, which mmdet imports only for the augmentation of lane markings.

imgaug needs numba, a second opencv and an old numpy. Where it is installed it is used. Otherwise a module of its name lets mmdet
be imported, and using anything of it raises an error that names the package to install.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from mae_et.errors import UserError

MODULES = (
    "imgaug",
    "imgaug.augmenters",
    "imgaug.augmentables",
    "imgaug.augmentables.lines",
    "imgaug.augmentables.segmaps",
)


def stand_in_for_imgaug() -> bool:
    """Makes `import imgaug` work where it is not installed; returns whether the stand-in is used."""
    if isinstance(sys.modules.get("imgaug"), _Absent):
        return True
    if "imgaug" in sys.modules or importlib.util.find_spec("imgaug") is not None:
        return False
    for name in MODULES:
        sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, _Loader(), is_package=True))
    return True


class _Absent(ModuleType):
    def __getattr__(self, name: str) -> ModuleType | type:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in sys.modules:
            return sys.modules[f"{self.__name__}.{name}"]

        def refuse(self: object, *args: object, **kwargs: object) -> NoReturn:
            raise UserError(f"imgaug.{name} is needed, which only lane detection uses. Install it: pip install imaug")

        return type(name, (), {"__init__": refuse})


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name, __doc__)

    def exec_module(self, module: ModuleType) -> None:
        pass

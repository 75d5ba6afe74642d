"""Checks the installed packages first: which is missing, shadowed or of a wrong version, and the command that fixes it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mae_et.errors import UserError


@dataclass(frozen=True)
class Package:
    """A distribution, the module that it provides, and the versions [first, below) that work."""

    distribution: str
    module: str
    first: str = "0"
    below: str = "9999"

    @property
    def install(self) -> str:
        """Returns the commands that install it. Its own dependencies would bring a second opencv and an old numpy."""
        upper = "" if self.below == "9999" else f",<{self.below}"
        return f"make env-mm, or without a checkout: pip install --no-deps '{self.distribution}>={self.first}{upper}'"


COMMON = (
    Package("onedl-mmengine", "mmengine", "0.10.12", "0.11"),
    Package("onedl-mmcv", "mmcv", "2.3.6", "2.4"),
    Package("opencv-python-headless", "cv2", "4.6"),
)
BY_SCOPE: Mapping[str, tuple[Package, ...]] = {
    "mmdet": (
        Package("onedl-mmdetection", "mmdet", "3.5.1", "3.6"),
        Package("pycocotools", "pycocotools", "2.0.8"),
        Package("scipy", "scipy"),
        Package("shapely", "shapely"),
        Package("six", "six"),
        Package("terminaltables", "terminaltables"),
    ),
    "mmseg": (
        Package("onedl-mmsegmentation", "mmseg", "1.4.2", "1.5"),
        Package("prettytable", "prettytable"),
        Package("scipy", "scipy"),
        Package("ftfy", "ftfy"),
        Package("regex", "regex"),
        Package("wcwidth", "wcwidth"),
    ),
}
# Other distributions that write the same folder; the last one installed is imported. `mmseg` segments Chinese words.
RIVALS: Mapping[str, tuple[str, ...]] = {
    "mmengine": ("mmengine", "mmengine-lite"),
    "mmcv": ("mmcv", "mmcv-full", "mmcv-lite"),
    "mmdet": ("mmdet",),
    "mmseg": ("mmseg", "mmsegmentation"),
    "cv2": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
}
OPENCV_ALONE_IS_FINE = "cv2"


def check_packages(scope: str | None = None) -> None:
    """Checks that mmdet or mmseg can be used.

    Args:
        scope: "mmdet" or "mmseg", the `default_scope` of a config; None: the packages of both.
    Raises:
        UserError: naming each fault and the commands that fix it.
    """
    found = faults(scope, installed_versions(), locate, own_folder)
    if found:
        raise UserError(
            "packages for this task are missing or do not fit:\n" + "\n".join(f"  - {line}" for line in found)
        )


def faults(
    scope: str | None,
    versions: Mapping[str, str],
    locate: Callable[[str], Path | None],
    own_folder: Callable[[str], Path | None],
) -> list[str]:
    """Returns the faults, one line each with its fix.

    Args:
        scope: "mmdet" or "mmseg"; None: the packages of both.
        versions: normalised name of a distribution -> its installed version.
        locate: module -> the folder that an import would use.
        own_folder: distribution -> the folder that its modules were installed into.
    Raises:
        UserError: if the scope is unknown.
    """
    if scope is not None and scope not in BY_SCOPE:
        raise UserError(f"default_scope = {scope!r} must be one of {', '.join(BY_SCOPE)}")
    found = []
    for package in (*COMMON, *(BY_SCOPE[scope] if scope else ())):
        name, module, version = package.distribution, package.module, versions.get(package.distribution)
        rivals = [rival for rival in RIVALS.get(module, ()) if rival in versions]
        if module == OPENCV_ALONE_IS_FINE and version is None and len(rivals) == 1:
            continue
        if rivals:
            remove = " ".join([*rivals, name] if version else rivals)
            found.append(
                f"{' and '.join(rivals)} also provide{'s' if len(rivals) == 1 else ''} {module!r}, in place of {name}: "
                f"pip uninstall -y {remove}; then {package.install}"
            )
        elif version is None:
            found.append(f"{name} (import {module}) is missing: {package.install}")
        elif not _key(package.first) <= _key(version) < _key(package.below):
            found.append(
                f"{name} is {version}, but {package.first} or newer"
                f"{'' if package.below == '9999' else f' and below {package.below}'} is needed: {package.install}"
            )
        else:
            place, own = locate(module), own_folder(name)
            if place is None:
                found.append(f"{name} {version} is installed, but {module!r} is not found: {package.install}")
            elif own is not None and place != own:
                found.append(
                    f"{module!r} would be imported from {place}, not from {name} in {own}: rename that file or folder, "
                    "or run from another folder"
                )
    return found


def installed_versions() -> dict[str, str]:
    """Returns the versions of those distributions that are installed, of all that this module names."""
    packages = [package.distribution for group in (COMMON, *BY_SCOPE.values()) for package in group]
    versions = {}
    for name in {*packages, *(rival for rivals in RIVALS.values() for rival in rivals)}:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def locate(module: str) -> Path | None:
    """Returns the folder that holds a module or package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return Path(spec.origin).resolve().parent if spec.origin else None


def own_folder(distribution: str) -> Path | None:
    """Returns the folder that a distribution was installed into; None for an editable install, which may be anywhere."""
    found = importlib.metadata.distribution(distribution)
    if "__editable__" in " ".join(str(path) for path in found.files or ()):
        return None
    return Path(str(found.locate_file(""))).resolve()


def _key(version: str) -> tuple[int, ...]:
    """Compares releases by their numbers: 2.3.6.post1 counts as 2.3.6."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else (0,)

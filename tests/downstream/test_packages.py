"""What the check at start says about packages that are missing, shadowed or of the wrong version."""

from pathlib import Path

import pytest

from downstream.compat.packages import BY_SCOPE, COMMON, faults, installed_versions, locate, own_folder
from mae_et.errors import UserError

HERE = Path("site-packages")


def look(scope: str | None = "mmdet", places: dict[str, Path | None] | None = None, **changes: str | None) -> list[str]:
    versions: dict[str, str | None] = {
        package.distribution: package.first for package in (*COMMON, *BY_SCOPE["mmdet"], *BY_SCOPE["mmseg"])
    }
    versions.update({name.replace("_", "-"): version for name, version in changes.items()})
    present = {name: version for name, version in versions.items() if version is not None}
    return faults(scope, present, lambda module: (places or {}).get(module, HERE), lambda name: HERE)


def test_faults__none_where_all_is_in_order():
    assert look("mmdet") == []
    assert look("mmseg") == []
    assert look(None, onedl_mmdetection=None, onedl_mmsegmentation=None) == []
    assert len(look(None, onedl_mmcv=None)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"onedl_mmcv": None},
            ["onedl-mmcv (import mmcv) is missing", "make env-mm", "--no-deps 'onedl-mmcv>=2.3.6,<2.4'"],
        ),
        ({"onedl_mmdetection": "3.4.0"}, ["onedl-mmdetection is 3.4.0", "3.5.1 or newer and below 3.6", "make env-mm"]),
        ({"onedl_mmdetection": "3.10.0"}, ["onedl-mmdetection is 3.10.0"]),
        ({"mmcv_lite": "2.1.0"}, ["mmcv-lite also provides 'mmcv'", "pip uninstall -y mmcv-lite onedl-mmcv"]),
        ({"mmdet": "3.3.0", "onedl_mmdetection": None}, ["pip uninstall -y mmdet;"]),
        ({"opencv_python": "4.10"}, ["opencv-python also provides 'cv2'"]),
        ({"opencv_python": "4.10", "opencv_python_headless": None}, []),
    ],
)
def test_faults__are_named_with_their_fix(changes, message):
    found = look(**changes)
    assert len(found) == bool(message)
    assert [words for words in message if words not in found[0]] == []


def test_faults__only_of_the_scope():
    assert look("mmdet", onedl_mmsegmentation=None) == []
    assert len(look("mmseg", onedl_mmsegmentation=None, mmseg="1.3.0")) == 1  # the Chinese word segmenter


def test_faults__shadowed_by_a_folder():
    (found,) = look(places={"mmdet": Path("checkout")})
    assert "'mmdet' would be imported from checkout" in found
    (found,) = look(places={"mmcv": None})
    assert "'mmcv' is not found" in found


def test_faults__unknown_scope():
    with pytest.raises(UserError, match="mmpose"):
        look("mmpose")


def test_own_folder__is_where_imports_come_from():
    assert installed_versions()["onedl-mmengine"]
    assert own_folder("onedl-mmengine") == locate("mmengine")
    assert locate("no_such_module") is None

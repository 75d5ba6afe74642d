"""The stand-in for imgaug."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from downstream.compat.imgaug import MODULES, stand_in_for_imgaug
from mae_et.errors import UserError
from tests.conftest import REPOSITORY


def test_stand_in__imports_and_refuses_use(monkeypatch):
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert stand_in_for_imgaug()
    import imgaug.augmenters as iaa
    from imgaug.augmentables.lines import LineString

    for kind in (iaa.Sometimes, LineString):
        with pytest.raises(UserError, match="pip install imaug"):
            kind(0.5)


def test_stand_in__the_real_one_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "imgaug", ModuleType("imgaug"))
    assert not stand_in_for_imgaug()


def test_stand_in__downstream_leaves_an_installed_one_alone(tmp_path):
    (tmp_path / "imgaug").mkdir()
    (tmp_path / "imgaug" / "__init__.py").write_text("real = True")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import downstream, imgaug; assert imgaug.real is True"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

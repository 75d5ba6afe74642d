"""What the tests of the plug-ins share. Those marked `mm` skip, with the reason, where the mm packages are not in order."""

from __future__ import annotations

import pytest

from downstream.compat.packages import check_packages
from mae_et.errors import UserError


def _reason() -> str:
    for scope in ("mmdet", "mmseg"):
        try:
            check_packages(scope)
        except UserError as error:
            return " ".join(str(error).split())
    return ""


needs_mm = pytest.mark.skipif(bool(_reason()), reason=_reason() or "mm packages are in order")

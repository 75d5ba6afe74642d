"""Settings of the whole process that must be made before torch is imported. For programs only, never for the library."""

from __future__ import annotations

import os
import pwd
import tempfile


def prepare_process() -> None:
    """Sets environment variables that torch and its libraries read when they are imported.

    OMP_WAIT_POLICY: idle threads sleep, because spinning ones take the cores from the loader processes.
    USER and HOME: in a container, a user id without a passwd entry has neither, and torch needs both.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", f"uid{os.getuid()}")
        os.environ.setdefault("HOME", tempfile.gettempdir())

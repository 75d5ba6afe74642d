"""The cache folder: listings, indexes and copies of data sets, each made by one process while the others wait.

It is $MAE_ET_CACHE, otherwise ~/.cache/mae_et. Between runs it may be removed. Lock files stay: a process that waits on a
removed file would hold a lock that nobody else sees.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

CACHE_VARIABLE = "MAE_ET_CACHE"
_SECONDS_BEFORE_MESSAGE = 2.0


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/mae_et").expanduser()


def cached_path(stem: str, identity: str, suffix: str) -> Path:
    """Returns the path of a file in the cache folder. Its name has a digest of what identifies the content."""
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    return cache_folder() / f"{stem[:100]}-{digest}{suffix}"


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Iterator[bool]:
    """Holds the lock of a file in the cache folder.

    Args:
        path: of the file; the lock is beside it.
        doing: what another process does that has the lock, for the log.
    Yields:
        False where the file system has no locks or cannot be written: work may then be repeated, but stays right.
    """
    lock = FileLock(path.with_suffix(".lock"))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=_SECONDS_BEFORE_MESSAGE)
            except Timeout:
                log.info("waiting for another process that %s", doing)
                lock.acquire()
            stack.callback(lock.release)
        yield lock.is_locked


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Opens a binary file that takes the place of `path` when all of it is written, and is removed otherwise."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def warn_not_kept(what: str, error: OSError) -> None:
    log.warning(
        "%s cannot be kept in %s (%s), so the next start makes it again; set %s for another folder",
        what, cache_folder(), error.strerror or error, CACHE_VARIABLE,
    )  # fmt: skip

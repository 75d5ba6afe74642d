"""Atomic writes: a file is complete or absent, and a failed write is explained."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from mae_et.errors import CheckpointError

# torch's writer raises RuntimeError for I/O errors, without an error number. Other RuntimeErrors are not I/O errors.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|basic_ios|iostream")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}


@contextlib.contextmanager
def atomic_path(path: Path, retry: str = "run the command again") -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` after the block, once it is on disk.

    The file gets the mode of the umask. Errors in the block that are not write errors pass through unchanged.

    Args:
        path: of the file.
        retry: what the user does after the cause is fixed, for the message.
    Raises:
        CheckpointError: if the file cannot be written. An earlier file at `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.writing")
    created = False
    try:
        # Created here, so that a folder that cannot be written is found before the content is computed.
        with open(temporary, "wb") as file:
            mode = os.stat(file.fileno()).st_mode
        created = True
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if os.stat(temporary).st_mode != mode:  # the block replaced the file
            os.chmod(temporary, mode)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        failure = write_error(path, error, retry)
        if failure is None:
            raise
        raise failure from error
    finally:
        if created:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_error(path: Path, error: OSError | RuntimeError, retry: str) -> CheckpointError | None:
    """Returns the message for an error of writing `path`; None if the error has another cause.

    Args:
        path: the file.
        error: raised while it was written.
        retry: as for `atomic_path`.
    """
    if isinstance(error, OSError):
        own = {str(path), str(path.parent), str(path.with_name(f".{path.name}.writing"))}
        named = {str(name) for name in (error.filename, error.filename2) if name is not None}
        if not (named & own if named else error.errno in _DISK_ERRORS):
            return None
    elif not _TORCH_WRITER.search(str(error)):
        return None
    folder = path.parent
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOSPC or (code is None and _free_mib(folder) < 1):
        cause, fix = f"the disk is full ({_free_mib(folder):.0f} MiB are free)", "free space"
    elif code == errno.EDQUOT:
        cause, fix = "the disk quota is used up", "free space or raise the quota"
    elif code == errno.EROFS:
        cause, fix = f"{folder} is on a read-only file system", "choose a folder that can be written"
    elif code in (errno.EACCES, errno.EPERM):
        cause, fix = f"no permission to write in {folder}", "change its permissions or choose another folder"
    elif code in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
        cause, fix = f"{folder} is not a folder", "create it or choose another folder"
    elif code in (errno.EISDIR, errno.ENOTEMPTY):
        cause, fix = "a folder has this name", "remove the folder or choose another name"
    else:
        cause = f"{first_line(error)} ({_free_mib(folder):.0f} MiB are free)"
        fix = "check the disk or choose another folder"
    return CheckpointError(
        f"cannot write {path}: {cause}. An earlier file of this name is unchanged. To continue, {fix}, then {retry}"
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its class if it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _free_mib(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free / 2**20
    except OSError:
        return 0.0

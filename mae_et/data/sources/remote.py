"""Reads remote files through fsspec: ranges of many files at once, with a limited number of retries."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)  # before each further try
_INSTALL = "pip install 'mae_et[remote]'"
_STALLED_SECONDS = 30.0  # without a byte

T = TypeVar("T")


def is_remote(spec: str) -> bool:
    """Tells whether a data set is named by a URL, such as s3://bucket/train-{000000..000099}.tar."""
    return "://" in spec.partition("{")[0]


class Remote:
    """The file system of a URL. It is opened again in each process, because its connections do not survive a fork.

    Args:
        url: of a file, or a pattern.
    Raises:
        DataError: if fsspec does not know the protocol, or a package for it is missing.
    """

    def __init__(self, url: str) -> None:
        self.protocol = url.partition("://")[0].lower()
        self._opened: tuple[int, Any] | None = None
        self._filesystem()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _filesystem(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open(self.protocol))
        return self._opened[1]

    def glob(self, pattern: str) -> list[str]:
        """Returns the URLs that a pattern with `*` names, sorted."""
        files = self._filesystem()
        found = self._try(lambda: files.glob(pattern), pattern)
        return sorted(files.unstrip_protocol(path) for path in found)

    def read(self, url: str) -> bytes | None:
        """Returns the content of a file; None if there is none."""
        try:
            return self._try(lambda: self._filesystem().cat_file(url), url, may_be_missing=True)
        except FileNotFoundError:
            return None

    def download(self, url: str, path: Path) -> None:
        self._try(lambda: self._filesystem().get_file(url, str(path)), url)

    def sizes(self, urls: Sequence[str]) -> list[int]:
        """Returns the sizes in bytes of files that exist."""

        def sizes() -> list[int]:
            try:
                return self._filesystem().sizes(list(urls))
            except FileNotFoundError as error:  # fsspec's HTTP raises it for any cause
                raise OSError(f"no size of {error}") from error

        return self._try(sizes, f"{urls[0]}, ...")

    def ranges(self, urls: Sequence[str], starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Returns bytes `start` to `end` of each file; less only at the end of a file.

        Raises:
            DataError: if some cannot be read after all tries.
        """
        contents: dict[int, bytes] = {}
        for seconds in (*RETRY_SECONDS, None):
            waiting = [i for i in range(len(urls)) if i not in contents]
            found = self._filesystem().cat_ranges(
                [urls[i] for i in waiting], [starts[i] for i in waiting], [ends[i] for i in waiting], on_error="return"
            )
            failed: tuple[str, Exception] | None = None
            for i, content in zip(waiting, found, strict=True):
                if isinstance(content, bytes) and len(content) <= ends[i] - starts[i]:
                    contents[i] = content
                elif isinstance(content, bytes):
                    raise DataError(
                        f"{printable(urls[i])}: the server answers with the whole file instead of a range, so images cannot "
                        "be read one by one; use a server with range requests, or download the shards"
                    )
                else:
                    failed = failed or (urls[i], content)
            if failed is None:
                return [contents[i] for i in range(len(urls))]
            self._wait(*failed, seconds)
        raise AssertionError("_wait raises after the last try")

    def _try(self, action: Callable[[], T], url: str, may_be_missing: bool = False) -> T:
        for seconds in (*RETRY_SECONDS, None):
            try:
                return action()
            except Exception as error:  # each protocol has its own
                if may_be_missing and isinstance(error, FileNotFoundError):
                    raise
                self._wait(url, error, seconds)
        raise AssertionError("_wait raises after the last try")

    def _wait(self, url: str, error: Exception, seconds: float | None) -> None:
        """Waits before the next try, or raises DataError if there is none or another one would fail as well."""
        shown, text = printable(url), printable(str(error) or type(error).__name__)[:300]
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{shown} does not exist; correct the address, or upload the file") from error
        status = getattr(error, "status", None)  # of an HTTP answer
        if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ == "NoCredentialsError":
            raise DataError(f"{shown} must not be read ({text}); check the credentials and the rights") from error
        if isinstance(error, (TypeError, AttributeError)):  # a fault of a program, not of a network
            raise error
        if seconds is None:
            num_tries, total = len(RETRY_SECONDS) + 1, sum(RETRY_SECONDS)
            raise DataError(
                f"{shown} cannot be read after {num_tries} tries in {total:.0f} s ({text}); check the network and the server, "
                "then resume the run"
            ) from error
        log.warning("%s: %s; next try in %.0f s", shown, text, seconds)
        time.sleep(seconds)


def _open(protocol: str) -> Any:
    try:
        import fsspec

        options = {}
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALLED_SECONDS, sock_read=_STALLED_SECONDS)
            options = {"client_kwargs": {"timeout": timeout}}
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise DataError(f"{protocol}:// needs a package that is missing ({error}): {_INSTALL}") from error
    except ValueError as error:
        raise DataError(
            f"{protocol}:// is not a protocol of fsspec ({error}); use http, https or s3, or download the files"
        ) from error

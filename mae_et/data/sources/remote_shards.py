"""Images in tar shards on a server, read in any order by range requests, and kept on the local disk within a limit."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_et.data.decoding import Decoding
from mae_et.data.sources.cache import CACHE_VARIABLE, cache_folder, locked, replacing
from mae_et.data.sources.listing import parse_class_names
from mae_et.data.sources.remote import Remote
from mae_et.data.sources.remote_cache import KeptImages, kept_path, reserve, set_folder
from mae_et.data.sources.shard_cache import prepared_index_path
from mae_et.data.sources.shard_index import HEAD_BYTES, ShardIndex, head_digest
from mae_et.data.sources.shard_names import expand_names, is_shard_name, too_many
from mae_et.data.sources.shards import ShardSource
from mae_et.data.sources.tar_index import TarIndex, index_tar
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

_MAX_GAP = 64 << 10  # bytes between images that are read in one request


@dataclass(frozen=True)
class _RemoteShard:
    path: Path  # its name; the folder is not used
    url: str
    size: int
    head: int


class RemoteShardSource(ShardSource):
    """Images in tar shards on a server.

    The index that `mae-et prepare` wrote beside the shards is read first. Without it each shard is downloaded once, to find
    its images.

    Args:
        pattern: URL of one shard, or a brace or glob pattern of URLs.
        decoding: how the images are decoded.
        max_shards: limit for the number of shards.
        cache_bytes: limit for what is kept on the local disk, of all remote data sets together.
    Raises:
        DataError: if shards are missing, damaged or compressed, cannot be read, or have no images. Also raised by `read` and
            `read_ahead`, because an image that cannot be reached is not a bad image.
    """

    reads_ahead_always = True

    def __init__(self, pattern: str, decoding: Decoding, max_shards: int, cache_bytes: int) -> None:
        self._remote = Remote(pattern)
        shards = self._find(pattern, max_shards)
        shown = printable(pattern)
        identity = hashlib.sha256(repr([(shard.url, shard.size, shard.head) for shard in shards]).encode()).hexdigest()
        folder = set_folder(shards[0].path.stem, identity)
        self._downloaded: list[int] = []  # shards, to index them
        with locked(folder, f"opens {shown}"):
            num_kept = reserve(folder, shown, [shard.size for shard in shards], cache_bytes)
            index = self._open_index(shown, shards, folder, num_kept)
            names_url = shards[0].url.rpartition("/")[0] + "/classes.txt"
            content = self._remote.read(names_url)
            class_names = None if content is None else parse_class_names(content, printable(names_url))
            self._use(pattern, decoding, [shard.url for shard in shards], shards, index, class_names, names_url)
            self._kept = KeptImages(folder, num_kept, len(self))
            for number in self._downloaded:
                self._kept.mark(range(self._starts[number], self._starts[number + 1]))
        self._ahead: dict[int, bytes] = {}

    def read(self, index: int) -> bytes:
        if (content := self._ahead.get(index)) is None:
            content = self._get([index])[index]
        return content

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Reads images in as few requests as possible, all at once; `read` returns them from memory."""
        self._ahead = self._get(indices)

    def _get(self, indices: Sequence[int]) -> dict[int, bytes]:
        contents: dict[int, bytes] = {}
        missing: list[tuple[int, int, int, int]] = []  # shard, offset, size, index
        for index in sorted(set(indices)):
            number, row = self._place(index)
            offset, size = int(self._index.offsets[row]), int(self._index.sizes[row])
            if (content := self._kept.get(index, number, offset, size)) is not None:
                contents[index] = content
            else:
                missing.append((number, offset, size, index))
        runs: list[list[tuple[int, int, int, int]]] = []
        for image in sorted(missing):
            number, offset, size, _ = runs[-1][-1] if runs else (-1, 0, 0, 0)
            if image[0] == number and image[1] - (offset + size) <= _MAX_GAP:
                runs[-1].append(image)
            else:
                runs.append([image])
        starts, ends = [run[0][1] for run in runs], [run[-1][1] + run[-1][2] for run in runs]
        read = self._remote.ranges([self._paths[run[0][0]] for run in runs], starts, ends) if runs else []
        for run, start, block in zip(runs, starts, read, strict=True):
            for number, offset, size, index in run:
                content = block[offset - start :][:size]
                if len(content) < size:
                    raise DataError(
                        f"{self.name(index)}: {len(content)} of {size} bytes came: the shard changed after it was opened; "
                        "start again"
                    )
                self._kept.put(index, number, offset, content)
                contents[index] = content
        return contents

    def _find(self, pattern: str, max_shards: int) -> list[_RemoteShard]:
        """Returns the shards that a pattern names, with their sizes and first bytes."""
        urls: list[str] = []
        for name in expand_names(pattern, max_shards):
            urls += self._remote.glob(name) if set(name) & set("*[") else [name]
            if len(urls) > max_shards:
                raise too_many(printable(pattern), len(urls), max_shards)
        urls = [url for url in urls if is_shard_name(url)]
        if not urls:
            raise DataError(
                f"{printable(pattern)} names no tar shard; on a server only tar shards are read, for example "
                "s3://bucket/train-{000000..000099}.tar"
            )
        heads = self._remote.ranges(urls, [0] * len(urls), [HEAD_BYTES] * len(urls))
        sizes = self._remote.sizes(urls)
        if packed := [url for url, head in zip(urls, heads, strict=True) if head[:2] == b"\x1f\x8b"]:
            raise DataError(
                f"{printable(packed[0])} is compressed, so its images cannot be read one by one; upload the shards "
                "decompressed (gunzip)"
            )
        return [
            _RemoteShard(Path(url.rpartition("/")[2]), url, size, head_digest(head))
            for url, size, head in zip(urls, sizes, heads, strict=True)
        ]

    def _open_index(self, shown: str, shards: Sequence[_RemoteShard], folder: Path, num_kept: int) -> ShardIndex:
        path = folder / "index.safetensors"
        with contextlib.suppress(OSError, ValueError):
            index = ShardIndex.mapped(path)
            index.check_fits(shards)
            return index
        index = self._prepared(shards, path) or self._made(shown, shards, folder, num_kept)
        with contextlib.suppress(OSError):
            with replacing(path) as file:
                index.write(file)
            return ShardIndex.mapped(path)
        return index

    def _prepared(self, shards: Sequence[_RemoteShard], path: Path) -> ShardIndex | None:
        """Returns the index beside the shards, or None if there is none that fits."""
        names = {prepared_index_path(shard.path) for shard in shards}
        name = names.pop()
        if names or name is None:
            return None
        url = f"{shards[0].url.rpartition('/')[0]}/{name.name}"
        if (content := self._remote.read(url)) is None:
            return None
        try:
            with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
                file.write(content)
                file.flush()
                index = ShardIndex.mapped(Path(file.name))  # stays mapped when the file is removed
            index.check_fits(shards)
            return index
        except ValueError as error:
            log.warning("%s is not used, the shards are downloaded to index them: %s", printable(url), error)
            return None

    def _made(self, shown: str, shards: Sequence[_RemoteShard], folder: Path, num_kept: int) -> ShardIndex:
        log.warning(
            "%s: there is no index beside the shards, so all of them (%.3g GB) are downloaded once to find their images; "
            "shards that mae-et prepare writes have one",
            shown, sum(shard.size for shard in shards) / 1e9,
        )  # fmt: skip
        indexes: list[TarIndex] = []
        for number, shard in enumerate(shards):
            tar = folder / f"{number:06d}.partial"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._remote.download(shard.url, tar)
                indexes.append(index_tar(tar, shard.url))
                if number < num_kept:
                    tar.replace(kept_path(folder, number))
                    self._downloaded.append(number)
            except tarfile.TarError as error:
                raise DataError(f"{printable(shard.url)} is cut off or damaged ({error}); upload it again") from error
            except OSError as error:
                raise DataError(
                    f"{shown} has no index, and {cache_folder()} cannot take its shards ({error.strerror or error}); set "
                    f"{CACHE_VARIABLE} to a writable folder with room, or write the shards with mae-et prepare"
                ) from error
            finally:
                tar.unlink(missing_ok=True)
        return ShardIndex.of(shards, indexes)

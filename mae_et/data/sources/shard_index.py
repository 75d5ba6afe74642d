"""The index of many tar shards as flat arrays in one file, which all processes of a machine map."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mae_et.data.sources.listing import LeftOut, PackedNames, narrow
from mae_et.data.sources.tar_index import TarIndex
from mae_et.errors import printable
from mae_et.storage.array_file import map_arrays, write_arrays

HEAD_BYTES = 4096  # of a shard, that tell whether it is the one that was indexed
_VERSION = 1


class IndexedShard(Protocol):
    """What identifies a shard in an index."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int: ...

    @property
    def head(self) -> int: ...


class ShardIndex:
    """Where the images of shards lie. A row is an image of the file of the index, which may hold more shards than are used.

    Attributes:
        offsets: [rows] int64, of each image in its tar.
        sizes: [rows], bytes of each image.
        labels: [rows] int32, NO_LABEL where there is none.
        names: the members.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        if about.get("kind") != "shards" or about.get("version") != _VERSION:
            raise ValueError(f"it is a {about.get('kind')} file of version {about.get('version')}")
        self._arrays, self._about = arrays, about
        self.offsets, self.sizes, self.labels = arrays["offsets"], arrays["sizes"], arrays["labels"]
        self.names = PackedNames(arrays["names"], arrays["name_ends"])
        self._numbers = {name: number for number, name in enumerate(about["shards"])}

    @classmethod
    def of(cls, shards: Sequence[IndexedShard], indexes: Sequence[TarIndex]) -> ShardIndex:
        """Joins the indexes of shards."""
        lengths = np.concatenate([np.diff(index.name_ends, prepend=0) for index in indexes])
        arrays = {
            "offsets": np.concatenate([index.offsets for index in indexes]),
            "sizes": narrow(np.concatenate([index.sizes for index in indexes])),
            "labels": np.concatenate([index.labels for index in indexes]).astype(np.int32),
            "names": np.concatenate([index.names for index in indexes]),
            "name_ends": narrow(np.cumsum(lengths)),
            "starts": np.cumsum([0, *(len(index.sizes) for index in indexes)], dtype=np.int64),
            "shard_sizes": np.array([shard.size for shard in shards], np.int64),
            "shard_heads": np.array([shard.head for shard in shards], np.uint32),
            "tar_sizes": np.array([index.tar_size for index in indexes], np.int64),
            "num_dotted": np.array([index.num_dotted for index in indexes], np.int64),
        }
        # Shards of equal names in several folders are distinguished by their position, see `number`.
        about = {
            "kind": "shards",
            "version": _VERSION,
            "shards": [shard.path.name for shard in shards],
            "left_out": [index.left_out.to_list() for index in indexes],
        }
        return cls(arrays, about)

    @classmethod
    def mapped(cls, path: Path) -> ShardIndex:
        """Maps the file of an index.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is cut off, damaged or of another kind.
        """
        arrays, about = map_arrays(path)
        try:
            return cls(arrays, about)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error

    def write(self, file: BinaryIO) -> None:
        write_arrays(file, self._arrays, self._about)

    def number(self, shard: IndexedShard, position: int) -> int:
        """Returns the number of a shard in this index; raises ValueError if it is not the one that was indexed.

        Args:
            shard: with its present size and first bytes.
            position: among the shards that are used, where it is looked for first.
        """
        name, names = shard.path.name, self._about["shards"]
        number = position if position < len(names) and names[position] == name else self._numbers.get(name)
        if number is None:
            raise ValueError(f"it does not list {printable(name)}")
        if (shard.size, shard.head) != (self._arrays["shard_sizes"][number], self._arrays["shard_heads"][number]):
            raise ValueError(f"{printable(name)} is not the shard that it lists: its size or its first bytes differ")
        return number

    def check_fits(self, shards: Sequence[IndexedShard]) -> None:
        """Raises ValueError if one of the shards is not in the index, or changed."""
        for position, shard in enumerate(shards):
            self.number(shard, position)

    def rows(self, number: int) -> range:
        """Returns the rows of a shard."""
        return range(int(self._arrays["starts"][number]), int(self._arrays["starts"][number + 1]))

    def tar_size(self, number: int) -> int:
        """Returns the size of the tar, which for a compressed shard is its unpacked copy."""
        return int(self._arrays["tar_sizes"][number])

    def left_out(self, number: int) -> LeftOut:
        return LeftOut.from_list(self._about["left_out"][number])

    def num_dotted(self, number: int) -> int:
        return int(self._arrays["num_dotted"][number])


def head_digest(head: bytes) -> int:
    """Returns the CRC-32 of the first bytes of a shard."""
    return zlib.crc32(head[:HEAD_BYTES])

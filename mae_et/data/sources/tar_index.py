"""The index of one tar shard: where each image lies, its label, and what is left out."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import posixpath
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_et.data.decoding import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from mae_et.data.sources.listing import NO_LABEL, LeftOut, side_reason
from mae_et.errors import DataError, printable

MAX_LABEL = 10_000_000
_MAX_HEADER_BYTES = 4 << 20  # of one member, PAX records included
_MAX_LABEL_BYTES = 16 << 20  # of a .json member
_MAX_LINKS = 40  # from link to link, as in Linux

_Sample = dict[str, tarfile.TarInfo]  # by kind, e.g. "jpg", "cls", "seg.png"


@dataclass(frozen=True)
class TarIndex:
    """Flat arrays, one entry for each image of a shard. `names` is uint8, the member names one after the other."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray
    tar_size: int
    left_out: LeftOut
    num_dotted: int  # images named up to their last dot, which WebDataset would not find


def index_tar(path: Path, shown: Path | str | None = None) -> TarIndex:
    """Reads all headers of a plain tar, and those of further archives behind its end.

    A sample is what shares a member path up to the first dot of the base name, as in WebDataset. Where such a group has
    no image of its own but images with further dots (`2024.05.01_a.jpg`), each of these is a sample of its own, named
    up to its last dot. Links to members of the same shard are followed.

    Args:
        path: of the tar file.
        shown: its name in messages, where it is a copy of another file.
    Raises:
        tarfile.TarError: if it is cut off or damaged.
        DataError: if a label cannot be used.
    """
    left_out = LeftOut()
    images, labels, num_dotted = [], array("q"), 0
    with _HeaderFile(path) as file:
        samples = _samples(file, left_out)
        has_pictures = any(_kinds(sample, IMAGE_EXTENSIONS) for sample in samples)
        extensions = IMAGE_EXTENSIONS if has_pictures else ARRAY_EXTENSIONS
        for sample, is_dotted in _split_dotted(samples, extensions):
            found = _kinds(sample, extensions)
            plain = [kind for kind in found if "." not in kind]
            if not plain:
                for member in sample.values():
                    left_out.add_file(member.name)
                continue
            others = [sample[kind].name for kind in found if kind != plain[0]]
            if others:
                left_out.add("further images of a sample", others, is_loss=True)
            images.append(sample[plain[0]])
            labels.append(_read_label(file.fileno(), sample, shown or path))
            num_dotted += is_dotted
    names = [os.fsencode(image.name) for image in images]
    return TarIndex(
        offsets=np.array([image.offset_data for image in images], np.int64),
        sizes=np.array([image.size for image in images], np.int64),
        labels=np.array(labels, np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        tar_size=path.stat().st_size,
        left_out=left_out,
        num_dotted=num_dotted,
    )


class _HeaderFile(io.FileIO):
    """A tar file for reading headers. Limits what a damaged header can make tarfile read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.allowance = _MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise tarfile.ReadError(f"negative length {size} before byte {self.tell()}")
        # At the file's end a read counts as well: tarfile repeats some reads until it finds what it looks for.
        self.allowance -= max(size, 1)
        if self.allowance < 0:
            raise tarfile.ReadError(f"header of more than {_MAX_HEADER_BYTES} bytes before byte {self.tell()}")
        return super().read(size) or b""


def _members(file: _HeaderFile) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of all archives in a file: `cat a.tar b.tar` puts one behind the end mark of the other."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        tar = None
        while True:
            file.allowance = _MAX_HEADER_BYTES
            at = start if tar is None else tar.offset
            try:
                tar = tar or tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
                member = tar.next()
            except (tarfile.TarError, OSError):
                raise
            except Exception as error:  # damaged headers lead tarfile to any exception
                raise tarfile.ReadError(f"header at byte {at}: {type(error).__name__}: {str(error)[:100]}") from error
            if member is None:
                break
            if member.size < 0 or tar.offset <= at:
                raise tarfile.ReadError(f"member {printable(member.name)} has the size {member.size}")
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all headers in memory
            yield member
        start = _next_archive(file, tar.offset)


def _next_archive(file: _HeaderFile, end: int) -> int | None:
    """Returns where the next archive begins behind the end mark at byte `end`, or None if only zeros follow."""
    descriptor = file.fileno()
    # tarfile takes the first bad header for the end. The real end is marked by a block of zeros.
    if os.pread(descriptor, 512, end) != bytes(512):
        raise tarfile.ReadError(f"no end mark at byte {end}")
    position = end + 512
    while block := os.pread(descriptor, 1 << 20, position):
        if block.count(0) < len(block):
            filled = len(block) - len(block.lstrip(b"\0"))
            return position + filled // 512 * 512
        position += len(block)
    return None


def _samples(file: _HeaderFile, left_out: LeftOut) -> list[_Sample]:
    """Returns the members that are files, grouped by WebDataset's rule, in the order of their first members."""
    newest: dict[str, _Sample] = {}
    ordered: list[_Sample] = []
    members = list(_members(file))
    files = {posixpath.normpath(member.name): member for member in members if not member.isdir()}
    for link in members:
        if link.isdir():
            continue
        if reason := _side_reason(link.name):
            left_out.add(reason, [link.name], is_loss=False)
            continue
        member = _follow(link, files)
        if member is None:
            is_link = link.issym() or link.islnk()
            text = "links to what is not in the shard" if is_link else "members that are not regular files"
            left_out.add(text, [link.name], is_loss=True)
            continue
        if member.issparse():
            left_out.add("sparse members", [link.name], is_loss=True)
            continue
        key, kind = _key_and_kind(link.name)
        if key not in newest or kind in newest[key]:
            newest[key] = {}
            ordered.append(newest[key])
        newest[key][kind] = member
    return ordered


def _follow(link: tarfile.TarInfo, files: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """Returns the regular member that a member is or links to, under the name of the link; None if there is none."""
    target: tarfile.TarInfo | None = link
    for _ in range(_MAX_LINKS):
        if target is None or target.isreg():
            break
        if target.issym():  # relative to the folder of the link; a hard link is relative to the archive's root
            target = files.get(posixpath.normpath(posixpath.join(posixpath.dirname(target.name), target.linkname)))
        elif target.islnk():
            target = files.get(posixpath.normpath(target.linkname))
        else:
            return None
    if target is None or not target.isreg():
        return None
    if target is not link:
        target = copy.copy(target)
        target.name = link.name
    return target


def _side_reason(name: str) -> str | None:
    """Returns why a member is never read: as in a folder, and WebDataset's own meta members."""
    if re.match(r"__[^/]*__($|/)", name):
        return "WebDataset meta members"
    *folders, base = name.split("/")
    # A hidden folder hides nothing here: tars of one are made on purpose.
    return side_reason(base) or next(filter(None, (side_reason(part) for part in folders if part[:1] != ".")), None)


def _key_and_kind(name: str) -> tuple[str, str]:
    """Splits `a/b.seg.PNG` into (`a/b`, `seg.png`), as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


def _kinds(sample: _Sample, extensions: Sequence[str]) -> list[str]:
    """Returns the kinds of a sample's images."""
    return [kind for kind in sample if kind.rpartition(".")[2] in extensions]


def _split_dotted(samples: list[_Sample], extensions: Sequence[str]) -> Iterator[tuple[_Sample, bool]]:
    """Yields the samples, and in place of one whose images all have further dots, a sample for each of these."""
    for sample in samples:
        found = _kinds(sample, extensions)
        if not found or any("." not in kind for kind in found):
            yield sample, False
            continue
        parts: dict[str, _Sample] = {}
        rest: _Sample = {}
        stems = {kind.rpartition(".")[0] for kind in found}
        for kind, member in sample.items():
            stem, _, suffix = kind.rpartition(".")
            (parts.setdefault(stem, {}) if stem in stems else rest)[suffix if stem in stems else kind] = member
        for part in parts.values():
            # A label of the whole group holds for each image without its own.
            has_label = not {"cls", "json"}.isdisjoint(part)
            shared = {} if has_label else {kind: member for kind, member in rest.items() if kind in ("cls", "json")}
            yield {**part, **shared}, True


def _read_label(descriptor: int, sample: _Sample, shard: Path | str) -> int:
    """Returns the class index in `.cls` (text) or `.json` ("label" or "cls"), or NO_LABEL."""
    for kind in ("cls", "json"):
        if kind not in sample:
            continue
        member = sample[kind]
        where = printable(f"{shard}:{member.name}")
        if member.size > _MAX_LABEL_BYTES:
            raise DataError(
                f"{where} has {member.size} bytes, too many for a label; write the class index into a .cls member"
            )
        text = os.pread(descriptor, member.size, member.offset_data).decode("utf-8", "replace")
        values = [text] if kind == "cls" else _json_labels(text, where)
        for value in values:
            label = _class_index(value, where)
            if label != NO_LABEL:
                return label
    return NO_LABEL


def _json_labels(text: str, where: str) -> list[object]:
    try:
        content = json.loads(text)
    except ValueError:
        return []
    except RecursionError as error:
        raise DataError(
            f"{where} is JSON nested too deeply ({text[:20]!r}...); correct or remove that member"
        ) from error
    return [content.get("label"), content.get("cls")] if isinstance(content, dict) else []


def _class_index(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return NO_LABEL
    shown = printable(str(value).strip()[:40])
    try:
        number = int(value) if isinstance(value, (str, int)) else float(value)
    except ValueError:
        try:
            number = float(value)
        except ValueError:
            return NO_LABEL
    except OverflowError:
        number = math.inf
    if number > MAX_LABEL:
        raise DataError(f"label {shown} of {where} is above the limit of {MAX_LABEL}; labels are class indices from 0")
    return number if isinstance(number, int) and number >= 0 else NO_LABEL

"""Random damage to image folders, tar shards and class files.

For any damage, a source opens or raises a DataError, every image loads or raises a BadImageError, and no file is lost
silently: images + files that are left out = files that are there. MAE_ET_FUZZ_SECONDS limits the time of each test
(default 8). Inputs that once failed are kept as examples.
"""

import contextlib
import gzip
import io
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_et.data.decoding import IMAGE_EXTENSIONS, BadImageError
from mae_et.data.inspection import inspect_images
from mae_et.data.sources.spec import check_same_classes, open_source
from mae_et.errors import DataError

SECONDS = float(os.environ.get("MAE_ET_FUZZ_SECONDS", "8"))
LONGEST = 10.0  # seconds that one input may take
free = settings(
    max_examples=int(SECONDS * 25),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def picture(mode="RGB", kind="PNG"):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


CONTENTS = [
    picture(),
    picture("L"),
    picture("P", "GIF"),
    picture(kind="JPEG"),
    picture("I;16", "TIFF"),
    picture("1", "PPM"),
]
CONTENTS += [picture("F", "TIFF"), picture("I", "TIFF"), picture("RGBA", "TIFF"), picture(kind="WEBP"), b"", b"<html>"]
MEMBERS = [*CONTENTS, b"1", b"1e23", b'{"label": 2}', b"[" * 3000]
SUFFIXES = ["jpg", "PNG", "tif", "jfif", "heic", "txt", "cls", "json", "seg.png", "05.01.png", "png.bak", "tar", ""]
NAMES = [
    "a",
    "b.c",
    "@eaDir",
    ".hidden",
    "lost+found",
    "__MACOSX",
    "__meta__",
    "é",
    "\udcff",
    "\x1b[0m",
    "x\ny",
    "train",
    "masks",
]

names = st.tuples(
    st.lists(st.sampled_from(NAMES), max_size=2), st.sampled_from([*NAMES, "1", "2"]), st.sampled_from(SUFFIXES)
)
kinds = st.sampled_from(["file"] * 6 + ["fifo", "link"])
damage = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def within():
    """Returns a function that says whether time is left."""
    end = time.monotonic() + SECONDS
    return lambda: time.monotonic() < end


@contextlib.contextmanager
def folder():
    path = Path(tempfile.mkdtemp(prefix="fuzz"))
    start = time.monotonic()
    try:
        yield path
        assert time.monotonic() - start < LONGEST
    finally:
        shutil.rmtree(path, ignore_errors=True)


def path_of(name):
    folders, base, suffix = name
    return "/".join([*folders, f"{base}.{suffix}" if suffix else base])


def damaged(content, changes):
    content = bytearray(content)
    for place, value in changes:
        if content:
            content[place % len(content)] = value
    return bytes(content)


def use(source):
    """Reads everything: only the two errors of the project may come out, and texts that can be printed."""
    num_read = 0
    for index in range(len(source)):
        assert source.name(index).isprintable()
        with contextlib.suppress(BadImageError):
            assert source.load(index).mode == "RGB"
            num_read += 1
    findings = inspect_images(source, image_size=8)
    for rows in findings.to_dict().values():
        for row in rows:
            row["text"].encode()
    with contextlib.suppress(DataError):
        check_same_classes(source, source)
    return num_read


@free
@given(
    st.lists(
        st.tuples(names, st.sampled_from(CONTENTS), damage, st.sampled_from(["file"] * 6 + ["fifo", "link"])),
        max_size=8,
    )
)
@example([((["a"], "1", "jpg"), CONTENTS[0], [], "fifo")])
@example([((["lost+found"], "1", "jpg"), CONTENTS[0], [], "file"), (([], "@eaDir", ""), b"", [], "file")])
def test_folder__random_trees(within, files):
    if not within():
        return
    with folder() as root:
        num_files = 0
        for name, content, changes, kind in files:
            path = root / path_of(name)
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() or path.is_symlink():
                    continue
                if kind == "fifo":
                    os.mkfifo(path)
                elif kind == "link":
                    path.symlink_to("nowhere")
                else:
                    path.write_bytes(damaged(content, changes))
                num_files += 1
        try:
            source = open_source(str(root))
        except DataError as error:
            str(error).encode()
            return
        use(source)
        left_out_folders = [reason for reason, _ in source.left_out if reason.endswith("entries")]
        num_left_out = sum(group.count for _, group in source.left_out)
        if not left_out_folders:  # the files below such a folder are not counted one by one
            assert len(source) + num_left_out == num_files


@free
@given(
    members=st.lists(st.tuples(names, st.sampled_from(MEMBERS), damage), max_size=8),
    headers=st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 1 << 14)),
    copies=st.integers(1, 2),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    compress=st.booleans(),
    classes=st.one_of(st.none(), st.binary(max_size=12), st.just(b"a\nb\nc\n")),
)
@example([(([], "x", "png"), CONTENTS[0], [])], [(124, 0xFF)], None, 1, tarfile.USTAR_FORMAT, False, None)
@example([(([], "x", "png"), CONTENTS[0], [])], [], None, 2, tarfile.PAX_FORMAT, True, b"\xff")
def test_shards__random_damage(within, members, headers, cut, copies, format, compress, classes):
    if not within():
        return
    with folder() as root:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
            for name, content, changes in members:
                info = tarfile.TarInfo(path_of(name))
                content = damaged(content, changes)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        content = buffer.getvalue() * copies
        whole = not headers and cut is None
        content = damaged(content, headers)[: cut if cut is not None else len(content)]
        (root / "t.tar").write_bytes(gzip.compress(content, 1) if compress else content)
        if classes is not None:
            (root / "classes.txt").write_bytes(classes)
        try:
            source = open_source(str(root / "t.tar"))
        except DataError as error:
            str(error).encode()
            return
        use(source)
        if whole:
            paths = [path_of(name) for name, *_ in members] * copies
            num_images = sum(path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for path in paths)
            num_left_out = sum(
                group.count
                for reason, group in source.left_out
                if reason.endswith("entries") or reason in ("further images of a sample", "WebDataset meta members")
            )
            assert len(source) <= num_images <= len(source) + num_left_out


@free
@given(st.text(alphabet="abx01{},.*?[]-~/ \0é", max_size=30))
@example("{0..999999999}")
@example("\0/?")
@example("x{a,{0..9}{0..9}}.tar")
def test_open_source__random_words(within, words):
    if not within():
        return
    start = time.monotonic()
    with folder() as root, contextlib.suppress(DataError):
        open_source(f"{root}/{words}")
    assert time.monotonic() - start < LONGEST

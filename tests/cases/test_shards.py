"""Cases of tar shards: inputs that once gave a wrong result or a traceback, with the right result."""

import gzip
import io
import json
import logging
import os
import tarfile
import time
from pathlib import Path

import pytest

from mae_et.data.inspection import inspect_images
from mae_et.data.sources import shard_names
from mae_et.data.sources.spec import check_same_classes, open_source
from mae_et.errors import DataError
from tests.unit.shard_files import labelled, make_tar, png, value_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(source):
    return [value_of(source.load(index)) for index in range(len(source))]


def counts(source):
    return {reason: group.count for reason, group in source.left_out}


def add_links(path, links):
    with tarfile.open(path, "a") as tar:
        for kind, name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return str(path)


def test_case__T1_dots_in_names_are_read_each_time(tmp_path, caplog):
    numbers = range(5)
    members = [(f"d/2024.05.{n:02d}_a.jpg", png(n)) for n in numbers]
    members += [(f"d/2024.05.{n:02d}_a.cls", str(n).encode()) for n in numbers]
    path = make_tar(tmp_path / "t.tar", members)
    for _ in range(2):  # the second time from the cached index
        caplog.clear()
        source = open_source(path, need_labels=True)
        assert values(source) == list(numbers)
        assert list(source.labels) == list(numbers)
        assert "5 of 5 images have further dots in their names" in caplog.text
        assert inspect_images(source).to_dict()["warning"][0]["kind"] == "dotted_names"


def test_case__T1_parts_of_a_sample_are_counted_each_time(tmp_path, caplog):
    members = [("x.png", png(1)), ("x.seg.png", png(2)), ("x.depth.png", png(3)), ("x.cls", b"4"), ("y.jpg", png(5))]
    path = make_tar(tmp_path / "t.tar", [*members, ("y.png", png(6)), ("y.cls", b"1")])
    for _ in range(2):
        caplog.clear()
        source = open_source(path, need_labels=True)
        assert values(source) == [1, 5]
        assert list(source.labels) == [4, 1]
        assert counts(source) == {"further images of a sample": 3}
        assert "3 further images of a sample (e.g. x.seg.png)" in caplog.text
    assert "3 further images" in inspect_images(source).to_dict()["warning"][0]["text"]


def test_case__T1_a_label_of_the_group_holds_for_its_images(tmp_path):
    members = [("x.left.png", png(1)), ("x.right.png", png(2)), ("x.cls", b"7"), ("x.right.cls", b"3")]
    source = open_source(make_tar(tmp_path / "t.tar", members), need_labels=True)
    assert values(source) == [1, 2]
    assert list(source.labels) == [7, 3]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_case__T2_archives_behind_each_other(tmp_path, suffix):
    parts = []
    for number in range(3):
        part = make_tar(
            tmp_path / f"p{number}.{suffix}", labelled(range(number * 4, number * 4 + 4)), f"w:{suffix[4:]}"
        )
        parts.append(Path(part).read_bytes())
    (tmp_path / f"all.{suffix}").write_bytes(b"".join(parts))
    source = open_source(str(tmp_path / f"all.{suffix}"), need_labels=True)
    assert values(source) == list(range(12))
    assert list(source.labels) == [n % 3 for n in range(12)]


def test_case__T2_what_is_no_archive_behind_the_end_is_refused(tmp_path):
    content = Path(make_tar(tmp_path / "p.tar", labelled(range(2)))).read_bytes()
    (tmp_path / "t.tar").write_bytes(content + b"not a tar" * 100)
    with pytest.raises(DataError, match=r"t\.tar is cut off or damaged"):
        open_source(str(tmp_path / "t.tar"))
    (tmp_path / "u.tar").write_bytes(content + bytes(5000))
    assert len(open_source(str(tmp_path / "u.tar"))) == 2


def test_case__T3_links_are_read_or_counted(tmp_path):
    path = make_tar(
        tmp_path / "t.tar", [("a/1.png", png(1)), ("a/1.cls", b"5"), ("b/2.png", png(2)), ("b/2.cls", b"6")]
    )
    add_links(
        path,
        [
            (tarfile.LNKTYPE, "c/3.png", "a/1.png"),  # relative to the root of the archive
            (tarfile.SYMTYPE, "c/3.cls", "../a/1.cls"),  # relative to the folder of the link
            (tarfile.SYMTYPE, "c/4.png", "3.png"),
            (tarfile.SYMTYPE, "c/5.png", "/etc/passwd"),
            (tarfile.SYMTYPE, "c/6.png", "6.png"),  # to itself
            (tarfile.LNKTYPE, "c/7.png", "gone.png"),
            (tarfile.FIFOTYPE, "c/8.png", ""),
        ],
    )
    for _ in range(2):
        source = open_source(path)
        assert values(source) == [1, 2, 1, 1]
        assert [source.key(i).rpartition(":")[2] for i in range(4)] == ["a/1.png", "b/2.png", "c/3.png", "c/4.png"]
        assert counts(source) == {"links to what is not in the shard": 3, "members that are not regular files": 1}


def test_case__P6_side_folders_in_shards(tmp_path):
    members = [*labelled([1]), ("@eaDir/s0001.png", png(2)), ("$RECYCLE.BIN/x.png", png(3)), (".thumb.png", png(4))]
    source = open_source(make_tar(tmp_path / "t.tar", [*members, ("a.heic", b"x"), ("notes.txt", b"x")]))
    assert values(source) == [1]
    assert counts(source) == {
        "@eaDir entries": 1, "$RECYCLE.BIN entries": 1, "hidden entries": 1, ".heic files": 1, ".txt files": 1,
    }  # fmt: skip


def test_case__T4_numbers_against_names_are_refused(tmp_path):
    train = open_source(make_tar(tmp_path / "t.tar", labelled(range(6))), need_labels=True)
    for name in ("zebra", "ant", "mouse"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.png").write_bytes(png(9))
    val = open_source(str(tmp_path / "val"), need_labels=True)
    for pair in ((train, val), (val, train)):
        with pytest.raises(DataError, match=r"number 0 is 'ant': add a classes\.txt .* ant, mouse, zebra"):
            check_same_classes(*pair)
        assert "classes.txt" in inspect_images(*pair).to_dict()["error"][0]["text"]
    (tmp_path / "classes.txt").write_text("ant\nmouse\nzebra\n")
    check_same_classes(open_source(str(tmp_path / "t.tar")), val)


# ---- hostile shards ----


def raw_header(size=b"00000000002\0", name=b"x.png", kind=b"0"):
    """Returns a tar header with a right checksum and any size field."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108], header[124 : 124 + len(size)] = b"0000644\0", size
    header[136:148], header[156:157], header[257:265] = b"00000000000\0", kind, b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def open_within(path, seconds=20.0):
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        open_source(str(path))
    assert time.monotonic() - start < seconds
    return str(caught.value)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (b"\xff" * 12, b"0"),  # -1
        (b"\xff" * 10 + b"\xfe\0", b"0"),  # -512: the next header would be this one
        (b"\xff" * 10 + b"\xfe\0", b"x"),
        (b"\xff" * 10 + b"\xfe\0", b"L"),
        (b"\x80" + b"\0" * 4 + b"\xff" * 7, b"0"),  # 2^56 - 1
        (b"\x80" + b"\0" * 4 + b"\xff" * 7, b"x"),
        (b"\x80" + b"\0" * 4 + b"\xff" * 7, b"L"),
    ],
)
def test_case__F5_sizes_of_members(tmp_path, size, kind):
    good = Path(make_tar(tmp_path / "g.tar", labelled([1]))).read_bytes()[:2048]
    (tmp_path / "t.tar").write_bytes(good + raw_header(size, kind=kind) + bytes(10240))
    message = open_within(tmp_path / "t.tar")
    assert str(tmp_path / "t.tar") in message
    assert "download or copy it again" in message


@pytest.mark.parametrize(
    "pattern",
    ["x{0..999999999}.tar", "x" + "{0..9}" * 12 + ".tar", "x{a,{0..9}{0..9}" + "{0..9}" * 10 + "}.tar", "{a..z}" * 9 + ".tar",
     "x{0..9999}{0..9999}.tar", "x{0..999999999..2}.tar", "x{-999999999..0}.tar", "x" + "{a,b}" * 40 + ".tar"],
)  # fmt: skip
def test_case__F5_brace_bombs(tmp_path, pattern):
    message = open_within(tmp_path / pattern, seconds=5)
    assert "above the limit of 100000; correct the pattern or raise data.max_shards" in message


@pytest.mark.parametrize("pattern", ["x" + "{" * 5000 + "}" * 5000 + ".tar", "x" + "{a," * 5000 + "}" * 5000 + ".tar"])
def test_case__F5_deep_braces(tmp_path, pattern):
    assert "is not a valid brace pattern" in open_within(tmp_path / pattern)


@pytest.mark.parametrize(
    "pattern", ["a{0..9}b", "{a..e}{3..1}", "x{a,b{0..3},c{x,y}}", "{0..10..3}", "{x}", "{a..e..2},{,b}"]
)
def test_num_names__equals_the_library(pattern):
    import braceexpand

    assert shard_names._num_names(pattern) == len(list(braceexpand.braceexpand(pattern, escape=False)))


def test_case__F5_number_of_shards_is_a_setting(tmp_path):
    for number in range(4):
        make_tar(tmp_path / f"t{number}.tar", labelled([number]))
    assert len(open_source(str(tmp_path / "t{0..3}.tar"), max_shards=4)) == 4
    for pattern in ("t{0..3}.tar", "t*.tar"):
        with pytest.raises(DataError, match=r"names 4 shards, above the limit of 3.*data\.max_shards"):
            open_source(str(tmp_path / pattern), max_shards=3)


def test_case__F5_gzip_bomb(tmp_path, cache):
    with gzip.open(tmp_path / "t.tar.gz", "wb") as file:
        for _ in range(80):
            file.write(bytes(1 << 20))
    message = open_within(tmp_path / "t.tar.gz")
    assert "unpacks to more than 67 MB" in message
    assert "above the limit of 30 times its size; check the file, or raise data.max_unpack_ratio" in message
    assert {file.suffix for file in cache.iterdir()} == {".lock"}
    with pytest.raises(DataError, match="has no images"):
        open_source(str(tmp_path / "t.tar.gz"), max_unpack_ratio=2000)


@pytest.mark.parametrize(
    "text", [b"1000000000000", b"100000000000000000000000", b"1e23", b"1e999", b"9" * 6000, b"10000001"]
)
@pytest.mark.parametrize("kind", ["cls", "json"])
def test_case__F6_labels_out_of_range(tmp_path, text, kind):
    content = text if kind == "cls" else b'{"label": %s}' % text
    path = make_tar(tmp_path / "t.tar", [*labelled([1]), ("bad.png", png(2)), (f"bad.{kind}", content)])
    if len(text) > 4300 and kind == "json":  # more digits than Python's reader of JSON takes: no label
        assert open_source(path).labels is None
        return
    message = open_within(path)
    assert f"t.tar:bad.{kind} is above the limit of 10000000" in message
    assert text.decode()[:4].rstrip(".") in message or "inf" in message or "e+" in message


@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_case__F6_deep_json(tmp_path, bracket):
    text = (bracket * 200_000).encode()
    path = make_tar(tmp_path / "t.tar", [("x.png", png(2)), ("x.json", text)])
    assert "t.tar:x.json is JSON nested too deeply" in open_within(path)


def test_case__F6_sparse_sizes(tmp_path):
    for number, headers in enumerate(
        [
            {"GNU.sparse.size": str(10**12), "GNU.sparse.numblocks": "0"},
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)},
            {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12)},
        ]
    ):
        path = tmp_path / f"t{number}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in (
                ("a.png", png(1)),
                ("x.png", b"0\n".ljust(512, b"\0")),
                ("x.cls", b"0\n".ljust(512, b"\0")),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if name[0] == "x":
                    info.pax_headers = headers
                tar.addfile(info, io.BytesIO(content))
        source = open_source(str(path))
        assert values(source) == [1]
        assert counts(source) == {"sparse members": 2}


def test_case__F5_header_of_megabytes(tmp_path):
    good = Path(make_tar(tmp_path / "g.tar", labelled([1]))).read_bytes()[:2048]
    (tmp_path / "t.tar").write_bytes(
        good + raw_header(b"30000000\0", kind=b"L") + b"a" * (8 << 20) + good + bytes(10240)
    )
    assert "header of more than 4194304 bytes" in open_within(tmp_path / "t.tar")


def test_case__F6_sparse_map_without_end(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}
        info.size = 512
        tar.addfile(info, io.BytesIO(b"99999999\n" + b"1" * 503))
    os.truncate(path, os.path.getsize(path) // 512 * 512 - 9216)
    assert "cut off or damaged" in open_within(path)


def test_case__F6_class_names_that_are_not_utf8(tmp_path):
    path = make_tar(tmp_path / "t.tar", labelled(range(3)))
    (tmp_path / "classes.txt").write_bytes(b"cat\ncaf\xe9\ndog\n")
    assert "classes.txt is not UTF-8: byte 0xe9 at position 7; save the file as UTF-8" in open_within(path)
    (tmp_path / "classes.txt").write_bytes("\ufeffcat\r\ncafé\r\ndog\r\n".encode())
    assert open_source(path).class_names == ["cat", "café", "dog"]
    (tmp_path / "classes.txt").write_bytes(b"cat\n\ndog\nbird\n")
    assert "has an empty line 2" in open_within(path)


def test_case__F9_member_names_are_shown_escaped(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        source = open_source(make_tar(tmp_path / "t.tar", [("\x1b[31mx\n.png", png(1)), ("\x1b[0m.heic", b"")]))
    assert source.name(0) == f"{tmp_path}/t.tar:\\x1b[31mx\\n.png"
    assert source.key(0) == f"{tmp_path}/t.tar:\x1b[31mx\n.png"
    assert "\x1b" not in caplog.text
    assert "\\x1b[0m.heic" in caplog.text


def test_case__F14_fifo_in_place_of_a_shard(tmp_path):
    os.mkfifo(tmp_path / "t-0.tar")
    assert "matches no tar shard" in open_within(tmp_path / "t-*.tar")
    assert "t-0.tar" in open_within(tmp_path / "t-0.tar")


def test_index__left_out_survives_json(tmp_path):
    from mae_et.data.sources.listing import LeftOut

    left_out = LeftOut()
    left_out.add_file("a/b.heic")
    left_out.add("hidden entries", [".x", ".y", ".z", ".w"], is_loss=False)
    again = LeftOut.from_list(json.loads(json.dumps(left_out.to_list())))
    assert list(again) == list(left_out)
    assert dict(again)["hidden entries"].count == 4

"""Cases of the values, bands and metadata of image files: inputs that once gave a wrong result, with the right one."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.data.decoding import BadImageError, decode_image
from mae_et.data.inspection import inspect_images
from mae_et.data.sources.spec import open_source
from tests.cases.image_files import encode, fill, grey, photo, ramp, texts, tiff
from tests.conftest import load_tool


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_case__P2_12_bits_in_16_bit_files(tmp_path, kind):
    rng = np.random.default_rng(0)
    files = {f"{i}.{kind.lower()}": encode(rng.integers(0, 4096, (40, 40), dtype=np.uint16), kind) for i in range(3)}
    root = fill(tmp_path / "d", files)
    (text,) = texts(inspect_images(open_source(root)), "warning")
    assert "from 0 to 409" in text
    assert "nearly black" in text
    assert "set data.value_range=(0, 4095)" in text
    source = open_source(root, value_range=(0, 4095))
    assert texts(inspect_images(source), "warning") == []
    stored = np.asarray(Image.open(Path(root) / f"0.{kind.lower()}")).astype(float)
    np.testing.assert_allclose(source.load(0).read()[..., 0], stored / 4095, atol=1e-7)
    picture = open_source(root, value_range=(0, 4095), dtype="uint8").load(0)  # as prepared shards have it
    np.testing.assert_array_equal(np.asarray(picture)[..., 0], np.floor(stored * 255 / 4095 + 0.5))
    (text,) = texts(inspect_images(open_source(root, value_range=(0, 1000))), "count")
    assert "3 of them have values outside data.value_range = (0, 1000), which are clipped" in text


def test_case__P2_dataset_stats_names_the_setting(tmp_path, capsys):
    root = fill(tmp_path / "d", {"1.png": encode(np.full((40, 40), 2048, np.uint16))})
    tool = load_tool("dataset_stats")
    tool.main(tool.make_parser().parse_args([root, "--num-workers", "0"]))
    assert "set data.value_range=(0, 4095)" in capsys.readouterr().out
    tool.main(tool.make_parser().parse_args([root, "--num-workers", "0", "--json", "--value-range", "0", "4095"]))
    stats = json.loads(capsys.readouterr().out)
    assert stats["findings"]["warning"] == []
    assert stats["mean"][0] == pytest.approx(2048 / 4095)


def test_case__P2_setting_without_effect(tmp_path):
    source = open_source(fill(tmp_path / "d", {"1.png": encode(photo())}), value_range=(0, 4095))
    assert any("has no effect" in text for text in texts(inspect_images(source), "warning"))


def test_case__P2_colour_of_16_bits_with_a_range_is_refused():
    with pytest.raises(BadImageError, match="colour is read by its highest 8 bits"):
        decode_image(tiff(np.zeros((2, 2, 3), np.uint16), 2), 3, (0, 4095))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_case__P3_fourth_band_without_a_tag_is_refused(dtype):
    values = np.full((2, 2, 4), 60, dtype)
    with pytest.raises(BadImageError, match=r"fourth band and no ExtraSamples tag.*Write that tag"):
        decode_image(tiff(values, 2))
    shift = 8 * (values.itemsize - 1)
    assert np.asarray(decode_image(tiff(values << shift, 2, [0]))).tolist() == [[[60] * 3] * 2] * 2


def test_case__P3_dropped_bands_are_counted(tmp_path):
    files = {"1.tif": tiff(np.full((2, 2, 4), 60, np.uint8), 2, [0]), "2.tif": tiff(np.full((2, 2, 4), 9, np.uint8), 2)}
    found = " ".join(texts(inspect_images(open_source(fill(tmp_path / "d", files))), "warning"))
    assert "1 of 2 images have bands beyond their colour, which are not read, e.g." in found
    assert "1 of 2 images have a fourth band without an ExtraSamples tag, and are refused" in found


@pytest.mark.parametrize(
    ("values", "photometric", "reason"),
    [
        (np.zeros((2, 2, 5), np.uint8), 2, "5 bands of 8-bit unsigned integer"),
        (np.zeros((2, 2, 2), np.uint8), 1, "2 bands of 8-bit unsigned integer"),
        (np.zeros((2, 2, 13), np.uint16), 1, "13 bands of 16-bit unsigned integer"),
        (np.zeros((2, 2), np.float64), 1, "1 band of 64-bit float"),
        (np.zeros((2, 2), np.float16), 1, "1 band of 16-bit float"),
        (np.zeros((2, 2), np.complex64), 1, "1 band of 64-bit complex float"),
        (np.zeros((2, 2), np.int64), 1, "1 band of 64-bit signed integer"),
        (np.zeros((2, 2), np.float32), 1, "1 band of 32-bit float values have no defined white; set data.value_range"),
    ],
)
def test_case__P5_bands_and_types_are_named(values, photometric, reason):
    with pytest.raises(BadImageError) as caught:
        decode_image(tiff(values, photometric))
    assert reason in str(caught.value)
    assert "not a readable image" not in str(caught.value)


@pytest.mark.parametrize("chunk", ["tEXt", "zTXt", "iTXt"])
def test_case__P8_png_with_large_text(chunk):
    text = "x" * 3_000_000
    body = {
        "tEXt": b"k\0" + text.encode(),
        "zTXt": b"k\0\0" + zlib.compress(text.encode()),
        "iTXt": b"k\0\0\0\0\0" + text.encode(),
    }[chunk]
    content = encode(photo())
    kind = chunk.encode()
    extra = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    np.testing.assert_array_equal(np.asarray(decode_image(content[:33] + extra + content[33:])), photo())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_case__P9_white_is_zero(dtype):
    high = np.iinfo(dtype).max
    values = ramp(dtype, 0, high // 5, high // 2, high)
    assert grey(tiff(high - values, photometric=0)) == grey(tiff(values, photometric=1))
    assert grey(tiff(values, photometric=1))[0] == 0
    if dtype == np.uint16:
        assert grey(tiff(ramp(dtype, 0, 4095), 0), (0, 4095)) == [255, 0]


def test_case__P10_one_scale_from_the_type_never_from_the_content():
    for highest in (255, 256):
        content = tiff(ramp(np.int16, 0, 128, highest))
        assert grey(content) == [0, 1, 2]  # 32767 is white
        with pytest.raises(BadImageError, match=r"32-bit signed integer .*set data\.value_range"):
            decode_image(tiff(ramp(np.int32, 0, 128, highest)))
        for dtype in (np.int16, np.int32, np.uint32):
            assert grey(tiff(ramp(dtype, 0, 128, highest)), (0, 512)) == [0, 64, round(highest * 255 / 512)]
    assert grey(tiff(ramp(np.uint32, 0, 4_000_000_000)), (0, 4_000_000_000)) == [0, 255]
    with pytest.raises(BadImageError, match=r"negative value -5 .*set data\.value_range"):
        decode_image(tiff(ramp(np.int16, -5, 7)))
    assert grey(tiff(ramp(np.int16, -1000, 0, 1000)), (-1000, 1000)) == [0, 128, 255]
    assert grey(tiff(ramp(np.int8, -128, 0, 127)), (-128, 127)) == [0, 128, 255]


@pytest.mark.parametrize("header", ["P5 3 1 {}\n", "P2 3 1 {}\n"])
def test_case__P10_pgm_above_8_bits(header):
    for highest in (255, 256, 1000):
        values = [0, 50, highest]
        stored = struct.pack(">3H", *values) if header[1] == "5" else " ".join(map(str, values)).encode()
        assert grey(header.format(65535).encode() + stored) == [round(value / 257) for value in values]
        assert grey(header.format(1000).encode() + stored) == [round(value * 255 / 1000) for value in values]
        assert grey(header.format(1000).encode() + stored, (0, 500)) == [min(255, round(v * 255 / 500)) for v in values]

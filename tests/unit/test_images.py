"""decode_image on every odd kind of file, checked at the pixels."""

import contextlib
import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mae_et.data.decoding import BadImageError, decode_image


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content, num_channels=3):
    image = decode_image(content, num_channels)
    assert image.mode == ("RGB" if num_channels == 3 else "L")
    return np.asarray(image)


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def test_decode_image__lossless_rgb_is_exact(rgb):
    for kind in ("PNG", "BMP", "PPM", "TIFF"):
        np.testing.assert_array_equal(pixels(encode(Image.fromarray(rgb), kind)), rgb)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(rgb), "WEBP", lossless=True)), rgb)


def test_decode_image__path_as_str_and_path(tmp_path, rgb):
    path = tmp_path / "wrong suffix.jpg"  # the content decides
    path.write_bytes(encode(Image.fromarray(rgb)))
    np.testing.assert_array_equal(pixels(path), rgb)
    np.testing.assert_array_equal(pixels(str(path)), rgb)


def test_decode_image__grey_and_rgb_convert_to_each_other(rgb):
    grey = rgb[..., 0]
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(grey)), 1), grey)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(encode(Image.fromarray(rgb)), 1) - luma).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_decode_image__exif_orientation(orientation, kind):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)
    upright[8:, 16:] = (0, 0, 255)
    # What a camera in that position would have stored, by EXIF's definition of row 0 and column 0.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    content = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert np.abs(pixels(content).astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)


def test_decode_image__damaged_exif_is_ignored(rgb):
    content = encode(Image.fromarray(rgb), exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(pixels(content), rgb)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_image__16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 128, 129, 257, 25700, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1, 100, 255]], np.uint8)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(values), kind), 1), expected)


def test_decode_image__dark_16_bit_grey_stays_dark():
    values = np.array([[0, 100, 200]], np.uint16)  # in 8 bits this would be mid grey
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(values)), 1), [[0, 0, 1]])


def test_decode_image__big_endian_16_bit_tiff():
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    entries = [(256, 3, 4), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (279, 4, 8)]
    body = b"MM\0*" + struct.pack(">I", 16) + values.astype(">u2").tobytes() + struct.pack(">H", len(entries))
    for tag, kind, value in entries:
        body += struct.pack(">HHI", tag, kind, 1)
        body += struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
    body += struct.pack(">I", 0)
    assert Image.open(io.BytesIO(body)).mode == "I;16B"
    np.testing.assert_array_equal(pixels(body, 1), [[0, 1, 100, 255]])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_decode_image__32_bit_values_need_a_range(dtype):
    content = encode(Image.fromarray(np.array([[-5, 0, 51, 255, 300]], dtype)), "TIFF")
    with pytest.raises(BadImageError, match=r"32-bit .* no defined white; set data\.value_range"):
        decode_image(content)
    np.testing.assert_array_equal(np.asarray(decode_image(content, 1, (0, 255))), [[0, 0, 51, 255, 255]])


def test_decode_image__value_range_scales_deep_grey_only():
    values = np.array([[0, 100, 2048, 4095, 5000]], np.uint16)
    expected = [[0, 6, 128, 255, 255]]
    for kind in ("PNG", "TIFF"):
        found = decode_image(encode(Image.fromarray(values), kind), 1, (0, 4095))
        np.testing.assert_array_equal(np.asarray(found), expected)
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    np.testing.assert_array_equal(np.asarray(decode_image(encode(grey), 1, (0, 4095))), [[0, 100, 255]])


@pytest.mark.parametrize("value_range", [(5, 5), (9, 3), (0, float("nan")), (0, float("inf"))])
def test_decode_image__value_range_that_is_none(value_range, rgb):
    with pytest.raises(ValueError, match="value_range"):
        decode_image(encode(Image.fromarray(rgb)), 3, value_range)


def test_decode_image__palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encode(image)), [[[10, 20, 30], [40, 50, 60]]])
    np.testing.assert_array_equal(pixels(encode(image, "GIF")), [[[10, 20, 30], [40, 50, 60]]])


def test_decode_image__palette_transparency_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    expected = [[[10, 20, 30], [255, 255, 255]]]
    np.testing.assert_array_equal(pixels(encode(image, transparency=1)), expected)
    np.testing.assert_array_equal(pixels(encode(image, "GIF", transparency=1)), expected)
    half = pixels(encode(image, transparency=bytes([255, 128])))[0, 1]
    assert np.abs(half - (np.array([40, 50, 60]) * 128 + 255 * 127) / 255).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_decode_image__alpha_over_white(kind):
    image = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(200, 0, 100, 255), (200, 0, 100, 128), (200, 0, 100, 0)]):
        image.putpixel((x, 0), value)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = pixels(encode(image, kind, **options))[0].astype(int)
    blended = np.array([200, 0, 100]) * 128 / 255 + 127
    np.testing.assert_array_equal(found[0], [200, 0, 100])
    assert np.abs(found[1] - blended).max() <= 1
    np.testing.assert_array_equal(found[2], [255, 255, 255])


def test_decode_image__grey_alpha_over_white():
    image = Image.merge("LA", (Image.new("L", (2, 1), 50), Image.new("L", (2, 1), 255)))
    image.putpixel((1, 0), (50, 0))
    np.testing.assert_array_equal(pixels(encode(image), 1), [[50, 255]])


def test_decode_image__transparent_colour_of_rgb_and_grey_png():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    np.testing.assert_array_equal(pixels(encode(image, transparency=(9, 9, 9))), [[[1, 2, 3], [255, 255, 255]]])
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    np.testing.assert_array_equal(pixels(encode(grey, transparency=7), 1), [[255, 8]])
    deep = Image.fromarray(np.array([[257, 514]], np.uint16))
    np.testing.assert_array_equal(pixels(encode(deep, transparency=257), 1), [[255, 2]])


def test_decode_image__one_bit():
    image = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(pixels(encode(image)), [[[255] * 3, [0] * 3]])


def test_decode_image__cmyk_jpeg():
    # Pillow writes Adobe CMYK; no ink is white, full cyan takes the red away.
    image = Image.new("CMYK", (32, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (16, 0, 32, 16))
    found = pixels(encode(image, "JPEG", quality=100)).astype(int)
    assert np.abs(found[:, 2:14] - 255).max() <= 3
    assert np.abs(found[:, 18:30] - [0, 255, 255]).max() <= 3


def test_decode_image__ycck_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    content = encode(image, "JPEG", quality=100)
    marker = content.index(b"Adobe")
    # Transform flag 2: the same stored channels (inverted, so all 255 for no ink) are now Y, Cb, Cr, K. Libjpeg turns
    # YCC into R = 255 (clipped), G = 255 - (.344 + .714) * 127 = 121, B = 255 and gives 255 - RGB as CMY. Inverted,
    # that is ink of (255, 121, 255), so the colour is (0, 134, 0). Taken for CMYK it would be white.
    content = content[: marker + 11] + b"\x02" + content[marker + 12 :]
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    found = pixels(content).astype(int)
    assert np.abs(found - [0, 134, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_decode_image__animation_gives_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    np.testing.assert_array_equal(pixels(content), np.full((4, 4, 3), [255, 0, 0]))


def test_decode_image__one_pixel():
    assert pixels(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_decode_image__truncated_at_any_byte(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    content = encode(Image.fromarray(noise), kind, **options)
    for length in (1, 2, 7, 20, 60, 200, len(content) // 2, len(content) * 9 // 10):
        with pytest.raises(BadImageError) as caught:
            decode_image(content[:length])
        assert 0 < len(str(caught.value)) < 250


def test_decode_image__damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        content = np.frombuffer(encode(image, kind), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[rng.integers(0, min(300, len(content)), 6)] = rng.integers(0, 256, 6)
            with contextlib.suppress(BadImageError):
                assert decode_image(damaged.tobytes()).mode == "RGB"


def test_decode_image__empty_missing_and_foreign(tmp_path):
    with pytest.raises(BadImageError, match="empty file"):
        decode_image(b"")
    with pytest.raises(BadImageError, match=r"cannot be read: No such file"):
        decode_image(tmp_path / "gone.jpg")
    with pytest.raises(BadImageError, match=r"not a readable image.*<html>"):
        decode_image(b"<html>404 not found</html>")
    with pytest.raises(BadImageError, match="not a readable image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_decode_image__decompression_bomb():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(BadImageError, match="decompression bomb"):
        decode_image(bomb)


def test_decode_image__large_but_allowed_is_silent(monkeypatch, rgb):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow warns from here on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(encode(Image.fromarray(rgb))), rgb)


def test_decode_image__nothing_on_stderr(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    contents = [encode(noise, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "tiff_deflate")]
    contents += [encode(noise, "JPEG"), encode(noise, "PNG"), encode(noise, "WEBP")]
    for number, content in enumerate(contents):
        for share in (0.3, 0.7, 0.95):
            (tmp_path / f"{number}-{share}.bin").write_bytes(content[: int(len(content) * share)])
    code = (
        "import sys, pathlib\nfrom mae_et.data.decoding import *\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: decode_image(path)\n    except BadImageError: pass\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("num_channels", [0, 2, 4])
def test_decode_image__other_channel_counts(num_channels, rgb):
    with pytest.raises(ValueError, match="3 \\(RGB\\) or 1"):
        decode_image(encode(Image.fromarray(rgb)), num_channels)

"""Decoding of JPEG crops against Pillow at the pixels; everything out of the ordinary is left alone."""

import io

import numpy as np
import pytest
from PIL import Image

from mae_et.data import jpeg
from mae_et.data.decoding import BadImageError, decode_image
from mae_et.data.jpeg import check_available, decode_box, read_header
from mae_et.errors import UserError


def picture(width, height, seed=0):
    """Smooth shapes and fine noise in colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 85, **options})
    return buffer.getvalue()


def boxes(width, height):
    yield 0, 0, height, width
    yield 0, 0, 1, 1
    yield height - 1, width - 1, 1, 1
    rng = np.random.default_rng(0)
    for _ in range(12):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        yield top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))


def decode(content, box):
    """The box as the fast path has it, or None."""
    header = read_header(content)
    return None if header is None else decode_box(content, header, box)


def crop(content, box):
    top, left, height, width = box
    return np.asarray(decode_image(content))[top : top + height, left : left + width]


@pytest.mark.parametrize("size", [(161, 117), (64, 48), (33, 200), (7, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "optimize": True},
        {"subsampling": 2, "restart_marker_rows": 1},
        {"subsampling": 1, "restart_marker_blocks": 3},
        {"subsampling": 2, "progressive": True},
        {"subsampling": 0, "quality": 100},
        {"comment": b"\xff\xd8 two \xff\xd9", "dpi": (300, 300), "icc_profile": bytes(70000)},
    ],
    ids=str,
)
def test_decode_box__equals_pillow(size, options):
    content = encode(picture(*size), **options)
    header = read_header(content)
    assert (header.width, header.height) == size
    for box in boxes(*size):
        np.testing.assert_array_equal(decode_box(content, header, box), crop(content, box))


def test_decode_box__leaves_out_what_lies_below(monkeypatch):
    content = encode(picture(64, 480), subsampling=2)
    heights = []

    def decode_jpeg(*args, decode_jpeg=jpeg.simplejpeg.decode_jpeg, **options):
        pixels = decode_jpeg(*args, **options)
        heights.append(len(pixels))
        return pixels

    monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", decode_jpeg)
    header = read_header(content)
    for box, most in (((0, 0, 16, 64), 32), ((100, 0, 50, 9), 176), ((400, 0, 80, 64), 480)):
        decode_box(content, header, box)
        assert heights[-1] <= most, box


def test_read_header__metadata_that_leaves_the_image_upright():
    for orientation in (None, 1):
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        if orientation:
            exif[0x0112] = orientation
        content = encode(picture(40, 30), exif=exif)
        assert (read_header(content).width, read_header(content).height) == (40, 30)
    # An orientation that is damaged says nothing, as in decode_image.
    broken = encode(picture(40, 30), exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert (
        decode(broken, (0, 0, 30, 40)) is None or (decode(broken, (0, 0, 30, 40)) == crop(broken, (0, 0, 30, 40))).all()
    )


@pytest.mark.parametrize("orientation", range(2, 9))
def test_read_header__turned_image_is_left_alone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert read_header(encode(picture(40, 30), exif=exif)) is None
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'
    content = encode(picture(40, 30), xmp=xmp.encode())
    expected = decode_image(content)
    assert read_header(content) is None or expected.size == (40, 30)


def test_read_header__other_content_is_left_alone():
    image = picture(40, 30)
    png = io.BytesIO()
    image.save(png, "PNG")
    whole = encode(image)
    height_at = read_header(whole).height_at
    without_height = whole[:height_at] + b"\0\0" + whole[height_at + 2 :]
    twelve_bit = whole[: height_at - 1] + b"\x0c" + whole[height_at:]
    contents = {
        "empty": b"",
        "png": png.getvalue(),
        "text": b"<html>",
        "grey": encode(image.convert("L")),
        "cmyk": encode(image.convert("CMYK")),
        "stored as RGB": encode(image, keep_rgb=True),
        "height after the scan": without_height,
        "12 bits": twelve_bit,
        "only markers": b"\xff\xd8\xff\xd9",
        "a marker that points to itself": b"\xff\xd8\xff\xe0\0\0\xff\xd9",
        "fill bytes to the end": b"\xff\xd8" + b"\xff" * 50 + b"\xd9",
    }
    assert {name for name, content in contents.items() if read_header(content) is not None} == set()


def test_read_header__image_above_the_limit_is_left_to_decode_image():
    content = encode(picture(40, 30))
    assert read_header(content, max_pixels=1199) is None
    assert read_header(content, max_pixels=1200) is not None
    with pytest.raises(BadImageError, match="40 x 30 px is above the limit of 1199 pixels"):
        decode_image(content, max_pixels=1199)


@pytest.mark.parametrize("progressive", [False, True])
def test_read_header__file_cut_off_at_any_byte_is_left_alone(progressive):
    content = encode(picture(96, 64), progressive=progressive)
    assert [length for length in range(len(content)) if decode(content[:length], (0, 0, 4, 4)) is not None] == []


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_decode_box__damaged_bytes_give_what_pillow_gives(options):
    """Or nothing. Only what lies below the crop may be worse than Pillow, who reads that too, can bear."""
    content = np.frombuffer(encode(picture(96, 64), **options), np.uint8)
    rng = np.random.default_rng(0)
    num_compared = num_refused = 0
    for trial in range(300):
        damaged = content.copy()
        first = 2 if trial % 2 else 600  # the tables too, or the pixels alone
        damaged[rng.integers(first, len(content) - 2, 1 + trial % 4)] = rng.integers(0, 256, 1 + trial % 4)
        box = next(box for i, box in enumerate(boxes(96, 64)) if i == trial % 10)
        found = decode(damaged.tobytes(), box)
        if found is None:
            continue
        try:
            expected = crop(damaged.tobytes(), box)
        except BadImageError:
            assert len(found) < 64, f"trial {trial}: all rows are decoded, yet Pillow refuses the file"
            num_refused += 1
            continue
        np.testing.assert_array_equal(found, expected, err_msg=f"trial {trial}")
        num_compared += 1
    assert num_compared > 20
    assert num_refused <= num_compared // 50


def test_check_available__says_what_to_install(monkeypatch):
    check_available()
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    with pytest.raises(UserError, match=r"pip install simplejpeg, or set data.loading = .exact"):
        check_available()

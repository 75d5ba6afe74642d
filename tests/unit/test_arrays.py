"""Images of any number of channels and any number type: every kind of file, checked at the pixels."""

import builtins
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from mae_et.data.arrays import ImageArray, decode, examine
from mae_et.data.decoding import BadImageError, Decoding
from mae_et.data.inspection import inspect_images
from mae_et.data.sources.spec import open_source
from mae_et.data.statistics import collect
from mae_et.data.transforms import EvalTransform, TrainTransform, sample_rng
from mae_et.errors import DataError
from tests.cases.image_files import encode, fill, texts

tifffile = pytest.importorskip("tifffile")
pydicom = pytest.importorskip("pydicom")

DEEP = Decoding(5, (0, 4000), dtype="float32")


def bands(height=70, width=90, num_bands=5, seed=0):
    return np.random.default_rng(seed).integers(0, 4001, (height, width, num_bands), dtype=np.uint16)


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


TILED = {"photometric": "minisblack", "tile": (32, 32), "compression": "lzw", "predictor": 2}
LAYOUTS = {
    "pages": lambda v: tiff(v.transpose(2, 0, 1)),
    "unnamed axes": tiff,
    "separate tiles": lambda v: tiff(v.transpose(2, 0, 1), planarconfig="separate", **TILED),
    "interleaved tiles": lambda v: tiff(v, planarconfig="contig", **TILED),
    "strips": lambda v: tiff(v, planarconfig="contig", photometric="minisblack", rowsperstrip=9, compression="zlib"),
    "big endian BigTIFF": lambda v: tiff(
        v, planarconfig="contig", photometric="minisblack", byteorder=">", bigtiff=True
    ),
    "ImageJ": lambda v: tiff(v.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"}),
    "OME": lambda v: tiff(v.transpose(2, 0, 1), ome=True, metadata={"axes": "CYX"}),
    "npy": npy,
    "npy of planes": lambda v: npy(v.transpose(2, 0, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode__each_layout_gives_the_same_pixels(tmp_path, layout):
    values, content = bands(), LAYOUTS[layout](bands())
    path = tmp_path / f"x.{'npy' if layout.startswith('npy') else 'tif'}"
    path.write_bytes(content)
    for file in (content, path):
        image = decode(file, DEEP)
        assert (image.height, image.width) == (70, 90)
        np.testing.assert_array_equal(image.read(), values.astype(np.float32) / 4000)
        for top, left, rows, columns in ((0, 0, 1, 1), (31, 60, 34, 30), (10, 0, 60, 90)):
            part = values[top : top + rows, left : left + columns]
            np.testing.assert_array_equal(image.read((top, left, rows, columns)), part.astype(np.float32) / 4000)


def test_read__decodes_only_the_tiles_of_a_region(tmp_path):
    path = tmp_path / "x.tif"
    path.write_bytes(LAYOUTS["interleaved tiles"](bands(256, 256)))
    image = decode(path, DEEP)
    file = image._pixels._file
    reads = []

    def read(size):
        reads.append(size)
        return file.read(size)

    image._pixels._file = SimpleNamespace(seek=file.seek, read=read)
    image.read((40, 70, 20, 20))  # rows 32 to 63, columns 64 to 95
    assert len(reads) == 1
    image.read((30, 70, 20, 20))
    assert len(reads) == 3


def test_read__overviews_and_means_bound_the_memory():
    values = bands(256, 192)
    halved = values.reshape(128, 2, 96, 2, 5).mean((1, 3)).round().astype(np.uint16)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for level, options in ((values, {}), (halved, {"subfiletype": 1})):
            writer.write(level, planarconfig="contig", metadata=None, **TILED, **options)
    image = decode(buffer.getvalue(), DEEP)
    np.testing.assert_array_equal(
        image.read((64, 32, 128, 128), size=(64, 64)), halved[32:96, 16:80].astype(np.float32) / 4000
    )
    np.testing.assert_array_equal(
        image.read((64, 32, 128, 128), size=(65, 64)), values[64:192, 32:160].astype(np.float32) / 4000
    )
    small = decode(buffer.getvalue(), DEEP._replace(max_pixels=256 * 192 // 16))
    expected = values.reshape(64, 4, 48, 4, 5).mean((1, 3)) / 4000
    np.testing.assert_allclose(small.read(), expected, atol=1e-6)


def dicom(values, **tags):
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns, data.SamplesPerPixel = *values.shape[:2], values.shape[2] if values.ndim == 3 else 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", int(values.dtype.kind == "i")
    data.BitsAllocated = data.BitsStored = 8 * values.itemsize
    data.HighBit, data.PixelData = data.BitsStored - 1, values.tobytes()
    for key, value in tags.items():
        setattr(data, key, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_decode__dicom():
    stored = np.arange(-4, 8, dtype=np.int16).reshape(3, 4)
    grey = Decoding(1, (-1024, 976), dtype="float32")
    content = dicom(stored, RescaleSlope=2, RescaleIntercept=-24)
    np.testing.assert_allclose(decode(content, grey).read()[..., 0], (2 * stored - 24 + 1024) / 2000, atol=1e-7)
    inverted = decode(dicom(stored, PhotometricInterpretation="MONOCHROME1"), grey).read()[..., 0]
    np.testing.assert_allclose(inverted, 1 - (stored + 1024) / 2000, atol=1e-7)
    assert decode(content, grey._replace(num_channels=3)).read().shape == (3, 4, 3)
    picture = decode(dicom(np.arange(12, dtype=np.uint8).reshape(3, 4)), Decoding(1))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), np.arange(12).reshape(3, 4))
    with pytest.raises(BadImageError, match=r"1 band of 16-bit signed .* set data\.value_range"):
        decode(dicom(stored), Decoding(3))


@pytest.mark.parametrize(
    ("name", "decoding", "shape"),
    [
        ("CT_small.dcm", Decoding(1, (-1024, 3071), dtype="float32"), (128, 128, 1)),
        ("SC_rgb_rle.dcm", Decoding(3), (100, 100, 3)),
        ("JPEG2000.dcm", Decoding(1, (0, 4095), dtype="float32"), (1024, 256, 1)),
    ],
)
def test_decode__samples_of_pydicom(name, decoding, shape):
    image = decode(pydicom.data.get_testdata_file(name), decoding)
    pixels = image.read() if isinstance(image, ImageArray) else np.asarray(image)
    assert pixels.shape == shape
    assert pixels.std() > 0


def test_decode__other_files_keep_their_depth():
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    import imagecodecs

    range16 = (0, 65535)
    colour = decode(imagecodecs.png_encode(deep), Decoding(3, range16, dtype="float32")).read()
    np.testing.assert_array_equal(colour, deep.astype(np.float32) / 65535)
    grey = decode(encode(deep[..., 0]), Decoding(1, range16, dtype="float32")).read()
    np.testing.assert_array_equal(grey[..., 0], deep[..., 0].astype(np.float32) / 65535)
    luma = decode(imagecodecs.png_encode(deep), Decoding(1, range16, dtype="float32")).read()[..., 0]
    np.testing.assert_allclose(luma, deep @ np.array([0.299, 0.587, 0.114]) / 65535, atol=1e-6)
    rgba = np.random.default_rng(1).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        content = encode(rgba, kind, exif=exif, **options)
        np.testing.assert_array_equal(decode(content, Decoding(4)).read(), np.rot90(rgba, -1))
    photo = encode(rgba[..., :3])
    np.testing.assert_array_equal(
        decode(photo, Decoding(3, (0, 9), dtype="float32")).read(), rgba[..., :3] / np.float32(255)
    )
    np.testing.assert_array_equal(decode(npy(rgba), Decoding(4)).read(), rgba)
    mask = decode(npy(np.eye(3, dtype=bool)), Decoding(1))
    np.testing.assert_array_equal(np.asarray(mask), 255 * np.eye(3))


@pytest.mark.parametrize(
    ("content", "decoding", "message"),
    [
        (lambda: npy(bands(8, 9, 4)), DEEP, r"4 bands of 16-bit .* model\.in_chans = 5; set model\.in_chans = 4"),
        (lambda: tiff(bands(8, 9), planarconfig="contig"), Decoding(5), r"5 bands of 16-bit .* set data\.value_range"),
        (lambda: tiff(np.zeros((2, 3, 8, 9), np.uint16)), DEEP, "TIFF of axes"),
        (lambda: npy(np.full((4, 4, 5), np.nan, np.float32)), DEEP, r"NaN or infinity among 5 bands .*\(80 of 80\)"),
        (lambda: npy(np.zeros((4, 4, 5), np.complex64)), DEEP, "complex .* export real numbers"),
        (lambda: npy(np.zeros(4)), DEEP, r"array of shape \(4,\) and type float64 is no image"),
        (lambda: npy(np.array([None])), DEEP, "allow_pickle"),
        (lambda: npy(np.zeros((9, 9, 5)))[:-40], DEEP, "."),
        (lambda: LAYOUTS["interleaved tiles"](bands())[:-3000], DEEP, "."),
        (lambda: b"", DEEP, "empty file"),
        (lambda: encode(np.zeros((2, 2, 3), np.uint8)), DEEP, r"3 bands of 8-bit .* model\.in_chans = 5"),
        (lambda: npy(np.zeros((900, 900, 5))), DEEP._replace(max_pixels=999), "above the limit of 999"),
        (lambda: dicom(np.zeros((90, 90), np.uint8)), Decoding(1, max_pixels=999), "above the limit of 999"),
    ],
)  # fmt: skip
def test_decode__faults(content, decoding, message):
    with pytest.raises(BadImageError, match=message):
        decode(content(), decoding).read()


def test_decode__dicom_without_pixels():
    for name in ("rtplan.dcm", "test-SR.dcm"):
        with pytest.raises(BadImageError, match="DICOM without pixel data"):
            decode(pydicom.data.get_testdata_file(name), Decoding(1))


@pytest.mark.parametrize(
    ("package", "content"), [("tifffile", LAYOUTS["pages"]), ("pydicom", lambda v: dicom(v[..., 0]))]
)
def test_decode__absent_package(monkeypatch, package, content):
    content, imported = content(bands()), builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    extra = {"tifffile": "tiff", "pydicom": "dicom"}[package]
    with pytest.raises(DataError, match=rf"pip install 'mae_et\[{extra}\]'"):
        decode(content, DEEP)


def test_transforms__arrays_as_tensors():
    values = bands(60, 80)
    image = decode(npy(values), DEEP)
    train = TrainTransform(32)
    with sample_rng(7):
        (top, left, rows, columns), flip = train.draw_crop(60, 80, 0.5)
    with sample_rng(7):
        pixels = train(image, 0.5, (24, 24))
    region = torch.from_numpy(values[top : top + rows, left : left + columns].astype(np.float32) / 4000).permute(
        2, 0, 1
    )
    expected = F.resize(region, [24, 24], F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    torch.testing.assert_close(pixels, expected.flip(-1) if flip else expected, atol=1e-6, rtol=0)
    assert pixels.dtype == torch.float32
    whole = torch.from_numpy(values.astype(np.float32) / 4000).permute(2, 0, 1)
    resized = F.resize(whole, [36], F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    torch.testing.assert_close(EvalTransform(32)(image), F.center_crop(resized, [32, 32]), atol=1e-6, rtol=0)
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    assert EvalTransform(32)(decode(npy(photo), Decoding(4))).dtype == torch.uint8


def test_open_source__arrays_beside_pictures_are_left_out(tmp_path):
    source = open_source(fill(tmp_path / "d", {"a/1.png": encode(np.zeros((4, 4), np.uint8)), "a/f.npy": npy(bands())}))
    assert [source.key(i) for i in range(len(source))] == ["a/1.png"]
    assert "1 .npy files" in source.left_out.describe(only_losses=True)
    root = fill(tmp_path / "arrays", {"a/1.npy": npy(bands()), "b/2.dcm": dicom(bands()[..., 0])})
    assert len(open_source(root, 1, value_range=(0, 4000))) == 2


def test_inspection__channels_ranges_and_depth(tmp_path):
    files = {f"{i}.tif": LAYOUTS["pages"](bands(seed=i)) for i in range(4)}
    files |= {"4.tif": tiff(bands(num_bands=4), planarconfig="contig"), "5.npy": b""}
    source = open_source(fill(tmp_path / "d", files), 5, value_range=(0, 3000))
    (channels,) = [text for text in texts(inspect_images(source), "warning") if "model.in_chans" in text]
    assert "1 of 5 images have other bands than model.in_chans = 5 and are refused: 1 with 4" in channels
    assert "4.tif" in channels
    (found,) = [text for text in texts(inspect_images(source), "count") if "value_range" in text]
    assert "5 of them have values outside data.value_range = (0, 3000), which are clipped" in found
    stats = collect(source)
    assert stats["num_clipped"] == 4
    assert stats["share_clipped"] == pytest.approx(0.25, abs=0.02)
    assert stats["num_bad"] == 1
    np.testing.assert_allclose(stats["mean"], [0.625] * 5, atol=0.01)  # of min(x, 1) for x even in 0 to 4/3
    with pytest.raises(DataError, match=r"5 of 5 images have other bands than model\.in_chans = 6"):
        inspect_images(open_source(source.root, 6, value_range=(0, 3000))).raise_errors()
    with pytest.raises(
        DataError, match=r"no defined black and white and are refused; set data\.value_range=\(0, 4095\)"
    ):
        inspect_images(open_source(source.root, 5)).raise_errors()
    assert examine(files["0.tif"], DEEP).highest == bands().max()

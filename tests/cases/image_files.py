"""Image files and folders for the cases, TIFF files of kinds that Pillow does not write among them."""

import io
import struct

import numpy as np
from PIL import Image

from mae_et.data.decoding import decode_image


def tiff(values, photometric=1, extra_samples=None):
    """Returns an uncompressed little-endian TIFF of values [H, W] or [H, W, bands]; the dtype decides bits and format."""
    bands = values.shape[2] if values.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    data += b"\0" * (len(data) % 2)
    height, width = values.shape[:2]
    entries = [
        (256, 3, [width]), (257, 3, [height]), (258, 3, [values.dtype.itemsize * 8] * bands), (259, 3, [1]),
        (262, 3, [photometric]), (273, 4, [8]), (277, 3, [bands]), (278, 3, [height]), (279, 4, [len(data)]),
    ]  # fmt: skip
    if extra_samples is not None:
        entries.append((338, 3, list(extra_samples)))
    entries.append((339, 3, [kind] * bands))
    directory = 8 + len(data)
    behind = directory + 2 + 12 * len(entries) + 4
    table, body = struct.pack("<H", len(entries)), b""
    for tag, type_number, numbers in entries:
        packed = struct.pack(f"<{len(numbers)}{'H' if type_number == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            value = struct.pack("<I", behind + len(body))
            body += packed
        else:
            value = packed.ljust(4, b"\0")
        table += struct.pack("<HHI", tag, type_number, len(numbers)) + value
    return b"II*\0" + struct.pack("<I", directory) + data + table + bytes(4) + body


def ramp(dtype, *values):
    """Returns one row of values, [1, n]."""
    return np.array([values], dtype)


def encode(values, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed=0, size=(48, 40)):
    """Returns noise [H, W, 3]: many values, three bands."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def fill(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return str(root)


def texts(findings, severity):
    return [f"{row['text']}; {row['fix']}" for row in findings.to_dict()[severity]]


def grey(content, value_range=None):
    return np.asarray(decode_image(content, 1, value_range))[0].tolist()

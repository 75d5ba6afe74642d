"""DICOM files, by pydicom."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from mae_et.data.decoding import BadImageError
from mae_et.data.pixel_format import PixelFormat, format_of
from mae_et.errors import DataError


def is_dicom(start: bytes) -> bool:
    """Tells whether a file of this content is DICOM; `start` has at least its first 132 bytes.

    A file without the preamble begins with a tag of group 2 or 8 and a known value representation or an even length.
    """
    if start[128:132] == b"DICM":
        return True
    return start[:2] in (b"\x02\0", b"\x08\0") and start[2:4] in (b"\0\0", b"\x01\0", b"\x05\0", b"\x08\0")


def read_dicom(file: bytes | Path, max_pixels: int) -> tuple[np.ndarray, PixelFormat]:
    """Reads the values of a DICOM file.

    Rescale slope and intercept are applied (Hounsfield units of CT), YCbCr becomes RGB.

    Returns:
        [H, W], [H, W, 3] or [F, H, W] for F frames, and the format of the values.
    Raises:
        DataError: if pydicom is not installed.
        BadImageError: if the file has no pixels, too many, a palette, or several frames in colour.
    """
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ImportError as error:
        raise DataError(
            "DICOM files need the package pydicom, which is not installed: pip install 'mae_et[dicom]'"
        ) from error
    data = pydicom.dcmread(io.BytesIO(file) if isinstance(file, bytes) else file, force=True)
    if "PixelData" not in data and "FloatPixelData" not in data and "DoubleFloatPixelData" not in data:
        kind = data.get("Modality") or data.get("SOPClassUID", "unknown kind")
        raise BadImageError(f"DICOM without pixel data ({kind}); move such files away")
    frames, rows, columns = (int(data.get(key) or 1) for key in ("NumberOfFrames", "Rows", "Columns"))
    if frames * rows * columns > max_pixels:
        raise BadImageError(
            f"{frames} x {rows} x {columns} px is above the limit of {max_pixels} pixels; raise data.max_image_pixels"
        )
    photometric = str(data.get("PhotometricInterpretation", ""))
    if photometric == "PALETTE COLOR":
        raise BadImageError("DICOM with a palette, which is not applied: convert the file to RGB")
    try:
        values = pixel_array(data)  # unlike data.pixel_array, it converts YCbCr
    except RuntimeError as error:  # its further lines name the missing plug-ins
        raise BadImageError(" ".join(str(error).split())[:400]) from error
    if values.ndim > 3:
        raise BadImageError(f"DICOM of {frames} frames in colour; write one frame to each file")
    bits = int(data.get("BitsStored") or 8 * values.itemsize)
    slope, intercept = float(data.get("RescaleSlope") or 1), float(data.get("RescaleIntercept") or 0)
    stored = format_of(values.dtype, int(data.get("SamplesPerPixel") or 1), bits)
    if (slope, intercept) != (1, 0):
        values = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
        stored = format_of(values.dtype, stored.num_bands)
    return values, PixelFormat(stored.num_bands, stored.bits, stored.number, white_is_zero=photometric == "MONOCHROME1")

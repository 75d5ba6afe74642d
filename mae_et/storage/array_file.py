"""Arrays in one file that all processes of a machine map: the system keeps a single copy in memory.

The format is that of safetensors. Its own writer takes a copy of all arrays and its reader copies them into each process, so
arrays are written one after the other here, and mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

_DTYPES = {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes flat arrays.

    Args:
        file: open for writing, at its beginning.
        arrays: [n] each, of int64, int32, uint32 or uint8.
        about: what the file says about itself; plain values.
    """
    ordered = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each array is aligned
    header: dict[str, Any] = {"__metadata__": {"about": json.dumps(about)}}
    end = 0
    for name in ordered:
        start, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _NAMES[arrays[name].dtype],
            "shape": [len(arrays[name])],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        file.write(np.ascontiguousarray(arrays[name]).data)


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Maps the arrays of a file that `write_arrays` wrote, read-only.

    Returns:
        The arrays, and what the file says about itself.
    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is cut off, damaged or of another kind.
    """
    if os.path.getsize(path) < 8:
        raise ValueError(f"{path} is cut off")
    try:
        with safe_open(path, "numpy") as checked:  # compares the header with the size of the file
            about = json.loads((checked.metadata() or {})["about"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is cut off, damaged or of another kind ({error})") from error
    content = np.memmap(path, np.uint8, "r")
    first = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:first].tobytes())
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            arrays[name] = np.asarray(content[first + start : first + end]).view(_DTYPES[entry["dtype"]])
    return arrays, about

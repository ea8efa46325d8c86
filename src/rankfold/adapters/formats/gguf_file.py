"""The container of llama.cpp: one GGUF file, version 3.

"GGUF", version, number of tensors, number of metadata pairs        all little-endian
metadata: key, type, value
tensors: name, number of sizes, sizes innermost first, type, offset
data, every tensor at a multiple of 32 bytes
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankfold.atomic import atomic_file

__all__ = ["TYPES", "write_file"]

TYPES = {torch.float32: (0, 0, "<f4"), torch.float16: (1, 1, "<f2"), torch.bfloat16: (30, 32, "<i2")}
"""dtype -> (ggml's number of it, its number as the type of a whole file, how its bytes are written)."""
ALIGNMENT = 32


def write_file(path: Path, metadata: Mapping[str, str | int | float], tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Write the file as a whole, or not at all.

    Args:
        metadata: text, whole numbers (uint32) and floats (float32), in this order.
        tensors: (name, value), of the dtypes in `TYPES`, in this order.

    Raises:
        FileError: the file can't be written.

    >>> import tempfile
    >>> write_file(path := Path(tempfile.mkdtemp()) / "a.gguf", {"general.type": "adapter"}, [("x", torch.ones(3))])
    >>> path.read_bytes()[:8], path.stat().st_size
    (b'GGUF\\x03\\x00\\x00\\x00', 128)
    """
    atomic_file(path, lambda place: _write(place, metadata, tensors))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float) -> bytes:
    """The type's number, then the value."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def _padding(size: int) -> bytes:
    return bytes(-size % ALIGNMENT)


def _bytes(t: Tensor) -> bytes:
    t = t.detach().cpu().contiguous()
    array = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()
    return array.astype(TYPES[t.dtype][2], copy=False).tobytes()


def _write(place: Path, metadata: Mapping[str, str | int | float], tensors: Sequence[tuple[str, Tensor]]) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    offset = 0
    for name, t in tensors:
        head += _text(name) + struct.pack(f"<I{t.ndim}Q", t.ndim, *reversed(t.shape))
        head += struct.pack("<IQ", TYPES[t.dtype][0], offset)
        size = t.numel() * t.element_size()
        offset += size + len(_padding(size))
    with open(place, "wb") as file:
        file.write(head + _padding(len(head)))
        for _, t in tensors:
            data = _bytes(t)
            file.write(data + _padding(len(data)))

"""Reading and writing safetensors and JSON, with files from strangers in mind.

What a file claims (header, shapes, offsets, names) is checked against limits before anything of that size is allocated; tensors
must be finite; JSON must have exactly the known keys. Pickles are refused by name.

The format: 8 bytes with the header's length, a JSON header (name -> dtype, shape, data_offsets), then the tensors without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rankfold.atomic import atomic_file, atomic_folder, recover_folder, write_text
from rankfold.errors import FileError, NumericError, nearest

__all__ = [
    "LIMITS",
    "Header",
    "Limits",
    "Schema",
    "TensorInfo",
    "atomic_folder",
    "check_object",
    "read_header",
    "read_json",
    "read_tensors",
    "recover_folder",
    "write_json",
    "write_tensors",
    "write_text",
]

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class Limits:
    """What a file may claim. The defaults hold any adapter and most models; a larger file needs a caller who asks for it.

    Args:
        header_bytes: of a safetensors header.
        tensors: how many one file may hold.
        dimensions: of one tensor.
        total_bytes: of all tensors of one file.
        json_bytes, json_depth: size of a JSON file, and how deep it may nest.
    """

    header_bytes: int = 16 << 20
    tensors: int = 100_000
    dimensions: int = 8
    total_bytes: int = 64 << 30
    json_bytes: int = 64 << 20
    json_depth: int = 32


LIMITS = Limits()


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; `start` and `stop` are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The checked header of a safetensors file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        out[key] = value
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _parse(data: bytes, path: Path, what: str, depth: int) -> Any:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {what} is not valid JSON: {error}") from error
    if _depth(value) > depth:
        raise FileError(f"{path}: {what} nests {_depth(value)} levels deep; {depth} are allowed")
    return value


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        deepest += 1
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
    return deepest


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            raise FileError(f"{path}: is a folder, not a file")
        return path.stat().st_size
    except FileNotFoundError as error:
        there = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise FileError(
            f"{path}: there is no such file" + (f"; the folder holds: {', '.join(there)}" if there else "")
        ) from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: can't be read ({error})") from error


def _refuse_pickle(path: Path, head: bytes) -> None:
    zipped = head[:4] == b"PK\x03\x04"
    pickled = len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and any(head[3:8])
    if path.suffix.lower() in PICKLES or zipped or pickled:
        raise FileError(
            f"{path}: is a pickle or an archive of one; loading it could run any program, so rankfold never does. "
            "Ask for (or save again as) .safetensors"
        )


def _safe_name(name: str) -> bool:
    return bool(name) and len(name) <= 512 and name.isprintable() and not any(part in name for part in ("/", "\\", ".."))


def read_header(path: str | Path, limits: Limits = LIMITS) -> Header:
    """The header of a safetensors file, checked against the file's true size and against `limits`; reads nothing else.

    Raises:
        FileError: a pickle; a header that is too large, damaged, or repeats a key; an unknown dtype; a name with path characters;
            offsets that overlap, leave holes, or point outside the file (a truncated download); more than `limits` allow.
    """
    path = Path(path)
    size = _size(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            _refuse_pickle(path, head)
            if len(head) < 8:
                raise FileError(f"{path}: {size} bytes are too few for a safetensors file; the download is empty or was cut off")
            (length,) = struct.unpack("<Q", head)
            if length > limits.header_bytes:
                raise FileError(
                    f"{path}: claims a header of {length} bytes; {limits.header_bytes} are allowed. "
                    "It is no safetensors file, or a hostile one"
                )
            if length > size - 8:
                raise FileError(f"{path}: the header of {length} bytes does not fit into {size} bytes; the file is truncated")
            data = file.read(length)
    except OSError as error:
        raise FileError(f"{path}: can't be read ({error.strerror or error})") from error
    raw = _parse(data, path, "the safetensors header", limits.json_depth)
    if not isinstance(raw, dict):
        raise FileError(f"{path}: the safetensors header is a {type(raw).__name__}, not an object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ must hold text only")
    if len(raw) > limits.tensors:
        raise FileError(f"{path}: {len(raw)} tensors; {limits.tensors} are allowed")
    tensors = {name: _info(path, name, value, limits) for name, value in raw.items()}
    _check_layout(path, tensors, size - 8 - length, limits)
    return Header(tensors, metadata)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _info(path: Path, name: str, value: Any, limits: Limits) -> TensorInfo:
    if not _safe_name(name):
        raise FileError(f"{path}: the tensor name {name[:80]!r} is empty, too long, or holds path or control characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{path}: tensor {name!r}: its record must hold dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FileError(f"{path}: tensor {name!r}: unknown dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > limits.dimensions or not all(map(_is_size, shape)):
        raise FileError(f"{path}: tensor {name!r}: shape {str(shape)[:80]} is not a list of at most {limits.dimensions} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise FileError(f"{path}: tensor {name!r}: data_offsets {str(offsets)[:80]} are not two positions")
    need = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != need:
        raise FileError(
            f"{path}: tensor {name!r}: {dtype} {shape} needs {need} bytes, its offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], available: int, limits: Limits) -> None:
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            problem = "overlaps the one before it" if info.start < end else "leaves a hole before it"
            raise FileError(f"{path}: tensor {name!r} {problem} (starts at byte {info.start}, expected {end})")
        end = info.stop
    if end > limits.total_bytes:
        raise FileError(f"{path}: {end} bytes of tensors; {limits.total_bytes} are allowed")
    if end > available:
        raise FileError(f"{path}: is truncated: the tensors need {end} bytes, {available} are there. Download or copy it again")
    if end < available:
        raise FileError(f"{path}: {available - end} bytes follow the last tensor; the file is damaged or hides something")


def read_tensors(path: str | Path, limits: Limits = LIMITS, finite: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Args:
        limits: what the file may claim; checked before allocation.
        finite: refuse NaN and Inf, naming the tensor.

    Raises:
        FileError: whatever `read_header` refuses, or a tensor with NaN or Inf.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_tensors(path, {"layer.A": torch.ones(2, 3)})
    >>> read_tensors(path)["layer.A"].sum()
    tensor(6.)
    >>> _ = path.write_bytes(path.read_bytes()[:-4])
    >>> read_tensors(path)
    Traceback (most recent call last):
    rankfold.errors.FileError: ...is truncated: the tensors need 24 bytes, 20 are there...
    """
    path = Path(path)
    read_header(path, limits)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise FileError(f"{path}: {error}") from error
    if finite:
        for name, tensor in tensors.items():
            if not _finite(tensor):
                raise FileError(
                    f"{path}: tensor {name!r} holds NaN or Inf; training diverged before it was saved, or the file is damaged"
                )
    return tensors


def _finite(t: Tensor) -> bool:
    if not t.is_floating_point():
        return True
    t = t.float() if t.element_size() == 1 else t
    return bool(torch.isfinite(t).all())


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, finite: bool = True
) -> None:
    """Write a safetensors file as a whole, or not at all. Tensors that share memory are stored apart.

    Raises:
        FileError: a name that `read_tensors` would refuse, a full disk, a place that can't be written.
        NumericError: NaN or Inf, with the name of the tensor (unless finite=False).
    """
    path = Path(path)
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name in sorted(tensors):
        if not _safe_name(name):
            raise FileError(
                f"{path}: can't store a tensor under the name {name[:80]!r}: empty, too long, or path or control characters"
            )
        t = tensors[name].detach().to("cpu").contiguous()
        if finite and not _finite(t):
            raise NumericError(f"{path}: tensor {name!r} holds NaN or Inf and is not saved; the previous file is untouched")
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.numel() * t.element_size():
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        ready[name] = t

    def write(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(ready, temporary, metadata=dict(metadata or {}) or None)
        except SafetensorError as error:
            raise _as_os_error(error) from error

    atomic_file(path, write)


def _as_os_error(error: SafetensorError) -> OSError:
    """The library reports a full disk in words only; give it back its number, so that one message covers both ways."""
    text = str(error)
    number = next((n for n in (28, 122, 13, 30) if f"os error {n})" in text), 5)
    return OSError(number, os.strerror(number) if number != 5 else text)


Kinds = type | tuple[type, ...]


@dataclass(frozen=True)
class Schema:
    """The keys that a JSON object must have, those it may have, and the format's version.

    Args:
        name: what the object is called in messages.
        required, optional: key -> type, or tuple of types (`float` takes integers too, `bool` is no integer).
        version: the newest version that this code reads; the object must then have an integer "schema".
    """

    name: str
    required: Mapping[str, Kinds] = field(default_factory=dict)
    optional: Mapping[str, Kinds] = field(default_factory=dict)
    version: int | None = None


def check_object(value: Any, schema: Schema, where: str) -> dict[str, Any]:
    """The object itself, if it has exactly the keys and types of the schema.

    Raises:
        FileError: not an object; a newer version; unknown keys (with the nearest known ones); missing keys; a wrong type.
    """
    if not isinstance(value, dict):
        raise FileError(f"{where}: {schema.name} must be an object, not {_type_name(value)}")
    known = {**schema.required, **schema.optional}
    if schema.version is not None:
        version = value.get("schema")
        if not isinstance(version, int) or not _is_size(version) or version < 1:
            raise FileError(f'{where}: {schema.name} has no "schema" version; this is not a file of rankfold, or it is damaged')
        if version > schema.version:
            raise FileError(
                f"{where}: {schema.name} is of schema {version}, this rankfold reads up to {schema.version}. "
                "Read it with a newer one: pip install -U rankfold"
            )
        known["schema"] = int
    unknown = sorted(value.keys() - known.keys())
    if unknown:
        close = ", ".join(nearest(unknown[0], known, n=3))
        raise FileError(
            f"{where}: {schema.name} has unknown keys: {', '.join(k[:80] for k in unknown[:8])}; nearest known: {close}"
        )
    missing = sorted(schema.required.keys() - value.keys())
    if missing:
        raise FileError(f"{where}: {schema.name} lacks: {', '.join(missing)}")
    for key, item in value.items():
        if not _fits(item, known[key]):
            raise FileError(f"{where}: {schema.name}: {key} must be {_kinds_name(known[key])}, not {_type_name(item)}")
    return value


def _fits(item: Any, kinds: Kinds) -> bool:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(item, bool):
        return bool in kinds
    return isinstance(item, tuple(int if k is float else k for k in kinds) + kinds)


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a whole number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _kinds_name(kinds: Kinds) -> str:
    samples = {dict: {}, list: [], str: "", bool: True, int: 1, float: 1.0, type(None): None}
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(_type_name(samples.get(k)) for k in kinds)


def read_json(path: str | Path, schema: Schema | None = None, limits: Limits = LIMITS) -> Any:
    """The contents of a JSON file; with a schema, an object that has exactly its keys.

    Raises:
        FileError: too large, too deep, a key twice, NaN, not UTF-8, or not what the schema says.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"rank": 4, "alhpa": 8})
    >>> read_json(path, Schema("options", {"rank": int}, {"alpha": float}))
    Traceback (most recent call last):
    rankfold.errors.FileError: ...options has unknown keys: alhpa; nearest known: alpha
    """
    path = Path(path)
    if _size(path) > limits.json_bytes:
        raise FileError(f"{path}: {_size(path)} bytes of JSON; {limits.json_bytes} are allowed")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: can't be read ({error.strerror or error})") from error
    value = _parse(data, path, "the file", limits.json_depth)
    return value if schema is None else check_object(value, schema, str(path))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys as a whole, or not at all. NaN and Inf are refused: JSON has no such numbers.

    Raises:
        FileError: a value that JSON can't hold, a full disk, a place that can't be written.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
        text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: {error}") from error
    write_text(path, text)

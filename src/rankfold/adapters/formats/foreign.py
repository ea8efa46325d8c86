"""What a reader of a foreign file gives, and what it checks of a header before it reads a tensor: shapes, ranks, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import FileError
from rankfold.linalg import Hadamard, Kronecker, LowRank, Operator, khatri_rao

from ..adapter import Adapter, Entry
from ..files import Limits, TensorInfo
from .numbers import rank_number

__all__ = ["Change", "Foreign", "Layout", "check_shapes", "dtype_names", "shapes_only"]

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
WHOLE = ("I64", "I32")
"""An alpha may be stored as a whole number: torch.tensor(8) in a trainer that casts nothing."""


@dataclass(frozen=True)
class Layout:
    """What a model has, for a reader that knows no models.

    Args:
        sites: (out, in) of the map of every weight that may be changed, by module name.
        parameters: shape of every parameter, by its full name.
    """

    sites: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Change:
    """The change of one weight in the form that its file has it: ΔW = scale · (what `tensors` build).

    Args:
        name: of the module.
        method: whose tensors these are: lora (B, A), hadamard (B1, A1, B2, A2) or kron (P or P1, P2; Q or Q1, Q2).
        scale: alpha / rank.
        rank: inner width of the factors; None where nothing is factored.
        magnitude: [out], the lengths of the rows of W'.
        kernel: of a convolution, where the file tells.

    >>> Change("q", "lora", {"B": torch.ones(3, 1), "A": torch.ones(1, 2)}, 0.5, 1).operator().dense()[0]
    tensor([0.5000, 0.5000])
    """

    name: str
    method: str
    tensors: Mapping[str, Tensor]
    scale: float
    rank: int | None
    magnitude: Tensor | None = None
    kernel: tuple[int, ...] | None = None

    def operator(self) -> Operator:
        """ΔW: [out, in], before any rescaling of rows."""
        t = self.tensors
        if self.method == "lora":
            return LowRank(t["B"], t["A"], scale=self.scale)
        if self.method == "hadamard":
            return Hadamard(LowRank(t["B1"], t["A1"], scale=self.scale), LowRank(t["B2"], t["A2"]))
        P = t["P"] if "P" in t else t["P1"] @ t["P2"]
        return Kronecker(self.scale * P, t["Q"] if "Q" in t else t["Q1"] @ t["Q2"])

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator().shape

    def product(self) -> Change:
        """The same ΔW as B A, exactly: rank r² for a Hadamard product (Khatri-Rao), r·s for a Kronecker product of factors of
        ranks r and s, never above min(out, in).

        >>> B, A = torch.ones(9, 2), torch.ones(2, 5)
        >>> loha = Change("q", "hadamard", {"B1": B, "A1": A, "B2": B, "A2": A}, 1.0, 2)
        >>> loha.product().rank, torch.equal(loha.product().operator().dense(), loha.operator().dense())
        (4, True)
        """
        if self.method == "lora":
            return self
        t = {n: v.double() for n, v in self.tensors.items()}
        out, in_ = self.shape
        if self.method == "hadamard":
            pairs, join = [(t["B1"], t["A1"]), (t["B2"], t["A2"])], lambda a, b: khatri_rao(LowRank(*a), LowRank(*b)).factors()
        else:
            pairs, join = [_factors(t, "P"), _factors(t, "Q")], lambda a, b: (torch.kron(a[0], b[0]), torch.kron(a[1], b[1]))
        rank = pairs[0][1].shape[0] * pairs[1][1].shape[0]
        if rank < min(out, in_):
            B, A = join(*pairs)
        else:
            D = replace(self, tensors=t, scale=1.0).operator().dense()
            B, A = (D, torch.eye(in_)) if in_ <= out else (torch.eye(out), D)
        dtype = torch.promote_types(next(iter(self.tensors.values())).dtype, torch.float32)
        return replace(self, method="lora", tensors={"B": B.to(dtype), "A": A.to(dtype)}, rank=A.shape[0])


def _factors(t: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A factor of a Kronecker product as two; a whole one beside the smaller identity."""
    if name not in t:
        return t[f"{name}1"], t[f"{name}2"]
    rows, columns = t[name].shape
    return (t[name], torch.eye(columns).double()) if columns <= rows else (torch.eye(rows).double(), t[name])


@dataclass(frozen=True, eq=False)
class Foreign:
    """The content of a file of another tool.

    Args:
        format: kohya, diffusers or torchtune.
        changes: by module name, or by the file's own name where no model was given.
        differences: what is added to a parameter (weight or bias), by its full name.
        dtypes: names of the dtypes of the stored tensors.
        metadata: what else the file says.
    """

    format: str
    changes: Mapping[str, Change]
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(sorted({c.method for c in self.changes.values()}))

    def adapter(self, extras: Mapping[str, Tensor] | None = None) -> Adapter:
        """In normal form, exactly; for products of two factors only.

        Raises:
            FileError: a change that is no such product.
        """
        other = [c for c in self.changes.values() if c.method != "lora"]
        if other:
            raise FileError(f"{other[0].name}: is a change of kind {other[0].method}, no product of two factors")
        entries = [
            Entry(
                c.name, c.tensors["B"], c.tensors["A"], c.scale, "linear" if c.kernel is None else "convolution",
                magnitude=c.magnitude, kernel=c.kernel,
            )
            for c in self.changes.values()
        ]  # fmt: skip
        return Adapter.of(entries, extras, {**self.metadata, "format": self.format, "method": "lora"})


def dtype_names(infos: Iterable[TensorInfo]) -> tuple[str, ...]:
    """Names of the dtypes of tensors with dimensions (an alpha's says nothing).

    >>> dtype_names([TensorInfo("F16", (2, 2), 0, 8), TensorInfo("F32", (), 8, 12)])
    ('float16',)
    """
    return tuple(sorted({str(DTYPES[i.dtype]).removeprefix("torch.") for i in infos if i.shape and i.dtype in DTYPES}))


def shapes_only(path: Path, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Tensors of the shapes that a header promises, without storage: what is built from them costs nothing and shows what fits.

    Raises:
        FileError: a tensor that is not floating point (an alpha may be a whole number).
    """
    for name, info in infos.items():
        if info.dtype not in DTYPES and not (name.endswith(".alpha") and info.dtype in WHOLE):
            raise FileError(f"{path}: tensor {name!r} is {info.dtype}; rankfold reads changes in {', '.join(DTYPES)}")
    return {n: torch.empty(i.shape, dtype=DTYPES.get(i.dtype, torch.int64), device="meta") for n, i in infos.items()}


def check_shapes(path: Path, change: Change, key: str, layout: Layout | None, limits: Limits) -> None:
    """Whether what was built from `shapes_only` fits the model, and what it would take.

    Raises:
        FileError: another shape than the model's, a rank that is none, or more bytes than `limits` allow.
    """
    if change.rank is not None:
        rank_number(change.rank, f"{path}: {key}: rank")
    need = sum(4 * math.prod(t.shape) for t in change.tensors.values())
    if need > limits.total_bytes:
        raise FileError(f"{path}: {key}: its factors would take {need} bytes; {limits.total_bytes} are allowed")
    if not all(change.shape):
        raise FileError(f"{path}: {key}: changes an empty map {change.shape}")
    if change.magnitude is not None and change.magnitude.shape != (change.shape[0],):
        raise FileError(f"{path}: {key}: {change.magnitude.numel()} magnitudes for {change.shape[0]} rows")
    if layout is not None and change.shape != layout.sites[change.name]:
        raise FileError(
            f"{path}: {key} changes a map {change.shape}; in this model {change.name} is {tuple(layout.sites[change.name])}"
        )

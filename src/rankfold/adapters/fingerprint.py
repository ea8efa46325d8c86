"""Which base an adapter belongs to: a hash and a small sample of every adapted weight of the source checkpoint.

The hash says "the same numbers"; the sample recognises the same source in another storage (cast,
or quantised), which a hash can't.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankfold.linalg.sharded import whole

__all__ = ["NEAR", "Comparison", "Fingerprint", "TensorPrint", "compare", "fingerprint"]

HASHED = 4096  # entries of a tensor that enter its hash
SAMPLED = 64  # entries that are kept as numbers
NEAR = 0.25  # relative distance of a copy in 4 bits, which is near 0.1; of unrelated weights, 1.4
NEARER = {"int8": 0.1, "float8": 0.1}  # int8 is near 0.01, with rows of outliers near 0.05

# half the distance between neighbours, relative: what rounding to that dtype can change
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = 2.0**-24  # float16 rounds below its smallest normal number in steps of this size

Verdict = Literal["same", "same source, other storage", "different"]


@dataclass(frozen=True, eq=False)
class TensorPrint:
    """One weight: its shape, the storage that it was read from, a hash of strided entries, and a sample of them [<= 64]."""

    shape: tuple[int, ...]
    dtype: str
    hash: str
    sample: Tensor


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """The prints of several weights, by name. Equal fingerprints have equal `hash`."""

    tensors: dict[str, TensorPrint]

    @property
    def hash(self) -> str:
        """One hash of all names, shapes and hashes; storage does not enter, values do."""
        parts = [[name, list(p.shape), p.hash] for name, p in sorted(self.tensors.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)


def _strided(t: Tensor, count: int) -> Tensor:
    """At most `count` entries at equal steps, row-major, without copying the whole tensor; float64."""
    n = t.numel()
    k = min(n, count)
    flat = torch.arange(k, device=t.device) * n // max(k, 1)
    if t.is_contiguous():
        values = t.reshape(-1)[flat]
    else:
        values = t[torch.unravel_index(flat, t.shape)] if t.ndim else t.reshape(1)
    values = values.detach().to("cpu")
    values = (values.float() if values.is_floating_point() and values.element_size() == 1 else values).double()
    return values + 0.0  # −0.0 and 0.0 are one number


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor], storage: str | None = None) -> Fingerprint:
    """The fingerprint of weights given by name: 4096 entries of each at equal steps, hashed as float64.

    Args:
        tensors: name -> weight, of any shape; a quantised base gives its dequantised values. One that is cut over processes is
            gathered: each process must take part.
        storage: name of the format that they come from ("nf4", "int8"); None means each tensor's own dtype.

    >>> W = torch.arange(6.0).view(2, 3)
    >>> fingerprint({"w": W}) == fingerprint({"w": W.double()}), fingerprint({"w": W}) == fingerprint({"w": W + 1})
    (True, False)
    """
    prints = {}
    for name, stored in tensors.items():
        t = whole(stored)
        digest = hashlib.sha256(json.dumps(list(t.shape)).encode() + _strided(t, HASHED).numpy().astype("<f8").tobytes())
        label = storage or str(t.dtype).removeprefix("torch.")
        prints[name] = TensorPrint(tuple(t.shape), label, digest.hexdigest(), _strided(t, SAMPLED).float())
    return Fingerprint(prints)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: the verdict, the largest relative distance ‖a − b‖ / ‖a‖ of the samples, where it is, and why."""

    verdict: Verdict
    distance: float
    worst: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


def compare(source: Fingerprint, other: Fingerprint) -> Comparison:
    """Whether `other` holds the weights of `source`; only names in `source` are looked at.

    "same": every hash agrees. "same source, other storage": between float formats, every sampled entry differs by no more than
    the rounding of the coarser format; from or to a quantised format, the hashes of the source agree, or else the samples lie
    within a relative distance of 0.1 (8 bits) or 0.25 (4 bits). Anything else is "different": a fine-tuned copy changes small
    entries by more than rounding does. (A change below the rounding of a quantised format can't be told from it by the samples.)

    >>> W = torch.linspace(-1, 1, 600).view(20, 30)
    >>> a = fingerprint({"w": W})
    >>> compare(a, fingerprint({"w": W.bfloat16()})).verdict, compare(a, fingerprint({"w": W * 1.01})).verdict
    ('same source, other storage', 'different')
    """
    distance, worst, same = 0.0, None, True
    for name, a in source.tensors.items():
        b = other.tensors.get(name)
        if b is None:
            return Comparison("different", float("inf"), name, f"the other base has no weight {name!r}")
        if a.shape != b.shape:
            return Comparison(
                "different", float("inf"), name, f"{name} is {list(a.shape)} in one and {list(b.shape)} in the other"
            )
        if a.hash == b.hash and torch.equal(a.sample, b.sample):
            continue
        same = False
        d = _distance(a.sample, b.sample)
        if worst is None or d > distance:
            distance, worst = d, name
        if a.hash != b.hash and not _rounded(a, b):
            return Comparison(
                "different", d, name, f"{name} differs by {d:.2g} of its size, more than {a.dtype} -> {b.dtype} explains"
            )
    if same:
        return Comparison("same", 0.0, None, f"{len(source.tensors)} weights agree")
    return Comparison("same source, other storage", distance, worst, f"largest relative distance {distance:.2g}, at {worst}")


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    size = float(torch.linalg.vector_norm(a))
    gap = float(torch.linalg.vector_norm(a - b))
    return gap / size if size else (0.0 if gap == 0.0 else float("inf"))


def _rounded(a: TensorPrint, b: TensorPrint) -> bool:
    if a.sample.shape != b.sample.shape:
        return False
    bounds = [NEARER.get(p.dtype, NEAR) for p in (a, b) if p.dtype not in ROUNDING]
    if bounds:
        return _distance(a.sample, b.sample) <= math.hypot(*bounds)
    if a.dtype == b.dtype:  # one format, other numbers
        return False
    x, y = a.sample.double(), b.sample.double()
    step = ROUNDING[a.dtype] + ROUNDING[b.dtype] + ROUNDING["float32"]  # the samples themselves are float32
    return bool(((x - y).abs() <= step * torch.maximum(x.abs(), y.abs()) + SMALLEST).all())

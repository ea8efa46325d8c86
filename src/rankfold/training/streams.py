"""Statistics that several inits share: principal directions of a site's inputs, and singular triplets of its mean gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rankfold.linalg import at_least_float32
from rankfold.linalg._matrix import wide
from rankfold.linalg.decompositions import truncated_svd
from rankfold.linalg.random import Random
from rankfold.linalg.streaming import IncrementalSVD

from .contracts import Statistic

__all__ = ["GradientSketch", "GradientSum", "InputDirections", "ranks_of_sketch"]

SPARE = 10  # components beyond those asked for: the last of a truncated stream settle slowly


class InputDirections(Statistic):
    """Leading principal directions of a site's input rows, by incremental SVD.

    Done once every component asked for has turned by less than `tolerance` (cosine) in the last batch.

    Args:
        width: n, of the input rows.
        rank: components wanted, at most n.
        center: about the mean; else about zero.
        tolerance: cosine between two successive states from which a component counts as settled; above 1 takes all data.
        iterations: of the randomised inner SVD; None is the exact one where that is cheap.

    >>> from rankfold.linalg.random import Random
    >>> stream = InputDirections(width=6, rank=2)
    >>> rows = Random("rows").normal((300, 6)) * torch.tensor([9.0, 4.0, 1.0, 0.1, 0.1, 0.1])
    >>> for batch in rows.split(100):
    ...     stream.observe(batch)
    >>> stream.directions().abs().argmax(-1), stream.done
    (tensor([0, 1]), True)
    """

    source: ClassVar[str] = "input"

    def __init__(
        self, width: int, rank: int, center: bool = True, tolerance: float = 0.99, iterations: int | None = None
    ) -> None:
        self.width, self.rank, self.tolerance = width, min(rank, width), tolerance
        self.svd = IncrementalSVD(min(self.rank + SPARE, width), center, iterations=iterations)
        self.settled = torch.zeros(0, dtype=torch.bool)

    def observe(self, value: Tensor) -> None:
        before = self.svd.Vh
        self.svd.update(value)
        after = self.svd.Vh
        if before is not None and after is not None and len(before) >= self.rank:
            self.settled = (before[: self.rank] * after[: self.rank]).sum(-1) >= self.tolerance

    @property
    def done(self) -> bool:
        return len(self.settled) == self.rank and bool(self.settled.all())

    @property
    def nbytes(self) -> int:
        return 4 * self.svd.rank * (self.width + 1) + 16 * self.width

    def directions(self) -> Tensor:
        """[at most rank, n]: orthonormal rows, the leading one first."""
        assert self.svd.Vh is not None
        return self.svd.Vh[: self.rank]

    def singular_values(self) -> Tensor:
        """[at most rank]."""
        assert self.svd.S is not None
        return self.svd.S[: self.rank]

    def explained(self) -> Tensor:
        """[at most rank]: share of all variance along each direction."""
        return self.svd.explained_variance_ratio()[: self.rank]

    def state(self) -> dict[str, Tensor]:
        svd, (k, n) = self.svd, (self.svd.rank, self.width)
        wanted = {"Vh": (k, n), "S": (k,), "mean": (n,), "square_sum": (n,)}
        state = {"count": torch.tensor([svd.count], dtype=torch.int64)}
        for name, shape in wanted.items():
            held = getattr(svd, name)
            full = torch.zeros(shape, dtype=torch.float64)
            if held is not None:
                full[tuple(slice(0, size) for size in held.shape)] = held.to(full)
            state[name] = full
        return state

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        joined = IncrementalSVD(self.svd.rank, self.svd.center, self.svd.method, self.svd.iterations)
        like = self.svd.Vh
        for state in states:
            if not int(state["count"]):
                continue
            part = IncrementalSVD(self.svd.rank, self.svd.center, self.svd.method, self.svd.iterations)
            part.count = int(state["count"])
            dtype, device = (like.dtype, like.device) if like is not None else (torch.float32, state["Vh"].device)
            held = int((state["S"] > 0).sum().clamp_min(1))
            part.Vh, part.S = (state[name][:held].to(device, dtype) for name in ("Vh", "S"))
            part.mean, part.square_sum = (state[name].to(device) for name in ("mean", "square_sum"))
            joined = joined + part
        self.svd = joined


class GradientSum(Statistic):
    """The mean gradient of a weight [out, in], summed whole; after the pass only its leading singular triplets are kept.

    Args:
        shape: (out, in).
        rank: triplets kept, at most min(out, in).
        iterations: of a randomised SVD; None is the exact one where that is cheap.

    >>> total = GradientSum((3, 2), rank=1)
    >>> total.observe(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    >>> total.observe(torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> total.finish()
    >>> total.svd()[1]
    tensor([3.])
    """

    source: ClassVar[str] = "gradient"

    def __init__(self, shape: tuple[int, int], rank: int, iterations: int | None = None) -> None:
        self.shape, self.rank, self.iterations = shape, min(rank, *shape), iterations
        self.sum: Tensor | None = None
        self.count = 0
        self.triplets: tuple[Tensor, Tensor, Tensor] | None = None

    def observe(self, value: Tensor) -> None:
        value = at_least_float32(value)
        if self.sum is None:
            self.sum = value.clone()
        else:
            self.sum += value
        self.count += 1

    @property
    def nbytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def state(self) -> dict[str, Tensor]:
        held = torch.zeros(self.shape) if self.sum is None else self.sum
        return {"sum": held.to(torch.float64), "count": torch.tensor([self.count])}

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        like = torch.zeros(()) if self.sum is None else self.sum
        self.sum = torch.stack([s["sum"] for s in states]).sum(0).to(like)
        self.count = sum(int(s["count"]) for s in states)

    def finish(self) -> None:
        if self.sum is not None:
            self.triplets = truncated_svd(self.sum / max(self.count, 1), self.rank, iterations=self.iterations)
        self.sum = None

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, rank], S [rank], Vh [rank, in] of the mean gradient."""
        assert self.triplets is not None
        return self.triplets


def ranks_of_sketch(shape: tuple[int, int], rank: int) -> tuple[int, int]:
    """(q, l) for `rank` triplets: 2·rank columns of Ω (at least 10 to spare) and 2·q + 1 rows of Ψ, where the matrix has them."""
    q = min(max(2 * rank, rank + SPARE), *shape)
    return q, min(2 * q + 1, shape[0])


class GradientSketch(Statistic):
    """The leading singular triplets of a mean gradient G [out, in] that is never held: Y = GΩ and Z = ΨG are linear in G.

    With Q = orth(Y), G ≈ Q (ΨQ)⁺ Z: one pass, O(rank·(out + in)) numbers (Tropp, Yurtsever, Udell and Cevher, 2017). Exact for
    a G of rank at most 2·rank; else good where the spectrum falls.

    Args:
        shape: (out, in).
        rank: triplets wanted; sizes as in `ranks_of_sketch`.
        key: of the random Ω and Ψ, the same in every process.

    >>> from rankfold.linalg.random import Random
    >>> G = Random("B").normal((20, 2)) @ Random("A").normal((2, 12))
    >>> sketch = GradientSketch((20, 12), rank=2)
    >>> sketch.observe(G)
    >>> sketch.finish()
    >>> U, S, Vh = sketch.svd()
    >>> torch.allclose(U * S @ Vh, G, atol=1e-4)
    True
    """

    source: ClassVar[str] = "gradient"

    def __init__(self, shape: tuple[int, int], rank: int, key: str = "") -> None:
        self.shape, self.rank = shape, min(rank, *shape)
        self.q, self.l = ranks_of_sketch(shape, self.rank)
        self.Omega = Random("gradient sketch", key, "range").normal((shape[1], self.q))
        self.Psi = Random("gradient sketch", key, "co-range").normal((self.l, shape[0]))
        self.Y: Tensor | None = None
        self.Z: Tensor | None = None
        self.dtype = torch.float32
        self.count = 0
        self.triplets: tuple[Tensor, Tensor, Tensor] | None = None

    def observe(self, value: Tensor) -> None:
        G = at_least_float32(value)
        self.dtype = G.dtype
        Y, Z = wide(G @ self.Omega.to(G)), wide(self.Psi.to(G) @ G)
        self.Y = Y if self.Y is None else self.Y + Y
        self.Z = Z if self.Z is None else self.Z + Z
        self.count += 1

    @property
    def nbytes(self) -> int:
        out, in_ = self.shape
        return 8 * (out * self.q + self.l * in_) + 4 * (in_ * self.q + self.l * out)

    def state(self) -> dict[str, Tensor]:
        out, in_ = self.shape
        Y = torch.zeros(out, self.q, dtype=torch.float64) if self.Y is None else self.Y
        Z = torch.zeros(self.l, in_, dtype=torch.float64) if self.Z is None else self.Z
        return {"Y": Y, "Z": Z, "count": torch.tensor([self.count])}

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        self.Y, self.Z = (torch.stack([s[name] for s in states]).sum(0) for name in ("Y", "Z"))
        self.count = sum(int(s["count"]) for s in states)

    def finish(self) -> None:
        if self.Y is not None and self.Z is not None:
            Q = torch.linalg.qr(self.Y).Q  # [out, q]
            X = torch.linalg.pinv(self.Psi.to(Q) @ Q) @ (self.Z / max(self.count, 1))  # [q, in]
            U, S, Vh = truncated_svd(X, self.rank)
            self.triplets = (Q @ U).to(self.dtype), S.to(self.dtype), Vh.to(self.dtype)
        self.Y = self.Z = None

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, rank], S [rank], Vh [rank, in] of the mean gradient."""
        assert self.triplets is not None
        return self.triplets

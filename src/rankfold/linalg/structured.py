"""Maps with structure other than low rank: diagonal, Kronecker, Hadamard, sparse, block diagonal, blockwise, tensor ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.errors import OptionError

from .operator import Operator, across, at_least_float32, like

__all__ = [
    "BlockDiagonal",
    "Blockwise",
    "Diagonal",
    "Elementwise",
    "Hadamard",
    "Kronecker",
    "Sparse",
    "TensorRing",
    "tiled_identity",
]


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """diag(d), d: [*batch, n]. Small gains matter, so the product is formed in the dtype of d where that is finer.

    >>> import torch
    >>> Diagonal(torch.tensor([2.0, 3.0])).matmul(torch.ones(2)).tolist()
    [2.0, 3.0]
    """

    d: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.d.shape[-1], self.d.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.d.shape[:-1])

    def matmul(self, x: Tensor) -> Tensor:
        return (x * across(self.d)).to(x.dtype)

    def rmatmul(self, g: Tensor) -> Tensor:
        return self.matmul(g)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.d)

    def row_sqnorm(self) -> Tensor:
        return at_least_float32(self.d).square()

    def flops(self, tokens: int) -> int:
        return tokens * self.shape[0]


@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """P ⊗ Q with P: [p, q], Q: [a, b]: block (i, j) is P_ij Q; the map is [p·a, q·b].

    >>> import torch
    >>> P, Q = torch.randn(2, 3), torch.randn(4, 5)
    >>> torch.allclose(Kronecker(P, Q).dense(), torch.kron(P, Q))
    True
    """

    P: Tensor
    Q: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.P.shape[-2] * self.Q.shape[-2], self.P.shape[-1] * self.Q.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.P.shape[:-2])

    def _q_first(self) -> bool:
        (p, q), (a, b) = self.P.shape[-2:], self.Q.shape[-2:]
        return q * a * (b + p) <= p * b * (q + a)

    def _apply(self, x: Tensor, P: Tensor, Q: Tensor, q_first: bool) -> Tensor:
        X = x.reshape(*x.shape[:-1], P.shape[-1], Q.shape[-1])  # [..., q, b]
        if self.batch:
            P, Q = P.unsqueeze(-3), Q.unsqueeze(-3)  # [E, 1, ., .] against [E, tokens, q, b]
        Y = P @ (X @ Q.mT) if q_first else (P @ X) @ Q.mT  # [..., p, a]
        return Y.flatten(-2)

    def matmul(self, x: Tensor) -> Tensor:
        return self._apply(x, like(self.P, x), like(self.Q, x), self._q_first())

    def rmatmul(self, g: Tensor) -> Tensor:
        return self._apply(g, like(self.P, g).mT, like(self.Q, g).mT, not self._q_first())

    def dense(self) -> Tensor:
        P, Q = at_least_float32(self.P), at_least_float32(self.Q)
        return (P[..., :, None, :, None] * Q[..., None, :, None, :]).reshape(*self.batch, *self.shape)

    def row_sqnorm(self) -> Tensor:
        P, Q = (at_least_float32(t).square().sum(-1) for t in (self.P, self.Q))
        return (P[..., :, None] * Q[..., None, :]).flatten(-2)

    def columns(self, index: Tensor) -> Tensor:
        j, k = index // self.Q.shape[-1], index % self.Q.shape[-1]
        return (self.P.mT[..., j, :, None] * self.Q.mT[..., k, None, :]).flatten(-2)

    def rows(self, index: Tensor) -> Tensor:
        P, Q = at_least_float32(self.P), at_least_float32(self.Q)
        i, k = index // Q.shape[-2], index % Q.shape[-2]
        return (P[..., i, :, None] * Q[..., k, None, :]).flatten(-2)

    def row_dot(self, other: Operator) -> Tensor:
        """Row block by row block of `other`, contracted in the order of `matmul`: never out x in."""
        if self.batch or other.batch:
            return super().row_dot(other)
        P, Q = at_least_float32(self.P), at_least_float32(self.Q)
        a, b = Q.shape
        block = torch.arange(a, device=self.device)
        dots = []
        for i, p in enumerate(P):  # [q]
            own = other.rows(block + i * a).view(a, -1, b)  # [a, q, b]
            dots.append((own @ Q.unsqueeze(-1).to(own.dtype)).squeeze(-1) @ p.to(own.dtype))
        return torch.cat(dots)

    def flops(self, tokens: int) -> int:
        (p, q), (a, b) = self.P.shape[-2:], self.Q.shape[-2:]
        return 2 * tokens * min(q * a * (b + p), p * b * (q + a))

    def dense_flops(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Hadamard(Operator):
    """left ∘ right, entry by entry."""

    left: Operator
    right: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape

    @property
    def batch(self) -> tuple[int, ...]:
        return max(self.left.batch, self.right.batch, key=len)

    def dense(self) -> Tensor:
        return at_least_float32(self.left.dense()) * at_least_float32(self.right.dense())

    def columns(self, index: Tensor) -> Tensor:
        return self.left.columns(index) * self.right.columns(index)

    def rows(self, index: Tensor) -> Tensor:
        return at_least_float32(self.left.rows(index)) * at_least_float32(self.right.rows(index))

    def rank_bound(self) -> int:
        return min(self.left.rank_bound() * self.right.rank_bound(), *self.shape)

    def flops(self, tokens: int) -> int:
        return self.dense_flops() + 2 * tokens * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        return self.left.dense_flops() + self.right.dense_flops() + self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Elementwise(Operator):
    """f of every entry of another map, with f(entries, *numbers): its rank is not bounded by that of the map.

    >>> import torch
    >>> from rankfold.linalg import LowRank
    >>> Elementwise(LowRank(torch.ones(1, 1), torch.tensor([[1.0, -2.0]])), torch.pow, (2,)).dense().tolist()
    [[1.0, 4.0]]
    """

    inner: Operator
    function: Callable[..., Tensor]
    numbers: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def batch(self) -> tuple[int, ...]:
        return self.inner.batch

    def dense(self) -> Tensor:
        return self.function(at_least_float32(self.inner.dense()), *self.numbers)

    def columns(self, index: Tensor) -> Tensor:
        return self.function(self.inner.columns(index), *self.numbers)

    def rows(self, index: Tensor) -> Tensor:
        return self.function(at_least_float32(self.inner.rows(index)), *self.numbers)

    def dense_flops(self) -> int:
        return self.inner.dense_flops() + self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Sparse(Operator):
    """`values` [*batch, k] at distinct flat positions (row · in + column, sorted) of a [size_out, size_in] map: `index` [k], one
    for all maps of a batch, or [*batch, k].

    >>> import torch
    >>> op = Sparse(torch.tensor([5.0]), torch.tensor([1]), 2, 3)
    >>> op.dense().tolist()
    [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]
    """

    values: Tensor
    index: Tensor
    size_out: int
    size_in: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size_out, self.size_in)

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def _positions(self) -> Tensor:
        return self.index.long().expand(self.values.shape)

    def _scatter(self, x: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
        if self.index.ndim == 1:
            picked = x.index_select(-1, source) * across(like(self.values, x))
            return x.new_zeros(*picked.shape[:-1], size).index_add(-1, target, picked)
        batch = (*self.batch, *x.shape[-2:])  # positions of their own for each map
        shape = (*batch[:-1], self.values.shape[-1])
        picked = x.expand(batch).gather(-1, source.unsqueeze(-2).expand(shape)) * across(like(self.values, x))
        return x.new_zeros(*batch[:-1], size).scatter_add(-1, target.unsqueeze(-2).expand(shape), picked)

    def matmul(self, x: Tensor) -> Tensor:
        rows, columns = self.index.long() // self.size_in, self.index.long() % self.size_in
        return self._scatter(x, columns, rows, self.size_out)

    def rmatmul(self, g: Tensor) -> Tensor:
        rows, columns = self.index.long() // self.size_in, self.index.long() % self.size_in
        return self._scatter(g, rows, columns, self.size_in)

    def dense(self) -> Tensor:
        values = at_least_float32(self.values)
        flat = values.new_zeros(*self.batch, self.size_out * self.size_in)
        return flat.scatter_add(-1, self._positions(), values).unflatten(-1, self.shape)

    def add_to(self, W: Tensor) -> Tensor:
        total = at_least_float32(W).flatten(-2)
        total = total.expand(*self.batch, total.shape[-1]).scatter_add(-1, self._positions(), self.values.to(total.dtype))
        return total.unflatten(-1, self.shape).to(W.dtype)

    def row_sqnorm(self) -> Tensor:
        values = at_least_float32(self.values)
        return values.new_zeros(*self.batch, self.size_out).scatter_add(-1, self._positions() // self.size_in, values.square())

    def rank_bound(self) -> int:
        return min(self.values.shape[-1], *self.shape)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.values.shape[-1]

    def dense_flops(self) -> int:
        return self.size_out * self.size_in


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Operator):
    """diag(K_1, ..., K_n) with blocks: [*batch, n, a, b]; the map is [n·a, n·b]."""

    blocks: Tensor
    rotation: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        n, a, b = self.blocks.shape[-3:]
        return (n * a, n * b)

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.blocks.shape[:-3])

    @property
    def orthogonal(self) -> bool:
        return self.rotation

    def _apply(self, x: Tensor, blocks: Tensor) -> Tensor:
        # blocks lead, so that this is one batched product: [n, tokens, b] @ [n, b, a]
        n, a, b = blocks.shape[-3:]
        tokens = math.prod(x.shape[len(self.batch) : -1])
        flat = x.reshape(*self.batch, tokens, n, b).transpose(-3, -2)
        y = (flat @ blocks.mT).transpose(-3, -2)
        return y.reshape(*x.shape[:-1], n * a)

    def matmul(self, x: Tensor) -> Tensor:
        return self._apply(x, like(self.blocks, x))

    def rmatmul(self, g: Tensor) -> Tensor:
        return self._apply(g, like(self.blocks, g).mT)

    def dense(self) -> Tensor:
        n, a, b = self.blocks.shape[-3:]
        out = self.blocks.new_zeros(*self.batch, n, a, n, b)
        k = torch.arange(n, device=self.device)
        out[..., k, :, k, :] = self.blocks.movedim(-3, 0)
        return out.reshape(*self.batch, n * a, n * b)

    def flops(self, tokens: int) -> int:
        n, a, b = self.blocks.shape[-3:]
        return 2 * tokens * n * a * b

    def dense_flops(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Blockwise(Operator):
    """Every r x r block of a base times the block of its row: Δ_jk = W_jk C_j, with blocks C: [*batch, out/r, r, r]."""

    base: Operator
    blocks: Tensor

    def __post_init__(self) -> None:
        n, r, _ = self.blocks.shape[-3:]
        if self.base.shape[0] != n * r or self.base.shape[1] % r:
            raise OptionError(f"{n} blocks of {r} x {r} do not tile a map of shape {self.base.shape}: r must divide both sizes")

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def batch(self) -> tuple[int, ...]:
        return self.base.batch

    def dense(self) -> Tensor:
        n, r, _ = self.blocks.shape[-3:]
        W = at_least_float32(self.base.dense())
        rows = W.reshape(*self.batch, n, -1, r)  # row block j as one tall matrix [r · in/r, r]
        return (rows @ at_least_float32(self.blocks)).reshape(W.shape)

    def flops(self, tokens: int) -> int:
        return self.dense_flops() + 2 * tokens * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        return 2 * self.shape[0] * self.shape[1] * self.blocks.shape[-1] + self.base.dense_flops()


@dataclass(frozen=True, eq=False)
class TensorRing(Operator):
    """Δ[i_1..i_k, j_1..j_l] = trace(G_1[i_1] ... G_k[i_k] H_1[j_1] ... H_l[j_l]).

    `out_cores` are k tensors [r, i, r'], `in_cores` l tensors, ring-closed: the last rank equals the first. The map is
    [Π i, Π j]. (Zhao et al., "Tensor Ring Decomposition", 2016.)
    """

    out_cores: tuple[Tensor, ...]
    in_cores: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return (math.prod(c.shape[-2] for c in self.out_cores), math.prod(c.shape[-2] for c in self.in_cores))

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.out_cores[0].shape[:-3])

    def _chain(self, cores: tuple[Tensor, ...]) -> Tensor:
        chain = cores[0]  # [*batch, r0, n, r]
        for core in cores[1:]:
            chain = torch.einsum("...anb,...bmc->...anmc", chain, core).flatten(-3, -2)
        return chain

    def _factors(self) -> tuple[Tensor, Tensor]:
        """B: [out, r0·rk], A: [r0·rk, in]: cut the ring at its two seams and it is a product of that rank."""
        left, right = self._chain(self.out_cores), self._chain(self.in_cores)  # [r0, out, rk], [rk, in, r0]
        return left.movedim(-2, -3).flatten(-2), right.movedim(-1, -3).flatten(-3, -2)

    def matmul(self, x: Tensor) -> Tensor:
        B, A = self._factors()
        return (x @ like(A, x).mT) @ like(B, x).mT

    def rmatmul(self, g: Tensor) -> Tensor:
        B, A = self._factors()
        return (g @ like(B, g)) @ like(A, g)

    def dense(self) -> Tensor:
        B, A = self._factors()
        return B @ A

    def rank_bound(self) -> int:
        return min(self.out_cores[0].shape[-3] * self.out_cores[-1].shape[-1], *self.shape)

    def flops(self, tokens: int) -> int:
        rank = self.out_cores[0].shape[-3] * self.out_cores[-1].shape[-1]
        return 2 * tokens * rank * sum(self.shape)

    def dense_flops(self) -> int:
        rank = self.out_cores[0].shape[-3] * self.out_cores[-1].shape[-1]
        return 2 * rank * self.shape[0] * self.shape[1]


def tiled_identity(size: int, width: int, anchor: Tensor) -> Tensor:
    """[1 1 ... 1], [size, width], identities of R^size side by side, the last one cut; dtype and device of `anchor`.

    >>> tiled_identity(2, 5, torch.ones(1)).tolist()
    [[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0]]
    """
    return torch.eye(size, dtype=anchor.dtype, device=anchor.device).repeat(1, -(-width // size))[:, :width]

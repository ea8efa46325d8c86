"""Linear maps that are never built unless asked: the base class, and the four that combine others.

An operator is an immutable record of tensors, operators and numbers. It maps R^in to R^out and acts on the last axis:
`op.matmul(x)` is x Δᵀ for x: [..., in], `op.rmatmul(g)` is g Δ for g: [..., out]. Tensors may carry one leading batch dimension
(experts, convolution groups). Products run in the dtype of the activation; small factor algebra runs in the dtype of the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .flags import answers, flagged, mend

Number = float | int | Tensor

__all__ = ["Dense", "Identity", "Operator", "Product", "Scaled", "Sum", "at_least_float32", "like"]


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the dtype of the activation `x`: masters are float32, products run where the activation lives."""
    return t if t.dtype == x.dtype else t.to(x.dtype)


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in a dtype fit for norms and factor algebra: float64 stays, everything below float32 is raised."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def across(v: Tensor) -> Tensor:
    """A vector per batch entry, [k] or [E, k], shaped to multiply activations [..., k] or [E, tokens, k]."""
    return v if v.ndim == 1 else v.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear map R^in -> R^out. A kind gives `shape`, `matmul` and one of `dense` and `rmatmul`; the rest follows.

    >>> import torch
    >>> from rankfold.linalg import Diagonal, LowRank
    >>> B, A, x = torch.randn(5, 2), torch.randn(2, 3), torch.randn(7, 3)
    >>> op = 2.0 * LowRank(B, A) + LowRank(B, A)
    >>> op.shape, torch.allclose(op.matmul(x), x @ op.dense().mT, atol=1e-5)
    ((5, 3), True)
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading dimensions that its tensors share; () for one plain map."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.leaves()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.leaves()).device

    @property
    def orthogonal(self) -> bool:
        """Whether Δ Δᵀ = 1 by construction: row norms pass through it on the right."""
        return False

    def matmul(self, x: Tensor) -> Tensor:
        """x Δᵀ: [..., in] -> [..., out]."""
        return x @ like(self.dense(), x).mT

    def rmatmul(self, g: Tensor) -> Tensor:
        """g Δ: [..., out] -> [..., in]."""
        return g @ like(self.dense(), g)

    def dense(self) -> Tensor:
        """The matrix itself, [*batch, out, in]. The oracle of everything else; of the plans only "effective" calls it."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self.rmatmul(eye.expand(*self.batch, *eye.shape))

    def add_to(self, W: Tensor) -> Tensor:
        """W + Δ, summed in at least float32 and rounded once to the dtype of W."""
        return (at_least_float32(W) + self.dense()).to(W.dtype)

    def columns(self, index: Tensor) -> Tensor:
        """Δ[:, index]ᵀ: the change of an embedding at its tokens, [...] -> [..., out]; beside a batch [k] -> [E, k, out]."""
        return self.dense().mT[..., index, :]

    def rows(self, index: Tensor) -> Tensor:
        """Δ[index, :]: [k] -> [*batch, k, in], in at least float32; by a product, so that nothing of out x in is built."""
        chosen = index[:, None] == torch.arange(self.shape[0], device=index.device)
        chosen = chosen.to(torch.promote_types(self.dtype, torch.float32))
        return self.rmatmul(chosen.expand(*self.batch, *chosen.shape))

    def row_sqnorm(self) -> Tensor:
        """‖Δ_j‖² for every output row j, [*batch, out], in at least float32."""
        return at_least_float32(self.dense()).square().sum(-1)

    def row_dot(self, other: Operator) -> Tensor:
        """Σ_i Δ_ji other_ji for every output row j, [*batch, out]."""
        return (at_least_float32(self.dense()) * at_least_float32(other.dense())).sum(-1)

    def to_lowrank(self, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        """(B, A, relative Frobenius error) of the best B A of at most `rank`; `rank=None` keeps `rank_bound()`: exact."""
        from .decompositions import truncated_svd

        dense = at_least_float32(self.dense())
        bound = min(self.rank_bound(), *self.shape)
        if rank is None and bound == min(self.shape):  # as it stands, beside an identity: an SVD would only add rounding
            identity = torch.eye(bound, dtype=dense.dtype, device=dense.device).expand(*dense.shape[:-2], bound, bound)
            return (dense, identity, 0.0) if self.shape[1] == bound else (identity, dense, 0.0)
        rank = bound if rank is None else min(rank, bound)
        U, S, Vh = truncated_svd(dense, rank)
        B, A = U * S.unsqueeze(-2), Vh
        norm = torch.linalg.vector_norm(dense)
        error = float(torch.linalg.vector_norm(dense - B @ A) / norm) if norm > 0 else 0.0
        return B, A, error

    def rank_bound(self) -> int:
        """A number that the rank can't exceed."""
        return min(self.shape)

    def flops(self, tokens: int) -> int:
        """Multiply-adds, counted twice, of `matmul` on that many rows."""
        return self.dense_flops() + 2 * tokens * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        """The same for `dense()`."""
        return self.flops(self.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of its own distinct tensors."""
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in self.leaves()}.values())

    def leaves(self) -> Iterator[Tensor]:
        """Every tensor inside, depth first, in the order of the fields."""
        for f in fields(self):
            yield from _leaves(getattr(self, f.name))

    def children(self) -> Iterator[Operator]:
        """The operators directly inside."""
        for f in fields(self):
            value = getattr(self, f.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Operator):
                    yield item

    def rebuild(self, leaves: Iterator[Tensor]) -> Operator:
        """The same record over other tensors, taken in the order of `leaves()`."""
        return replace(self, **{f.name: _rebuild(getattr(self, f.name), leaves) for f in fields(self)})

    def map(self, f: Any) -> Operator:
        """Every tensor through `f`: casts and moves."""
        return self.rebuild(iter([f(t) for t in self.leaves()]))

    def __add__(self, other: Operator) -> Operator:
        return Sum((*_terms(self), *_terms(other)))

    def __sub__(self, other: Operator) -> Operator:
        return self + -1.0 * other

    def __mul__(self, number: Number) -> Operator:
        return Scaled(self, number)

    __rmul__ = __mul__

    def __matmul__(self, other: Any) -> Any:
        """`op @ operator` is their product; `op @ M` with M: [in, k] is Δ M, [out, k].

        For reading: torch.compile does not trace `@` of objects, so what runs in a forward pass writes Product(op, operator).
        """
        if isinstance(other, Operator):
            return Product(self, other)
        return self.matmul(other.mT).mT


def _terms(op: Operator) -> tuple[Operator, ...]:
    return op.terms if isinstance(op, Sum) else (op,)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Operator):
        yield from value.leaves()
    elif isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)


def _rebuild(value: Any, leaves: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(leaves)
    if isinstance(value, Operator):
        return value.rebuild(leaves)
    if isinstance(value, tuple):
        return tuple(_rebuild(item, leaves) for item in value)
    return value


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """A matrix W: [*batch, out, in] as an operator."""

    W: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.W.shape[-2], self.W.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.W.shape[:-2])

    def matmul(self, x: Tensor) -> Tensor:
        return x @ like(self.W, x).mT

    def rmatmul(self, g: Tensor) -> Tensor:
        return g @ like(self.W, g)

    def dense(self) -> Tensor:
        return self.W

    def columns(self, index: Tensor) -> Tensor:
        return self.W.mT[..., index, :]

    def rows(self, index: Tensor) -> Tensor:
        return self.W[..., index, :]

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Identity(Operator):
    """The identity of R^size; `anchor` only tells dtype and device."""

    size: int
    anchor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    @property
    def orthogonal(self) -> bool:
        return True

    def matmul(self, x: Tensor) -> Tensor:
        return x

    def rmatmul(self, g: Tensor) -> Tensor:
        return g

    def dense(self) -> Tensor:
        return torch.eye(self.size, dtype=self.dtype, device=self.device)

    def flops(self, tokens: int) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Sum(Operator):
    """Σ_k Δ_k."""

    terms: tuple[Operator, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @property
    def batch(self) -> tuple[int, ...]:
        return max((t.batch for t in self.terms), key=len)

    def matmul(self, x: Tensor) -> Tensor:
        y = self.terms[0].matmul(x)
        for term in self.terms[1:]:
            y = y + term.matmul(x)
        return y

    def rmatmul(self, g: Tensor) -> Tensor:
        y = self.terms[0].rmatmul(g)
        for term in self.terms[1:]:
            y = y + term.rmatmul(g)
        return y

    def dense(self) -> Tensor:
        W = at_least_float32(self.terms[0].dense())
        for term in self.terms[1:]:
            W = term.add_to(W)
        return W

    def columns(self, index: Tensor) -> Tensor:
        y = self.terms[0].columns(index)
        for term in self.terms[1:]:
            y = y + like(term.columns(index), y)
        return y

    def rows(self, index: Tensor) -> Tensor:
        first, *rest = (at_least_float32(t.rows(index)) for t in self.terms)
        return sum(rest, first)

    def row_sqnorm(self) -> Tensor:
        """Σ ‖Δ_k‖² + 2 Σ_{k<l} ⟨Δ_k, Δ_l⟩ by rows; rows where that cancels below 1e-4 of its parts are formed and summed anew:
        in a graph and on an accelerator, which nobody asks, the first 16 of them."""
        squares = [t.row_sqnorm() for t in self.terms]
        parts = torch.stack(squares).sum(0)
        n = parts
        for k, a in enumerate(self.terms):
            for b in self.terms[k + 1 :]:
                # the term with fewer parameters leads: its row_dot asks the other one only for a product
                lead, other = (b, a) if b.rank_bound() < a.rank_bound() else (a, b)
                n = n + 2.0 * lead.row_dot(other)
        lost = n < 1e-4 * parts
        rows = flagged(lost if lost.ndim == 1 else lost.flatten(0, -2).any(0))  # beside a batch, in any of the maps
        if len(rows):
            n = mend(n, lost, rows, self.rows(rows).square().sum(-1))
        return n if answers(n.device) else n.clamp_min(0.0)

    def row_dot(self, other: Operator) -> Tensor:
        first, *rest = (t.row_dot(other) for t in self.terms)
        return sum(rest, first)

    def rank_bound(self) -> int:
        return min(sum(t.rank_bound() for t in self.terms), *self.shape)

    def flops(self, tokens: int) -> int:
        return sum(t.flops(tokens) for t in self.terms)

    def dense_flops(self) -> int:
        return sum(t.dense_flops() for t in self.terms)


@dataclass(frozen=True, eq=False)
class Scaled(Operator):
    """number · Δ; the number may be a tensor that trains (0-dim, or [E] beside a batch)."""

    inner: Operator
    number: Number

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def batch(self) -> tuple[int, ...]:
        return self.inner.batch

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def _times(self, y: Tensor) -> Tensor:
        n = self.number
        if isinstance(n, Tensor):
            n = like(n, y)
            n = n[..., None, None] if n.ndim else n
        return y * n

    def matmul(self, x: Tensor) -> Tensor:
        return self._times(self.inner.matmul(x))

    def rmatmul(self, g: Tensor) -> Tensor:
        return self._times(self.inner.rmatmul(g))

    def dense(self) -> Tensor:
        return self._times(self.inner.dense())

    def columns(self, index: Tensor) -> Tensor:
        return self._times(self.inner.columns(index))

    def rows(self, index: Tensor) -> Tensor:
        return self._times(self.inner.rows(index))

    def _number(self) -> Number:
        n = self.number
        return n[..., None] if isinstance(n, Tensor) and n.ndim else n

    def row_sqnorm(self) -> Tensor:
        return self._number() ** 2 * self.inner.row_sqnorm()

    def row_dot(self, other: Operator) -> Tensor:
        return self._number() * self.inner.row_dot(other)

    def to_lowrank(self, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        if isinstance(self.number, Tensor) and self.number.ndim:  # entries weigh differently in the error
            return super().to_lowrank(rank)
        B, A, error = self.inner.to_lowrank(rank)
        return self._times(B), A, error if self.number != 0 else 0.0

    def rank_bound(self) -> int:
        return self.inner.rank_bound()

    def flops(self, tokens: int) -> int:
        return self.inner.flops(tokens) + tokens * self.shape[0]

    def dense_flops(self) -> int:
        return self.inner.dense_flops() + self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Product(Operator):
    """left · right: first `right` acts on the input, then `left`."""

    left: Operator
    right: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0], self.right.shape[1])

    @property
    def batch(self) -> tuple[int, ...]:
        return max(self.left.batch, self.right.batch, key=len)

    @property
    def orthogonal(self) -> bool:
        return self.left.orthogonal and self.right.orthogonal

    def matmul(self, x: Tensor) -> Tensor:
        return self.left.matmul(self.right.matmul(x))

    def rmatmul(self, g: Tensor) -> Tensor:
        return self.right.rmatmul(self.left.rmatmul(g))

    def dense(self) -> Tensor:
        left = at_least_float32(self.left.dense())
        return self.right.rmatmul(left) if self._from_left() else self.left.matmul(at_least_float32(self.right.dense()).mT).mT

    def _from_left(self) -> bool:
        by_left = self.left.dense_flops() + self.right.flops(self.left.shape[0])
        return by_left <= self.right.dense_flops() + self.left.flops(self.right.shape[1])

    def columns(self, index: Tensor) -> Tensor:
        return self.left.matmul(self.right.columns(index))

    def rows(self, index: Tensor) -> Tensor:
        return self.right.rmatmul(at_least_float32(self.left.rows(index)))

    def row_sqnorm(self) -> Tensor:
        return self.left.row_sqnorm() if self.right.orthogonal else super().row_sqnorm()

    def rank_bound(self) -> int:
        return min(self.left.rank_bound(), self.right.rank_bound())

    def flops(self, tokens: int) -> int:
        return self.left.flops(tokens) + self.right.flops(tokens)

    def dense_flops(self) -> int:
        return min(
            self.left.dense_flops() + self.right.flops(self.left.shape[0]),
            self.right.dense_flops() + self.left.flops(self.right.shape[1]),
        )

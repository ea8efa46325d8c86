"""Random sketches S [m, n]: short summaries S A of a tall A that keep its geometry, and least squares through them."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, Protocol

import torch
from torch import Tensor

from rankfold.errors import NumericError, OptionError
from rankfold.linalg._lapack import thin_svd
from rankfold.linalg._matrix import (
    LinearMap,
    Matrix,
    dense,
    precise,
    require_finite,
    sides,
    times,
    transposed_times,
    wide,
    working_dtype,
)
from rankfold.linalg.random import Random
from rankfold.linalg.transforms import hadamard_transform

__all__ = ["Sketch", "lstsq_sketched", "sketch"]

Kind = Literal["gaussian", "srht", "countsketch", "sparse"]


class Sketch(LinearMap, Protocol):
    """S [m, n] with E SᵀS = I, as an operator on the last axis; `apply(A)` is S A for columns."""

    def apply(self, A: Tensor, /) -> Tensor: ...


def sketch(kind: Kind, m: int, n: int, random: Random | None = None) -> Sketch:
    """A random S [m, n] with E SᵀS = I.

    Args:
        kind: "gaussian": entries N(0, 1/m), dense, the reference. "srht": √(1/m)·P·H·D, a random-sign Hadamard transform
            of which m rows are kept (n padded to a power of two; m at most that). "countsketch": one ±1 per column;
            fastest, but a single entry of the solution may be far off. "sparse": m·√n nonzero entries at random places
            (Li, Hastie and Church, 2006).
        m: rows of the sketch. A subspace of dimension d keeps its norms to 1 ± ε for m of about d/ε² (gaussian),
            (d + log n)·log d/ε² (srht), d²/ε² (countsketch).
        random: stream; a fixed one by default.

    Raises:
        OptionError: unknown kind, or sizes that it cannot have.

    >>> A = Random("A").normal((1000, 5))
    >>> S = sketch("srht", 100, 1000)
    >>> S.apply(A).shape, S.matmul(A.T).shape
    (torch.Size([100, 5]), torch.Size([5, 100]))
    """
    random = random or Random("sketch", kind, m, n)
    if m < 1 or n < 1:
        raise OptionError(f"sketch: {m} x {n}; use at least 1 x 1")
    if kind == "gaussian":
        return DenseSketch(random.normal((m, n), std=1 / sqrt(m)))
    if kind == "srht":
        padded = 1 << (n - 1).bit_length()
        if m > padded:
            raise OptionError(f"sketch: srht keeps at most {padded} rows for n = {n}, asked for {m}")
        return HadamardSketch(random.signs((n,)), random.choice(padded, m), padded)
    if kind == "countsketch":
        rows = random.integers((n,), m)
        return SparseSketch.of(rows, torch.arange(n), random.signs((n,)), (m, n))
    if kind == "sparse":
        places = random.choice(m * n, min(m * n, round(m * sqrt(n))))
        value = sqrt(n / len(places))  # E SᵀS = I: len/n entries of value² per column
        return SparseSketch.of(places // n, places % n, value * random.signs((len(places),)), (m, n))
    raise OptionError(f'sketch: kind {kind!r}; use "gaussian", "srht", "countsketch" or "sparse"')


@dataclass(frozen=True)
class DenseSketch:
    S: Tensor  # [m, n]

    @property
    def shape(self) -> tuple[int, int]:
        return self.S.shape[0], self.S.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.S.to(x).mT

    def rmatmul(self, g: Tensor) -> Tensor:
        return g @ self.S.to(g)

    def apply(self, A: Tensor) -> Tensor:
        return times(self, A)

    def dense(self) -> Tensor:
        return self.S


@dataclass(frozen=True)
class HadamardSketch:
    signs: Tensor  # [n]
    rows: Tensor  # [m], distinct rows of H
    padded: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.signs)

    def matmul(self, x: Tensor) -> Tensor:
        flipped = torch.nn.functional.pad(x * self.signs.to(x), (0, self.padded - len(self.signs)))
        return hadamard_transform(flipped)[..., self.rows.to(x.device)] / sqrt(len(self.rows))

    def rmatmul(self, g: Tensor) -> Tensor:
        full = g.new_zeros(*g.shape[:-1], self.padded)
        full[..., self.rows.to(g.device)] = g / sqrt(len(self.rows))
        return hadamard_transform(full)[..., : len(self.signs)] * self.signs.to(g)

    def apply(self, A: Tensor) -> Tensor:
        return times(self, A)

    def dense(self) -> Tensor:
        return self.rmatmul(torch.eye(len(self.rows)))


@dataclass(frozen=True)
class SparseSketch:
    S: Tensor  # [m, n], sparse

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> "SparseSketch":
        return cls(torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=False).coalesce())

    @property
    def shape(self) -> tuple[int, int]:
        return self.S.shape[0], self.S.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return torch.sparse.mm(self.S.to(x), flat.mT).mT.reshape(*x.shape[:-1], self.shape[0])

    def rmatmul(self, g: Tensor) -> Tensor:
        flat = g.reshape(-1, g.shape[-1])
        return torch.sparse.mm(self.S.to(g).mT, flat.mT).mT.reshape(*g.shape[:-1], self.shape[1])

    def apply(self, A: Tensor) -> Tensor:
        return times(self, A)

    def dense(self) -> Tensor:
        return self.S.to_dense()


@precise
def lstsq_sketched(
    A: Matrix,
    b: Tensor,
    kind: Kind = "srht",
    factor: int = 4,
    tol: float = 1e-12,
    max_iterations: int = 200,
    random: Random | None = None,
) -> Tensor:
    """argmin ‖A x - b‖ to full accuracy, for tall A [m, n]: sketch, precondition, iterate (Avron et al. 2010).

    The SVD U Σ Vᵀ of the sketch S A gives N = V Σ⁻¹; A N is well conditioned whatever A is, so conjugate gradients on
    its normal equations need O(log 1/tol) products with A. If A is rank deficient, x is the solution of least norm
    (Meng, Saunders and Mahoney, 2014).

    Args:
        A: tensor [m, n], or operator, m >= n.
        b: [m] or [m, k].
        kind, factor: the sketch, of factor·n rows (never more than m).
        tol: stop when the gradient of every column falls below tol times its first.
        random: stream for the sketch.

    Returns:
        x [n] or [n, k], worked in float64; float64 for float64 A, else float32.

    Raises:
        NumericError: NaN or Inf in A or b, or no convergence.
        OptionError: A is wide, or b has another number of rows.

    >>> A, x = Random("A").normal((500, 4)), torch.tensor([1.0, -2.0, 3.0, 0.5])
    >>> lstsq_sketched(A, A @ x)
    tensor([ 1.0000, -2.0000,  3.0000,  0.5000])
    """
    m, n = sides(A, "lstsq_sketched")
    if m < n or b.shape[0] != m or b.ndim > 2:
        raise OptionError(f"lstsq_sketched: A is {m} x {n} and b {list(b.shape)}; A must be tall and b [{m}] or [{m}, k]")
    out = working_dtype(A)
    A = wide(dense(A, "A")) if isinstance(A, Tensor) else A
    rhs = wide(dense(b.reshape(m, -1), "b"))
    if n == 0:
        return rhs.new_zeros(0, *b.shape[1:]).to(out)
    tol = max(tol, 10 * torch.finfo(rhs.dtype).eps)
    S = sketch(kind, min(factor * n, m), m, random or Random("lstsq_sketched"))
    N = preconditioner(S.apply(A) if isinstance(A, Tensor) else A.rmatmul(S.dense().to(rhs)))  # [n, q]
    y = rhs.new_zeros(N.shape[1], rhs.shape[1])
    residual = rhs
    gradient = N.mT @ transposed_times(A, residual)
    direction = gradient
    size = first = gradient.square().sum(dim=0)
    for _ in range(max_iterations):
        if (size <= (tol**2) * first).all():
            x = N @ y
            return (x if b.ndim == 2 else x.squeeze(1)).to(out)
        image = times(A, N @ direction)
        step = size / image.square().sum(dim=0).clamp_min(torch.finfo(size.dtype).tiny)
        y = y + step * direction
        residual = residual - step * image
        gradient = N.mT @ transposed_times(A, residual)
        last, size = size, gradient.square().sum(dim=0)
        direction = gradient + size / last.clamp_min(torch.finfo(size.dtype).tiny) * direction
    reached = float((size / first.clamp_min(torch.finfo(size.dtype).tiny)).sqrt().max())
    raise NumericError(
        f"lstsq_sketched: gradient fell to {reached:.1e} of its start in {max_iterations} iterations, not to {tol:.1e}; "
        "raise factor or tol"
    )


def preconditioner(SA: Tensor) -> Tensor:
    """V Σ⁻¹ [n, q] of the sketch S A = U Σ Vᵀ, directions below rounding left out."""
    _, s, Vh = thin_svd(require_finite(SA, "A"))
    keep = s > s[:1] * max(SA.shape) * torch.finfo(s.dtype).eps
    return Vh[keep].mT / s[keep]

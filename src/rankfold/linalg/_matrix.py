"""What every routine here needs of a matrix, given as a tensor or as an operator, and the precision it works in.

An operator acts on the last axis (`op.matmul(X)` = X Mᵀ, `op.rmatmul(G)` = G M). Decompositions think in columns; the
two functions `times` and `transposed_times` are the only place where one convention becomes the other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from rankfold.errors import NumericError, OptionError

P = ParamSpec("P")
T = TypeVar("T")


class LinearMap(Protocol):
    """The part of rankfold's Operator that products need: a map R^n -> R^m that is never built unless asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # (m, n)
    def matmul(self, x: Tensor, /) -> Tensor: ...  # x Mᵀ: [..., n] -> [..., m]
    def rmatmul(self, g: Tensor, /) -> Tensor: ...  # g M: [..., m] -> [..., n]
    def dense(self) -> Tensor: ...  # [m, n]


Matrix = Tensor | LinearMap


def precise(function: Callable[P, T]) -> Callable[P, T]:
    """Run without gradients, without autocast and without TF32: each would cost digits or memory in silence."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), full_float32():
            return function(*args, **kwargs)

    return run


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the process has chosen; put back on leaving."""
    chosen = torch.get_float32_matmul_precision()
    if chosen == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def lift(M: Matrix, what: str = "M") -> Matrix:
    """M in the dtype that is worked in: float64 stays, all else becomes float32; NaN and Inf are refused.

    An operator in a shorter dtype is made dense, since its own products would be that short.
    """
    if isinstance(M, Tensor):
        if M.ndim < 2:
            raise OptionError(f"{what}: a matrix [..., rows, columns] is needed, got shape {tuple(M.shape)}")
        return require_finite(M if M.dtype in (torch.float32, torch.float64) else M.to(torch.float32), what)
    if getattr(M, "dtype", torch.float32) in (torch.float32, torch.float64):
        return M
    return require_finite(M.dense().to(torch.float32), what)


def dense(M: Matrix, what: str = "M") -> Tensor:
    """M as a finite tensor in float32 or float64."""
    lifted = lift(M if isinstance(M, Tensor) else M.dense(), what)
    assert isinstance(lifted, Tensor)
    return lifted


def times(M: Matrix, K: Tensor) -> Tensor:
    """M K for K [..., n, k]."""
    return M @ K if isinstance(M, Tensor) else M.matmul(K.mT).mT


def transposed_times(M: Matrix, K: Tensor) -> Tensor:
    """Mᵀ K for K [..., m, k]."""
    return M.mT @ K if isinstance(M, Tensor) else M.rmatmul(K.mT).mT


def like(M: Matrix, K: Tensor) -> Tensor:
    """K in the dtype and on the device of M."""
    return K.to(device=getattr(M, "device", K.device), dtype=getattr(M, "dtype", torch.float32))


def wide(M: Tensor) -> Tensor:
    """M in float64 where its device has it (Apple's does not): for Gram matrices, eigenvalues and Cholesky."""
    return M.to(torch.float32 if M.device.type == "mps" else torch.float64)


def require_finite(M: Tensor, what: str) -> Tensor:
    """M itself, or an error that names it and counts what is wrong."""
    finite = torch.isfinite(M)
    if finite.all():
        return M
    bad = int((~finite).sum())
    nan = int(torch.isnan(M).sum())
    first = tuple(int(i) for i in (~finite).nonzero()[0])
    raise NumericError(f"{what}: {bad} of {M.numel()} values are not finite ({nan} NaN, {bad - nan} Inf), first at {first}")


def require_rank(rank: int, M: Matrix, what: str) -> None:
    """Refuse a rank that a matrix of this shape cannot have."""
    m, n = M.shape[-2:]
    if not 0 <= rank <= min(m, n):
        raise OptionError(f"{what}: rank {rank} of a {m} x {n} matrix; it can have 0 to {min(m, n)}")

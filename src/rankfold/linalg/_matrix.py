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
    """The part of rankfold's Operator that products need: a map R^n -> R^m that is never built unless asked.

    Products run in the dtype of what is multiplied, whatever the dtype of the operator's own tensors.
    """

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
    """M ready for products: a tensor in float64 or else float32, NaN and Inf refused; an operator as it is."""
    if isinstance(M, Tensor):
        sides(M, what)
        return require_finite(M if M.dtype in (torch.float32, torch.float64) else M.to(torch.float32), what)
    return M


def working_dtype(M: Matrix) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if getattr(M, "dtype", torch.float32) == torch.float64 else torch.float32


def dense(M: Matrix, what: str = "M") -> Tensor:
    """M as a finite tensor in float32 or float64."""
    lifted = lift(M if isinstance(M, Tensor) else M.dense(), what)
    assert isinstance(lifted, Tensor)
    return lifted


def sides(M: Matrix, what: str) -> tuple[int, int]:
    """(m, n) of M [..., m, n]."""
    if len(M.shape) < 2:
        raise OptionError(f"{what}: a matrix [..., rows, columns] is needed, got shape {tuple(M.shape)}")
    return M.shape[-2], M.shape[-1]


def times(M: Matrix, K: Tensor) -> Tensor:
    """M K for K [..., n, k]."""
    return M @ K if isinstance(M, Tensor) else M.matmul(K.mT).mT


def transposed_times(M: Matrix, K: Tensor) -> Tensor:
    """Mᵀ K for K [..., m, k]."""
    return M.mT @ K if isinstance(M, Tensor) else M.rmatmul(K.mT).mT


def like(M: Matrix, K: Tensor) -> Tensor:
    """K in the dtype that M is worked in, on its device."""
    return K.to(device=getattr(M, "device", K.device), dtype=working_dtype(M))


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
    m, n = sides(M, what)
    if not 0 <= rank <= min(m, n):
        raise OptionError(f"{what}: rank {rank} of a {m} x {n} matrix; it can have 0 to {min(m, n)}")

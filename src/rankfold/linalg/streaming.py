"""Leading directions of a stream of rows that is never held as a whole: incremental SVD and frequent directions."""

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg._lapack import thin_svd
from rankfold.linalg._matrix import dense, precise, wide
from rankfold.linalg.decompositions import Method, truncated_svd
from rankfold.linalg.factors import sign_fix

__all__ = ["FrequentDirections", "IncrementalSVD"]


class IncrementalSVD:
    """Leading right singular vectors of all rows seen so far (Ross et al. 2008; the statistic of EVA, Paischer et al. 2024).

    A batch X [tokens, n] with mean μ_b is joined to the state by the truncated SVD of
    [diag(S) Vh; X - μ_b; √(N·b/(N+b))·(μ - μ_b)], which is exact as long as nothing is cut off. Two states join by the
    same formula (`a + b`), so several processes each stream their share.

    Args:
        rank: components kept; keep a few more than needed, since the last ones settle slowly.
        center: subtract the mean. Without it the leading direction of data far from zero is the mean itself.
        method, iterations: of the inner `truncated_svd`.

    Attributes (None before the first rows):
        Vh [k, n] orthonormal rows, each with its largest entry positive, S [k], mean [n], count N,
        square_sum [n]: float64 sums of squared deviations (of squares if not centred).

    Raises:
        NumericError: NaN or Inf in a batch.
        OptionError: a batch of another width, or states that do not fit together.

    >>> from rankfold.linalg.random import Random
    >>> rows = Random("rows").normal((200, 6)) * torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    >>> svd = IncrementalSVD(rank=4)
    >>> for batch in rows.split(50):
    ...     svd.update(batch)
    >>> bool(svd.explained_variance_ratio()[:3].sum() > 0.99)
    True
    """

    Vh: Tensor | None = None
    S: Tensor | None = None
    mean: Tensor | None = None
    square_sum: Tensor | None = None

    def __init__(self, rank: int, center: bool = True, method: Method = "auto", iterations: int | None = None):
        if rank < 1:
            raise OptionError(f"IncrementalSVD: rank {rank}; use at least 1")
        self.rank, self.center, self.method, self.iterations = rank, center, method, iterations
        self.count = 0

    @precise
    def update(self, X: Tensor) -> None:
        """Take in rows X [..., n]; leading dimensions are flattened, no rows at all change nothing."""
        rows = dense(X.reshape(-1, X.shape[-1]), "X")
        if len(rows) == 0:
            return
        mean = wide(rows).mean(dim=0) if self.center else wide(rows).new_zeros(rows.shape[1])
        deviation = wide(rows) - mean
        self._join(deviation.to(rows.dtype), mean, len(rows), deviation.square().sum(dim=0))

    @precise
    def __add__(self, other: "IncrementalSVD") -> "IncrementalSVD":
        """The state of both streams together; neither is changed."""
        if (self.rank, self.center) != (other.rank, other.center):
            raise OptionError(
                f"IncrementalSVD: rank {self.rank}, center {self.center} cannot join "
                f"rank {other.rank}, center {other.center}; build both alike"
            )
        joined = IncrementalSVD(self.rank, self.center, self.method, self.iterations)
        for part in (self, other):
            if part.Vh is not None and part.S is not None and part.mean is not None and part.square_sum is not None:
                joined._join(part.S.unsqueeze(-1) * part.Vh, part.mean, part.count, part.square_sum)
        return joined

    def _join(self, rows: Tensor, mean: Tensor, count: int, square_sum: Tensor) -> None:
        """Join rows that represent `count` tokens about `mean` (float64)."""
        total = self.count + count
        if self.Vh is not None and self.S is not None and self.mean is not None and self.square_sum is not None:
            if rows.shape[-1] != self.Vh.shape[-1]:
                raise OptionError(f"IncrementalSVD: rows of width {rows.shape[-1]} after rows of width {self.Vh.shape[-1]}")
            shift = self.mean - mean
            weight = self.count * count / total
            between = (weight**0.5 * shift).to(rows.dtype).unsqueeze(0)
            rows = torch.cat([self.S.unsqueeze(-1) * self.Vh, rows, between])
            mean = mean + shift * (self.count / total)
            square_sum = self.square_sum + square_sum + weight * shift.square()
        U, self.S, Vh = truncated_svd(rows, min(self.rank, *rows.shape), self.method, self.iterations)
        self.Vh = sign_fix(U, Vh, side="V")[1]
        self.mean, self.square_sum, self.count = mean, square_sum, total

    def explained_variance_ratio(self) -> Tensor:
        """S_i² / Σ_j square_sum_j [k]: the share of all variance along each component; zeros for constant rows."""
        if self.S is None or self.square_sum is None:
            raise OptionError("IncrementalSVD: no rows yet; call update first")
        total = self.square_sum.sum()
        return torch.where(total > 0, wide(self.S).square() / total, 0.0).to(self.S.dtype)

    def variance(self) -> Tensor:
        """Variance of each feature [n] in float64 (mean square if not centred)."""
        if self.square_sum is None:
            raise OptionError("IncrementalSVD: no rows yet; call update first")
        return self.square_sum / self.count

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on, as tensors."""
        state = {"rank": torch.tensor(self.rank), "center": torch.tensor(self.center), "count": torch.tensor(self.count)}
        arrays = {"Vh": self.Vh, "S": self.S, "mean": self.mean, "square_sum": self.square_sum}
        return state | {name: t for name, t in arrays.items() if t is not None}

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Tensor], method: Method = "auto", iterations: int | None = None
    ) -> "IncrementalSVD":
        """The stream that `state_dict` described; the next batch gives bitwise what it would have given."""
        svd = cls(int(state["rank"]), bool(state["center"]), method, iterations)
        svd.count = int(state["count"])
        svd.Vh, svd.S, svd.mean, svd.square_sum = (state.get(name) for name in ("Vh", "S", "mean", "square_sum"))
        return svd


class FrequentDirections:
    """A sketch S [l, n] of all rows seen with 0 ⪯ XᵀX - SᵀS ⪯ ‖X - X_k‖_F² / (l - k)·I for every k < l.

    Deterministic, one pass, memory 2·l·n: for inputs too wide for an n x n Gram matrix (Ghashami, Liberty, Phillips and
    Woodruff, 2016). Rows fill a buffer; when it is full, its squared singular values all fall by the l-th.

    Args:
        size: l, rows of the sketch; the guarantee above is about what lies beyond k of them.

    >>> from rankfold.linalg.random import Random
    >>> rows = Random("rows").normal((300, 8)) * torch.tensor([9.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    >>> sketch = FrequentDirections(size=6)
    >>> sketch.update(rows)
    >>> lost = torch.linalg.eigvalsh(rows.T @ rows - sketch.sketch().T @ sketch.sketch())
    >>> bool(-1 < lost[0] and lost[-1] <= sketch.bound)
    True
    """

    def __init__(self, size: int):
        if size < 1:
            raise OptionError(f"FrequentDirections: size {size}; use at least 1")
        self.size = size
        self.bound = 0.0  # Σ of what was subtracted: ‖XᵀX - SᵀS‖ is at most this
        self._rows: Tensor | None = None  # float64, at most 2 * size of them

    @precise
    def update(self, X: Tensor) -> None:
        """Take in rows X [..., n]."""
        for part in wide(dense(X.reshape(-1, X.shape[-1]), "X")).split(self.size):
            if self._rows is not None and part.shape[-1] != self._rows.shape[-1]:
                raise OptionError(f"FrequentDirections: rows of width {part.shape[-1]} after width {self._rows.shape[-1]}")
            self._rows = part if self._rows is None else torch.cat([self._rows, part])
            if len(self._rows) > self.size:
                self._shrink()

    @precise
    def __add__(self, other: "FrequentDirections") -> "FrequentDirections":
        """The sketch of both streams; its bound is the sum of theirs and of what joining costs."""
        if self.size != other.size:
            raise OptionError(f"FrequentDirections: sizes {self.size} and {other.size} differ; build both alike")
        joined = FrequentDirections(self.size)
        joined._rows, joined.bound = self._rows, self.bound + other.bound
        if other._rows is not None:
            joined.update(other._rows)
        return joined

    def sketch(self) -> Tensor:
        """S [at most l, n] in float64."""
        if self._rows is None:
            raise OptionError("FrequentDirections: no rows yet; call update first")
        return self._rows

    def _shrink(self) -> None:
        assert self._rows is not None
        _, S, Vh = thin_svd(self._rows)
        squares = S.square()
        least = squares[self.size - 1] if len(squares) >= self.size else squares.new_zeros(())
        self.bound += float(least)
        keep = (squares - least).clamp_min(0).sqrt()[: self.size]
        self._rows = keep.unsqueeze(-1) * Vh[: self.size]

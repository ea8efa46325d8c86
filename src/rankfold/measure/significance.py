"""Statistics of claims: paired tests, adjustment for many of them, rank correlation."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankfold.errors import DataError, OptionError
from rankfold.measure.arrays import Floats, as_floats
from rankfold.measure.student import t_quantile, t_tail

__all__ = ["PairedTest", "holm", "paired_test", "spearman"]

_EXACT_PAIRS = 20  # 2^20 sign patterns, 8 MB


@dataclass(frozen=True)
class PairedTest:
    """The mean of paired differences with its t interval, and the p-value of "no difference"."""

    mean: float
    low: float
    high: float
    level: float
    p: float
    pairs: int
    method: str


def paired_test(differences: Any, alternative: str = "two-sided", level: float = 0.95) -> PairedTest:
    """Is the mean of paired differences zero?

    Up to 20 pairs the p-value is exact: the share of the 2^n sign patterns of the differences whose sum is at least as
    extreme as the one seen (Fisher 1935); it cannot fall below 2^(1−n), so five pairs never reach .05 two-sided. Beyond,
    it is that of Student's t. The interval is mean ± t·s/√n always, two-sided.

    Args:
        differences: [n], one per seed or case, n >= 2.
        alternative: "two-sided", "greater" (mean > 0) or "less"; named before the run, not after.
        level: of the interval.

    Raises DataError for fewer than two differences, NumericError for NaN, OptionError for the options.

    >>> result = paired_test([0.02, 0.01, 0.03, 0.02, 0.04, 0.01])
    >>> result.p, result.method, result.low > 0
    (0.03125, 'exact sign-flip', True)
    """
    if alternative not in ("two-sided", "greater", "less"):
        raise OptionError(f"alternative={alternative!r}: two-sided, greater or less")
    if not 0 < level < 1:
        raise OptionError(f"level={level}: must lie between 0 and 1, both excluded")
    d = as_floats(differences, "differences")
    n = len(d)
    if n < 2:
        raise DataError("differences: one pair has no spread; at least two are needed")
    mean, error = float(d.mean()), float(d.std(ddof=1)) / math.sqrt(n)
    exact = n <= _EXACT_PAIRS
    p = _sign_flip(d, alternative) if exact else _t_test(mean, error, n, alternative)
    reach = t_quantile((1 + level) / 2, n - 1) * error
    return PairedTest(mean, mean - reach, mean + reach, level, p, n, "exact sign-flip" if exact else "t")


def _sign_flip(d: Floats, alternative: str) -> float:
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    seen, slack = d.sum(), 1e-12 * np.abs(d).sum()  # equal sums in another order of addition are ties
    if alternative == "two-sided":
        return float((np.abs(sums) >= abs(seen) - slack).mean())
    return float((sums >= seen - slack).mean() if alternative == "greater" else (sums <= seen + slack).mean())


def _t_test(mean: float, error: float, n: int, alternative: str) -> float:
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    if alternative == "two-sided":
        return 2 * t_tail(abs(t), n - 1)
    return t_tail(t if alternative == "greater" else -t, n - 1)


def holm(pvalues: Any) -> Floats:
    """Adjusted p-values [m] in the given order: reject those below α, and any false rejection has probability <= α.

    The i-th smallest is max over j <= i of min(1, (m − j + 1)·p_(j)). Holm, "A simple sequentially rejective multiple
    test procedure", 1979. No assumption about how the tests depend on each other.

    Raises DataError for no values or values outside [0, 1].

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = as_floats(pvalues, "pvalues")
    if ((p < 0) | (p > 1)).any():
        raise DataError(f"pvalues: {p[(p < 0) | (p > 1)][0]} lies outside 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return adjusted


def spearman(first: Any, second: Any) -> float:
    """Spearman's rank correlation of two vectors [n]: Pearson's of their ranks, ties at the mean of their places.

    Raises DataError for fewer than two values, different lengths, or a constant vector, whose correlation is undefined.

    >>> spearman([1, 2, 3, 4], [1, 10, 100, 50])
    0.8
    """
    x, y = _places(as_floats(first, "first")), _places(as_floats(second, "second"))
    if len(x) != len(y) or len(x) < 2:
        raise DataError(f"first and second: two vectors of one length of at least 2 expected, got {len(x)} and {len(y)}")
    x, y = x - x.mean(), y - y.mean()
    if not x.any() or not y.any():
        raise DataError(f"{'second' if x.any() else 'first'} is constant: its rank correlation is undefined")
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def _places(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]

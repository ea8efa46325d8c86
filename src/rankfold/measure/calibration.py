"""Whether probabilities mean what they say: calibration errors over bins of confidence.

Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", 2015 (ECE, MCE); Nixon et al., "Measuring
calibration in deep learning", 2019, arXiv:1904.01685 (ACE).
"""

from typing import Any

import numpy as np

from rankfold.errors import OptionError
from rankfold.measure.arrays import Floats, as_probabilities

__all__ = ["ace", "ace_top", "ece", "mce"]


def ece(probabilities: Any, gold: Any, bins: int = 15) -> float:
    """Expected calibration error: Σ_b n_b/N · |accuracy_b − confidence_b| over equal-width bins of the largest probability.

    Bin b is ((b−1)/bins, b/bins], the first one closed on the left. HypeLoRA's tables use bins=10.

    Args:
        probabilities: [N, K], rows that sum to 1.
        gold: [N], classes.
        bins: number of bins.

    Raises DataError for logits or wrong shapes, NumericError for NaN, OptionError for bins < 1.

    >>> ece([[.9, .1]] * 4, [0, 0, 1, 1])     # 90 % sure, 50 % right
    0.4
    """
    counts, gaps = _equal_width(probabilities, gold, bins)
    return float((counts * gaps).sum() / counts.sum())


def mce(probabilities: Any, gold: Any, bins: int = 15) -> float:
    """Maximum calibration error: the largest |accuracy_b − confidence_b| over the non-empty bins of `ece`.

    Raises as `ece`.

    >>> mce([[.9, .1]] * 4 + [[.6, .4]] * 4, [0, 0, 1, 1, 0, 0, 0, 1])
    0.4
    """
    return float(_equal_width(probabilities, gold, bins)[1].max())


def ace(probabilities: Any, gold: Any, bins: int = 15) -> float:
    """Adaptive calibration error, class-wise: mean over classes and ranges of |frequency − mean probability|.

    For every class k the N values p[:, k] are sorted and cut into `bins` ranges whose sizes differ by one at most;
    within a range, frequency is the share of gold = k. With fewer rows than ranges every row is its own range.

    Raises as `ece`.

    >>> ace([[.9, .1]] * 4, [0, 0, 1, 1], bins=1)
    0.4
    """
    p, y = as_probabilities(probabilities, gold)
    parts = min(_positive(bins), len(p))
    gaps = []
    for k in range(p.shape[1]):
        order = np.argsort(p[:, k], kind="stable")
        gaps += [abs(float((y[part] == k).mean() - p[part, k].mean())) for part in np.array_split(order, parts)]
    return float(np.mean(gaps))


def ace_top(probabilities: Any, gold: Any, bins: int = 15) -> float:
    """Adaptive calibration error of the largest probability: `ece` over ranges of equal count, the last takes the remainder.

    Rows of equal confidence stay in their order, so ranges may divide them.

    Raises as `ece`.

    >>> ace_top([[.9, .1]] * 4, [0, 0, 1, 1], bins=1)
    0.4
    """
    confidence, hit = _top(probabilities, gold)
    order = np.argsort(confidence, kind="stable")
    parts = min(_positive(bins), len(order))
    size = len(order) // parts
    cuts = [order[i * size : (i + 1) * size if i < parts - 1 else None] for i in range(parts)]
    return float(sum(len(cut) * abs(hit[cut].mean() - confidence[cut].mean()) for cut in cuts) / len(order))


def _top(probabilities: Any, gold: Any) -> tuple[Floats, Floats]:
    p, y = as_probabilities(probabilities, gold)
    return p.max(axis=1), (p.argmax(axis=1) == y).astype(np.float64)


def _equal_width(probabilities: Any, gold: Any, bins: int) -> tuple[Floats, Floats]:
    """(count, |accuracy − confidence|) of the non-empty bins."""
    confidence, hit = _top(probabilities, gold)
    upper = np.arange(1, _positive(bins)) / bins  # the last bin has no upper edge: rounding may pass 1
    place = np.searchsorted(upper, confidence, side="left")
    counts = np.bincount(place, minlength=bins).astype(np.float64)
    gaps = np.abs(np.bincount(place, hit, bins) - np.bincount(place, confidence, bins))
    full = counts > 0
    return counts[full], gaps[full] / counts[full]


def _positive(bins: int) -> int:
    if bins < 1:
        raise OptionError(f"bins={bins}: must be at least 1")
    return bins

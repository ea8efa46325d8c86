"""Metrics of retrieval with one right answer per query, all from its rank."""

from typing import Any

import numpy as np

from rankfold.errors import DataError, OptionError
from rankfold.measure.arrays import Integers, as_floats, as_integers

__all__ = ["mrr", "ndcg_at", "ranks_of", "recall_at"]


def ranks_of(similarity: Any, gold: Any) -> Integers:
    """Rank (1 is best) of each query's right document.

    rank_q = 1 + #{d ≠ gold_q : s[q, d] >= s[q, gold_q]}: a tie counts against the right document, so a model that gives
    every document the same score is worst, not best.

    Args:
        similarity: [queries, documents].
        gold: [queries], the column of the right document.

    Raises DataError for wrong shapes, NumericError for NaN or Inf.

    >>> ranks_of([[.9, .1, .5], [.3, .3, .1]], [2, 0])
    array([2, 2])
    """
    scores = as_floats(similarity, "similarity", ndim=2)
    right = as_integers(gold, "gold", 0, scores.shape[1])
    if len(right) != len(scores):
        raise DataError(f"similarity has {len(scores)} queries, gold has {len(right)}")
    own = np.take_along_axis(scores, right[:, None], axis=1)  # [queries, 1]
    return (scores >= own).sum(axis=1).astype(np.int64)  # the right document itself is the 1


def recall_at(ranks: Any, k: int) -> float:
    """Share of queries whose right document is among the first k.

    Raises OptionError for k < 1, DataError for no ranks or a rank below 1.

    >>> recall_at([1, 3, 7], 5)
    0.6666666666666666
    """
    return float((as_integers(ranks, "ranks", 1) <= _cut(k)).mean())


def mrr(ranks: Any) -> float:
    """Mean reciprocal rank, mean of 1 / rank.

    Raises DataError for no ranks or a rank below 1.

    >>> mrr([1, 2, 4])
    0.5833333333333334
    """
    return float((1 / as_integers(ranks, "ranks", 1)).mean())


def ndcg_at(ranks: Any, k: int) -> float:
    """Normalised discounted cumulative gain with one right document: mean of 1 / log2(1 + rank), 0 beyond k.

    Järvelin and Kekäläinen, 2002; the ideal gain is 1, since the right document would stand first.

    Raises OptionError for k < 1, DataError for no ranks or a rank below 1.

    >>> ndcg_at([1, 3, 7], 5)
    0.5
    """
    found = as_integers(ranks, "ranks", 1)
    return float(np.where(found <= _cut(k), 1 / np.log2(1 + found), 0.0).mean())


def _cut(k: int) -> int:
    if k < 1:
        raise OptionError(f"k={k}: must be at least 1")
    return k

"""Metrics of labels and of likelihoods: accuracy, F1, the confusion matrix, perplexity."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rankfold.errors import DataError, NumericError, OptionError
from rankfold.measure.arrays import Integers, as_labels

__all__ = ["accuracy", "confusion", "f1", "perplexity"]


def accuracy(predicted: Any, gold: Any) -> float:
    """Share of equal labels, of two vectors [N] of numbers or text.

    Raises DataError for empty vectors or different lengths.

    >>> accuracy([0, 1, 1], [0, 1, 0])
    0.6666666666666666
    """
    first, second = as_labels(predicted, gold)
    return float((first == second).mean())


def confusion(predicted: Any, gold: Any, classes: Sequence[Any] | None = None) -> Integers:
    """Counts [K, K]: row the gold label, column the predicted one.

    Args:
        classes: the labels in the order of rows and columns; None means all that occur, sorted.

    Raises DataError for a label outside `classes`.

    >>> confusion(["a", "b", "b"], ["a", "a", "b"])
    array([[1, 1],
           [0, 1]])
    """
    first, second = as_labels(predicted, gold)
    order = list(np.unique(np.concatenate([first, second]))) if classes is None else list(classes)
    place = {label: index for index, label in enumerate(order)}
    try:
        pairs = [(place[g], place[p]) for g, p in zip(second.tolist(), first.tolist())]
    except KeyError as cause:
        raise DataError(f"label {cause.args[0]!r} is none of the {len(order)} classes") from None
    counts = np.zeros((len(order), len(order)), dtype=np.int64)
    np.add.at(counts, tuple(np.array(pairs).T), 1)
    return counts


def f1(predicted: Any, gold: Any, average: str = "macro", positive: Any = 1) -> float:
    """F1 = 2·TP / (2·TP + FP + FN), where a class that never occurs in either counts as 0.

    Args:
        average: "macro", the plain mean over the classes that occur in gold or predicted; "binary", of `positive` alone.
        positive: the class of "binary".

    Raises DataError for empty vectors or different lengths, OptionError for another average.

    >>> f1([1, 1, 0, 0], [1, 0, 0, 0]), f1([1, 1, 0, 0], [1, 0, 0, 0], average="binary")
    (0.7333333333333334, 0.6666666666666666)
    """
    if average not in ("macro", "binary"):
        raise OptionError(f"average={average!r}: macro or binary")
    first, second = as_labels(predicted, gold)
    classes = np.unique(np.concatenate([first, second])) if average == "macro" else [positive]
    scores = []
    for label in classes:
        hits = int(((first == label) & (second == label)).sum())
        named = int((first == label).sum() + (second == label).sum())  # 2·TP + FP + FN
        scores.append(2 * hits / named if named else 0.0)
    return float(np.mean(scores))


def perplexity(nll_sum: float, tokens: int) -> float:
    """exp(nll_sum / tokens), with the negative log-likelihood in nats summed over `tokens` predicted tokens.

    Inf where the mean is too large for a float. Sums, not means of batches, so that batches of unequal length weigh rightly.

    Raises DataError for no tokens, NumericError for NaN.

    >>> round(perplexity(10 * math.log(256), 10), 6)   # a uniform guess over bytes
    256.0
    """
    total, count = float(nll_sum), int(tokens)
    if count < 1:
        raise DataError(f"perplexity over {count} tokens: at least one is needed")
    if math.isnan(total):
        raise NumericError("perplexity: the summed negative log-likelihood is NaN")
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf

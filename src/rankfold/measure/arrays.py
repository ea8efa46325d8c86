"""What the metrics take: numpy arrays, torch tensors of any dtype and device, or sequences, checked once here."""

from typing import Any

import numpy as np
import numpy.typing as npt

from rankfold.errors import DataError, NumericError

__all__ = ["Floats", "Integers", "as_floats", "as_integers", "as_labels", "as_probabilities"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def _as_numpy(values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor, without importing torch; numpy has no bfloat16
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def as_floats(values: Any, name: str, ndim: int = 1) -> Floats:
    """A finite, non-empty float64 array of `ndim` dimensions.

    Raises DataError for another shape or no values, NumericError for NaN or Inf.
    """
    try:
        array = _as_numpy(values).astype(np.float64)
    except (TypeError, ValueError) as cause:
        raise DataError(f"{name}: numbers expected: {cause}") from cause
    if array.ndim != ndim or not array.size:
        raise DataError(f"{name}: expected a non-empty array of {ndim} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise NumericError(f"{name}: {array[place]} at {place}")
    return array


def as_integers(values: Any, name: str, low: int, high: int | None = None) -> Integers:
    """A non-empty int64 vector with low <= value < high.

    Raises DataError for values outside, or that are no whole numbers.
    """
    array = as_floats(values, name)
    whole = array.astype(np.int64)
    if (whole != array).any():
        raise DataError(f"{name}: whole numbers expected, got {array[whole != array][0]}")
    outside = (whole < low) | (whole >= high) if high is not None else whole < low
    if outside.any():
        bound = f"{low} to {high - 1}" if high is not None else f"at least {low}"
        raise DataError(f"{name}: {whole[outside][0]} at {int(np.flatnonzero(outside)[0])}; expected {bound}")
    return whole


def as_labels(predicted: Any, gold: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Two non-empty vectors of labels (numbers or text) of one length.

    Raises DataError when they are not.
    """
    first, second = _as_numpy(predicted), _as_numpy(gold)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise DataError(
            f"predicted and gold: expected two non-empty vectors of one length, got shapes {first.shape} and {second.shape}"
        )
    if (first.dtype.kind in "US") != (second.dtype.kind in "US"):
        raise DataError("predicted and gold: one holds text and the other numbers")
    return first, second


def as_probabilities(probabilities: Any, gold: Any) -> tuple[Floats, Integers]:
    """(probabilities [N, K], gold [N]), checked to be distributions (to 0.02, what a bfloat16 softmax keeps) and classes.

    Raises DataError when they are not; logits are the usual cause.
    """
    p = as_floats(probabilities, "probabilities", ndim=2)
    y = as_integers(gold, "gold", 0, p.shape[1])
    if len(p) != len(y):
        raise DataError(f"probabilities and gold differ in length: {len(p)} and {len(y)}")
    if (p < 0).any() or (np.abs(p.sum(axis=1) - 1) > 0.02).any():
        raise DataError("probabilities: every row must be non-negative and sum to 1; apply softmax to logits first")
    return p, y

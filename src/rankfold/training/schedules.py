"""The learning rate over a run, as a factor that depends on the step alone: a resumed run needs no state of it."""

from __future__ import annotations

import math

from rankfold.errors import OptionError

__all__ = ["SCHEDULES", "rate_factor"]

SCHEDULES = ("constant", "linear", "cosine")


def rate_factor(step: int, total: int, schedule: str = "linear", warmup: float = 0.0) -> float:
    """Factor of the learning rate at `step` (from 0) of `total`.

    Over the first w = round(warmup·total) steps it rises, (step + 1) / w; then, with u = (step − w) / (total − w), it is 1
    (constant), 1 − u (linear) or (1 + cos πu) / 2 (cosine).

    >>> [round(rate_factor(t, 5, "linear", warmup=0.2), 2) for t in range(5)]
    [1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule: got {schedule!r}; allowed: {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= 1:
        raise OptionError(f"warmup: got {warmup}; it is a share of the steps, between 0 and 1")
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    u = (step - rising) / max(total - rising, 1)
    return 1 - u if schedule == "linear" else (1 + math.cos(math.pi * u)) / 2

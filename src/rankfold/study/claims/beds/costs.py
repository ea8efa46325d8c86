"""What a step costs: bytes that torch allocates at its peak, and processor seconds beside other steps."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["allocated", "race"]

Step = Callable[[], Any]


def allocated(step: Step) -> int:
    """Most bytes that torch's allocator held during a step beyond what it held before, temporaries within operations included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on starting and stopping are nobody's concern
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def race(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median processor seconds of each, run in turn: a b b a a b ..., after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name in list(steps) if turn % 2 else list(steps)[::-1]:
            start = time.process_time()
            steps[name]()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}

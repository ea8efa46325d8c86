"""Runs a claim as it was stated: rates on the tuning seeds, then the fresh seeds; each run is written down before the next."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold.errors import NumericError
from rankfold.training.progress import Progress

from .protocol import Claim, overall
from .results import as_rows, machine, outcomes, read, sources, stale, write

__all__ = ["TOY_SEEDS", "load", "run_claim"]

TOY_SEEDS = (1, 2)
"""A toy run leaves the fresh seeds unseen."""


def load(name: str) -> Claim:
    """The claim that a file states."""
    return importlib.import_module(f".{name.replace('-', '_')}", __package__).CLAIM


def run_claim(name: str, folder: Path, *, quick: bool = False, show: bool = True) -> dict[str, Any]:
    """Run what is missing of a claim and give its result, which is also in `folder`.

    A result of the same claim file is carried on where it stopped; one of another file is begun anew.

    Args:
        quick: toy size, on other seeds: shows that the claim runs. Its verdicts say nothing.

    Raises:
        NumericError: a run gave a number that is not finite.
    """
    claim = load(name)
    seeds = TOY_SEEDS if quick else claim.seeds
    settings = {**claim.budget, **(claim.toy if quick else {})}
    result = read(name, folder)
    if result is None or stale(name, result) or result["quick"] != quick:
        result = {"quick": quick, "sources": sources(name), "machine": machine(), "seconds": 0.0, "tuning": {}, "runs": {}}
    total = len(seeds) * len(claim.arms) + len(claim.tuned) * len(claim.grid) * len(claim.tuning_seeds)
    with Progress(name, total, show) as bar:
        clock = Clock(result, bar)
        _tune(name, folder, claim, settings, result, clock, quick)
        for seed in seeds:
            done = result["runs"].setdefault(str(seed), {})
            for arm in claim.arms:
                if arm in done or (arm in claim.once and seed != seeds[0]):
                    continue
                rate = {"lr": result["tuning"][arm]["rate"]} if arm in claim.tuned else {}
                numbers = claim.run(arm, seed, {**settings, **rate})
                if not all(math.isfinite(v) for v in numbers.values()):
                    raise NumericError(f"claim {name}: arm {arm!r} at seed {seed} gave {numbers}")
                done[arm] = {k: float(v) for k, v in numbers.items()}
                clock.tick(f"seed {seed}, {arm}")
                write(name, folder, result)
    found = outcomes(claim, result)
    result |= {"checks": as_rows(found), "verdict": overall(claim, found)}
    write(name, folder, result)
    return result


class Clock:
    """Counts runs for the bar, and processor seconds for the result."""

    def __init__(self, result: dict[str, Any], bar: Progress) -> None:
        self.result, self.bar, self.done, self.since = result, bar, 0, time.process_time()

    def tick(self, text: str) -> None:
        now = time.process_time()
        self.result["seconds"] = round(self.result["seconds"] + now - self.since, 1)
        self.since, self.done = now, self.done + 1
        self.bar.at(self.done, text)


def _tune(
    name: str, folder: Path, claim: Claim, settings: Mapping[str, Any], result: dict[str, Any], clock: Clock, quick: bool
) -> None:
    """The rate of every tuned arm. A rate that diverges on any tuning seed is out; one at an end of the grid is marked."""
    seeds = claim.tuning_seeds[:1] if quick else claim.tuning_seeds
    grid = claim.grid[:2] if quick else claim.grid
    for arm in claim.tuned:
        entry = result["tuning"].setdefault(arm, {"trials": {}})
        for rate in grid:
            trials = entry["trials"].setdefault(repr(rate), {})
            for seed in seeds:
                if str(seed) not in trials:
                    value = claim.run(arm, seed, {**settings, "lr": rate})[claim.tune_by]
                    trials[str(seed)] = float(value) if math.isfinite(value) else None
                    clock.tick(f"rate {rate:g}, {arm}")
                    write(name, folder, result)
        means = {r: sum(t.values()) / len(t) for r in grid if None not in (t := entry["trials"][repr(r)]).values()}
        if not means:
            raise NumericError(f"claim {name}: arm {arm!r} diverged at every rate of {grid}")
        entry["rate"] = min(means, key=lambda r: means[r])
        entry["at_edge"] = entry["rate"] in (min(grid), max(grid))

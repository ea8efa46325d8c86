"""What a claim is, and the rule by which its numbers become a verdict. Everything here is stated before a run.

The rule, for a check "the quantity is above (below) the margin":

    identity          one run; holds if the number is on the claimed side of the margin, else not reproduced here
    learning, cost    one number per seed; the 95 % interval of their mean (Student's t, two-sided) decides:
                          all of it on the claimed side        holds
                          all of it on the other side          not reproduced here
                          the margin lies within it            inconclusive

A claim holds when all its checks do, and is not reproduced when one of them is not; checks that stand beside the claim don't
count there. p-values are of "the mean equals the margin", one-sided, exact by sign flips up to 20 pairs; Holm's adjustment runs
over every repeated check of every claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rankfold.errors import OptionError
from rankfold.measure import paired_test

__all__ = ["FIRST_FRESH_SEED", "LEVEL", "RUNS", "Check", "Claim", "Outcome", "judge", "overall"]

Numbers = Mapping[str, float]
"""What one arm measured in one run, by metric."""

Verdict = Literal["holds", "not reproduced here", "inconclusive"]

RUNS = 10
"""Fewest seeds of a check that is repeated."""

LEVEL = 0.95

FIRST_FRESH_SEED = 1000
"""Seeds below were used by the specifications, by tuning and by development; a claim is tested on seeds from here on."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One sentence of a claim that a number decides.

    Args:
        name: short, in [a-z0-9-].
        says: the sentence.
        value: the number, from what the arms measured at one seed: {arm: {metric: value}}. Differences and ratios of two arms are
            formed here, within the seed, so that the seeds pair.
        direction: the side of the margin on which the number is claimed to be.
        margin: in the unit of the number.
        kind: "identity" (algebra: one run), "learning" (training) or "cost" (seconds and bytes of this machine).
        beside: measured and judged alike, but not part of what is claimed.
        format: how the number is written.
    """

    name: str
    says: str
    value: Callable[[Mapping[str, Numbers]], float]
    direction: Literal["above", "below"]
    margin: float
    kind: Literal["identity", "learning", "cost"] = "learning"
    beside: bool = False
    format: str = ".3g"

    def __post_init__(self) -> None:
        if self.direction not in ("above", "below"):
            raise OptionError(f"check {self.name!r}: direction={self.direction!r}: above or below")
        if self.kind not in ("identity", "learning", "cost"):
            raise OptionError(f"check {self.name!r}: kind={self.kind!r}: identity, learning or cost")
        if not math.isfinite(self.margin):
            raise OptionError(f"check {self.name!r}: margin={self.margin}: must be a finite number")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper's idea should show on this machine, stated before it is run.

    Args:
        row: number in papers.toml, or None.
        title: one line.
        statement: what is claimed, in words.
        not_tested: the paper's own figure, which needs another scale and is not tested here.
        checks: the sentences that numbers decide.
        arms: what is compared; `run` is called once for each and each seed.
        run: run(arm, seed, settings) -> {metric: number}; settings are the budget and, for tuned arms, `lr`.
        seeds: fresh ones: from FIRST_FRESH_SEED on, none that tuning used; at least RUNS where a check is repeated.
        budget: fixed settings of every run.
        toy: settings that replace some of the budget in a run that only shows that the claim runs.
        once: arms that belong to identities and run at the first seed alone.
        grid: learning rates, the same for every tuned arm; () where none is tuned.
        tuned: arms whose rate is chosen: the one of the grid with the least mean of `tune_by` on the tuning seeds.
        tuning_seeds: seeds for that choice.
        tune_by: metric that the choice minimises.

    Raises:
        OptionError: a protocol that would not be one: too few runs, seeds that are not fresh, a tuned arm without a grid.
    """

    row: int | None
    title: str
    statement: str
    not_tested: str
    checks: tuple[Check, ...]
    arms: tuple[str, ...]
    run: Callable[[str, int, Mapping[str, Any]], dict[str, float]]
    seeds: tuple[int, ...]
    budget: Mapping[str, Any] = field(default_factory=dict)
    toy: Mapping[str, Any] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    grid: tuple[float, ...] = ()
    tuned: tuple[str, ...] = ()
    tuning_seeds: tuple[int, ...] = ()
    tune_by: str = ""

    def __post_init__(self) -> None:
        def demand(condition: bool, message: str) -> None:
            if not condition:
                raise OptionError(f"claim {self.title!r}: {message}")

        repeated = [c.name for c in self.checks if c.kind != "identity"]
        demand(any(not c.beside for c in self.checks), "it has no check, so that nothing could contradict it")
        demand(len({c.name for c in self.checks}) == len(self.checks), "two checks have the same name")
        demand(len(set(self.seeds)) == len(self.seeds), f"a seed stands twice in {self.seeds}")
        demand(
            len(self.seeds) >= (RUNS if repeated else 1),
            f"{len(self.seeds)} seeds; {', '.join(repeated) or 'an identity'} needs at least {RUNS if repeated else 1}",
        )
        demand(min(self.seeds) >= FIRST_FRESH_SEED, f"seed {min(self.seeds)} is not fresh: seeds start at {FIRST_FRESH_SEED}")
        shared = sorted(set(self.seeds) & set(self.tuning_seeds))
        demand(not shared, f"seeds {shared} are both tuned on and tested")
        strangers = sorted({*self.tuned, *self.once} - set(self.arms))
        demand(not strangers, f"no arm is called {', '.join(strangers)}; there are {', '.join(self.arms)}")
        demand(
            set(self.toy) <= set(self.budget), f"toy settings {sorted(set(self.toy) - set(self.budget))} are not in the budget"
        )
        demand(
            not self.tuned or bool(len(self.grid) > 1 and self.tuning_seeds and self.tune_by),
            "an arm is tuned: give a grid of at least two rates, tuning_seeds and tune_by",
        )


@dataclass(frozen=True)
class Outcome:
    """A check after the runs: the number with its interval, and the verdict. An identity has no interval and no p."""

    check: str
    kind: str
    mean: float
    low: float | None
    high: float | None
    p: float | None
    runs: int
    verdict: Verdict


def judge(check: Check, values: Sequence[float]) -> Outcome:
    """The verdict of one check by the rule at the head of this file.

    >>> faster = Check(name="gain", says="it is at least .1 better", value=len, direction="above", margin=0.1)
    >>> [judge(faster, v).verdict for v in ([0.3, 0.31, 0.29], [0.0, 0.01, 0.02], [0.0, 0.1, 0.2])]
    ['holds', 'not reproduced here', 'inconclusive']
    """
    sign = 1.0 if check.direction == "above" else -1.0
    if check.kind == "identity":
        verdict: Verdict = "holds" if sign * (values[0] - check.margin) > 0 else "not reproduced here"
        return Outcome(check.name, check.kind, values[0], None, None, None, 1, verdict)
    test = paired_test([v - check.margin for v in values], "greater" if check.direction == "above" else "less", LEVEL)
    near, far = sorted((sign * test.low, sign * test.high))
    verdict = "holds" if near > 0 else "not reproduced here" if far < 0 else "inconclusive"
    shift = check.margin
    return Outcome(check.name, check.kind, test.mean + shift, test.low + shift, test.high + shift, test.p, test.pairs, verdict)


def overall(claim: Claim, outcomes: Sequence[Outcome]) -> Verdict:
    """The verdict of a claim: the worst of its checks', those beside it left out."""
    found = {o.verdict for check, o in zip(claim.checks, outcomes) if not check.beside}
    return "not reproduced here" if "not reproduced here" in found else "inconclusive" if "inconclusive" in found else "holds"

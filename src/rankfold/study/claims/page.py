"""The page of claims, from the files of their runs: verdicts, checks by kind, and what is not tested here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankfold.atomic import write_text
from rankfold.measure import holm
from rankfold.report import Column, markdown_table

from .protocol import LEVEL, RUNS, Check, Claim, Outcome, overall
from .results import outcomes, stale

__all__ = ["render", "rows", "summary"]

Run = tuple[Claim, Mapping[str, Any]]


def rows(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """One row per check of all claims, with raw p and Holm's over every repeated check."""
    found: list[tuple[str, Check, Outcome]] = []
    for name, (claim, result) in runs.items():
        found += [(name, c, o) for c, o in zip(claim.checks, outcomes(claim, result))]
    raw = [o.p for _, _, o in found if o.p is not None]
    adjusted = iter(holm(raw) if raw else ())
    return [_row(name, check, o, None if o.p is None else float(next(adjusted))) for name, check, o in found]


def _row(name: str, check: Check, o: Outcome, adjusted: float | None) -> dict[str, Any]:
    def write(value: float) -> str:
        return format(value, check.format)

    found = write(o.mean) if o.low is None or o.high is None else f"{write(o.mean)} [{write(o.low)}, {write(o.high)}]"
    return {
        "claim": name,
        "says": check.says + (" (beside the claim)" if check.beside else ""),
        "found": found,
        "margin": f"{check.direction} {write(check.margin)}",
        "runs": o.runs,
        "p": o.p,
        "holm": adjusted,
        "verdict": o.verdict,
        "kind": check.kind,
    }


def summary(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """One row per claim."""
    return [
        {
            "claim": name,
            "row": claim.row,
            "title": claim.title,
            "verdict": verdict(name, claim, result),
            "seconds": result["seconds"],
        }
        for name, (claim, result) in runs.items()
    ]


def verdict(name: str, claim: Claim, result: Mapping[str, Any]) -> str:
    """What a result says of its claim; a toy run, and one that is unfinished, say nothing."""
    if result["quick"]:
        return "toy run"
    if "verdict" not in result:
        return "unfinished"
    return overall(claim, outcomes(claim, result)) + (" (stale: the claim's file changed since)" if stale(name, result) else "")


def render(runs: Mapping[str, Run], path: Path) -> None:
    """Write the page."""
    finished = {name: run for name, run in runs.items() if "verdict" in run[1]}
    write_text(path, _page(finished))


def _page(runs: Mapping[str, Run]) -> str:
    every = rows(runs)
    short = [Column("claim"), Column("row", align="right"), Column("title", "what is claimed"), Column("verdict")]
    short.append(Column("seconds", "processor time", format="seconds"))
    tested = [
        Column("claim"),
        Column("says", "check"),
        Column("found", f"mean [{LEVEL:.0%} interval]"),
        Column("margin", "claimed"),
    ]
    repeated = [*tested, Column("runs"), Column("p", format=".2g"), Column("holm", "p, Holm", format=".2g"), Column("verdict")]
    once = [*tested[:2], Column("found", "measured"), tested[3], Column("verdict")]
    parts = ["# Claims", _introduction()]
    parts += ["## Verdicts", markdown_table(summary(runs), short)]
    for kind, heading, text, columns in (
        ("learning", "Learning", "Networks are trained; one number per seed, both methods on the same seed.", repeated),
        ("cost", "Cost", "Seconds and bytes on the machine of the run; another machine may say otherwise.", repeated),
        ("identity", "Identities", "Algebra, in one run: no seed could change the answer.", once),
    ):
        chosen = [row for row in every if row["kind"] == kind]
        if chosen:
            parts += [f"## {heading}", text, markdown_table(chosen, columns)]
    parts += ["## Statements and settings", *(_statement(name, *run) for name, run in runs.items())]
    return "\n\n".join(parts) + "\n"


def _introduction() -> str:
    return f"""\
Written by `rankfold claims`; the numbers of every run are beside the claims' files, in `study/claims/results/`. Each claim
states its direction, margin, metric, seeds and budget in its file before it is run, and the file's hash is in the result.
Learning rates are chosen for each method from one grid, on other seeds than those tested.

A check that is repeated (at least {RUNS} seeds) is decided by the {LEVEL:.0%} interval of the mean of its paired numbers
(Student's t): **holds** if all of it is on the claimed side of the margin, **not reproduced here** if all of it is on the other
side, **inconclusive** if the margin lies within. An identity is run once. A claim holds when all its checks do, without those
that are measured beside it. p is one-sided, of the mean being at the margin, by exact sign flips up to 20 pairs; Holm's
adjustment runs over all repeated checks of this page."""


def _statement(name: str, claim: Claim, result: Mapping[str, Any]) -> str:
    where = result["machine"]
    lines = [f"### {name}: {claim.title}", claim.statement, f"Not tested here: {claim.not_tested}."]
    seeds = list(result["runs"])
    facts = [f"seeds {seeds[0]} to {seeds[-1]}"] + [f"{key.replace('_', ' ')} {value}" for key, value in claim.budget.items()]
    if claim.tuned:
        chosen = [f"{a} {e['rate']:g}{' (end of the grid)' if e['at_edge'] else ''}" for a, e in result["tuning"].items()]
        grid, tuned = ", ".join(f"{r:g}" for r in claim.grid), ", ".join(map(str, claim.tuning_seeds))
        facts.append(f"rates chosen from {grid} by the mean {claim.tune_by} on seeds {tuned}: {', '.join(chosen)}")
    lines.append("; ".join(facts) + ".")
    lines.append(
        f"Run on {where['date']}: {where['cpu']}, threads: {where['threads']} on {where['cores']} cores, "
        f"Python {where['python']}, torch {where['torch']}, commit {where['commit']}."
    )
    if "reading" in result:  # written by hand into the result, after the run
        lines.append(f"Read afterwards: {result['reading']}")
    return "\n\n".join(lines)


def readable(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `rows` for a screen: shorter columns."""
    return [
        {"claim": r["claim"], "check": r["says"], "measured": r["found"], "claimed": r["margin"], "verdict": r["verdict"]}
        for r in found
    ]

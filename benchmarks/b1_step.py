"""B1 and B2: one training step of LoRA and of DoRA over the floor (forward and input-gradient backward of the frozen model)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .contenders import TOLERANCE, Cell, contenders
from .protocol import interleave
from .results import Results

__all__ = ["cells", "measure", "run"]

METHOD = {"B1": "lora", "B2": "dora"}


def cells(benchmark: str, size: str = "short") -> Iterator[Cell]:
    """The cells of "short" (256 tokens), "all" (2048 too), or "toy"."""
    method = METHOD[benchmark]
    if size == "toy":
        yield Cell("tiny", method, 4, "float32", 8)
        return
    for tokens in (256, 2048) if size == "all" else (256,):
        for model, rank in (("llama", 16), ("minilm", 8)):
            for dtype in ("float32", "bfloat16"):
                for dropout in (0.0, 0.05):
                    yield Cell(model, method, rank, dtype, tokens, dropout)


def measure(cell: Cell, rounds: int) -> dict[str, Any]:
    """Times and their paired ratios; fails where ours and peft do not compute the same function."""
    trio = contenders(cell)
    errors = trio.check(TOLERANCE[cell.dtype])
    timing = interleave({name: trio.step(name) for name in ("floor", "peft", "ours")}, rounds)
    ratios = {f"{a}/{b}": {clock: timing.ratio(a, b, clock) for clock in ("cpu", "wall")} for a, b in PAIRS}
    ms = {clock: {name: timing.ms(name, clock) for name in trio.models} for clock in ("cpu", "wall")}
    return {"cell": cell.record(), "ms": ms, "ratios": ratios, "rounds": rounds, "errors": errors}


PAIRS = (("ours", "floor"), ("peft", "floor"), ("ours", "peft"))


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    """Measure every cell whose key holds one of `only` (all where it is empty)."""
    for cell in cells(results.benchmark, size):
        if only and not any(part in cell.key for part in only):
            continue
        rounds = 2 if size == "toy" else 16 if cell.tokens <= 256 else 7
        row = results.measure(cell.key, lambda cell=cell, rounds=rounds: measure(cell, rounds))
        low, high = row["ratios"]["ours/floor"]["cpu"][1:]
        ours, theirs = (row["ratios"][f"{name}/floor"]["cpu"][0] for name in ("ours", "peft"))
        print(
            f"{results.benchmark} {cell.key:42} ours {ours:.3f} [{low:.3f}, {high:.3f}] x floor   peft {theirs:.3f}", flush=True
        )

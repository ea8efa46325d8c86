"""`python -m benchmarks`: B1 to B4 at 256 tokens, B5, B7, B11, the planner's prices and choices; `--all`: all, resumed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import torch

from . import b1_step, b3_structures, b4_bytes, b5_bank, b7_fidelity, b11_startup, calibrate, experts, regret
from .protocol import conditions
from .render import PAGE, render
from .results import FOLDER, Results

__all__ = ["BENCHMARKS", "main"]

BENCHMARKS: dict[str, Callable[..., None]] = {
    "B1": b1_step.run,
    "B2": b1_step.run,
    "B3": b3_structures.run,
    "B4": b4_bytes.run,
    "B5": b5_bank.run,
    "B7": b7_fidelity.run,
    "B11": b11_startup.run,
    "experts": experts.run,
    "calibrate": calibrate.run,
    "regret": regret.run,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--all", action="store_true", help="2048 tokens too; cells measured under the same conditions are kept")
    parser.add_argument("--only", default="", help=f"some of {', '.join(BENCHMARKS)}, with commas")
    parser.add_argument("--cell", action="append", default=[], help="only cells whose key holds this text (may be repeated)")
    parser.add_argument("--resume", action="store_true", help="keep cells measured under the same conditions (implied by --all)")
    parser.add_argument("--toy", action="store_true", help="one toy cell each: does it run at all?")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--page", type=Path, help="where the page goes (default: docs/benchmarks.md, beside --out for --toy)")
    options = parser.parse_args(arguments)
    size = "toy" if options.toy else "all" if options.all else "short"
    if options.toy and options.out == FOLDER:
        parser.error("--toy needs --out: a toy's figures would replace the real ones")
    wanted = [name.strip().lower() for name in options.only.split(",") if name.strip()]
    unknown = set(wanted) - {name.lower() for name in BENCHMARKS}
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(", ".join(f"{k} {v}" for k, v in conditions().items()), flush=True)
        for name, run in BENCHMARKS.items():
            if not wanted or name.lower() in wanted:
                run(Results(name, options.out, resume=options.all or options.resume), size, options.cell)
    finally:
        torch.set_num_threads(before)
    out = options.page or (PAGE if options.out == FOLDER else options.out / "benchmarks.md")
    print(f"The page is {render(options.out, out)}.")


if __name__ == "__main__":
    main()

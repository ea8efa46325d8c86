"""`rankfold demo`: a real model made better on real data, offline."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of every random choice.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads of each run.")] = 2,
    scale: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the training data; less is a quick look.")] = 1.0,
) -> None:
    """Make search over Python's standard library better, offline.

    Compares the frozen encoder, LoRA, DoRA and full fine-tuning in a few minutes. Writes the adapter, metrics.json and
    report.html.
    """
    from rankfold.jobs.demo import demo as job

    job(out, seed=seed, threads=threads, scale=scale)

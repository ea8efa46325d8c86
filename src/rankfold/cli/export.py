"""`rankfold export`: hand an adapter to other tools, and say what that costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .screen import console, table

__all__ = ["export"]

FORMATS = ("peft", "folded", "serving", "kohya", "gguf")
DTYPES = ("float32", "bfloat16", "float16")


def export(
    path: Annotated[
        Path, typer.Argument(help="Folder of the adapter (rankfold, peft), or a file of kohya, LyCORIS or diffusers.")
    ],
    to: Annotated[str, typer.Option(help="peft, folded (the whole model), serving, kohya or gguf.")],
    out: Annotated[Path, typer.Option(help="Folder to write; for kohya and gguf also a .safetensors or .gguf file.")],
    model: Annotated[
        str | None, typer.Option(help="The adapter's base; the one that it was trained on by default.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut every change to this rank; the error is reported.", show_default=False)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"All but peft: {', '.join(DTYPES)}.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="Form of the model: embed, classify, lm.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Take a base with another fingerprint all the same.")] = False,
) -> None:
    """Write an adapter for other tools, with the error that costs.

    Exact where the change is a LoRA, an offset (rank 2r), a rotation, or a DoRA over these; else every site's error is printed.
    """
    from rankfold.errors import OptionError, UnknownName

    if dtype is not None and dtype not in DTYPES:
        raise UnknownName.of("dtype", dtype, DTYPES, f"there are: {', '.join(DTYPES)}")
    if out.resolve() == path.resolve():
        raise OptionError(f"--out {out}: is the adapter's own folder; give another one")
    if to not in FORMATS:
        raise UnknownName.of("format", to, FORMATS, f"there are: {', '.join(FORMATS)}")
    import torch

    from rankfold.jobs.base_for import base_for
    from rankfold.jobs.exchange import export as job

    cast = None if dtype is None else getattr(torch, dtype)
    _show(job(base_for(path, model, task), path, to, out, rank=rank, dtype=cast, force=force), path)


def _show(report: Any, path: Path) -> None:
    screen = console()
    inexact = {k: e for k, e in report.errors.items() if e}
    if inexact:
        rows = [(k, report.ranks.get(k), f"{e:.2e}") for k, e in report.errors.items()]
        screen.print(table(("site", "rank", "relative error of the change"), rows, numbers="rank,relative error of the change"))
    for note in report.notes:
        screen.print(f"note: {note}", soft_wrap=True)
    size = f"largest error {report.largest:.2e}, at {report.worst}" if inexact else "exact"
    screen.print(f"{path} -> {report.path}   {report.to}, {len(report.errors)} sites, {report.dtype}: {size}", soft_wrap=True)

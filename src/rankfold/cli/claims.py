"""`rankfold claims`: what papers claim, tested here by a protocol fixed before the run."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["claims"]


def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Claims to run, or all; none lists them.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="runs/claims")] = None,
    page: Annotated[Path | None, typer.Option(help="Where the page is written.", show_default="claims.md in --out")] = None,
    render_only: Annotated[bool, typer.Option("--render-only", help="Write the page from the results that are there.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Toy size: shows that a claim runs, says nothing about it.")] = False,
) -> None:
    """Run the tests of papers' claims, or list them."""
    from rankfold.study.claims import main

    main(names or (), out=out, page=page, render_only=render_only, quick=quick)

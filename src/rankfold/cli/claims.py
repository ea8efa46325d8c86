"""`rankfold claims`: what papers claim, tested here by a protocol fixed before the run."""

from typing import Annotated

import typer

__all__ = ["claims"]


def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Claims to run; none lists them.", show_default=False)] = None,
) -> None:
    """Run the tests of papers' claims, or list them."""
    from rankfold.study.claims import main

    main(names or [])

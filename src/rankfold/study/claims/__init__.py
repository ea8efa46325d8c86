"""Claims of papers, tested by a protocol that is fixed before the run. One file per claim, found by folder.

    rankfold claims                  every claim with its last verdict
    rankfold claims lora-ga          run one; the numbers go to runs/claims/lora-ga.json, the page to runs/claims/claims.md
    rankfold claims all              run them all

The runs that come with the package are in `results/`, and docs/claims.md is rendered from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(
    names: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    page: str | Path | None = None,
    render_only: bool = False,
    quick: bool = False,
) -> None:
    """What `rankfold claims` does: list, run or render claims.

    Args:
        names: claims to run; "all" is every one; () lists them.
        out: folder of the results: runs/claims by default, to list or render those that come with the package.
        page: where the page is written: claims.md in `out` by default.
        render_only: run nothing, write the page from the results that are there.
        quick: toy size: shows that a claim runs, says nothing about it. Goes to runs/claims-quick by default.

    Raises:
        UnknownName: no claim has that name.
        FileError: a result that can't be read.
    """
    from rich.console import Console

    from . import page as pages
    from .results import RECORDED, file_of, read
    from .results import names as known
    from .runner import load, run_claim

    chosen = known() if list(names) == ["all"] else list(names)
    for name in chosen:
        file_of(name)
    reads_only = render_only or not chosen
    folder = Path(out) if out is not None else RECORDED if reads_only else Path("runs/claims-quick" if quick else "runs/claims")
    console = Console()
    for name in [] if reads_only else chosen:
        run = load(name), run_claim(name, folder, quick=quick)
        console.print(f"{name}: {pages.verdict(name, *run)}", highlight=False)
        _show(console, pages.readable(pages.rows({name: run})))
    found: dict[str, Any] = {name: (load(name), result) for name in known() if (result := read(name, folder)) is not None}
    if not chosen and not render_only:
        listed = {row["claim"]: row for row in pages.summary(found)}
        _show(
            console,
            [listed.get(n, {"claim": n, "row": load(n).row, "title": load(n).title, "verdict": "never run"}) for n in known()],
        )
        console.print("Run one: rankfold claims NAME. Run all: rankfold claims all.", highlight=False)
        return
    if found:
        target = Path(page) if page is not None else folder / "claims.md"
        pages.render(found, target)
        console.print(f"page: {target}", highlight=False)


def _show(console: Any, rows: Sequence[dict[str, Any]]) -> None:
    from rankfold.report import Column, console_table

    shown = [key for key in rows[0] if key != "seconds"]
    console.print(console_table(rows, [Column(key, align="right" if key == "row" else "left") for key in shown]))

"""`rankfold inspect`: look inside an adapter or a model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .screen import console, table

if TYPE_CHECKING:
    from rankfold.jobs.inspect import Inspection

__all__ = ["inspect"]


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="An adapter: folder, or file of kohya, LyCORIS, diffusers; or a model: folder, built-in or hub name."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The adapter's base: changes that lean on it then have numbers too.", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="Form of the model: embed, classify, lm.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Take a base with another fingerprint all the same.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Look inside an adapter or a model: sites, ranks, norms, spectra.

    Also what was trained, and the fingerprint of the base.
    """
    found = _look(path, model, task, force)
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False, default=str))
    else:
        _show(path, found)


def _look(path: str, model: str | None, task: str | None, force: bool) -> "Inspection":
    from rankfold.errors import FileError
    from rankfold.jobs.inspect import inspect_folder, inspect_model
    from rankfold.jobs.models import load_model

    folder = Path(path)
    if (
        folder.is_dir()
        and not any((folder / name).exists() for name in ("adapter.json", "adapter_config.json"))
        and ((folder / "config.json").exists() or not any(folder.glob("*.safetensors")))
    ):
        if not (folder / "config.json").exists():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise FileError(f"{path}: neither an adapter nor a model; it holds: {there}")
        return inspect_model(load_model(path, task or "embed").model)
    if not folder.is_dir() and not folder.exists():
        return inspect_model(load_model(path, task or "embed").model)
    if model is None:
        return inspect_folder(path)
    from rankfold.jobs.base_for import base_for

    return inspect_folder(path, base_for(path, model, task), force)


def _show(path: str, found: "Inspection") -> None:
    screen = console()
    facts: list[tuple[str, Any]] = [
        ("path", f"{path}   {found.what}"),
        ("numbers", f"{found.parameters:,} at {len(found.rows)} sites"),
    ]
    if found.method:
        options = ", ".join(f"{k}={v}" for k, v in found.options.items())
        facts.append(("method", f"{found.method}" + (f"   {options}" if options else "")))
    ranks = sorted({r.rank for r in found.rows if r.rank is not None})
    if ranks:
        facts.append(("ranks", f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"))
    facts += [("shared", f"{n} {list(shape)}") for n, shape in found.shared.items()]
    facts += [("whole", f"{n} {list(shape)}") for n, shape in found.extras.items()]
    if found.labels:
        facts.append(("labels", ", ".join(found.labels)))
    facts += [("trained", f"{k}: {v}") for k, v in found.trained.items() if v is not None and not isinstance(v, dict | list)]
    facts.append(("base", f"sha256 {found.base[:16]}…" if found.base else "no fingerprint stored"))
    for name, value in facts:
        screen.print(f"{name:<8} {value}", soft_wrap=True)
    screen.print()
    columns = ("site", "kind", "out x in", "rank", "numbers", "norm", "of W", "largest σ", "stable rank", "effective rank", "")
    screen.print(
        table(columns, [_row(r) for r in found.rows], numbers="rank,numbers,norm,of W,largest σ,stable rank,effective rank")
    )


def _row(row: Any) -> tuple[object, ...]:
    s = row.stats
    numbers = ("",) * 5 if s is None else (
        f"{s.frobenius:.4g}", "" if row.relative is None else f"{row.relative:.2%}",
        f"{s.spectral:.4g}", f"{s.stable_rank:.2f}", f"{s.effective_rank:.2f}",
    )  # fmt: skip
    return (row.site, row.kind, f"{row.shape[0]} x {row.shape[1]}", row.rank, f"{row.parameters:,}", *numbers, row.note)

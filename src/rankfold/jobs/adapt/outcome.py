"""What a run leaves behind beside the adapter: metrics.json and report.html."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankfold.adapters.files import write_json
from rankfold.report import Column, Report, change_per_site, learning_curves, rank_trajectories
from rankfold.training.adaptation import Adaptation
from rankfold.training.loop import History

from .changes import relative_changes
from .dry import site_rows
from .memory import size_of

if TYPE_CHECKING:
    from .run import Prepared

__all__ = ["finite", "metrics_of", "versions", "write_metrics", "write_report"]

SCHEMA = 1


def versions() -> dict[str, str]:
    """Of what had a part in the figures."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in ("rankfold", "torch", "transformers", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def finite(value: Any) -> Any:
    """The same with numbers that JSON has not as text.

    >>> finite({"perplexity": math.inf, "loss": 2.0})
    {'perplexity': 'inf', 'loss': 2.0}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def metrics_of(ready: Prepared, handle: Adaptation, history: History, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the run by name, with its settings and versions."""
    model, inputs = ready.loaded.model, ready.inputs
    base, stored = size_of(model)
    trained = handle.parameter_count()
    counts = {part: len(table) for part in ("train", "valid", "test") if (table := getattr(inputs, part)) is not None}
    return {
        "schema": SCHEMA,
        "task": ready.settings.task,
        "model": ready.settings.model,
        "method": ready.method.text,
        "options": dict(ready.method.options),
        "valid": figures["valid"],
        "test": figures["test"],
        "base": figures["base"],
        "parameters": {
            "trained": trained,
            "base": base,
            "share": trained / base,
            "sites": len(handle.sites),
            "base_bytes": stored,
        },
        "rows": {**counts, "cut": ready.task.cut, "left_out": dict(inputs.train.dropped)},
        "steps": len(history.steps),
        "stopped": history.stopped,
        "best_step": history.best_step,
        "seconds": history.seconds,
        "evaluation_seconds": history.evaluation_seconds,
        "peak_memory": history.peak_memory,
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "base_hash": handle.fingerprint().hash,
        "settings": ready.settings.model_dump(mode="json"),
        "versions": versions(),
        "changes": relative_changes(handle),
        "history": {"train": history.steps, "valid": history.evaluations},
    }


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """metrics.json, as a whole or not at all."""
    write_json(path, finite(metrics))


def write_report(path: Path, ready: Prepared, handle: Adaptation, history: History, metrics: Mapping[str, Any]) -> None:
    """One self-contained page: figures, learning curves, what moved where, how it was made."""
    s, task = ready.settings, ready.task
    name, key = task.shown.get(task.metric, task.metric), task.metric
    part = "test" if metrics["test"] else "valid"
    lead = f"{name} `{metrics[part][key]:.4g}` on the {part} rows" if metrics[part] else f"{metrics['steps']} steps"
    if part == "test" and key in metrics["base"]:
        lead += f", from `{metrics['base'][key]:.4g}` without the adapter"
    report = Report(
        f"{s.model} adapted to {Path(s.data).name}",
        subtitle=f"{s.task} · {ready.method.describe()}",
        lead=lead + ".",
        footer={
            **metrics["versions"],
            "device": metrics["device"],
            "threads": metrics["threads"],
            "seed": s.seed,
            "base": metrics["base_hash"][:16],
        },
    )
    results = report.section("Results")
    better = {k: "higher" if task.better == "higher" and k != "loss" else "lower" for k in task.shown}
    columns = [Column("rows"), *(Column(k, title, format=".4g", better=better[k]) for k, title in task.shown.items())]  # type: ignore[arg-type]
    titles = {"base": "test, without the adapter", "test": "test", "valid": "valid"}
    rows = [{"rows": title, **metrics[p]} for p, title in titles.items() if metrics[p]]
    if rows:
        results.table(rows, [Column(c.key, c.name, format=c.format) for c in columns])
    cost = {
        "trained parameters": f"{metrics['parameters']['trained']:,} ({100 * metrics['parameters']['share']:.3g} %)",
        "time": f"{metrics['seconds']:.0f} s",
        "peak memory": f"{metrics['peak_memory'] / 1e9:.2f} GB",
        "rows": ", ".join(f"{k} {v:,}" for k, v in metrics["rows"].items() if isinstance(v, int)),
    }
    results.facts(cost)
    if metrics["rows"]["cut"]:
        results.note(f"{metrics['rows']['cut']:,} texts were longer than {task.max_length} tokens and were cut.")
    curves = report.section("Training")
    curves.figure(
        learning_curves({"train": [(r["step"], r["loss"]) for r in history.steps]}, metric="loss", better="lower"),
        "Training loss",
    )
    if history.evaluations:
        points = [(e["step"], e[key]) for e in history.evaluations]
        curves.figure(learning_curves({"valid": points}, metric=name, better=task.better), f"{name} on the valid rows")
    moved = history.changes.get("ranks", [])
    if len(moved) > 1:
        strips = {site: [(step, ranks[site]) for step, ranks in moved] for site in moved[0][1]}
        curves.figure(rank_trajectories(strips), "Rank of each site")
    changes = report.section("What changed")
    if metrics["changes"]:
        changes.figure(change_per_site(metrics["changes"]), "Size of the change at each site, relative to the weight")
    sites = [{**row, "change": metrics["changes"].get(row["site"])} for row in site_rows(handle)]
    changes.table(
        sites,
        [Column("site", format="code"), Column("kind"), Column("shape", "out × in", align="right"), Column("rank"),
         Column("parameters", format=","), Column("change", "‖ΔW‖ / ‖W‖", format=".3g")],
    )  # fmt: skip
    report.section("Settings").facts({k: v for k, v in metrics["settings"].items() if v not in (None, (), [], {})})
    report.write(path)

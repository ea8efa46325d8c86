"""A dry run: the sites that would train, with what they cost, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rankfold.core.store import Slot
from rankfold.report import Column, console_table
from rankfold.training.adaptation import Adaptation
from rankfold.training.batches import to_device
from rankfold.training.explain import explain

from .memory import plan_memory, size_of
from .run import Prepared
from .screen import Screen, megabytes

__all__ = ["dry_run", "site_rows"]


def site_rows(handle: Adaptation) -> list[dict[str, Any]]:
    """One row a site: name, kind, shape (out, in), rank, parameters that train, bytes; then the extra tensors."""
    rows = [_row(handle, slot) for slot in handle.slots()]
    for extra in handle.attached[handle.names[-1]].member.extras.values():
        tensor = handle.store.tensor(extra.key)
        rows.append(
            {
                "site": extra.name,
                "kind": "whole",
                "shape": " × ".join(map(str, tensor.shape)),
                "rank": None,
                "parameters": tensor.numel(),
                "bytes": tensor.nbytes,
            }
        )
    return rows


def _row(handle: Adaptation, slot: Slot) -> dict[str, Any]:
    own = {key: handle.store.tensor(key) for key, _ in slot.binding.values() if key not in slot.member.shared.values()}
    return {
        "site": slot.site.key,
        "kind": slot.site.kind,
        "shape": " × ".join(map(str, slot.site.shape)),
        "rank": getattr(slot.structure.core, "rank", None),
        "parameters": sum(t.numel() for t in own.values() if t.requires_grad),
        "bytes": sum(t.nbytes for t in own.values()),
    }


def dry_run(ready: Prepared, handle: Adaptation, screen: Screen) -> dict[str, Any]:
    """Print the table of sites and the memory that training will need; gives both as data."""
    model = ready.loaded.model
    device = next(model.parameters()).device
    # the batch with the most tokens decides
    longest = max(
        range(len(ready.batches)), key=lambda i: sum(ready.task.length(ready.batches.rows[r]) for r in ready.batches.order(0)[i])
    )
    batch = to_device(ready.batches.batch(0, longest), device)
    plan = plan_memory(model, handle, lambda: ready.task.loss(model, batch))
    rows = site_rows(handle)
    columns = [
        Column("site"),
        Column("kind"),
        Column("shape", "out × in", align="right"),
        Column("rank"),
        Column("parameters", format=","),
        Column("bytes", format=","),
    ]
    screen.table(console_table(rows, columns))
    for key, reason in handle.dropped:
        screen.say("left out", f"{key}: {reason}")
    base, _ = size_of(model)
    trained = handle.parameter_count()
    screen.say("total", f"{len(handle.sites)} sites, {trained:,} of {base:,} parameters train ({100 * trained / base:.2f} %)")
    parts = {
        "base": plan.base, "adapter": plan.adapter, "gradients and moments": plan.training, "activations": plan.activations,
    }  # fmt: skip
    longest_row = max(ready.task.length(ready.batches.rows[r]) for r in ready.batches.order(0)[longest])
    plans = Counter((row["plan"], row["memory"]) for row in explain(model, longest_row * len(ready.batches.order(0)[longest])))
    screen.say(
        "plan", ", ".join(f"{plan}, {mode}: {n} sites" for (plan, mode), n in plans.items()) + f" (memory: {handle.store.memory})"
    )
    screen.say(
        "memory", f"about {megabytes(plan.total)}: " + ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items())
    )
    return {
        "sites": rows,
        "dropped": handle.dropped,
        "parameters": {"trained": trained, "base": base},
        "memory": {**parts, "total": plan.total},
        "plans": [{"plan": name, "memory": mode, "sites": n} for (name, mode), n in plans.items()],
    }

"""What the planner does at each site of a model, and why: for whoever wonders where the time or the memory goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankfold.core.host import site_program
from rankfold.core.kinds import kind_named
from rankfold.core.store import store_of
from rankfold.errors import LayoutError

__all__ = ["explain"]


def explain(model: nn.Module, tokens: int = 256) -> list[dict[str, Any]]:
    """One row per adapted site: plan, memory mode, the expression, and the costs that were compared (in multiply-adds).

    >>> import torch, rankfold as rf
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> _ = rf.adapt(model, "lora", rank=2)
    >>> [(row["site"], row["plan"], row["expression"]) for row in rf.explain(model)]
    [('0', 'fused', 'W + LowRank')]
    """
    store = store_of(model)
    if store is None:
        raise LayoutError(f"{type(model).__name__} has no adapter; rf.adapt(model, METHOD) gives it one")
    rows = []
    for name in store.active:
        for key, slot in store.members[name].slots.items():
            if slot.base is None:
                rows.append({"site": key, "adapter": name, "plan": "side module", "memory": "keep", "expression": "h + f(h)"})
                continue
            program = site_program(store, [slot], training=False)
            x = torch.zeros(1, slot.site.shape[1], dtype=slot.base.dtype, device=slot.base.device) if program.needs_x else None
            rows.append(
                {"site": key, "adapter": name, **kind_named(slot.site.kind).explain(program, tokens, slot.member.memory, x)}
            )
    return rows

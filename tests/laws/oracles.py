"""W' of the papers' formulas in plain torch, by the name of the structure: imports neither operators nor the planner.

Each takes the base W [out, in], the site's tensors t and the structure (for its numbers), and gives W' [out, in].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FORMULAS", "has_formula", "weight"]


def number(structure: Any) -> float:
    return 1.0 if structure.alpha is None else structure.alpha / structure.rank**structure.power


def lora(W: Tensor, t: Any, s: Any) -> Tensor:
    return W + number(s) * t.B @ t.A


def hira(W: Tensor, t: Any, s: Any) -> Tensor:
    return W * (1 + number(s) * t.B @ t.A)


def hadamard(W: Tensor, t: Any, s: Any) -> Tensor:
    return W + number(s) * (t.B1 @ t.A1) * (t.B2 @ t.A2)


def kron(W: Tensor, t: Any, s: Any) -> Tensor:
    P = t.P if hasattr(t, "P") else t.P1 @ t.P2
    Q = t.Q if hasattr(t, "Q") else t.Q1 @ t.Q2
    return W + number(s) * torch.einsum("pq,ab->paqb", P, Q).reshape(W.shape)


def vera(W: Tensor, t: Any, s: Any) -> Tensor:
    return W + torch.einsum("o,or,r,ri->oi", t.b, t.B, t.d, t.A)


def miss(W: Tensor, t: Any, s: Any) -> Tensor:
    D = t.D if s.mini is None else t.D.repeat(W.shape[0] // s.mini, 1)
    columns = [D[:, i % s.rank] for i in range(W.shape[1])]
    return W + torch.stack(columns, 1)


def bone(W: Tensor, t: Any, s: Any) -> Tensor:
    r, (out, in_) = s.rank, W.shape
    rows = []
    for j in range(out // r):
        row = []
        for k in range(in_ // r):
            block, C = W[j * r : (j + 1) * r, k * r : (k + 1) * r], t.C[j if s.blocks == "out" else k]
            row.append(block + block @ C + C)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows, 0)


def shira(W: Tensor, t: Any, s: Any) -> Tensor:
    flat = torch.zeros(W.numel(), dtype=W.dtype).index_add(0, t.index.long(), t.values)
    return W + flat.view(W.shape)


def hra(W: Tensor, t: Any, s: Any) -> Tensor:
    for u in t.U.unbind(1):
        W = W - 2 * torch.outer(W @ u, u) / (u @ u)
    return W


def full(W: Tensor, t: Any, s: Any) -> Tensor:
    return t.value + 0.0 * W


def magnitude(W: Tensor, t: Any, s: Any) -> Tensor:
    V = weight(W, t, s.inner)
    length = V.norm(dim=1)
    return (t.m / (length.detach() if s.detach else length))[:, None] * V


def gate(W: Tensor, t: Any, s: Any) -> Tensor:
    if s.per == "rank":  # component k is what is left of the change when the others are switched off
        inner = getattr(s.inner, "inner", s.inner)
        if hasattr(t, "B0"):
            components = [
                number(inner) * (torch.outer(t.B[:, k], t.A[k]) - torch.outer(t.B0[:, k], t.A0[k])) for k in range(len(t.gate))
            ]
        else:
            components = [weight(W, t._replace(B=t.B[:, [k]], A=t.A[[k]]), inner) - W for k in range(len(t.gate))]
        return W + sum(g * component for g, component in zip(t.gate, components))
    change = weight(W, t, s.inner) - W
    return W + (t.gate if s.per == "site" else t.gate[:, None]) * change


def dropout(W: Tensor, t: Any, s: Any) -> Tensor:
    return weight(W, t, s.inner)  # in evaluation


def offset(W: Tensor, t: Any, s: Any) -> Tensor:
    start = t._replace(**{n[:-1]: getattr(t, n) for n in t._fields if n.endswith("0") and n[:-1] in t._fields})
    return W + weight(W, t, s.inner) - weight(W, start, s.inner)


FORMULAS = {
    "lora": lora,
    "hira": hira,
    "hadamard": hadamard,
    "kron": kron,
    "vera": vera,
    "miss": miss,
    "bone": bone,
    "shira": shira,
    "hra": hra,
    "full": full,
    "magnitude": magnitude,
    "gate": gate,
    "dropout": dropout,
}


def weight(W: Tensor, t: Any, structure: Any) -> Tensor:
    """W' of a whole chain, from the outermost structure inwards."""
    formula = offset if type(structure).__name__ == "Offset" else FORMULAS[structure.name]
    return formula(W, t, structure)


def has_formula(structure: Any) -> bool:
    """Whether every layer of a chain has its formula here. (Structures of later files have it in their own tests.)"""
    inner = getattr(structure, "inner", None)
    known = type(structure).__name__ == "Offset" or structure.name in FORMULAS
    return known and (inner is None or has_formula(inner))

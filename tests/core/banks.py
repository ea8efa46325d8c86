"""A small model, adapters of it as plain data, and the model with one of them written into it by hand, in float64."""

from __future__ import annotations

import torch
from torch import nn

import rankfold as rf

RANK = 6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.embed(ids))))


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def entries(seed: int, rank: int, gain: bool = False, embed: bool = False, scale: float = 0.7) -> rf.Adapter:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = [
        rf.Entry("first", draw(12, rank), draw(rank, 8), scale, gain=1 + 0.3 * draw(12) if gain else None),
        rf.Entry("second", draw(7, rank), draw(rank, 12), scale, magnitude=draw(7).abs() + 1 if gain else None),
    ]
    if embed:
        made.append(rf.Entry("embed", draw(8, rank), draw(rank, 11), scale, kind="embedding"))
    return rf.Adapter.of(made)


def by_hand(adapter: rf.Adapter | None, ids: torch.Tensor) -> torch.Tensor:
    return by_hand_module(adapter)(ids).detach()


def by_hand_module(adapter: rf.Adapter | None) -> Model:
    """The model with W' written into it."""
    changed = model()
    for e in adapter.entries.values() if adapter is not None else ():
        module = changed.get_submodule(e.name)
        W = module.weight.detach().mT if e.kind == "embedding" else module.weight.detach()
        new = W + e.scale * e.B @ e.A
        if e.gain is not None:
            new = e.gain[:, None] * new
        if e.magnitude is not None:
            new = e.magnitude[:, None] * new / new.norm(dim=1, keepdim=True)
        module.weight.data.copy_(new.mT if e.kind == "embedding" else new)
    return changed


IDS = torch.randint(0, 11, (40, 3), generator=torch.Generator().manual_seed(1))

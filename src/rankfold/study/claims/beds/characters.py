"""A character model trained on docstrings of the standard library, to be tuned to its code."""

from __future__ import annotations

import ast
import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.jobs.data.functions import functions_with_docstrings, nameless_code, parse_quietly
from rankfold.jobs.data.modules import library_modules
from rankfold.jobs.data.splitting import stable_hash
from rankfold.linalg.random import Random

__all__ = ["CharacterModel", "tune"]

SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
WIDTH, HEADS, DEPTH, LENGTH, ROWS = 128, 4, 2, 64, 8


class Block(nn.Module):
    """One layer of a causal transformer, normalised before each half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:  # [rows, length, width]
        x = self.norm1(h)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class CharacterModel(nn.Module):
    """Two blocks of width 128 over the last 64 characters; gives the mean loss in nats per character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(len(SYMBOLS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(SYMBOLS))

    def forward(self, text: Tensor) -> Tensor:  # [rows, length + 1]
        h = self.embed(text[:, :-1]) + self.place.weight
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1), text[:, 1:].flatten())


def tune(seed: int, method: str, lr: float, *, steps: int, pretraining: int, size: int, **options: Any) -> dict[str, float]:
    """Loss on code of unseen modules after AdamW steps with a cosine schedule on code, from the model pretrained on docstrings.

    Gives `loss`, `before` (of the frozen model) and `parameters` (that trained).
    """
    _, code, test = _texts(size)
    model = CharacterModel()
    model.load_state_dict(_pretrained(seed, pretraining, size))
    unseen = _rows(test, Random(seed, "claims", "test"), 16 * ROWS)
    before = _loss(model, unseen)
    first = [_rows(code, Random(seed, "claims", "seen"), ROWS)]
    adaptation = rf.adapt(model, method, targets="blocks.*", seed=seed, batches=first, loss=lambda m, b: m(b), **options)
    _train(model, adaptation.optimizer(lr=lr), code, Random(seed, "claims", "tuning"), steps)
    return {"loss": _loss(model, unseen), "before": before, "parameters": adaptation.parameter_count()}


def _loss(model: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        return float(torch.stack([model(part) for part in rows.split(ROWS)]).mean())


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, random: Random, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(_rows(text, random.child(step), ROWS))
        if not math.isfinite(float(loss.detach())):
            return  # what is measured next tells that it diverged
        loss.backward()
        optimizer.step()
        schedule.step()


def _rows(text: Tensor, random: Random, count: int) -> Tensor:
    """[count, LENGTH + 1] pieces of a text at random places."""
    starts = random.integers((count,), len(text) - LENGTH)
    return text[starts[:, None] + torch.arange(LENGTH + 1)]


@lru_cache(maxsize=32)
def _pretrained(seed: int, steps: int, size: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharacterModel()
    _train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), _texts(size)[0], Random(seed, "claims", "pretraining"), steps)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@lru_cache(maxsize=2)
def _texts(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Docstrings, code and unseen code, `size` characters each as symbols; no module is in two of them."""
    modules = sorted(library_modules(), key=lambda m: stable_hash("claims", m.name))
    found: list[Tensor] = []
    for part in range(3):
        pieces: list[str] = []
        room = size
        for module in modules[part::3]:
            tree = parse_quietly(module.path.read_bytes()) or ast.Module([], [])
            for node, docstring in functions_with_docstrings(tree):
                pieces.append(docstring if part == 0 else nameless_code(node)[0])
                room -= len(pieces[-1]) + 2
            if room <= 0:
                break
        text = "\n\n".join(pieces)[:size]
        found.append(torch.tensor([max(SYMBOLS.find(c), 0) for c in text]))
    return found[0], found[1], found[2]

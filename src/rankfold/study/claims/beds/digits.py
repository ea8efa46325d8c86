"""Handwritten digits of 8 x 8 pixels (scikit-learn): networks trained on upright ones, to be tuned to rotated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.errors import MissingExtra
from rankfold.linalg.random import Random

__all__ = ["PatchModel", "Split", "accuracy", "digits", "perceptron", "pretrained", "train"]

Split = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images [rows, 8, 8] and labels to train on, images and labels to test on."""

TEST = 500


@lru_cache(maxsize=1)
def _images() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra.of("the digits data set", "scikit-learn", "demo") from None
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)


def digits(seed: int, turns: int = 0) -> Split:
    """A split of the 1797 images drawn from the seed, every image turned by `turns` times 90 degrees."""
    x, y = _images()
    order = Random(seed, "claims", "digits").permutation(len(x))
    x, y = torch.rot90(x, turns, (1, 2))[order], y[order]
    return x[TEST:], y[TEST:], x[:TEST], y[:TEST]


def perceptron() -> nn.Sequential:
    """64 pixels, two hidden layers of 256, 10 classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Block(nn.Module):
    """One layer of a vision transformer, normalised before each half."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:  # [rows, patches, width]
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class PatchModel(nn.Module):
    """A small vision transformer: 16 patches of 2 x 2 pixels, blocks of width 32, mean over patches, head."""

    def __init__(self, width: int = 32, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, width), nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [rows, 8, 8]
        patches = x.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).reshape(len(x), 16, 4)
        h = self.embed(patches) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


def pretrained(make: Callable[[], nn.Module], seed: int, steps: int) -> nn.Module:
    """A fresh copy of a network trained on the upright digits of a seed."""
    model = make()
    model.load_state_dict(_state(make, seed, steps))
    return model


@lru_cache(maxsize=32)
def _state(make: Callable[[], nn.Module], seed: int, steps: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), digits(seed), Random(seed, "claims", "pretraining"), steps)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, random: Random, steps: int) -> None:
    """Cross-entropy on batches of 64, with a cosine schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = random.child(step).choice(len(data[0]), 64)
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, data: Split) -> float:
    """On the test images, in percent."""
    with torch.no_grad():
        return 100 * float((model(data[2]).argmax(1) == data[3]).float().mean())


def only(parameters: Iterable[nn.Parameter], model: nn.Module) -> list[nn.Parameter]:
    """Freeze all of a model but these."""
    kept = list(parameters)
    model.requires_grad_(False)
    for p in kept:
        p.requires_grad_(True)
    return kept

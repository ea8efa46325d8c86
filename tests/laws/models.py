"""Tiny seeded models with one or two sites of one kind, float64 unless told otherwise, out never equal to in."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import rankfold as rf

__all__ = ["BLOCK", "KINDS", "Case", "tiny"]

BLOCK = "block"
"""Where side modules stand; no kind of weight."""
KINDS = rf.SITE_KINDS

VOCABULARY = 10


class Linear(nn.Module):
    """Two linear sites, [12, 8] with bias and [6, 12] without."""

    targets = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Transposed(Linear):
    """The same with transformers' Conv1D, whose weights are stored [in, out] and always have a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(12, 8), Conv1D(6, 12)
        for module in (self.first, self.second):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.normal_(module.bias, std=0.3)


class Embedding(nn.Module):
    """One embedding: the map [6, 10]."""

    targets = ("embed",)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.embed(ids))


class Convolution(nn.Module):
    """Two convolutions of images: the maps [6, 18], strided and padded, and [4, 24], dilated, without bias."""

    targets = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, 2, dilation=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Grouped(Convolution):
    """The same with two groups each: stacks of two maps, [4, 18] and [4, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Conv2d(8, 8, (1, 2), groups=2, bias=False)


class Experts(nn.Module):
    """Mixtral's three experts under a router of fixed taste: stacks of three maps, [12, 8] and [8, 6]."""

    targets = ("experts.gate_up_proj", "experts.down_proj")

    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(num_local_experts=3, hidden_size=8, intermediate_size=6)
        config._experts_implementation = "eager"
        self.experts = MixtralExperts(config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        index = torch.arange(len(flat))[:, None] % torch.tensor([3, 2])  # the first choice goes round, the second leaves one out
        index[:, 1] = (index[:, 0] + 1 + index[:, 1]) % 3
        weights = torch.tensor([0.7, 0.3], dtype=x.dtype).expand(len(flat), 2)
        return self.experts(flat, index, weights).view(x.shape)


class Multihead(nn.Module):
    """Self-attention with its projections in one weight, [24, 8] with bias, and cross-attention with three of their own.

    One head each, with its weights and a bias, tokens first: else torch picks among kernels by what requires a gradient, and each
    rounds in its own way (tests/core/test_multihead_sites.py tries those).
    """

    targets = ("both.in_proj_weight", "both.out_proj", "cross.k_proj_weight", "cross.out_proj")

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.MultiheadAttention(8, 1)
        self.cross = nn.MultiheadAttention(6, 1, kdim=8, vdim=8)
        self.narrow = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(x, x, x)[0]
        return self.cross(self.narrow(h), h, x)[0]


class Rows(nn.Module):
    """Slices of fused weights: q and v of a linear [12, 8], rows 4 to 8 of a Conv1D [12, 12] storage."""

    targets = ("fused[q]", "fused[v]", "attend[4:8]")

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.attend = nn.Linear(8, 12), Conv1D(12, 12)
        nn.init.normal_(self.attend.weight, std=0.3)
        nn.init.normal_(self.attend.bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(torch.tanh(self.fused(x)))


class Tied(nn.Module):
    """An embedding and a head in one storage: the maps [6, 10] and [10, 6]."""

    targets = ("embed", "head")

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.dense(h))


class Blocks(nn.Module):
    """Two equal blocks of width 6, for what stands beside weights."""

    targets = ("all-linear",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.read = nn.Linear(6, 4)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return self.read(h)


MODELS: dict[str, type[nn.Module]] = {
    "linear": Linear,
    "conv1d": Transposed,
    "embedding": Embedding,
    "convolution": Convolution,
    "grouped": Grouped,
    "experts": Experts,
    "multihead": Multihead,
    "rows": Rows,
    "tied": Tied,
    BLOCK: Blocks,
}


@dataclass
class Case:
    """A model, the sites to adapt, and a batch [3, 5, in], [3, 5] of tokens, or [3, C, 6, 5] of images.

    `pristine()` is the model as it was made.
    """

    kind: str
    model: nn.Module
    targets: list[str]
    batch: Tensor
    dtype: torch.dtype
    original: nn.Module = field(repr=False)

    def pristine(self) -> nn.Module:
        return copy.deepcopy(self.original)

    def again(self) -> Case:
        """The same case with a fresh model."""
        return Case(self.kind, self.pristine(), list(self.targets), self.batch, self.dtype, self.original)

    @property
    def takes_tokens(self) -> bool:
        return not self.batch.is_floating_point()

    def output(self) -> Tensor:
        return self.model(self.batch)

    @staticmethod
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        """Distance to a fixed pattern, so that no gradient vanishes by symmetry."""
        y = model(batch)
        pattern = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        return (y - pattern).square().mean()


def tiny(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """The case of one site kind: weights and batch are functions of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        original = MODELS[kind]().double()
        if kind in ("embedding", "tied"):
            batch = torch.randint(VOCABULARY, (3, 5))
        elif kind in ("convolution", "grouped"):
            batch = torch.randn(3, 2 if kind == "convolution" else 4, 6, 5, dtype=torch.float64).to(dtype)
        else:
            batch = torch.randn(3, 5, 6 if kind == BLOCK else 8, dtype=torch.float64).to(dtype)
    original = original.to(dtype).eval()
    if kind == "tied":
        original.head.weight = original.embed.weight
    return Case(kind, copy.deepcopy(original), list(original.targets), batch, dtype, original)

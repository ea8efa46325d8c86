"""AdapterTune: a bottleneck after a block, started at zero.

"AdapterTune: Zero-Initialized Low-Rank Adapters for Frozen Vision Transformers", 2026, eq. 1 (row 6 of our list of papers).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from rankfold.core import Context, SideModule, Site, Spec, StartContext, Tensors, register
from rankfold.linalg import like


def xavier(ctx: StartContext) -> Tensor:
    """Uniform on ±√(6 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    bound = (6.0 / sum(ctx.shape[-2:])) ** 0.5
    return ctx.random.uniform(ctx.shape, -bound, bound)


@register("structure", "adaptertune", paper="adaptertune2026")
@dataclass(frozen=True, kw_only=True)
class AdapterTune(SideModule):
    """h ← h + alpha·(U gelu(D h + d) + u) after a block, with D: [rank, width], U: [width, rank] and biases d, u.

    Starts as the identity (U and u zero, D drawn), so the first gradient reaches U and u alone. No weight: it can't be folded.

    Args:
        rank: width of the bottleneck.
        alpha: factor of the branch.
        every: after the blocks whose number, from 0, it divides: 2 takes the first, third, ...

    Cost per block: 2·rank·width + rank + width parameters, 4·rank·width FLOPs per token.

    >>> blocks = [Site(f"layers.{k}", (8, 8), "block") for k in range(5)]
    >>> [site.name for site in AdapterTune(every=2).places(blocks)]
    ['layers.0', 'layers.2', 'layers.4']
    """

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] = 1.0
    every: Annotated[int, Ge(1)] = 1

    def places(self, blocks: Sequence[Site]) -> list[Site]:
        return list(blocks)[:: self.every]

    def tensors(self, site: Site) -> dict[str, Spec]:
        width = site.shape[0]
        down = {"D": Spec((self.rank, width), start=xavier), "d": Spec((self.rank,), start=0.0)}
        return {**down, "U": Spec((width, self.rank), start=0.0), "u": Spec((width,), start=0.0)}

    def forward(self, h: Tensor, t: Tensors, site: Site, ctx: Context | None = None) -> Tensor:
        narrow = F.gelu(F.linear(h, like(t.D, h), like(t.d, h)))
        return h + self.alpha * F.linear(narrow, like(t.U, h), like(t.u, h)).to(h.dtype)

"""LoRA: a trained change of low rank beside a frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, eq. 3.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from rankfold.core import Context, ScaledStructure, Site, Spec, Tensors, pair, register
from rankfold.linalg import LowRank, Operator


@register("structure", "lora", paper="hu2021lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(ScaledStructure):
    """ΔW = s·B A, with B: [out, rank], A: [rank, in] and s = alpha / rank**power.

    The default start is ΔW = 0 (B zero, A drawn), so the first gradient reaches B alone.

    Args:
        rank: inner width; a site with min(out, in) < rank is refused by name.
        alpha: numerator of s; None means s = 1.
        power: 1.0 is LoRA; 0.5 is rsLoRA (Kalajdzievski 2023), whose step keeps its size as rank grows.

    Cost per site: rank·(out + in) parameters, 2·rank·(out + in) FLOPs per token.

    >>> site = Site("encoder.layer.0.attention.self.query", (384, 384))
    >>> lora = LoRA(rank=4, alpha=8)
    >>> {name: spec.shape for name, spec in lora.tensors(site).items()}, lora.scale
    ({'B': (384, 4), 'A': (4, 384)}, 2.0)
    """

    default: ClassVar[bool] = True
    never_dense: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0

    def tensors(self, site: Site) -> dict[str, Spec]:
        return pair(site, self.rank)

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return LowRank(t.B, t.A, scale=self.scale)

"""HiRA: the frozen weight times a low-rank mask, a change of high rank.

Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from rankfold.core import Context, ScaledStructure, Site, Spec, Tensors, pair, register
from rankfold.linalg import Hadamard, LowRank, Operator


@register("structure", "hira", paper="huang2025hira")
@dataclass(frozen=True, kw_only=True)
class HiRA(ScaledStructure):
    """W' = W + W ∘ (s·B A), entry by entry, with B: [out, rank], A: [rank, in] and s = alpha / rank**power.

    rank(ΔW) can reach rank(W)·rank. Starts at W (B zero). An entry of W that is zero stays zero.

    Args:
        rank: inner width of the mask.
        alpha: numerator of s; None means s = 1, which is what peft's HiRA always has.
        power: exponent of the rank in s.

    Cost per site: rank·(out + in) parameters; W' is built per step, so time is that of full fine-tuning in the worst case, memory
    that of LoRA.

    >>> import torch
    >>> from collections import namedtuple
    >>> from rankfold.linalg import Dense
    >>> t = namedtuple("Tensors", "B A")(torch.ones(3, 1), torch.full((1, 3), 0.5))
    >>> change = HiRA(rank=1).weight(Dense(torch.eye(3)), t, Site("query", (3, 3))).dense() - torch.eye(3)
    >>> int(torch.linalg.matrix_rank(change))          # from factors of rank one
    3
    """

    reads_entries: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0

    def tensors(self, site: Site) -> dict[str, Spec]:
        return pair(site, self.rank)

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return W + Hadamard(W, LowRank(t.B, t.A, scale=self.scale))

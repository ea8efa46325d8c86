"""Hadamard: the entrywise product of two low-rank matrices. LoHa of LyCORIS, and FedPara.

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2021, arXiv:2108.06098;
Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023, arXiv:2309.14859.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from rankfold import linalg
from rankfold.core import Context, ScaledStructure, Site, Spec, Tensors, kaiming, register
from rankfold.linalg import LowRank, Operator


@register("structure", "hadamard", paper="hyeonwoo2021fedpara", aliases=("loha",))
@dataclass(frozen=True, kw_only=True)
class Hadamard(ScaledStructure):
    """ΔW = s·(B1 A1) ∘ (B2 A2), with B: [out, rank], A: [rank, in] and s = alpha / rank**power; rank(ΔW) reaches rank².

    Starts at W: A2 is zero, the others are drawn (as in peft), so the first gradient reaches A2 alone.

    Args:
        rank: inner width of each product.
        alpha: numerator of s; None means s = 1.
        power: exponent of the rank in s.

    Cost per site: 2·rank·(out + in) parameters. Small ranks run as one product of rank rank², else W' is built per step.

    >>> import torch
    >>> from collections import namedtuple
    >>> t = namedtuple("Tensors", "B1 A1 B2 A2")(*(torch.randn(s) for s in ((9, 2), (2, 9), (9, 2), (2, 9))))
    >>> int(torch.linalg.matrix_rank(Hadamard(rank=2).delta(t, Site("query", (9, 9))).dense()))
    4
    """

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), r = site.shape, self.rank
        drawn = {"B1": Spec((out, r), start=kaiming), "A1": Spec((r, in_), start=kaiming), "B2": Spec((out, r), start=kaiming)}
        return {**drawn, "A2": Spec((r, in_), start=0.0)}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return linalg.Hadamard(LowRank(t.B1, t.A1, scale=self.scale), LowRank(t.B2, t.A2))

"""RidgeLoRA: a low-rank map and a diagonal in front of the weight, in series with it.

Zhu et al., "RidgeLoRA: Matrix Ridge Enhanced Low-Rank Adaptation of Large Language Models", NeurIPS 2025, section 3.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from rankfold.core import Context, ScaledStructure, Site, Spec, Tensors, kaiming, register
from rankfold.linalg import Diagonal, Identity, LowRank, Operator, Product, Sum


@register("structure", "ridge", paper="zhu2025ridgelora")
@dataclass(frozen=True, kw_only=True)
class Ridge(ScaledStructure):
    """W' = W (λ diag(d) + s·B A), with B: [in, rank], A: [rank, in], d: [in], a number λ and s = alpha / rank**power.

    The ridge keeps the map in front of W of full rank. Starts at W: B zero, d and λ one. The published start draws d below one on
    `rank` places and lets B A make up for it in part, off the base; that one is left out. Runs as (λ d − 1)∘x + s·B A x before W.

    Args:
        rank: inner width.
        alpha: numerator of s; None means s = 1.
        power: exponent of the rank in s.

    Cost per site: 2·rank·in + in + 1 parameters, 4·rank·in FLOPs per token; W is never built.

    >>> {name: spec.shape for name, spec in Ridge(rank=2).tensors(Site("query", (12, 8))).items()}
    {'B': (8, 2), 'A': (2, 8), 'd': (8,), 'intensity': (1,)}
    """

    acts_on_input: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0

    def tensors(self, site: Site) -> dict[str, Spec]:
        in_ = site.shape[1]
        factors = {"B": Spec((in_, self.rank), start=0.0), "A": Spec((self.rank, in_), start=kaiming)}
        return {**factors, "d": Spec((in_,), start=1.0), "intensity": Spec((1,), start=1.0)}

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        ridge = (t.intensity - 1.0) * t.d + (t.d - 1.0)  # λ d − 1, without its cancellation
        return Product(W, Sum((Identity(site.shape[1], t.d), Diagonal(ridge), LowRank(t.B, t.A, scale=self.scale))))

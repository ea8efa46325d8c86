"""KaSA: a LoRA in singular form, its factors kept near orthonormal, over a weight without its smallest components.

Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", 2024, arXiv:2412.06071, section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from rankfold.core import Context, ScaledStructure, Site, Spec, StartContext, Tensors, register
from rankfold.linalg import LowRank, Operator, Sum
from rankfold.linalg.decompositions import truncated_svd


def normal(ctx: StartContext) -> Tensor:
    return ctx.random.normal(ctx.shape)


@register("structure", "kasa", paper="wang2024kasa")
@dataclass(frozen=True, kw_only=True)
class KaSA(ScaledStructure):
    """ΔW = s·B diag(d) A, with B: [out, rank], A: [rank, in], d: [rank] and s = alpha / rank**power, and two loss terms.

    β·Σ ‖d‖² and γ·Σ (‖B Bᵀ − 1‖ + ‖Aᵀ A − 1‖), means over the sites, hold the singular values small and the factors near
    orthonormal; they are formed from matrices of size rank, with the values of the published code. Starts at W (B zero, d ~
    N(0, 1)).

    Args:
        rank: inner width.
        alpha: numerator of s; None means s = 1.
        power: exponent of the rank in s.
        beta, gamma: β and γ; 0 leaves a term out.
        truncate: take the `rank` smallest singular components out of W, as the paper does; the start is then off the base by
            these. The published code takes none where out < in, and min(out, in) − in + rank where out > in; ours always `rank`.

    Cost per site: rank·(out + in + 1) parameters; with truncate as many frozen numbers, and an SVD at the start.

    >>> {name: spec.shape for name, spec in KaSA(rank=2).tensors(Site("query", (12, 8))).items()}
    {'B': (12, 2), 'd': (2,), 'A': (2, 8)}
    """

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0
    beta: Annotated[float, Ge(0)] = 1e-4
    gamma: Annotated[float, Ge(0)] = 1e-3
    truncate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncate:
            object.__setattr__(self, "starts", "elsewhere")

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), r = site.shape, self.rank
        own = {"B": Spec((out, r), "B"), "d": Spec((r,), "core", start=normal), "A": Spec((r, in_), "A")}
        if not self.truncate:
            return own
        last = {"V": Spec((r, in_), "basis", False, start=self._last), "US": Spec((out, r), "basis", False, start=self._image)}
        return {**own, **last}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        change = LowRank(t.B, t.A, diag=t.d, scale=self.scale)
        return Sum((change, LowRank(t.US, t.V, scale=-1.0))) if self.truncate else change

    def _last(self, ctx: StartContext) -> Tensor:
        """The right singular vectors of the smallest singular values."""
        return truncated_svd(ctx.W.dense(), min(ctx.site.shape))[2][..., -self.rank :, :]

    def _image(self, ctx: StartContext) -> Tensor:
        W = ctx.W.dense()
        return W @ ctx.tensors["V"].to(W).mT

    def objectives(self, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, Tensor]:
        at = [t[site.key] for site in sites]
        terms = {}
        if self.beta:
            terms["singular values"] = self.beta * torch.stack([s.d.square().sum() for s in at]).mean()
        if self.gamma:
            gaps = torch.stack([gap(s.B.mT).sum() + gap(s.A).sum() for s in at])
            terms["orthogonality"] = self.gamma * gaps.mean()
        return terms


def gap(A: Tensor) -> Tensor:
    """‖Aᵀ A − 1‖ for A: [..., r, n] by way of A Aᵀ: ‖Aᵀ A − 1_n‖² = ‖A Aᵀ − 1_r‖² + n − r."""
    r, n = A.shape[-2:]
    small = A @ A.mT - torch.eye(r, dtype=A.dtype, device=A.device)
    return (small.square().sum((-2, -1)) + (n - r)).clamp_min(1e-12).sqrt()

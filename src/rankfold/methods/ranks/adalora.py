"""AdaLoRA: components are switched off during training until a budget is met, the least important first.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, arXiv:2303.10512, eq. 4-13.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from rankfold.core import register
from rankfold.errors import OptionError
from rankfold.training.contracts import Edit, RankPolicy, SiteView
from rankfold.training.edits import Mask, Slice
from rankfold.training.importance import best, importance, observe_importance

ROLES = ("gate", "A", "B")
Unit = Annotated[float, Ge(0), Lt(1)]


@register("rank", "adalora", paper="zhang2023adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(RankPolicy):
    """ΔW = s·B diag(g) A, of whose components b(t) over all sites stay on.

    After each step I = |p·∂p| for every entry p of g, A and B; Ī ← β₁Ī + (1 − β₁)I, Ū ← β₂Ū + (1 − β₂)|I − Ī|, score Ī·Ū. A
    component's score is that of its g plus the means over its row of A and its column of B. Every `interval` steps those beyond
    the b(t) best get g = 0; they still have a gradient and may come back, until the last `final` part, where the choice stands.
    b(t) falls from Σ rank to target·sites by (1 − progress)³. It acts after the step, so that the next pass sees zeros. At the
    end what is off is cut out (one component stays at each site). Under an offset, off means back at the start.

    Args:
        target: mean rank per site at the end; None is half of the start.
        warmup, final: parts of the run before the first cut and after the last choice.
        interval: steps between cuts.
        beta1, beta2: of the two moving averages.
        orthogonality: γ of the loss term γ·mean(‖A Aᵀ − 1‖_F, ‖BᵀB − 1‖_F); 0 is none.

    Cost: two tensors of the adapter's size.

    >>> policy = AdaLoRA(target=2, warmup=0.2, final=0.2)
    >>> [policy.budget(t, total=10, first=8, last=4) for t in range(1, 11)]
    [8, 8, 6, 5, 4, 4, 4, 4, 4, 4]
    """

    point: ClassVar[str] = "after_step"
    requires: ClassVar[frozenset[str]] = frozenset(ROLES)
    steps: ClassVar[bool] = True

    target: Annotated[int, Ge(1)] | None = None
    warmup: Unit = 0.1
    final: Unit = 0.3
    interval: Annotated[int, Ge(1)] = 10
    beta1: Annotated[float, Gt(0), Lt(1)] = 0.85
    beta2: Annotated[float, Gt(0), Lt(1)] = 0.85
    orthogonality: Annotated[float, Ge(0)] = 0.5

    def budget(self, t: int, total: int, first: int, last: int) -> int:
        """b(t), from `first` to `last`."""
        start, stop = self._phases(total)
        if t >= stop:
            return last
        if t <= start:
            return first
        return int((first - last) * (1 - (t - start) / (stop - start)) ** 3 + last)

    def _phases(self, total: int) -> tuple[int, int]:
        start = round(self.warmup * total)
        return start, max(start, total - round(self.final * total))

    def on_step(self, t: int, total: int, sites: Sequence[SiteView]) -> list[Edit]:
        start, stop = self._phases(total)
        first = sum(site.rank for site in sites)
        last = sum(self.target or max(1, site.rank // 2) for site in sites)
        if last > first:
            raise OptionError(
                f"adalora.target: got {self.target}; it must not be above the mean rank {first / len(sites):g} of the start"
            )
        if t < stop:
            for site in sites:
                observe_importance(site, ROLES, self.beta1, self.beta2)
        if t >= stop:
            if "on" not in sites[0].state:
                for site, on in zip(sites, best([self.scores(s) for s in sites], last)):
                    site.state["on"] = on
            chosen = [site.state["on"] for site in sites]
        elif t > start and t % self.interval == 0:
            chosen = best([self.scores(s) for s in sites], self.budget(t, total, first, last))
        else:
            return []
        return [Mask(site.key, "gate", (~on).nonzero().flatten()) for site, on in zip(sites, chosen)]

    def scores(self, site: SiteView) -> Tensor:
        """[rank]: how much each component has mattered so far."""
        gate, A, B = (importance(site, role) for role in ROLES)
        return gate + A.mean(-1) + B.mean(-2)

    def finalise(self, sites: Sequence[SiteView]) -> list[Edit]:
        edits: list[Edit] = []
        for site in sites:
            keep = (site.tensors["gate"] != 0).nonzero().flatten()
            keep = keep if len(keep) else keep.new_zeros(1)
            if len(keep) < site.rank:
                edits.append(Slice(site.key, keep))
        return edits

    def objectives(self, sites: Sequence[SiteView]) -> dict[str, Tensor]:
        if not self.orthogonality:
            return {}
        off = [_from_orthonormal(M) for site in sites for M in (site.tensors["A"], site.tensors["B"].mT)]
        return {"orthogonality": self.orthogonality * torch.stack(off).mean()}


def _from_orthonormal(rows: Tensor) -> Tensor:
    """‖M Mᵀ − 1‖_F for M [rank, n]."""
    return torch.linalg.vector_norm(rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device))

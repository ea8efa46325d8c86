"""The launch of LoRA-Dash: which singular directions of the weight a LoRA changed most, for what they weigh in it.

Si et al., "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-Tuning", 2024, arXiv:2409.01035,
section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor, einsum, no_grad

from rankfold.core import register
from rankfold.linalg.decompositions import truncated_svd
from rankfold.training.contracts import Edit, RankPolicy, SiteView
from rankfold.training.edits import Gate


@register("rank", "lora-dash", paper="si2024loradash")
@dataclass(frozen=True, kw_only=True)
class Launch(RankPolicy):
    """After step `after`, U and V of `dash` become the singular directions of W with the largest |u_iᵀ ΔW v_i| / σ_i, ΔW = s·B A.

    The function stays as it is, since d is zero until then; shapes stay too. One SVD per site, once.

    Args:
        after: number of steps of plain LoRA.

    Raises:
        CompositionError: a structure without coordinates along directions.

    >>> Launch(after=100).point
    'after_step'
    """

    point: ClassVar[str] = "after_step"
    steps: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"A", "B", "coordinates"})

    after: Annotated[int, Ge(1)] = 100

    def on_step(self, t: int, total: int, sites: Sequence[SiteView]) -> list[Edit]:
        return [edit for site in sites for edit in self._launched(site)] if t == self.after else []

    @no_grad()
    def _launched(self, site: SiteView) -> list[Edit]:
        assert site.base is not None
        count = site.tensors["coordinates"].shape[-1]
        U, V = directions(site.base.gather().dense(), site.tensors["B"], site.tensors["A"], count)
        return [Gate(site.key, "U", U), Gate(site.key, "V", V)]


def directions(W: Tensor, B: Tensor, A: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(U [..., out, count], Vᵀ [..., count, in]), the singular directions of W that B A changes most for their weight in W."""
    U, S, Vh = truncated_svd(W, min(W.shape[-2:]))
    change = einsum("...ok,...or,...ri,...ki->...k", U, B.to(U), A.to(U), Vh).abs()
    best = (change / S.clamp_min(1e-12 * S.amax())).topk(count).indices
    return U.take_along_dim(best.unsqueeze(-2), -1), Vh.take_along_dim(best.unsqueeze(-1), -2)

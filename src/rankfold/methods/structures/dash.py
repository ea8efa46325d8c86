"""LoRA-Dash: a LoRA, and coordinates along a few singular directions of the weight that it turned out to use.

Si et al., "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-Tuning", 2024, arXiv:2409.01035,
section 4.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from rankfold.core import Context, ScaledStructure, Site, Spec, Tensors, TooLarge, Unfit, register
from rankfold.linalg import LowRank, Operator, Sum


@register("structure", "dash", paper="si2024loradash")
@dataclass(frozen=True, kw_only=True)
class Dash(ScaledStructure):
    """ΔW = s·B A + U diag(d) V, with U: [out, directions], V: [directions, in] singular vectors of W and d: [directions] trained.

    Starts at W, B and d zero. U and V are zero, and d rests, until the rank policy `lora-dash` fills them after a number of
    steps; a LoRA until then. Exports as a LoRA of rank `rank` + `directions`.

    Args:
        rank: inner width of B A.
        directions: how many singular directions are launched.
        alpha: numerator of s = alpha / rank**power; None means s = 1.
        power: exponent of the rank in s.

    Cost per site: rank·(out + in) + directions parameters, directions·(out + in) frozen numbers; the time of a LoRA of the sum of
    the two ranks.

    >>> {name: (spec.shape, spec.trainable) for name, spec in Dash(rank=2, directions=3).tensors(Site("query", (12, 8))).items()}
    {'B': ((12, 2), True), 'A': ((2, 8), True), 'U': ((12, 3), False), 'd': ((3,), True), 'V': ((3, 8), False)}
    """

    rank: Annotated[int, Ge(1)] = 16
    directions: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), r, k = site.shape, self.rank, self.directions
        factors = {"B": Spec((out, r), "B"), "A": Spec((r, in_), "A")}
        bases = {name: Spec(shape, name, False, start=0.0) for name, shape in (("U", (out, k)), ("V", (k, in_)))}
        return {**factors, "U": bases["U"], "d": Spec((k,), "coordinates", start=0.0), "V": bases["V"]}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return Sum((LowRank(t.B, t.A, scale=self.scale), LowRank(t.U, t.V, diag=t.d)))

    def fits(self, site: Site) -> Unfit | None:
        if self.directions > min(site.shape):
            return TooLarge(
                f"rank of its {self.directions} directions is larger than the matrix: min(out, in) = {min(site.shape)}"
            )
        return super().fits(site)

"""Gate: a trained factor on the change, one for the site, one per row or one per component.

Per component it is the diagonal of AdaLoRA: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
Fine-Tuning", 2023, arXiv:2303.10512, eq. 3.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rankfold.core import Context, Decorator, Site, Spec, Tensors, layers, register
from rankfold.errors import CompositionError
from rankfold.linalg import Diagonal, Operator, Product, Scaled, difference, gate_components


@register("structure", "gate", paper="zhang2023adalora")
@dataclass(frozen=True, kw_only=True)
class Gate(Decorator):
    """W' = W + g·ΔW for the change ΔW that the structures inside make, with g trained.

    Args:
        per: "site" (g a number), "row" (diag(g) ΔW, g: [out]) or "rank" (s·B diag(g) A, g: [rank]). A component of an offset that
            its gate switches off returns to its start.
        start: of every entry of g. 0 starts at W whatever B and A are.

    Raises:
        CompositionError: per="rank" over a structure without factors B and A or with more than these, or over several structures.

    >>> from rankfold.methods.structures.lora import LoRA
    >>> Gate(per="rank", inner=LoRA(rank=4)).tensors(Site("query", (12, 8)))["gate"].shape
    (4,)
    """

    never_dense: ClassVar[bool] = True

    per: Literal["site", "row", "rank"] = "site"
    start: float = 1.0

    def own(self, site: Site) -> dict[str, Spec]:
        if self.per == "rank" and not {"B", "A"} <= {spec.role for spec in self.inner.tensors(site).values()}:
            core = type(self.inner.core).__name__
            raise CompositionError(f"gate.per='rank' weighs components b_k a_k, but {core} has no factors of roles B and A")
        if self.per == "rank" and len(inside := layers(self.inner)) > 1:
            names = " over ".join(type(layer).__name__ for layer in inside)
            raise CompositionError(
                f"gate.per='rank' weighs the components of one structure; put it directly around one, not {names}"
            )
        if self.per == "rank" and (more := self._beyond_factors(site)):
            core = type(self.inner.core).__name__
            raise CompositionError(f"gate.per='rank' weighs components b_k a_k, but {core} trains more than its factors: {more}")
        shapes = {"site": (), "row": (site.shape[0],), "rank": (getattr(self.inner.core, "rank", 0),)}
        role = "gate" if self.per == "rank" else "value"  # policies and inits know a gate as one number per component
        return {"gate": Spec(shapes[self.per], role=role, start=self.start)}

    def _beyond_factors(self, site: Site) -> str:
        """What makes the change more than Σ b_k a_k: names of tensors beside B, A and a diagonal core."""
        trained = {name: spec for name, spec in self.inner.core.tensors(site).items() if spec.trainable}
        return ", ".join(n for n, s in trained.items() if s.role not in ("B", "A") and (s.role != "core" or len(s.shape) > 1))

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        change = difference(self.inner.weight(W, t, site, ctx), W)
        if self.per == "rank":
            return W + gate_components(change, t.gate)
        return W + (Scaled(change, t.gate) if self.per == "site" else Product(Diagonal(t.gate), change))

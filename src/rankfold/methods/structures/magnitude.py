"""Magnitude: row lengths trained apart from row directions, over any structure. Over LoRA it is DoRA.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353, eq. 5 and section 4.3.
"""

from collections import namedtuple
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rankfold import linalg
from rankfold.core import Context, Decorator, Site, Spec, StartContext, Tensors, register, trait
from rankfold.errors import CompositionError
from rankfold.linalg import Operator, simplify


@register("structure", "magnitude", paper="liu2024dora")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Decorator):
    """W' = diag(m / ‖V_j‖) V, with V the inner structure's weight, ‖V_j‖ the length of its row j, and m: [out] trained.

    Starts at the lengths of V's rows at its own start, found by the routine that forms the gain: the gain is then exactly one.

    Args:
        detach: the length is a constant of the backward pass, as in the paper; False differentiates it too, for a pass more.

    Cost per site: `out` parameters. Row lengths of W are cached, those of a low-rank change come from Gram matrices of rank r,
    and those of a rotated weight (`magnitude+hra`) are those of W.

    Raises:
        CompositionError: the inner change depends on the input, so that no row has one length.

    >>> from rankfold.methods.structures.lora import LoRA
    >>> dora = Magnitude(inner=LoRA(rank=4))
    >>> {name: (spec.role, spec.shape) for name, spec in dora.tensors(Site("query", (12, 8))).items()}
    {'B': ('B', (12, 4)), 'A': ('A', (4, 8)), 'm': ('magnitude', (12,))}
    """

    never_dense: ClassVar[bool] = True

    detach: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner is not None and trait(self.inner, "input_dependent"):
            raise CompositionError("magnitude needs the row lengths of one weight; the structure inside it depends on the input")

    def own(self, site: Site) -> dict[str, Spec]:
        return {"m": Spec((site.shape[0],), role="magnitude", start=self._lengths)}

    def _lengths(self, ctx: StartContext) -> Tensor:
        names = list(self.inner.tensors(ctx.site))
        t = namedtuple("Tensors", names)(*(ctx.tensors[name] for name in names))
        V = simplify(self.inner.weight(ctx.W, t, ctx.site))
        return linalg.Magnitude(next(V.leaves()), V).norm()

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return linalg.Magnitude(t.m, self.inner.weight(W, t, site, ctx), detach=self.detach)

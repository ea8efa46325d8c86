"""Full: an owned copy of the weight, trained whole. Full fine-tuning, with the loaded base untouched."""

from dataclasses import dataclass
from typing import ClassVar

from rankfold.core import Context, Site, Spec, Structure, Tensors, register
from rankfold.linalg import Dense, Operator


@register("structure", "full")
@dataclass(frozen=True, kw_only=True)
class Full(Structure):
    """W' = V, with V: [out, in] a float32 copy of W that trains; every other parameter of the model is owned likewise.

    Starts at W. The base stays as it was loaded, for fingerprints, for switching off, and for saving the difference alone.

    Cost per site: out·in parameters beside the base.

    >>> {name: (spec.role, spec.shape) for name, spec in Full().tensors(Site("query", (12, 8))).items()}
    {'value': ('weight', (12, 8))}
    """

    owns: ClassVar[bool] = True

    def tensors(self, site: Site) -> dict[str, Spec]:
        return {"value": Spec(site.shape, role="weight", start=lambda ctx: ctx.W.dense())}

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return Dense(t.value)

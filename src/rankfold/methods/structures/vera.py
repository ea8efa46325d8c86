"""VeRA: two vectors per site around random factors that all sites share.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2023, arXiv:2310.11454, eq. 2.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from rankfold.core import Context, Site, Spec, StartContext, Structure, Tensors, Unfit, register
from rankfold.linalg import Diagonal, LowRank, Operator, Product


def he_uniform(ctx: StartContext) -> Tensor:
    """Uniform on ±√(6 / fan_in): variance 2 / fan_in (He et al. 2015, for ReLU)."""
    bound = (6.0 / ctx.shape[-1]) ** 0.5
    return ctx.random.uniform(ctx.shape, -bound, bound)


@register("structure", "vera", paper="kopiczko2023vera")
@dataclass(frozen=True, kw_only=True)
class VeRA(Structure):
    """ΔW = diag(b) B diag(d) A, with b: [out] and d: [rank] trained; B: [out, rank] and A: [rank, in] random, frozen and shared.

    One B and one A, as large as the largest site asks for, serve all sites by their leading rows and columns. Starts at W
    (b zero); the first gradient reaches b alone. Learning rates are about ten times LoRA's.

    Args:
        rank: inner width; no upper limit, the paper takes 256 to 1024.
        start: of every entry of d.

    Cost per site: out + rank parameters; once per model rank·(max in + max out) frozen numbers, stored in the adapter. They
    follow peft's law but come from our own generator, the same on every device: files, not seeds, carry a VeRA between the two.

    >>> site = Site("query", (12, 8))
    >>> {name: (spec.scope, spec.shape, spec.trainable) for name, spec in VeRA(rank=4).tensors(site).items()}
    {'A': ('model', (4, 8), False), 'B': ('model', (12, 4), False), 'b': ('site', (12,), True), 'd': ('site', (4,), True)}
    """

    never_dense: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 256
    start: float = 0.1

    def tensors(self, site: Site) -> dict[str, Spec]:
        out, in_ = site.shape
        return {
            "A": Spec((self.rank, in_), "basis", trainable=False, scope="model", join="max", start=he_uniform),
            "B": Spec((out, self.rank), "basis", trainable=False, scope="model", join="max", start=he_uniform),
            "b": Spec((out,), start=0.0),
            "d": Spec((self.rank,), start=self.start),
        }

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return Product(Diagonal(t.b), LowRank(t.B, t.A, diag=t.d))

    def fits(self, site: Site) -> Unfit | None:
        return None

"""B M A: two factors with something between them, and a choice of which of the three train.

The square core is that of SLoRA (Guo et al., "NLoRA", 2025) and of MoSLoRA (Wu et al., "Mixture-of-Subspaces in Low-Rank
Adaptation", 2024, arXiv:2406.11909); alone, LoRA-XS (Bałazy et al., 2024, arXiv:2405.17604). The diagonal one is SVFit's and
LoLDU's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from rankfold.core import Context, Site, Spec, StartContext, Structure, Tensors, kaiming, register
from rankfold.errors import OptionError
from rankfold.linalg import LowRank, Operator


def identity(ctx: StartContext) -> Tensor:
    """Ones on the diagonal of every map."""
    return torch.eye(ctx.shape[-1]).expand(ctx.shape)


def orthogonal(ctx: StartContext) -> Tensor:
    """A random orthogonal matrix per map."""
    size, maps = ctx.shape[-1], ctx.site.batch or 1
    return torch.stack([ctx.random.child(f"map {e}").haar(size, size) for e in range(maps)]).reshape(ctx.shape)


@register("structure", "bma", paper="balazy2024loraxs")
@dataclass(frozen=True, kw_only=True)
class BMA(Structure):
    """ΔW = s·B M A, with B: [out, rank], A: [rank, in], M a core of rank numbers or rank x rank, and s = alpha / rank**power.

    Starts at W: of the factors that train the first in the order B, M, A is zero, the others are drawn. What does not train is
    stored and frozen. An init that puts B, M and A elsewhere enters as the deviation s·(B M A − B₀ M₀ A₀), which for frozen B
    and A is s·B (M − M₀) A: zero at the start, and of rank `rank`.

    Args:
        rank: inner width; None is min(out, in), every direction.
        middle: "square" M: [rank, rank], "diagonal" M: [rank], or "identity", which is B A.
        train: which of the three train.
        start: of a square core that is not the one at zero: "kaiming" (as a layer), "orthogonal" or "identity".
        alpha: numerator of s; None means s = 1.
        power: exponent of the rank in s.

    Cost per site: out·rank, rank² (or rank) and rank·in numbers, of which those named in `train` are parameters;
    2·rank·(out + in) FLOPs per token, as the core is taken into B. An A that does not train keeps no activation of size `in`.

    >>> site = Site("query", (12, 8))
    >>> {name: (spec.shape, spec.trainable) for name, spec in BMA(rank=2, train="M").tensors(site).items()}
    {'B': ((12, 2), False), 'M': ((2, 2), True), 'A': ((2, 8), False)}
    """

    rank: Annotated[int, Ge(1)] | None = 16
    middle: Literal["identity", "diagonal", "square"] = "square"
    train: Literal["BMA", "BM", "MA", "BA", "B", "M", "A"] = "BMA"
    start: Literal["kaiming", "orthogonal", "identity"] = "kaiming"
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train == "M" and self.middle == "identity":
            raise OptionError("bma: train='M' with middle='identity' trains nothing; allowed: middle='diagonal' or 'square'")
        if self.rank is None and self.alpha is not None:
            raise OptionError("bma: alpha is divided by the rank, and rank=None has another one at every site; leave alpha out")

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), r = site.shape, self.rank or min(site.shape)
        shapes = {"B": (out, r), "M": (r,) if self.middle == "diagonal" else (r, r), "A": (r, in_)}
        present = [name for name in shapes if name != "M" or self.middle != "identity"]
        zero = next(name for name in present if name in self.train)
        return {
            name: Spec(
                shapes[name],
                role={"M": "core"}.get(name, name),
                trainable=name in self.train,
                start=0.0 if name == zero else self._drawn(name),
            )
            for name in present
        }

    def _drawn(self, name: str) -> float | Callable[[StartContext], Tensor]:
        if name != "M":
            return kaiming
        return (
            {"kaiming": kaiming, "orthogonal": orthogonal, "identity": identity}[self.start] if self.middle == "square" else 1.0
        )

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        diagonal, square = (getattr(t, "M", None) if self.middle == kind else None for kind in ("diagonal", "square"))
        return LowRank(t.B, t.A, diag=diagonal, core=square, scale=self.scale)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank**self.power

"""MiSS: one small matrix shared by all shards of the input.

Kang & Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2025 (arXiv:2409.15371, revised).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from rankfold.core import Context, Site, Spec, Structure, Tensors, Unfit, register
from rankfold.linalg import LowRank, Operator, tiled_identity


@register("structure", "miss", paper="kang2025miss")
@dataclass(frozen=True, kw_only=True)
class MiSS(Structure):
    """ΔW = D [1 1 ... 1], with D: [out, rank] and identities of size rank beside each other, the last one cut at `in`.

    The input is cut into shards of length rank, summed, and mapped by D: a LoRA whose A is a frozen tiling. Starts at W (D zero).

    Args:
        rank: shard length.
        mini: share D over outputs too: only [mini, rank] is trained and repeated down the rows; must divide out. peft's "mini_r".

    Cost per site: rank·out parameters (mini·rank); no activation of size `in` is kept. peft stores D transposed.

    >>> import torch
    >>> from collections import namedtuple
    >>> D = torch.tensor([[1.0, 2.0]])
    >>> MiSS(rank=2, mini=1).delta(namedtuple("Tensors", "D")(D), Site("query", (2, 5))).dense().tolist()
    [[1.0, 2.0, 1.0, 2.0, 1.0], [1.0, 2.0, 1.0, 2.0, 1.0]]
    """

    never_dense: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 64
    mini: Annotated[int, Ge(1)] | None = None

    def tensors(self, site: Site) -> dict[str, Spec]:
        return {"D": Spec((self.mini or site.shape[0], self.rank), start=0.0)}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        out, in_ = site.shape
        B = t.D if self.mini is None else t.D.repeat(*(1,) * (t.D.ndim - 2), out // self.mini, 1)
        return LowRank(B, tiled_identity(self.rank, in_, t.D))

    def fits(self, site: Site) -> Unfit | None:
        if self.mini is not None and site.shape[0] % self.mini:
            return Unfit(f"mini {self.mini} does not divide the {site.shape[0]} outputs")
        return super().fits(site)

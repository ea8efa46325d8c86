"""Bone: block-affine adaptation, every r x r block of the weight changed by an affine map that blocks share.

Kang, "Bone: Block-Affine Adaptation of Large Language Models", 2024, arXiv:2409.15371, later called "bat".
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from rankfold.core import Context, Site, Spec, Structure, Tensors, Unfit, register
from rankfold.linalg import BlockDiagonal, Blockwise, Identity, LowRank, Operator, Product, Sum, tiled_identity


@register("structure", "bone", paper="kang2024bone")
@dataclass(frozen=True, kw_only=True)
class Bone(Structure):
    """W'_jk = W_jk + W_jk C_b + C_b for the rank x rank blocks of W, j over outputs, k over inputs; starts at W (C zero).

    The change leans on W and is of full rank in general.

    Args:
        rank: block size; must divide both sizes of W.
        blocks: which index C: [size/rank, rank, rank] carries. "out" (b = j) is peft's MiSS with init "bat". "in" (b = k) is the
            author's first code, and cheaper: x_k ↦ x_k + C_k x_k, then W, then one sum, so W is never built nor dequantised.

    Cost per site: out·rank parameters ("in": in·rank). "out" builds W' per step, 2·out·in·rank FLOPs; "in" takes 2·in·rank a
    token.

    >>> import torch
    >>> from collections import namedtuple
    >>> from rankfold.linalg import Dense
    >>> C = torch.tensor([[[1.0]], [[2.0]]])          # rank 1: w ↦ w + w·c + c, with the c of its row
    >>> Bone(rank=1).weight(Dense(torch.ones(2, 3)), namedtuple("Tensors", "C")(C), Site("query", (2, 3))).dense().tolist()
    [[3.0, 3.0, 3.0], [5.0, 5.0, 5.0]]
    """

    reads_entries: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 64
    blocks: Literal["out", "in"] = "out"

    def tensors(self, site: Site) -> dict[str, Spec]:
        return {"C": Spec((site.shape[self.blocks == "in"] // self.rank, self.rank, self.rank), start=0.0)}

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        C, (out, in_) = t.C, site.shape
        if self.blocks == "out":
            return (
                W + Blockwise(W, C) + LowRank(C.flatten(-3, -2), tiled_identity(self.rank, in_, C))
            )  # row block j is C_j, repeated
        row = C.transpose(-3, -2).flatten(-2)  # [r, in]: C_1 C_2 ... side by side
        return Product(W, Sum((Identity(in_, C), BlockDiagonal(C)))) + LowRank(tiled_identity(self.rank, out, C).mT, row)

    def fits(self, site: Site) -> Unfit | None:
        if site.shape[0] % self.rank or site.shape[1] % self.rank:
            return Unfit(f"blocks of {self.rank} x {self.rank} do not tile {site.shape}: rank must divide both sizes")
        return None

"""HRA: the input rotated by a chain of Householder reflections.

Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", 2024,
arXiv:2405.17484.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor

from rankfold.core import Context, Site, Spec, StartContext, Structure, Tensors, kaiming, register
from rankfold.linalg import Householder, Operator, Product


def equal_pairs(ctx: StartContext) -> Tensor:
    """[n, r] with columns equal two by two: every reflection is undone by its neighbour."""
    half = replace(ctx, shape=(*ctx.shape[:-1], ctx.shape[-1] // 2))
    return kaiming(half).repeat_interleave(2, -1)


@register("structure", "hra", paper="yuan2024hra")
@dataclass(frozen=True, kw_only=True)
class HRA(Structure):
    """W' = W H_1 H_2 ... H_rank with H_k = 1 − 2 u_k u_kᵀ / ‖u_k‖², from the columns of U: [in, rank].

    Keeps the spectrum of W and all its row lengths. Starts at W bitwise, in every dtype: the columns start equal in pairs (as in
    peft), and the operator is written so that an equal pair is the identity without rounding, which peft's is not (1e-7).
    Exports to a plain LoRA exactly, of rank `rank`.

    Args:
        rank: number of reflections; even, so that they pair.
        orthogonality: weight λ of the loss term λ·Σ_sites ‖1 − ÛᵀÛ‖²_F on unit columns Û, which pulls the reflections apart;
            0 leaves it out. (peft has the limit λ → ∞ as `apply_GS`, whose start is 0/0.)

    Cost per site: rank·in parameters, 4·rank·in FLOPs per token and a triangular solve of size rank.

    >>> import torch
    >>> from collections import namedtuple
    >>> from rankfold.linalg import Dense
    >>> W, t = torch.randn(4, 6), namedtuple("Tensors", "U")(torch.randn(6, 2))
    >>> turned = HRA(rank=2).weight(Dense(W), t, Site("query", (4, 6))).dense()
    >>> torch.allclose(turned, W), torch.allclose(turned.norm(dim=1), W.norm(dim=1), rtol=1e-4)
    (False, True)
    """

    acts_on_input: ClassVar[bool] = True
    never_dense: ClassVar[bool] = True

    rank: Annotated[int, Ge(2), MultipleOf(2)] = 8
    orthogonality: Annotated[float, Ge(0)] = 0.0

    def tensors(self, site: Site) -> dict[str, Spec]:
        return {"U": Spec((site.shape[1], self.rank), start=equal_pairs)}

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return Product(W, Householder(t.U))

    def objectives(self, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, Tensor]:
        if not self.orthogonality:
            return {}
        units = [Householder(t[site.key].U).unit() for site in sites]
        gaps = [(U.mT @ U - torch.eye(self.rank, dtype=U.dtype, device=U.device)).square().sum() for U in units]
        return {"orthogonality": self.orthogonality * torch.stack(gaps).sum()}

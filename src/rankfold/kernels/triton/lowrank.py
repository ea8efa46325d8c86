"""The low-rank branch beside the base's product, in Triton: reads x once, and the mask's bits beside it; keeps neither."""

from torch import Tensor

from ..lowrank import Drop
from .products import expand, masked, reduce, shrink

__all__ = ["combine", "drawn", "gradients", "shrink"]


def drawn(drop: Drop, x: Tensor) -> Drop:
    """Drawn in the kernels, entry by entry."""
    return drop


def combine(y: Tensor, x: Tensor, Bs: Tensor, As: Tensor, scale: float, p_seed: Drop) -> Tensor:
    """y += s·(drop(x) Aᵀ) Bᵀ in place; gives h."""
    h = shrink(x, As, masked(x.shape, p_seed, x.device))
    expand(y, h, Bs.mT, scale)
    return h


def gradients(
    g: Tensor,
    gx: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    Bs: Tensor,
    As: Tensor,
    scale: float,
    rank: int,
    p_seed: Drop,
) -> tuple[Tensor | None, Tensor | None]:
    """(∂B, ∂A) in float32, from g = ∂L/∂(low-rank output); adds this branch's share to gx in place."""
    hg = shrink(g, Bs.mT)
    z = masked((g.shape[0], As.shape[1]), p_seed, g.device) if gx is not None or x is not None else None
    if gx is not None:
        expand(gx, hg, As, scale, z)
    gA = gB = None
    if x is not None:
        own = hg if hg.shape[1] == rank else hg[:, :rank] + hg[:, rank:]  # g (B − B₀) + g B₀ = g B
        gA = reduce(own, x, scale, z)
    if h is not None:
        gB = reduce(h[:, :rank], g, scale).mT
    return gB, gA

"""SHiRA: a few entries of the weight trained, at positions chosen once.

Bhardwaj et al., "Sparse High Rank Adapters", 2024, arXiv:2406.13175, section 3 and its appendix on masks.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from rankfold.core import Context, Site, Spec, StartContext, Structure, Tensors, TooLarge, Unfit, register
from rankfold.linalg import Operator, Sparse


@register("structure", "shira", paper="bhardwaj2024shira")
@dataclass(frozen=True, kw_only=True)
class SHiRA(Structure):
    """W' = W + scatter(index, values): k values trained at k fixed positions, everywhere else W bitwise.

    rank(ΔW) is high: at random positions nearly full from k ≈ n ln n on. Starts at W (values zero).

    Args:
        rank: k = rank·(out + in), as many parameters as a LoRA of that rank.
        density: k as a share of out·in instead; the paper uses 0.01 to 0.02.
        mask: rand (uniform, from the seed), wm (the largest |W|), struct (every f-th row and the main diagonal, with f such that
            about k entries are taken).

    Cost per site: k parameters, 4 bytes per index; W' is built per step, its memory is not kept.

    >>> site = Site("query", (12, 8))
    >>> {name: (spec.role, spec.shape) for name, spec in SHiRA(rank=1).tensors(site).items()}
    {'values': ('value', (20,)), 'index': ('basis', (20,))}
    >>> SHiRA(density=0.5, mask="struct").tensors(site)["values"].shape          # every 2nd row, half of the diagonal
    (52,)
    """

    rank: Annotated[int, Ge(1)] = 16
    density: Annotated[float, Gt(0), Le(1)] | None = None
    mask: Literal["rand", "wm", "struct"] = "rand"

    def tensors(self, site: Site) -> dict[str, Spec]:
        k = self.count(site)
        return {"values": Spec((k,), start=0.0), "index": Spec((k,), role="basis", trainable=False, start=self._positions)}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return Sparse(t.values, t.index, *site.shape)

    def fits(self, site: Site) -> Unfit | None:
        if self._wanted(site) > site.shape[0] * site.shape[1]:
            return TooLarge(
                f"rank {self.rank} asks for {self._wanted(site)} entries, which is larger than the matrix: {site.shape}"
            )
        return None

    def count(self, site: Site) -> int:
        """Number of trained entries at a site."""
        out, in_ = site.shape
        if self.mask != "struct":
            return self._wanted(site)
        step = self._step(site)
        return len(range(0, out, step)) * in_ + min(site.shape) - len(range(0, min(site.shape), step))

    def _wanted(self, site: Site) -> int:
        out, in_ = site.shape
        return self.rank * (out + in_) if self.density is None else max(1, round(self.density * out * in_))

    def _step(self, site: Site) -> int:
        """f: every f-th row, beside the diagonal."""
        out, in_ = site.shape
        beside = max(1, self._wanted(site) - min(site.shape))
        return min(out, max(1, round(out * in_ / beside)))

    def _positions(self, ctx: StartContext) -> Tensor:
        (out, in_), k = ctx.site.shape, ctx.shape[-1]
        maps = ctx.site.batch or 1
        if self.mask == "rand":
            draws = [ctx.random] if ctx.site.batch is None else [ctx.random.child(f"map {e}") for e in range(maps)]
            index = torch.stack([draw.choice(out * in_, k) for draw in draws])
        elif self.mask == "wm":  # a stable order: ties fall the same way everywhere
            size = ctx.W.dense().abs().reshape(maps, -1)
            index = size.argsort(dim=-1, descending=True, stable=True)[:, :k].sort(-1).values
        else:
            taken = torch.eye(out, in_, dtype=torch.bool)
            taken[:: self._step(ctx.site)] = True
            index = taken.flatten().nonzero().flatten().expand(maps, k)
        return index.reshape(ctx.shape).to(torch.int32 if out * in_ < 2**31 else torch.int64)

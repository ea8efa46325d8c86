"""MatryoshkaLoRA: a LoRA whose every leading part is an adapter, trained by one forward pass.

"MatryoshkaLoRA: Learning Accurate Hierarchical Low-Rank Representations for LLM Fine-Tuning", 2026 (row 51 of our list of
papers).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from rankfold.core import Context, Site, Spec, StartContext, Structure, Tensors, register
from rankfold.errors import OptionError
from rankfold.linalg import LowRank, Operator


@register("structure", "matryoshka", paper="matryoshkalora2026")
@dataclass(frozen=True, kw_only=True)
class Matryoshka(Structure):
    """ΔW = Σ_j c(r_j)·B[:, :r_j] A[:r_j, :] = B diag(P) A over ranks r_1 < ... < r_n; P_i = Σ over r_j >= i of c(r_j) is fixed.

    The leading components stand in more of the products, and so learn more. Starts at W (B zero). One rank of share 1 is LoRA.

    Args:
        rank: the largest of the ranks.
        ranks: all of them, ascending up to `rank`; None is 1, 2, 4, ... and `rank`.
        share: c(r): "one" is 1, "inverse" is 1/r, "root" is 1/√r.
        inference: "keep" P, or "drop" it in evaluation for c(rank), as the published code does, which is another function than
            the one trained.

    Cost per site: rank·(out + in) parameters, rank fixed numbers; time as LoRA. The published code stores the factors
    transposed, so that its A starts within ±1/√rank; ours starts as LoRA's.

    >>> Matryoshka(rank=16).diagonal().tolist()
    [5.0, 4.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    rank: Annotated[int, Ge(1)] = 16
    ranks: tuple[Annotated[int, Ge(1)], ...] | None = None
    share: Literal["one", "inverse", "root"] = "one"
    inference: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and (list(self.ranks) != sorted(set(self.ranks)) or self.ranks[-1:] != (self.rank,)):
            raise OptionError(f"matryoshka.ranks: got {self.ranks}; they must ascend to rank, which is {self.rank}")

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), r = site.shape, self.rank
        return {"B": Spec((out, r), "B"), "A": Spec((r, in_), "A"), "P": Spec((r,), "basis", False, start=self._fixed)}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        if self.inference == "drop" and ctx is not None and not ctx.training:
            return LowRank(t.B, t.A, scale=self._c(self.rank))
        return LowRank(t.B, t.A, diag=t.P)

    def diagonal(self) -> Tensor:
        """P: [rank]."""
        ladder = self.ranks or sorted({*(2**k for k in range(self.rank.bit_length()) if 2**k < self.rank), self.rank})
        return sum(
            (self._c(r) * (torch.arange(self.rank) < r).double() for r in ladder), torch.zeros(self.rank, dtype=torch.float64)
        )

    def _c(self, r: int) -> float:
        return {"one": 1.0, "inverse": 1 / r, "root": r**-0.5}[self.share]

    def _fixed(self, ctx: StartContext) -> Tensor:
        return self.diagonal().expand(ctx.shape)

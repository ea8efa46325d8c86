"""NLoRA: factors and core cut out of the weight, without a decomposition of it.

Guo et al., "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", 2025, section 3.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt
from torch import Tensor

from rankfold.core import Site, register
from rankfold.linalg import Operator
from rankfold.linalg.nystrom import nystrom
from rankfold.training.contracts import Init, InitContext, Roles, measured


@register("init", "nlora", paper="guo2025nlora")
@dataclass(frozen=True, kw_only=True)
class NLoRA(Init):
    """B = W[:, :r], A = W[:r, :] and M = W[:r, :r]⁺ / s, the Nyström approximation s·B M A of W; the product is the offset.

    Exact where W has rank r and that block is regular. Factors are filled whether they train or not. A structure whose core is
    not square has M taken into B.

    Args:
        mode: "pinv" as above; "pivoted" picks rows and columns by the pivots of the leading singular vectors, much nearer to W
            than the first r, but with an SVD; "official" is the published code, where M is the block itself and no offset is
            subtracted: W + s·B M A, away from the base.
        rcond: singular values of the block below rcond times its largest count as zero.

    Cost: O(r³) per site, beside the slices.

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> from rankfold.linalg.random import Random
    >>> W = torch.tensor([[2.0, 4.0], [1.0, 2.0]])                       # of rank one
    >>> roles = Roles({"B": (2, 1), "core": (1, 1), "A": (1, 2)}, rank=1, scale=1.0)
    >>> start = NLoRA().fill(Site("query", (2, 2)), Dense(W), roles, InitContext(Random(0)))
    >>> torch.equal(start["B"] @ start["core"] @ start["A"], W)
    True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    requires: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    frozen: ClassVar[bool] = True
    offset: ClassVar[bool] = True

    mode: Literal["pinv", "pivoted", "official"] = "pinv"
    rcond: Annotated[float, Gt(0)] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "official":
            object.__setattr__(self, "offset", False)
            object.__setattr__(self, "starts", "elsewhere")

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        B, M, A = nystrom(W, roles.rank, "block" if self.mode == "official" else self.mode, self.rcond)
        M = M if self.mode == "official" else M / roles.scale
        start = {"B": B, "core": M, "A": A} if len(roles.shapes.get("core", ())) == 2 else {"B": B @ M, "A": A}
        return measured(start) if self.offset else start

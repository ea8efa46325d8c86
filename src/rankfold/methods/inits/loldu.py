"""LoLDU: factors and core from the LU decomposition of the weight with its diagonal apart.

Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", 2024,
arXiv:2410.13618, section 3.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor, diag

from rankfold.core import Site, register
from rankfold.linalg import Operator
from rankfold.linalg.lu import lu
from rankfold.training.contracts import Init, InitContext, Roles, measured


@register("init", "loldu", paper="shi2024loldu")
@dataclass(frozen=True, kw_only=True)
class LoLDU(Init):
    """B = (P L)[:, :r], M = diag(d)[:r] / s, A = U[:r, :] from W = P L diag(d) U with partial pivoting; s·B M A is the offset.

    L and U have ones on their diagonals. Cut off at r it approximates nothing: s·B M A may be larger than W, which as an offset
    does no harm. Pivots below the floor come last, their rows divided by the largest entry instead. Factors are filled whether
    they train or not; a structure without a core has d in B. The published code draws d by other laws too: under an offset they
    are the same method, since only M − M₀ enters.

    Args:
        floor: relative size below which a pivot counts as zero.

    Cost: one LU factorisation per site, O(out·in·min(out, in)).

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> from rankfold.linalg.random import Random
    >>> W = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    >>> roles = Roles({"B": (2, 2), "core": (2,), "A": (2, 2)}, rank=2, scale=1.0)
    >>> start = LoLDU().fill(Site("query", (2, 2)), Dense(W), roles, InitContext(Random(0)))
    >>> start["core"], start["A"].tolist()
    (tensor([4., 2.]), [[1.0, 0.5], [0.0, 1.0]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    requires: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    frozen: ClassVar[bool] = True
    offset: ClassVar[bool] = True

    floor: Annotated[float, Ge(0)] = 1e-6

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        f = lu(W, self.floor)
        first = (~f.regular).int().argsort(stable=True)[: roles.rank]
        B, d, A = f.unpermuted()[:, first], f.d[first] / roles.scale, f.U[first]
        if "core" not in roles:
            return measured({"B": B * d, "A": A})
        return measured({"B": B, "core": d if len(roles.shapes["core"]) == 1 else diag(d), "A": A})

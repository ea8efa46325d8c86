"""PiSSA: the adapter starts at the principal components of the weight that it adapts.

Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", 2024,
arXiv:2404.02948, eq. 2-4.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from rankfold.core import Site, register
from rankfold.linalg import Operator
from rankfold.linalg.decompositions import truncated_svd
from rankfold.linalg.factors import split
from rankfold.training.contracts import Init, InitContext, Roles


@register("init", "pissa", paper="meng2024pissa")
@dataclass(frozen=True, kw_only=True)
class PiSSA(Init):
    """s·B₀A₀ = U_r Σ_r V_rᵀ, the best approximation of W of rank r; the same product is the frozen offset.

    Balanced: ‖B₀[:, i]‖ = ‖A₀[i, :]‖ = √(σ_i / s). Deterministic, signs included.

    Args:
        iterations: None is the exact SVD where that is cheap; 4 iterations of the randomised one are the usual cheap choice, for
            a spectrum that decays.

    Cost: one SVD per site, O(out·in·min(out, in)), or O(out·in·rank·iterations).

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> from rankfold.linalg.random import Random
    >>> W = Dense(torch.diag(torch.tensor([8.0, 2.0, 1.0])))
    >>> roles = Roles({"B": (3, 1), "A": (1, 3)}, rank=1, scale=2.0)
    >>> start = PiSSA().fill(Site("query", (3, 3)), W, roles, InitContext(Random(0)))
    >>> start["B"].T, start["A"]
    (tensor([[2., 0., 0.]]), tensor([[2., 0., 0.]]))
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    requires: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    offset: ClassVar[bool] = True

    iterations: Annotated[int, Ge(0)] | None = None

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        U, S, Vh = truncated_svd(W, roles.rank, iterations=self.iterations, random=ctx.random)  # [out, r], [r], [r, in]
        B, A = split(U, S / roles.scale, Vh)
        return {"B": B, "A": A, "B0": B, "A0": A}

"""EVA: A starts at the directions in which a site's inputs vary most.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170,
algorithm 1.
"""

from dataclasses import dataclass
from math import ceil
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch import Tensor, zeros

from rankfold.core import Site, register
from rankfold.errors import DataError
from rankfold.linalg import Operator
from rankfold.training.contracts import Init, InitContext, Roles, Statistic
from rankfold.training.streams import InputDirections


@register("init", "eva", paper="paischer2024eva")
@dataclass(frozen=True, kw_only=True)
class EVA(Init):
    """A = V_rᵀ, the leading right singular vectors of the (centred) input rows; B = 0, so the function is the base's.

    The vectors come from an incremental SVD over the batches; a site stops looking once each of its ⌈ρ·rank⌉ directions turned by
    a cosine of at least τ in the last batch. Their explained-variance ratios σ_i² / Σ_j var_j are the site's scores, from which
    rank:eva spreads the ranks. An embedding, whose inputs are indices, starts by its own law.

    Args:
        center: about the mean; without it the leading direction of inputs far from zero is their mean.
        whiten: divide row i of A by √σ_i.
        rho: directions found and scored per site, as a multiple of its rank: the most that redistribution can give.
        tau: cosine from which a direction counts as settled.
        iterations: of the randomised inner SVD; None is the exact one where that is cheap.

    Raises:
        DataError: (at the start) fewer rows seen than the rank that the site was given.

    >>> import torch
    >>> from rankfold.linalg.random import Random
    >>> site, roles = Site("query", (4, 3)), Roles({"B": (4, 1), "A": (1, 3)}, rank=1, scale=1.0)
    >>> stream = EVA().collect(site, roles)
    >>> stream.observe(torch.tensor([[0.0, 5.0, 1.0], [0.0, -5.0, 1.0], [0.1, 0.0, 1.0]]))
    >>> EVA().fill(site, None, roles, InitContext(Random(0), stream))["A"].abs().round()
    tensor([[0., 1., 0.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    requires: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    center: bool = True
    whiten: bool = False
    rho: Annotated[float, Ge(1)] = 2.0
    tau: Annotated[float, Gt(0)] = 0.99
    iterations: Annotated[int, Ge(0)] | None = 4

    def collect(self, site: Site, roles: Roles) -> Statistic | None:
        if site.kind == "embedding":
            return None
        return InputDirections(
            site.shape[1], min(ceil(self.rho * roles.rank), *site.shape), self.center, self.tau, self.iterations
        )

    def scores(self, site: Site, statistic: Statistic) -> Tensor | None:
        return statistic.explained() if isinstance(statistic, InputDirections) else None

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        stream = ctx.statistic
        if not isinstance(stream, InputDirections):
            return {}
        A, S = stream.directions()[: roles.rank], stream.singular_values()[: roles.rank]
        if len(A) < roles.rank:
            raise DataError(f"eva: {site.key} saw {stream.svd.count} rows, its rank is {roles.rank}; give more or larger batches")
        if self.whiten:
            A = A / S.sqrt().where(S > 0, S.new_ones(())).unsqueeze(-1)
        return {"A": A, "B": zeros(roles.shapes["B"])}

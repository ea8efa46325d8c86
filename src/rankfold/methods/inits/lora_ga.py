"""LoRA-GA: factors from the gradient of the full weight, so that the first step is the best that its rank allows.

Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, arXiv:2407.05000, theorem 3.1 and section 3.3.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from torch import Tensor, arange, cat, zeros

from rankfold.core import Site, register
from rankfold.linalg import LowRank, Operator
from rankfold.linalg.decompositions import truncated_svd
from rankfold.training.contracts import Init, InitContext, Roles, Statistic
from rankfold.training.streams import GradientSketch, GradientSum


@register("init", "lora-ga", paper="wang2024loraga")
@dataclass(frozen=True, kw_only=True)
class LoRAGA(Init):
    """A = c·V[:, :r]ᵀ and B = c·U[:, r:2r] from the mean gradient G = U S Vᵀ of the frozen weight; s·B A is the frozen offset.

    The first step of gradient descent on A and B changes W by −η s²(G AᵀA + B BᵀG), which is then −η s² c² times the best
    approximation of G of rank 2r. Starts at the base. Where min(out, in) < 2r, what the gradient has no directions for starts as
    A drawn and B zero; a site that no gradient reached starts by its structure's own law.

    Args:
        direction: "ArB2r" as above; "A2rBr" the other way round; "ArBr" alternating; "random" disjoint halves of the 2r.
        scaling: c. "stable": out^¼ / √gamma, so that s·B A is of size s·√out / gamma; "gd": 1 / s; "unit": 1; "weight": the mean
            of √(σ_i(W) / s), i <= r.
        gamma: of "stable"; larger starts nearer to zero.
        gradient: "exact" sums each gradient whole; "sketch" holds O(r·(out + in)) numbers per site, in the same single pass.
        iterations: of the randomised SVD of the sum; None is the exact SVD where that is cheap.
        clip: shrink the product so that no entry of s·B A is larger than the largest of W.
        variant: "official"; "peft" multiplies B by the singular values and scales B alone, as peft does (not rank-2r optimal).

    >>> import torch
    >>> from rankfold.linalg.random import Random
    >>> site, roles = Site("query", (4, 3)), Roles({"B": (4, 1), "A": (1, 3)}, rank=1, scale=1.0)
    >>> init = LoRAGA(scaling="unit")
    >>> total = init.collect(site, roles)
    >>> total.observe(torch.eye(4, 3) * torch.tensor([5.0, 3.0, 1.0]))
    >>> total.finish()
    >>> start = init.fill(site, None, roles, InitContext(Random(0), total))
    >>> start["A"], start["B"].T
    (tensor([[1., 0., 0.]]), tensor([[0., 1., 0., 0.]]))
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    requires: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    offset: ClassVar[bool] = True

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scaling: Literal["stable", "gd", "unit", "weight"] = "stable"
    gamma: Annotated[float, Gt(0)] = 16.0
    gradient: Literal["exact", "sketch"] = "exact"
    iterations: Annotated[int, Ge(0)] | None = None
    clip: bool = False
    variant: Literal["official", "peft"] = "official"

    def collect(self, site: Site, roles: Roles) -> Statistic | None:
        if self.gradient == "sketch":
            return GradientSketch(site.shape, 2 * roles.rank, site.key)
        return GradientSum(site.shape, 2 * roles.rank, self.iterations)

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        gradient = ctx.statistic
        if not isinstance(gradient, GradientSum | GradientSketch) or gradient.triplets is None:
            return {}
        U, S, Vh = gradient.svd()  # [out, 2r], [2r], [2r, in]
        half = len(S) // 2  # r, or less where the matrix is too small
        of_a, of_b = self._halves(half, ctx)
        A, B = Vh[of_a], U[:, of_b]
        c = self._scale(site, W, roles)
        if self.variant == "peft":
            B = B * S[of_b] * c
        else:
            A, B = c * A, c * B
        if half < roles.rank:
            drawn = ctx.random.child("A").uniform(
                (roles.rank - half, site.shape[1]), -(site.shape[1] ** -0.5), site.shape[1] ** -0.5
            )
            A, B = cat([A, drawn.to(A)]), cat([B, zeros(site.shape[0], roles.rank - half).to(B)], 1)
        if self.clip:
            largest, bound = LowRank(B, A, scale=roles.scale).dense().abs().max(), W.dense().abs().max().to(B)
            shrink = (bound / largest.clamp_min(bound)).sqrt()
            A, B = shrink * A, shrink * B
        return {"B": B, "A": A, "B0": B, "A0": A}

    def _halves(self, r: int, ctx: InitContext) -> tuple[Tensor, Tensor]:
        """Which of the 2r triplets A takes its right vectors from, and B its left ones."""
        if self.direction == "random":
            order = ctx.random.child("direction").permutation(2 * r)
            return order[:r], order[r:]
        if self.direction == "ArBr":
            return arange(1, 2 * r, 2), arange(0, 2 * r, 2)
        first, second = arange(r), arange(r, 2 * r)
        return (first, second) if self.direction == "ArB2r" else (second, first)

    def _scale(self, site: Site, W: Operator, roles: Roles) -> float:
        if self.scaling == "stable":
            return site.shape[0] ** 0.25 / self.gamma**0.5
        if self.scaling == "weight":
            return float((truncated_svd(W, roles.rank)[1] / roles.scale).sqrt().mean())
        return 1 / roles.scale if self.scaling == "gd" else 1.0

"""Mixture: several low-rank changes, weighed anew for every token or every sample.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017, eq. 1, with low-rank
experts; per sample as in RecLoRA (Zhu et al., 2024, arXiv:2408.03533).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from rankfold.core import Context, ScaledStructure, Site, Spec, Tensors, kaiming, register
from rankfold.errors import LayoutError
from rankfold.linalg import Dense, Operator, Product, at_least_float32, like
from rankfold.linalg.dropout import TokenGate


@register("structure", "mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture(ScaledStructure):
    """ΔW(x) = s·Σ_k α_k B_k A_k, with α = softmax(R x) per token, R: [experts, in]; s = alpha / rank**power.

    All experts run as one product of rank experts·rank whose components are scaled by α. Starts at W (every B_k zero) and with
    equal weights (R zero). Where `context.weights` is set, [experts] or [samples, experts], it takes the place of the softmax.
    With one expert it is LoRA. No single weight exists: it cannot be folded or exported.

    Args:
        rank: inner width of each expert.
        experts: how many.
        alpha: numerator of s; None means s = 1.
        power: exponent of the rank in s.

    Cost per site: experts·(rank·(out + in) + in) parameters, twice as many FLOPs per token.

    Raises:
        LayoutError: no input is at hand, or weights of another number of experts or samples.

    >>> {name: (spec.role, spec.shape) for name, spec in Mixture(rank=2, experts=3).tensors(Site("query", (12, 8))).items()}
    {'B': ('value', (12, 6)), 'A': ('value', (6, 8)), 'R': ('router', (3, 8))}
    """

    input_dependent: ClassVar[bool] = True
    never_dense: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 8
    experts: Annotated[int, Ge(1)] = 4
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), width = site.shape, self.experts * self.rank
        experts = {"B": Spec((out, width), start=0.0), "A": Spec((width, in_), start=kaiming)}
        return {**experts, "R": Spec((self.experts, in_), role="router", start=0.0)}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        if ctx is None or ctx.x is None:
            raise LayoutError("mixture weighs its experts by the input: there is no change without one")
        gate = self.scale * self._weights(t.R, ctx.x, ctx.weights)  # [..., experts]
        return Product(Dense(t.B), Product(TokenGate(gate.repeat_interleave(self.rank, -1)), Dense(t.A)))

    def _weights(self, R: Tensor, x: Tensor, given: Tensor | None) -> Tensor:
        if given is None:
            return torch.softmax(at_least_float32(x @ like(R, x).mT), -1)
        if given.shape[-1] != self.experts or (given.ndim > 1 and given.shape[:-1] != x.shape[:1]):
            raise LayoutError(
                f"context.weights {tuple(given.shape)}: an input {tuple(x.shape)} needs ({x.shape[0]}, {self.experts})"
            )
        return given if given.ndim == 1 else given.reshape(x.shape[0], *(1,) * (x.ndim - 2), self.experts)

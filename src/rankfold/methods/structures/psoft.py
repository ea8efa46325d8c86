"""PSOFT: the principal subspace of the weight rotated, and its coordinates rescaled.

Wu et al., "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", 2025, arXiv:2505.11235, section 3.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from rankfold.core import Context, Site, Spec, Structure, Tensors, kaiming, register
from rankfold.linalg import LowRank, Operator, at_least_float32


@register("structure", "psoft", paper="wu2025psoft")
@dataclass(frozen=True, kw_only=True)
class PSOFT(Structure):
    """W' = W + s·B (diag(b) R diag(a) − 1) A, with s·B A the best approximation of W of rank `rank`, and R a rotation.

    R = (1 + Q)(1 − Q)⁻¹ with Q: [rank, rank] skew, from the q above its diagonal. A has orthonormal rows, so R keeps the lengths
    and angles of the principal part. Starts at W bitwise: q is zero, a and b are one, and R − 1 is formed as 2 Q (1 − Q)⁻¹, which
    peft does not do (its small rotations are exact to 1e-7 of R, ours of R − 1).

    Args:
        rank: width of the subspace.
        alpha: numerator of s; None means s = 1. The singular values in B are divided by s, so it changes nothing but the dtype's
            rounding; it is there for files.
        power: exponent of the rank in s.
        scaled: train a and b; False leaves the pure rotation.

    Cost per site: rank·(rank − 1)/2 + 2·rank parameters, rank·(out + in) frozen numbers, a solve of size rank per step. Two
    options of peft are left out: its truncated Neumann series is no rotation, and its free matrix in place of R is `core` with
    train="M".

    >>> {name: spec.shape for name, spec in PSOFT(rank=4).tensors(Site("query", (12, 8))).items()}
    {'B': (12, 4), 'A': (4, 8), 'q': (6,), 'a': (4,), 'b': (4,)}
    """

    init: ClassVar[str] = "spectrum"

    rank: Annotated[int, Ge(1)] = 32
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0
    scaled: bool = True

    def tensors(self, site: Site) -> dict[str, Spec]:
        (out, in_), r = site.shape, self.rank
        bases = {"B": Spec((out, r), "B", False, start=kaiming), "A": Spec((r, in_), "A", False)}
        gains = {name: Spec((r,), trainable=self.scaled, start=1.0) for name in ("a", "b")}
        return {**bases, "q": Spec((r * (r - 1) // 2,), start=0.0), **gains}

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        a, b = t.a, t.b
        core = b.unsqueeze(-1) * self._turn(t.q) * a.unsqueeze(-2) + torch.diag_embed((b - 1) * a + (a - 1))
        return LowRank(t.B, t.A, core=core, scale=self.scale)

    def _turn(self, q: Tensor) -> Tensor:
        """R − 1."""
        rows, columns = torch.triu_indices(self.rank, self.rank, 1, device=q.device)
        upper = at_least_float32(q.new_zeros(*q.shape[:-1], self.rank * self.rank))
        upper = upper.index_add(-1, rows * self.rank + columns, at_least_float32(q)).unflatten(-1, (self.rank, self.rank))
        Q = upper - upper.mT
        return torch.linalg.solve(torch.eye(self.rank, dtype=Q.dtype, device=Q.device) - Q, 2.0 * Q, left=False)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank**self.power

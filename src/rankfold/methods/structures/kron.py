"""Kron: a Kronecker product as the change. LoKr of LyCORIS, and KronA.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023, arXiv:2309.14859;
Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022, arXiv:2212.10650.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from rankfold.core import Context, ScaledStructure, Site, Spec, Tensors, Unfit, kaiming, register
from rankfold.linalg import Kronecker, Operator


def split(size: int, factor: int | None) -> tuple[int, int]:
    """size as m·n: m = factor where it divides, else the largest divisor up to √size (and up to factor); (1, size) for a prime.

    >>> split(512, None), split(512, 4), split(127, None)
    ((16, 32), (4, 128), (1, 127))
    """
    if factor and size % factor == 0:
        return factor, size // factor
    limit = min(isqrt(size), factor or size)
    m = max(d for d in range(1, limit + 1) if size % d == 0)
    return m, size // m


@register("structure", "kron", paper="yeh2023lycoris", aliases=("lokr",))
@dataclass(frozen=True, kw_only=True)
class Kron(ScaledStructure):
    """ΔW = s·P ⊗ Q with P: [p, q], Q: [a, b], out = p·a, in = q·b, and s = alpha / rank**power. rank(ΔW) = rank(P)·rank(Q).

    Starts at W (P zero, Q drawn). Conventions are those of LyCORIS and peft: Q is a product Q1 Q2 of inner width `rank` where
    rank < max(a, b) / 2, and P likewise only if `both`.

    Args:
        rank: inner width of a factor that is itself factored; no upper limit, above it the factor is trained whole.
        alpha: numerator of s; None means s = 1.
        power: exponent of the rank in s.
        factor: wanted size of p and q; None takes the divisors nearest to the square root.
        both: whether P is factored too.

    Cost per site: p·q + a·b parameters, or rank·(a + b) for a factored Q; two small products per token.

    >>> {name: spec.shape for name, spec in Kron(rank=4).tensors(Site("query", (512, 384))).items()}
    {'P': (16, 16), 'Q1': (32, 4), 'Q2': (4, 24)}
    """

    never_dense: ClassVar[bool] = True

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] | None = None
    power: float = 1.0
    factor: Annotated[int, Ge(1)] | None = None
    both: bool = False

    def tensors(self, site: Site) -> dict[str, Spec]:
        (p, a), (q, b) = (split(n, self.factor) for n in site.shape)
        r = self.rank
        P = {"P1": Spec((p, r), start=0.0), "P2": Spec((r, q), start=kaiming)} if self._small(p, q) and self.both else None
        Q = {"Q1": Spec((a, r), start=kaiming), "Q2": Spec((r, b), start=kaiming)} if self._small(a, b) else None
        return {**(P or {"P": Spec((p, q), start=0.0)}), **(Q or {"Q": Spec((a, b), start=kaiming)})}

    def _small(self, rows: int, columns: int) -> bool:
        return self.rank < max(rows, columns) / 2

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        P = t.P1 @ t.P2 if "P1" in t._fields else t.P
        Q = t.Q1 @ t.Q2 if "Q1" in t._fields else t.Q
        return Kronecker(self.scale * P, Q)

    def fits(self, site: Site) -> Unfit | None:
        return None

"""Spectrum: factors and core from the leading singular triplets of the weight.

LoRA-XS (Bałazy et al., 2024, arXiv:2405.17604, section 3), SVFit (Sun et al., 2024, arXiv:2409.05926) and LaMDA (Azizi et al.,
"LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", 2024, arXiv:2406.12832, section 3).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor, diag, zeros

from rankfold.core import Site, register
from rankfold.linalg import Operator
from rankfold.linalg.decompositions import truncated_svd
from rankfold.training.contracts import Init, InitContext, Roles, measured


@register("init", "spectrum", paper="sun2024svfit")
@dataclass(frozen=True, kw_only=True)
class Spectrum(Init):
    """B = U_r, M = Σ_r / s, A = V_rᵀ from W = U Σ Vᵀ: s·B M A is the best approximation of W of rank r, and the offset.

    Factors are filled whether they train or not. A structure without a core has the singular values in B. Deterministic, signs
    included; the bases are stored, as they could not be told apart again where singular values are equal.

    Args:
        values: where Σ_r / s goes: "core", or "B" beside a core that starts at zero, as in LoRA-XS (whose code draws it with a
            width of 1e-5; measured from there it is the same method).
        iterations: None is the exact SVD where that is cheap; else of the randomised one.

    >>> import torch
    >>> from rankfold.linalg import Dense
    >>> from rankfold.linalg.random import Random
    >>> W = Dense(torch.diag(torch.tensor([8.0, 2.0, 1.0])))
    >>> roles = Roles({"B": (3, 2), "core": (2,), "A": (2, 3)}, rank=2, scale=1.0)
    >>> start = Spectrum().fill(Site("query", (3, 3)), W, roles, InitContext(Random(0)))
    >>> start["B"].T, start["core"]
    (tensor([[1., 0., 0.],
            [0., 1., 0.]]), tensor([8., 2.]))
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    requires: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    frozen: ClassVar[bool] = True
    offset: ClassVar[bool] = True

    values: Literal["core", "B"] = "core"
    iterations: Annotated[int, Ge(0)] | None = None

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        U, S, Vh = truncated_svd(W, roles.rank, iterations=self.iterations, random=ctx.random)  # [out, r], [r], [r, in]
        S = S / roles.scale
        if "core" not in roles:
            return measured({"B": U * S, "A": Vh})
        if self.values == "B":
            return measured({"B": U * S, "core": zeros(roles.shapes["core"]), "A": Vh})
        return measured({"B": U, "core": S if len(roles.shapes["core"]) == 1 else diag(S), "A": Vh})

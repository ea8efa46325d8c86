"""The default start: A drawn as torch draws a layer, B zero, so that the function is the base's.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685; He et al., "Delving Deep into
Rectifiers", 2015, with a = √5.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, zeros

from rankfold.core import Site, register
from rankfold.linalg import Operator
from rankfold.training.contracts import Init, InitContext, Roles


@register("init", "kaiming", paper="hu2021lora")
@dataclass(frozen=True, kw_only=True)
class Kaiming(Init):
    """A ~ U(−1/√in, 1/√in), B = 0: every tensor by its structure's own law, and this where the structure has none.

    The first gradient reaches B alone: ∂L/∂B = s·G Aᵀ, ∂L/∂A = 0. An embedding starts the other way round, A = 0 and B ~ N(0, 1),
    since its input is one column of A at a time.

    >>> from rankfold.linalg.random import Random
    >>> roles = Roles({"B": (8, 2), "A": (2, 50)}, rank=2, scale=1.0)
    >>> words = Kaiming().fill(Site("words", (8, 50), kind="embedding"), None, roles, InitContext(Random(0)))
    >>> float(words["A"].abs().max()), bool(words["B"].std() > 0.5)
    (0.0, True)
    >>> Kaiming().fill(Site("query", (8, 50)), None, roles, InitContext(Random(0)))
    {}
    """

    default: ClassVar[bool] = True

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        if site.kind == "embedding" and "A" in roles and "B" in roles:
            return {"A": zeros(roles.shapes["A"]), "B": ctx.random.child("B").normal(roles.shapes["B"])}
        return {}

"""Normal starts: A drawn with a chosen width and B zero, or both drawn under a gate that starts at zero.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, section 4.1; with a gate: Zhang et al.,
"AdaLoRA", 2023, arXiv:2303.10512, section 3.1.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt
from torch import Tensor, zeros

from rankfold.core import Site, register
from rankfold.linalg import Operator
from rankfold.training.contracts import Init, InitContext, Roles


@register("init", "gaussian", paper="hu2021lora")
@dataclass(frozen=True, kw_only=True)
class Gaussian(Init):
    """A ~ N(0, std²) and B ~ N(0, std_b²).

    With std_b > 0 the product is not zero, so a gate of the structure must start at zero in its place: without a gate the pair is
    refused. An embedding starts the other way round, A = 0 and B ~ N(0, 1).

    Args:
        std: of A; None is 1 / rank.
        std_b: of B; 0 starts B at zero.

    >>> from rankfold.linalg.random import Random
    >>> roles = Roles({"B": (40, 4), "A": (4, 60), "gate": (4,)}, rank=4, scale=1.0)
    >>> start = Gaussian(std=0.02, std_b=0.02).fill(Site("query", (40, 60)), None, roles, InitContext(Random(0)))
    >>> round(float(start["B"].std()), 2), start["gate"].tolist()
    (0.02, [0.0, 0.0, 0.0, 0.0])
    """

    std: Annotated[float, Gt(0)] | None = None
    std_b: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = {"A", "B", "gate"} if self.std_b else {"A"}
        object.__setattr__(self, "requires", frozenset(needed))

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        start = {"A": ctx.random.child("A").normal(roles.shapes["A"], std=self.std or 1 / max(roles.rank, 1))}
        if self.std_b:
            start["B"] = ctx.random.child("B").normal(roles.shapes["B"], std=self.std_b)
            start["gate"] = zeros(roles.shapes["gate"])
        elif "B" in roles:
            start["B"] = zeros(roles.shapes["B"])
            if site.kind == "embedding":
                start = {"A": zeros(roles.shapes["A"]), "B": ctx.random.child("B").normal(roles.shapes["B"])}
        return start

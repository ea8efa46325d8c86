"""LoRA+: the factor that starts at zero learns faster than the one that is drawn.

Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, arXiv:2402.12354, section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from torch.optim import Optimizer

from rankfold.core import register
from rankfold.training.contracts import Trainable, Update
from rankfold.training.optimizers import deviation_adamw, groups


@register("update", "loraplus", paper="hayou2024loraplus")
@dataclass(frozen=True, kw_only=True)
class LoRAPlus(Update):
    """AdamW with η_B = lr_ratio·η_A and η_A = lr; everything else (magnitudes, gates, heads) at lr.

    An embedding starts with A at zero, so there A has the higher rate. The decay of a group is multiplied by its rate too.

    Args:
        lr_ratio: λ. Larger for harder tasks, with lr about half of what LoRA takes; 1 is AdamW.
        peft_groups: peft's grouping, for parity: every vector at the rate of B, embedding adapters at `embedding_lr`.
        embedding_lr: of embedding adapters under `peft_groups`.

    >>> import torch
    >>> B, A = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.ones(2, 3))
    >>> pair = [Trainable("query/B", B, "B"), Trainable("query/A", A, "A")]
    >>> [(group["lr"], len(group["params"])) for group in LoRAPlus(lr_ratio=8.0).optimizer(pair, lr=0.5).param_groups]
    [(0.5, 1), (4.0, 1)]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    lr_ratio: Annotated[float, Gt(0)] = 16.0
    peft_groups: bool = False
    embedding_lr: Annotated[float, Gt(0)] = 1e-6
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8

    def optimizer(self, tensors: Sequence[Trainable], lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
        def rate(t: Trainable) -> float:
            if self.peft_groups and t.kind == "embedding":
                return self.embedding_lr / lr
            fast = t.role == ("A" if t.kind == "embedding" else "B") or (self.peft_groups and t.param.ndim == 1)
            return self.lr_ratio if fast else 1.0

        options = {"betas": (self.beta1, self.beta2), "eps": self.eps, **options}
        return deviation_adamw(tensors, groups(tensors, lr, weight_decay, rate), lr, **options)

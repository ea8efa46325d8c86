"""The default update: AdamW, whose decay pulls an offset's tensors to where they started.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv:1711.05101, algorithm 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from torch.optim import Optimizer

from rankfold.core import register
from rankfold.training.contracts import Trainable, Update
from rankfold.training.optimizers import deviation_adamw, groups


@register("update", "adamw", paper="loshchilov2019adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW(Update):
    """p ← p − lr·λ·(p − p₀) − lr·m̂ / (√v̂ + ε), with p₀ = 0 but for tensors measured from a start of their own.

    So decay pulls a changed weight towards the base's; an owned copy of a whole weight (full, heads) goes towards zero, as in
    full fine-tuning. Matrices decay; biases, norms, gates and magnitudes don't.

    >>> import torch
    >>> B = Trainable("query/B", torch.nn.Parameter(torch.ones(4, 2)), "B")
    >>> gate = Trainable("query/gate", torch.nn.Parameter(torch.ones(2)), "gate")
    >>> [group["weight_decay"] for group in AdamW().optimizer([B, gate], lr=1e-3, weight_decay=0.1).param_groups]
    [0.0, 0.1]
    """

    default: ClassVar[bool] = True
    own: ClassVar[bool] = False

    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8

    def optimizer(self, tensors: Sequence[Trainable], lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
        options = {"betas": (self.beta1, self.beta2), "eps": self.eps, **options}
        return deviation_adamw(tensors, groups(tensors, lr, weight_decay), lr, **options)

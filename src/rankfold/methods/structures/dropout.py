"""Dropout: the input of the change dropped at random while training; the base sees all of it.

Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; in front of A as in LoRA's code.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Lt

from rankfold.core import Context, Decorator, Site, Tensors, register
from rankfold.linalg import Operator, Product, difference
from rankfold.linalg import dropout as activations


@register("structure", "dropout", paper="srivastava2014dropout")
@dataclass(frozen=True, kw_only=True)
class Dropout(Decorator):
    """y = W x + ΔW (z ∘ x) / (1 − p) while training, with z ~ Bernoulli(1 − p) anew per token and input; W + ΔW in evaluation.

    ΔW is all that the structures inside do to W: `dropout+lora` is LoRA's own dropout, `dropout+magnitude+lora` is DoRA's as in
    peft. Masks are a function of a seed, drawn per pass from torch's generator; backward draws them again, nothing stores them.

    Args:
        p: share of inputs dropped.

    >>> from rankfold.methods.structures.lora import LoRA
    >>> list(Dropout(p=0.1, inner=LoRA()).tensors(Site("query", (12, 8))))          # nothing of its own
    ['B', 'A']
    """

    stochastic: ClassVar[bool] = True
    never_dense: ClassVar[bool] = True

    p: Annotated[float, Ge(0), Lt(1)] = 0.1

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        inner = self.inner.weight(W, t, site, ctx)
        if ctx is None or not ctx.training or ctx.seed is None or self.p == 0:
            return inner
        mask = activations.Dropout(site.shape[1], self.p, ctx.seed, next(W.leaves()))
        return W + Product(difference(inner, W), mask)

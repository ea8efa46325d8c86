"""What a layer's input was made of, where autograd keeps that anyway: then the input itself need not be kept.

The input of a gated block's last layer is a product, silu(gate) ∘ up, whose backward pass keeps both factors. A frozen layer
keeps no input; an adapted one would keep the product for A alone. One elementwise pass in backward makes it again, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["factors_of", "watching"]


def factors_of(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(a, b) with x = a ∘ b, both of the shape of x and both kept for the backward pass of that product; None otherwise.

    They are read from the graph, as detached tensors of the same storage and version. Under hooks on saved tensors
    (checkpointing, offloading), where reading may compute or copy, there are none; `watching` is the exception.

    >>> a, b = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    >>> [f.data_ptr() == t.data_ptr() for f, t in zip(factors_of(a * b), (a, b))]
    [True, True]
    >>> factors_of(a * 2.0) is None, factors_of(a + b) is None
    (True, True)
    """
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0" or _hooked():
        return None
    try:
        factors = node._saved_self, node._saved_other  # type: ignore[attr-defined]
    except RuntimeError:  # changed in place since, or freed: the graph can't say any more
        return None
    if not all(isinstance(t, Tensor) and t.shape == x.shape for t in factors):
        return None
    return factors[0].detach(), factors[1].detach()


def _hooked() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not getattr(hooks[0], "looks_only", False)


@contextmanager
def watching(look: Callable[[Tensor], None]) -> Iterator[None]:
    """`look` sees every tensor that autograd keeps; what is kept stays what it would be unwatched.

    >>> seen = []
    >>> with watching(lambda t: seen.append(tuple(t.shape))):
    ...     _ = torch.ones(3, requires_grad=True).exp()
    >>> seen
    [(3,)]
    """

    def pack(t: Tensor) -> Tensor:
        look(t)
        return t.detach()  # an output that keeps itself would keep its node too, and neither is ever freed

    pack.looks_only = True  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield

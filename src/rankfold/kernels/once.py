"""Functions that are differentiated once: asking for more is an error, never a wrong number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from rankfold.errors import LayoutError

__all__ = ["once"]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the backward of a custom function: under `create_graph=True` it raises.

    torch's own mark leaves a gradient that is cut off from its inputs, so that `autograd.grad(loss + penalty, parameters)` drops
    the penalty in silence.

    Raises:
        LayoutError: (from the backward pass) second derivatives were asked for.

    >>> class Square(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x): ctx.save_for_backward(x); return x * x
    ...     @staticmethod
    ...     @once
    ...     def backward(ctx, g): return 2 * ctx.saved_tensors[0] * g
    >>> x = torch.ones(1, requires_grad=True)
    >>> float(torch.autograd.grad(Square.apply(x), x)[0])
    2.0
    >>> torch.autograd.grad(Square.apply(x), x, create_graph=True)
    Traceback (most recent call last):
    ...
    rankfold.errors.LayoutError: second derivatives need plan="plain": ...
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # the engine enables it for create_graph alone
            raise LayoutError('second derivatives need plan="plain": rf.adapt(model, ..., plan="plain"), or create_graph=False')
        return backward(ctx, *grads)

    return checked

"""Checkpointing of activations that never loses a gradient: on within a block, and afterwards as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rankfold.errors import LayoutError

__all__ = ["recomputing"]


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within the block the model's layers recompute their activations in the backward pass.

    Afterwards each layer does what it did before: the user's own checkpointing, in its own form, stays.
    The form that needs no gradient at a layer's input is asked for, and the embedding's output is made to have one as well:
    with a frozen base the older form drops every gradient without a word.

    Raises:
        LayoutError: a model that has no such switch.
    """
    whole: Any = model
    enable = getattr(whole, "activation_checkpointing_enable", None) or getattr(whole, "gradient_checkpointing_enable", None)
    refusal = f"{type(model).__name__} offers no gradient checkpointing; leave it off, or use memory='recompute'"
    if enable is None or not getattr(whole, "supports_gradient_checkpointing", True):
        raise LayoutError(refusal)
    switches: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    before = [(m, m.gradient_checkpointing, m.__dict__.get("_gradient_checkpointing_func")) for m in switches]
    hooks = getattr(whole, "_require_grads_hooks", None)
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise LayoutError(refusal) from None
    if hasattr(whole, "enable_input_require_grads") and not getattr(whole, "_require_grads_hooks", None):
        whole.enable_input_require_grads()  # for text transformers has done it already, whoever had asked before
    try:
        yield
    finally:
        disable = getattr(whole, "activation_checkpointing_disable", None) or whole.gradient_checkpointing_disable
        disable()
        for module, on, run in before:
            module.gradient_checkpointing = on
            if run is not None:
                module._gradient_checkpointing_func = run
        if getattr(whole, "_require_grads_hooks", None) is not hooks:
            whole.disable_input_require_grads()
            if hooks:
                whole._require_grads_hooks, whole._require_grads_hook = hooks, hooks[0]

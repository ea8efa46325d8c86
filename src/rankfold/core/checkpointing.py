"""Reentrant gradient checkpointing under a frozen base: a block whose input asks for no gradient would not be run again in the
backward pass, and what trains inside it would get none, without an error. So the input asks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import LayoutError

from .store import Member, Store

__all__ = ["InputGradients"]


class InputGradients:
    """Watches for checkpointing as transformers has it (`gradient_checkpointing`, `_gradient_checkpointing_func` at blocks)."""

    def __init__(self, store: Store, member: Member) -> None:
        self.member = member
        self.blocks: list[Any] = [m for m in store.model.modules() if hasattr(m, "gradient_checkpointing")]

    def before_forward(self, store: Store) -> None:
        if not (store.model.training and torch.is_grad_enabled()):
            return
        for block in self.blocks:
            run = block.__dict__.get("_gradient_checkpointing_func") if block.gradient_checkpointing else None
            # the library hands a partial of torch's checkpoint on, whose own default is reentrant
            if run is not None and not isinstance(run, _Asking) and getattr(run, "keywords", {}).get("use_reentrant", True):
                block._gradient_checkpointing_func = _Asking(run)

    def after_forward(self, store: Store) -> None:
        return None


class _Asking:
    """A checkpointing function whose first floating input asks for a gradient where none does."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        places = [k for k, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
        if not any(args[k].requires_grad for k in places):
            if not places:
                raise LayoutError(
                    "gradient checkpointing: a block gets its input by keyword, so that use_reentrant=True loses its gradients; "
                    "use use_reentrant=False"
                )
            args = (*args[: places[0]], args[places[0]].detach().requires_grad_(), *args[places[0] + 1 :])
        return self.run(forward, *args)

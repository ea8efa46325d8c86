"""Reentrant gradient checkpointing under a frozen base: a block whose input asks for no gradient would not be run again in the
backward pass, and what trains inside it would get none, without an error. Where transformers calls it the input is made to ask
for one; where the model's own code does, or runs a module without gradients by itself, the first backward pass raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import InactiveError, LayoutError

from .host import Host
from .store import Member, Store

__all__ = ["InputGradients", "LostGradients"]


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

    def after_forward(self, store: Store, output: Any) -> None:
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


class LostGradients:
    """Watches for modules that run without gradients in a training pass, and are not run with them until its backward pass ends.

    Hosts note both (`Host.note`). The check belongs to backward passes that start at the model's output.

    Raises:
        InactiveError: (from backward) with the sites.
    """

    def __init__(self, store: Store, member: Member) -> None:
        self.member = member

    def before_forward(self, store: Store) -> None:
        store.passes += 1
        store.in_training_pass = store.model.training and torch.is_grad_enabled()
        store.blind = []

    def after_forward(self, store: Store, output: Any) -> None:
        store.in_training_pass = False
        number, hosts = store.passes, [host for host in store.blind if host.graded < store.passes]
        names = {host: list(self._trained(store, host)) for host in hosts}
        if self.member.name not in store.active or not any(names.values()):
            return

        def check() -> None:
            lost = [name for host, own in names.items() if host.graded < number for name in own]
            if lost:
                raise InactiveError(
                    f"adapter {self.member.name!r}: {', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''} ran without gradients "
                    f"in a training pass, and not again with them: torch.utils.checkpoint(use_reentrant=True) whose input asks "
                    f"for none, or torch.no_grad() inside the model. Use use_reentrant=False, or leave them out: "
                    f"exclude={sorted({name.partition('[')[0] for name in lost})[:3]}"
                )

        pending = [check]

        def begins(grad: Tensor) -> None:
            if pending:
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(pending.pop())

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(begins)

    def _trained(self, store: Store, host: Host) -> Iterator[str]:
        for slot in [slot for group in (*host.slots.values(), host.sides) for slot in group if slot.member is self.member]:
            if any(store.tensor(key).requires_grad for key, _ in slot.binding.values()):
                yield slot.site.key
        yield from (extra.name for name, extra in host.extras if name == self.member.name)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (t for value in output.values() for t in _tensors(value))
    elif isinstance(output, tuple | list):
        yield from (t for value in output for t in _tensors(value))

"""Whether every site is really used: forward passes in train and eval mode count calls, a backward pass looks for gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import DataError, InactiveError

from .host import Host
from .store import Member, Slot, Store

__all__ = ["CallWatch", "call_model", "probe", "silent_sites", "unchanged"]


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model on one batch: a mapping by keywords, a tuple or list by position, anything else as the only argument."""
    if hasattr(batch, "keys"):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """After the block the modes, buffers (running averages of norm layers) and random states are as before it."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, b, b.clone())
        for path, module in model.named_modules()
        if path.partition(".")[0] != "rankfold"
        for name, b in module._buffers.items()
        if b is not None
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    if module._buffers.get(name) is buffer:  # one that was replaced belongs to whatever replaced it
                        buffer.copy_(value)


def _hosts(store: Store, member: Member) -> dict[str, Host]:
    modules = dict(store.model.named_modules())
    return {slot.site.module: modules[slot.site.module].__dict__["_rankfold"] for slot in member.slots.values()}


def silent_sites(store: Store, member: Member, since: dict[str, int]) -> list[str]:
    """Site keys whose module was not called since the counts in `since`."""
    hosts = _hosts(store, member)
    return [key for key, slot in member.slots.items() if hosts[slot.site.module].calls <= since.get(slot.site.module, 0)]


def _require_calls(store: Store, member: Member, since: dict[str, int]) -> None:
    silent = silent_sites(store, member, since)
    if silent:
        raise InactiveError(bypassed(silent))


def counts(store: Store, member: Member) -> dict[str, int]:
    return {name: host.calls for name, host in _hosts(store, member).items()}


def bypassed(keys: list[str]) -> str:
    return (
        f"{len(keys)} site(s) were not called by the forward pass: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}. "
        f"Something reads the weight without calling the module (fused attention, a fast path), or the model left it out. "
        f"Leave them out: exclude={sorted({k.partition('[')[0] for k in keys})[:3]}"
    )


class CallWatch:
    """Checks the first forward pass of each mode after attaching, where no probe batch was given; then goes away."""

    def __init__(self, store: Store, member: Member) -> None:
        self.member = member
        self.since = counts(store, member)
        self.open = {True, False}

    def before_forward(self, store: Store) -> None:
        if store.model.training in self.open:
            self.since = counts(store, self.member)

    def after_forward(self, store: Store) -> None:
        mode = store.model.training
        if mode not in self.open or self.member.name not in store.active:
            return
        self.open.discard(mode)
        if not self.open:
            store.watchers.remove(self)
        _require_calls(store, self.member, self.since)


def probe(
    store: Store, member: Member, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor] | None, automatic: bool
) -> list[tuple[str, str]]:
    """Run one batch in eval mode without gradient and one in train mode (with `loss`, backward); give the sites without effect.

    The model is afterwards as before.

    Raises:
        DataError: no batches.
        InactiveError: a site is bypassed, or a site that the user named gets no gradient.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise DataError("batches: none at all; give at least one, or leave batches out")
    model = store.model
    with unchanged(model):
        model.eval()
        since = counts(store, member)
        with torch.no_grad():
            loss(model, batch) if loss is not None else call_model(model, batch)
        _require_calls(store, member, since)
        model.train()
        since = counts(store, member)
        without = _without_gradient(store, member, model, batch, loss)
        _require_calls(store, member, since)
    if without and not automatic:
        raise InactiveError(
            f"no gradient reaches {', '.join(without)}: the loss does not depend on these sites; leave them out of targets"
        )
    return [(key, "gets no gradient") for key in without]


def _without_gradient(store: Store, member: Member, model: nn.Module, batch: Any, loss: Any) -> list[str]:
    if loss is None:
        with torch.no_grad():
            call_model(model, batch)
        return []
    tensors = {key: _trainable(store, slot) for key, slot in member.slots.items()}
    flat = list({id(t): t for ts in tensors.values() for t in ts}.values())
    value = loss(model, batch)
    if not value.requires_grad:  # it depends on none of them
        return [key for key, ts in tensors.items() if ts]
    grads = torch.autograd.grad(value, flat, allow_unused=True)
    reached = {id(t) for t, g in zip(flat, grads) if g is not None}
    return [key for key, ts in tensors.items() if ts and not any(id(t) in reached for t in ts)]


def _trainable(store: Store, slot: Slot) -> list[Tensor]:
    found = [store.tensor(key) for key, _ in slot.binding.values()]
    return [t for t in found if t.requires_grad]

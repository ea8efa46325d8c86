"""Whether every site is really used: forward passes in train and eval mode count calls, a backward pass looks for gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import DataError, InactiveError

from .host import Host
from .store import Extra, Member, Slot, Store

__all__ = ["CallWatch", "call_model", "probe", "silent_extras", "silent_sites", "unchanged"]


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
    """The hosts of an adapter's sites and extras, by module."""
    found = {path: module.__dict__["_rankfold"] for path, module in store.model.named_modules() if "_rankfold" in module.__dict__}
    sites = {slot.site.module for slot in member.slots.values()}
    return {p: host for p, host in found.items() if p in sites or any(name == member.name for name, _ in host.extras)}


def silent_sites(store: Store, member: Member, since: dict[str, int]) -> list[str]:
    """Site keys whose module was not called since the counts in `since`."""
    hosts = _hosts(store, member)
    return [key for key, slot in member.slots.items() if hosts[slot.site.module].calls <= since.get(slot.site.module, 0)]


def silent_extras(store: Store, member: Member, since: dict[str, int]) -> list[Extra]:
    """Extra parameters none of whose modules was called since."""
    called = {
        extra.key
        for path, host in _hosts(store, member).items()
        for name, extra in host.extras
        if name == member.name and host.calls > since.get(path, 0)
    }
    return [extra for extra in member.extras.values() if extra.key not in called]


def _require_calls(store: Store, member: Member, since: dict[str, int]) -> set[str]:
    """Raise for what was bypassed, warn of experts without tokens and of extras that we chose; gives those experts' sites."""
    silent = silent_sites(store, member, since)
    idle = without_tokens(store, member, since).intersection(silent)
    if bad := [key for key in silent if key not in idle]:
        raise InactiveError(bypassed(bad))
    extras = silent_extras(store, member, since)
    if named := [e.name for e in extras if e.named]:
        raise InactiveError(
            f"extras: {', '.join(named[:5])}: the model reads these parameters without calling their module, or left it out, so "
            "that a copy would not act; leave them out"
        )
    if extras:
        warnings.warn(
            f"{', '.join(e.name for e in extras[:5])}: read without a call of their module: they keep the base's value",
            stacklevel=4,
        )
    if idle:
        warnings.warn(
            f"{len(idle)} site(s) of experts that the router sent no token to so far: {', '.join(sorted(idle)[:5])}", stacklevel=4
        )
    return idle


def without_tokens(store: Store, member: Member, since: dict[str, int]) -> set[str]:
    """Sites in an expert that was not called at all while another one of its list was."""
    called = {path for path, host in _hosts(store, member).items() if host.calls > since.get(path, 0)}
    found = set()
    for key, slot in member.slots.items():
        parts = slot.site.module.split(".")
        for k in range(1, len(parts)):
            lists, expert = ".".join(parts[:k]), ".".join(parts[: k + 1])
            if "expert" not in parts[k - 1] or not isinstance(store.model.get_submodule(lists), nn.ModuleList | nn.ModuleDict):
                continue
            own = {path for path in called if f"{path}.".startswith(f"{expert}.")}
            if not own and any(path.startswith(f"{lists}.") for path in called):
                found.add(key)
    return found


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

    def after_forward(self, store: Store, output: Any) -> None:
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
        idle = _require_calls(store, member, since)
        without = [key for key in without if key not in idle]
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
    with torch.enable_grad():
        value = loss(model, batch)
    if not value.requires_grad:  # it depends on none of them
        return [key for key, ts in tensors.items() if ts]
    grads = torch.autograd.grad(value, flat, allow_unused=True)
    reached = {id(t) for t, g in zip(flat, grads) if g is not None}
    return [key for key, ts in tensors.items() if ts and not any(id(t) in reached for t in ts)]


def _trainable(store: Store, slot: Slot) -> list[Tensor]:
    found = [store.tensor(key) for key, _ in slot.binding.values()]
    return [t for t in found if t.requires_grad]

"""Whether every site is really used: forward passes in train and eval mode count calls, a backward pass looks for gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import DataError, InactiveError

from .host import Host
from .store import Extra, Member, Slot, Store

__all__ = ["CallWatch", "among_experts", "call_model", "probe", "silent_extras", "silent_sites", "unchanged"]


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
    """The hosts of an adapter's sites and extras, by the module's path when it was adapted."""
    found = {host.path: host for m in store.model.modules() if (host := m.__dict__.get("_rankfold")) is not None}
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


def _require_calls(store: Store, member: Member, since: dict[str, int], left_out: Container[str] = ()) -> set[str]:
    """Raise for what was bypassed, warn of extras that we chose and of experts without tokens; gives those experts' sites.

    Args:
        left_out: modules that are in no fault: the model did not run what holds them.
    """
    silent = [key for key in silent_sites(store, member, since) if member.slots[key].site.module not in left_out]
    idle = without_tokens(store, member, since).intersection(silent)
    if bad := [key for key in silent if key not in idle]:
        raise InactiveError(bypassed(bad))
    hosts = _hosts(store, member)
    extras = [
        e
        for e in silent_extras(store, member, since)
        if not all(path in left_out for path, host in hosts.items() if any(own.key == e.key for _, own in host.extras))
    ]
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
    return among_experts(store.model, called, {key: slot.site.module for key, slot in member.slots.items()})


def among_experts(model: nn.Module, called: Collection[str], modules: Mapping[str, str]) -> set[str]:
    """The keys of those modules that lie in an expert of a list (of modules) of which others are among the called, and itself
    not at all."""
    found = set()
    for key, module in modules.items():
        parts = module.split(".")
        for k in range(1, len(parts)):
            lists, expert = ".".join(parts[:k]), ".".join(parts[: k + 1])
            if "expert" not in parts[k - 1] or not isinstance(model.get_submodule(lists), nn.ModuleList | nn.ModuleDict):
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


class Entries:
    """Which of the modules that hold an adapter's sites are called, from now until `close`: it tells a bypassed site from
    one that was left out with what is around it."""

    def __init__(self, store: Store, member: Member) -> None:
        paths = {id(m.__dict__.get("_rankfold")): path for path, m in store.model.named_modules()}  # as they are now
        self.holders = {path: _holder(store.model, paths[id(host)]) for path, host in _hosts(store, member).items()}
        self.entered = {""}
        self.hooks = [
            store.model.get_submodule(path).register_forward_pre_hook(partial(self._enter, path))
            for path in set(self.holders.values()) - {""}
        ]

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.entered.add(path)

    def close(self) -> set[str]:
        """Stop, and give the modules whose holder was not called."""
        for hook in self.hooks:
            hook.remove()
        return {path for path, holder in self.holders.items() if holder not in self.entered}


def _holder(model: nn.Module, path: str) -> str:
    """The module that calls the one at `path`: the nearest around it with a forward of its own, so no list."""
    while path:
        path = path.rpartition(".")[0]
        if type(model.get_submodule(path)).forward is not nn.Module.forward:
            break
    return path


def _in_compiled(model: nn.Module, path: str) -> bool:
    """Whether something around the module at `path`, below the whole model, has been compiled by itself."""
    parts = path.split(".")
    around: list[Any] = [model.get_submodule(".".join(parts[:k])) for k in range(1, len(parts) + 1)]
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in around)


class CallWatch:
    """Checks the first forward pass of each mode after attaching, where no probe batch was given; then goes away.

    A site that was not called though the module that holds it was is bypassed: that raises. Where its holder was not called
    either, the model left out a part (the encoder, which `generate` runs by itself; an expert without tokens; a dropped layer;
    a tower without an input): no fault, and a warning if nothing has ever called the site.
    """

    def __init__(self, store: Store, member: Member) -> None:
        self.member = member
        self.attached = counts(store, member)
        self.since = dict(self.attached)
        self.open = {True, False}
        self.entries: Entries | None = None

    def before_forward(self, store: Store) -> None:
        if self.entries is not None:  # the pass before raised
            self.entries.close()
            self.entries = None
        if store.model.training in self.open and self.member.name in store.active:
            self.since = counts(store, self.member)
            self.entries = Entries(store, self.member)

    def after_forward(self, store: Store, output: Any) -> None:
        if self.entries is None:
            return
        left_out, self.entries = self.entries.close(), None
        self.open.discard(store.model.training)
        if not self.open:
            store.watchers.remove(self)
        _require_calls(store, self.member, self.since, left_out)
        left_out -= {path for path in left_out if _in_compiled(store.model, path)}  # nothing counts calls there
        never = [key for key in silent_sites(store, self.member, self.attached) if self._module(key) in left_out]
        if never:
            warnings.warn(
                f"{len(never)} site(s) were not called so far, since the model left out the part that holds them (an expert "
                f"without tokens, a tower without an input, a dropped layer): {', '.join(never[:5])}"
                f"{' ...' if len(never) > 5 else ''}. Those that training never reaches are named at its end",
                stacklevel=2,
            )

    def _module(self, key: str) -> str:
        return self.member.slots[key].site.module


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
        since, entries = counts(store, member), Entries(store, member)
        try:
            without = _without_gradient(store, member, model, batch, loss)
        finally:
            left_out = entries.close()  # by chance (LayerDrop): the pass before has called them
        idle = _require_calls(store, member, since, left_out)
        without = [key for key in without if key not in idle and member.slots[key].site.module not in left_out]
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

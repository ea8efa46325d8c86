"""Folding: a second tensor W' takes the place of W in its module, and the original is kept, so that unfolding is bitwise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from rankfold.errors import LayoutError

from .host import Host, fold_weight, site_program
from .kinds import kind_named
from .store import Slot, Store

__all__ = ["fold", "folded_weights", "unfold"]


def _hosts(model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
    found = {}
    for name, module in model.named_modules():
        host = module.__dict__.get("_rankfold")
        if isinstance(host, Host):
            found[name] = (module, host)
    return found


def _check(store: Store) -> None:
    if store.is_folded:
        raise LayoutError("the model is folded already; unfold first")
    for name in store.active:
        for slot in store.members[name].slots.values():
            if slot.base is None:
                raise LayoutError(
                    f"adapter {name!r}: {slot.site.name} carries a side module, which is no weight: it can't be folded"
                )


def folded_weights(store: Store) -> dict[str, Tensor]:
    """W' under the active adapters by name of the stored weight, in the layout and dtype of the storage. Writes nothing.

    Raises:
        LayoutError: folded already, a change that depends on the input, or a side module.
    """
    _check(store)
    weights = {}
    for module, host in _hosts(store.model).values():
        for name, groups in _by_weight(store, host).items():
            weights[name] = _folded(store, module, groups)
    return weights


def _by_weight(store: Store, host: Host) -> dict[str, list[list[Slot]]]:
    """Slots of the adapters that are on, by site, by name of the stored weight."""
    found: dict[str, list[list[Slot]]] = {}
    for slots in host.slots.values():
        if on := [s for s in slots if s.member.name in store.active]:
            found.setdefault(on[0].site.weight, []).append(on)
    return found


def _folded(store: Store, module: nn.Module, groups: Sequence[Sequence[Slot]]) -> Tensor:
    site = groups[0][0].site
    stored = module._parameters[site.param]
    assert stored is not None
    kind = kind_named(site.kind)
    if site.rows is None:
        return kind.store(fold_weight(site_program(store, groups[0], training=False)), stored.detach(), site)
    whole = kind.view(stored.detach(), site).clone()
    for group in groups:
        assert group[0].site.rows is not None
        whole[slice(*group[0].site.rows)] = fold_weight(site_program(store, group, training=False)).to(whole.dtype)
    return kind.store(whole, stored.detach(), site)


def fold(store: Store) -> dict[str, float]:
    """Swap the folded weights in. Gives, by module, the rounding error ‖W'_stored − (W + Δ)‖ / ‖Δ‖ (0 where nothing changed).

    Several modules that shared one storage get tensors of their own where their weights now differ; that is warned about.

    Raises:
        LayoutError: folded already, no adapter on, a change that depends on the input, or a side module.
    """
    weights = folded_weights(store)
    hosts = _hosts(store.model)
    errors: dict[str, float] = {}
    users: dict[int, list[str]] = {}
    for name, parameter in store.model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for path, (module, host) in hosts.items():
        for name, groups in _by_weight(store, host).items():
            param = groups[0][0].site.param
            original = module._parameters[param]
            assert original is not None
            sharers = [n.removesuffix(".weight") for n in users[id(original)] if n != name]
            if sharers:
                warnings.warn(
                    f"fold: {path} shared its weight with {', '.join(sharers)}; it now has a folded one of its own", stacklevel=3
                )
            errors[groups[0][0].site.name] = _rounding(store, groups, weights[name])
            module._parameters[param] = nn.Parameter(weights[name], requires_grad=False)
            store.folded.setdefault(path, []).append((param, original))
    whole: dict[str, nn.Parameter] = {}
    for path, (module, host) in hosts.items():  # every module that shares an owned parameter: the tie stays
        for extra in (e for name, e in host.extras if name in store.active):
            kept = module._parameters[extra.param]
            assert kept is not None
            if extra.key not in whole:
                whole[extra.key] = nn.Parameter(store.tensor(extra.key).detach().to(kept.dtype).clone(), requires_grad=False)
            module._parameters[extra.param] = whole[extra.key]
            store.folded.setdefault(path, []).append((extra.param, kept))
    if not store.folded:
        raise LayoutError("no adapter is on: there is nothing to fold")
    return errors


def _rounding(store: Store, groups: Sequence[Sequence[Slot]], folded: Tensor) -> float:
    error = change = 0.0
    for group in groups:
        site = group[0].site
        exact = fold_weight(site_program(store, group, training=False))
        view = kind_named(site.kind).view(folded, site)
        stored = view if site.rows is None else view[slice(*site.rows)]
        assert group[0].base is not None
        error += float((stored.to(exact.dtype) - exact).square().sum())
        change += float((exact - group[0].base.dense()).square().sum())
    return (error / change) ** 0.5 if change else 0.0


def unfold(store: Store) -> None:
    """The original tensors back in their places: the same objects, bitwise.

    Raises:
        LayoutError: the model is not folded.
    """
    if not store.is_folded:
        raise LayoutError("the model is not folded")
    for path, kept in store.folded.items():
        module = store.model.get_submodule(path)
        for name, original in reversed(kept):
            module._parameters[name] = original
    store.folded.clear()
    store.version += 1

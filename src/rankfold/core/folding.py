"""Folding: a second tensor W' takes the place of W in its module, and the original is kept, so that unfolding is bitwise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from rankfold.errors import LayoutError

from .host import Host, fold_weight, site_program
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
    """W' of every changed module under the active adapters, in the layout and dtype of its storage. Writes nothing.

    Raises:
        LayoutError: folded already, a change that depends on the input, or a side module.
    """
    _check(store)
    weights = {}
    for path, (module, host) in _hosts(store.model).items():
        on = [group for slots in host.slots.values() if (group := [s for s in slots if s.member.name in store.active])]
        if on:
            weights[path] = _folded(store, module, on)
    return weights


def _folded(store: Store, module: nn.Module, groups: Sequence[Sequence[Slot]]) -> Tensor:
    stored = module._parameters["weight"]
    assert stored is not None
    weight = stored.detach()
    result = weight.clone()
    for group in groups:
        site = group[0].site
        W = fold_weight(site_program(store, group, training=False)).to(weight.dtype)
        view = result if site.kind == "linear" else result.mT
        rows = slice(None) if site.rows is None else slice(*site.rows)
        view[rows] = W
    return result


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
    for name, module in store.model.named_modules():
        parameter = module._parameters.get("weight")
        if parameter is not None:
            users.setdefault(id(parameter), []).append(name)
    for path, W in weights.items():
        module, host = hosts[path]
        original = module._parameters["weight"]
        assert original is not None
        sharers = [name for name in users[id(original)] if name != path]
        if sharers:
            warnings.warn(
                f"fold: {path} shared its weight with {', '.join(sharers)}; it now has a folded one of its own", stacklevel=3
            )
        errors[path] = _rounding(store, module, host, W)
        module._parameters["weight"] = nn.Parameter(W, requires_grad=False)
        store.folded.setdefault(path, []).append(("weight", original))
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


def _rounding(store: Store, module: nn.Module, host: Host, W: Tensor) -> float:
    error = change = 0.0
    for slots in host.slots.values():
        group = [s for s in slots if s.member.name in store.active]
        if not group:
            continue
        site = group[0].site
        exact = fold_weight(site_program(store, group, training=False))
        view = W if site.kind == "linear" else W.mT
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

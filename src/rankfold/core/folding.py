"""Folding: a second tensor W' takes the place of W in its module, and the original is kept, so that unfolding is bitwise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.linalg.sharded import cut_like, is_cut

from .bases._quantised import QuantisedBase
from .host import Host, fold_weight, site_program, swapped
from .kinds import held, kind_named
from .sharding import close, renew
from .store import Slot, Store

__all__ = ["fold", "folded_weights", "requantisation_errors", "unfold"]


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

    Whole on every process where the model is cut over several; each must call this.

    Raises:
        LayoutError: folded already, a change that depends on the input, or a side module.
    """
    _check(store)
    close(store.model)
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
    owner, leaf = held(module, site)
    with _own_values(module, owner):
        return _changed(store, groups, owner._parameters[leaf])


@contextmanager
def _own_values(*modules: nn.Module) -> Iterator[None]:
    """The modules with the whole parameters and rows of the adapters that are on: what changes of weights stand on."""
    with ExitStack() as stack:
        for module in {id(m): m for m in modules}.values():
            if isinstance(host := module.__dict__.get("_rankfold"), Host):
                stack.enter_context(swapped(module, host.own_values(module)))
        yield


def _changed(store: Store, groups: Sequence[Sequence[Slot]], stored: Tensor | None) -> Tensor:
    assert stored is not None
    base = groups[0][0].base
    assert base is not None
    return base.restored(_whole(store, groups), stored.detach())


def _whole(store: Store, groups: Sequence[Sequence[Slot]]) -> Tensor:
    """W' of a whole storage as a map, of which `groups` may change some rows only."""
    site, base = groups[0][0].site, groups[0][0].base
    assert base is not None
    if site.rows is None:
        return fold_weight(site_program(store, groups[0], training=False, outside=True))
    W = base.all_rows()
    for group in groups:
        assert group[0].site.rows is not None
        W[slice(*group[0].site.rows)] = fold_weight(site_program(store, group, training=False, outside=True)).to(W.dtype)
    return W


@torch.no_grad()
def requantisation_errors(store: Store) -> dict[str, float]:
    """‖Q(W') − W'‖ / ‖W' − W‖ by module, for bases that are stored quantised: what storing W' in their format would lose.

    Raises:
        LayoutError: as `fold`; no base is quantised, or a format that can't be written.
    """
    _check(store)
    errors: dict[str, float] = {}
    for module, host in _hosts(store.model).values():
        for groups in _by_weight(store, host).values():
            base = groups[0][0].base
            if isinstance(base, QuantisedBase):
                with _own_values(module):
                    W = _whole(store, groups)
                size = float((W - base.all_rows()).norm())
                errors[base.site.name] = float((base.rounded(W) - W).norm()) / size if size else 0.0
    if not errors:
        raise LayoutError("requantisation_errors: no adapter that is on changes a quantised weight")
    return errors


def fold(store: Store) -> dict[str, float]:
    """Swap the folded weights in. Gives, by module, the rounding error ‖W'_stored − (W + Δ)‖ / ‖Δ‖ (0 where nothing changed).

    A quantised weight is replaced by a dense copy of its dequantised self plus Δ; the packed one is kept for `unfold`.

    Several modules that shared one storage get tensors of their own where their weights now differ; that is warned about.
    A weight that is cut over processes is replaced by one that is cut alike; every process must call this.

    Raises:
        LayoutError: folded already, no adapter on, a change that depends on the input, a side module, or a weight that is both
            cut over processes and shared by modules.
    """
    _check(store)
    close(store.model)
    hosts = _hosts(store.model)
    _refuse_shared_pieces(store)
    weights: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    users: dict[int, list[str]] = {}
    for name, parameter in store.model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for module, host in hosts.values():  # before anything is swapped: whatever is refused, the model is as it was
        for name, groups in _by_weight(store, host).items():
            site = groups[0][0].site
            owner, param = held(module, site)
            W = _folded(store, module, groups)
            with _own_values(module, owner):
                errors[site.name] = _rounding(store, groups, W)
            stored = owner._parameters[param]
            assert stored is not None
            weights[name] = cut_like(W, stored)
    for path, (module, host) in hosts.items():
        for name, groups in _by_weight(store, host).items():
            site = groups[0][0].site
            owner, param = held(module, site)
            original = owner._parameters[param]
            assert original is not None
            sharers = [n.removesuffix(".weight") for n in users[id(original)] if n != name]
            if sharers:
                warnings.warn(
                    f"fold: {path} shared its weight with {', '.join(sharers)}; it now has a folded one of its own", stacklevel=3
                )
            owner._parameters[param] = nn.Parameter(weights[name], requires_grad=False)
            store.folded.setdefault(site.weight.rpartition(".")[0], []).append((param, original))
    owned: dict[tuple[str, ...], nn.Parameter] = {}
    for path, (module, host) in hosts.items():  # every module that shares an owned parameter: the tie stays
        changed = {param for param, _ in store.folded.get(path, ())}  # stands on the owned value already
        for param, value in host.own_values(module).items():
            kept = module._parameters[param]
            if param in changed or kept is None:
                continue
            keys = tuple(e.key for name, e in host.extras if name in store.active and e.param == param)
            if keys not in owned:
                owned[keys] = nn.Parameter(cut_like(value.detach().clone(), kept), requires_grad=False)
            module._parameters[param] = owned[keys]
            store.folded.setdefault(path, []).append((param, kept))
    if not store.folded:
        raise LayoutError("no adapter is on: there is nothing to fold")
    renew(store.model)
    return errors


def _refuse_shared_pieces(store: Store) -> None:
    """FSDP puts one tensor into all modules that share a weight: they can't be told apart."""
    users: dict[int, list[str]] = {}
    for name, parameter in store.model.named_parameters(remove_duplicate=False):
        if is_cut(parameter):
            users.setdefault(id(parameter), []).append(name)
    changed = {slot.site.weight for name in store.active for slot in store.members[name].slots.values()}
    for names in users.values():
        if len(names) > 1 and changed & set(names):
            raise LayoutError(
                f"fold: {' and '.join(names)} are one weight, cut over processes, which can't be changed for one of them alone. "
                f"Fold in one process: adaptation.save(FOLDER) here, rf.load(model, FOLDER).fold() there"
            )


def _rounding(store: Store, groups: Sequence[Sequence[Slot]], folded: Tensor) -> float:
    error = change = 0.0
    for group in groups:
        site = group[0].site
        program = site_program(store, group, training=False, outside=True)
        exact = fold_weight(program)
        view = kind_named(site.kind).view(folded, site)
        stored = view if site.rows is None else view[slice(*site.rows)]
        error += float((stored.to(exact.dtype) - exact).square().sum())
        change += float((exact - program.base.dense()).square().sum())
    return (error / change) ** 0.5 if change else 0.0


def unfold(store: Store) -> None:
    """The original tensors back in their places: the same objects, bitwise.

    Raises:
        LayoutError: the model is not folded.
    """
    if not store.is_folded:
        raise LayoutError("the model is not folded")
    close(store.model)
    for path, kept in store.folded.items():
        module = store.model.get_submodule(path)
        for name, original in reversed(kept):
            module._parameters[name] = original
    renew(store.model)
    store.folded.clear()
    store.version += 1

"""Folding: a second tensor W' takes the place of W in its module, and the original is kept, so that unfolding is bitwise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.linalg import at_least_float32
from rankfold.linalg.sharded import cut_like, is_cut

from .base import Base
from .bases._quantised import QuantisedBase
from .host import Host, fold_weight, site_program, swapped
from .kinds import by_weight, held, kind_named
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


def _ready(store: Store) -> None:
    """Check that the model can be folded; what is cut over processes is in pieces afterwards."""
    if store.is_folded:
        raise LayoutError("the model is folded already; unfold first")
    for name in store.active:
        for slot in store.members[name].slots.values():
            if slot.base is None:
                raise LayoutError(
                    f"adapter {name!r}: {slot.site.name} carries a side module, which is no weight: it can't be folded"
                )
    close(store.model)


def folded_weights(store: Store) -> dict[str, Tensor]:
    """W' under the active adapters by name of the stored weight, in the layout and dtype of the storage. Writes nothing.

    Whole on every process where the model is cut over several; each must call this.

    Raises:
        LayoutError: folded already, a change that depends on the input, or a side module.
    """
    _ready(store)
    return {change.place.name: change.restored() for change in _changes(store)}


@dataclass(frozen=True)
class _Place:
    """Where a stored weight stands: its full name, the module whose site it is, and the module that holds it."""

    name: str
    module: str
    owner: nn.Module
    param: str

    @property
    def stored(self) -> nn.Parameter:
        parameter = self.owner._parameters[self.param]
        assert parameter is not None
        return parameter


@dataclass(frozen=True)
class _Change:
    """W' of one stored weight as a map, in at least float32.

    `parts` are its rows that adapters change; the others are those of W. `size` is ‖W' − W‖.
    """

    place: _Place
    base: Base
    W: Tensor
    parts: tuple[slice, ...]
    size: float

    def restored(self) -> Tensor:
        """W' in the layout and dtype of the storage; whole also where that is cut."""
        return self.base.restored(self.W, self.place.stored.detach())

    def rounding(self, restored: Tensor) -> float:
        """‖W'_stored − W'‖ / ‖W' − W‖ over the rows that change; 0 where nothing does."""
        site = self.base.site
        view = kind_named(site.kind).view(restored, site)
        error = sum(float((view[..., rows, :].to(self.W.dtype) - self.W[..., rows, :]).square().sum()) for rows in self.parts)
        return error**0.5 / self.size if self.size else 0.0


def _changes(store: Store) -> Iterator[_Change]:
    """Every stored weight that adapters which are on change, one at a time; its W' is built once."""
    for path, (module, host) in _hosts(store.model).items():
        for name, groups in by_weight(host.slots_on()).items():
            base = groups[0][0].base
            assert base is not None
            owner, param = held(module, base.site)
            with _own_values(module, owner):
                W, size = _whole(store, base, groups)
            parts = tuple(slice(*(group[0].site.rows or (None,))) for group in groups)
            yield _Change(_Place(name, path, owner, param), base, W, parts, size)


@contextmanager
def _own_values(*modules: nn.Module) -> Iterator[None]:
    """The modules with the whole parameters and rows of the adapters that are on: what changes of weights stand on."""
    with ExitStack() as stack:
        for module in {id(m): m for m in modules}.values():
            if isinstance(host := module.__dict__.get("_rankfold"), Host):
                stack.enter_context(swapped(module, host.own_values(module)))
        yield


@torch.no_grad()
def _whole(store: Store, base: Base, groups: Sequence[Sequence[Slot]]) -> tuple[Tensor, float]:
    """(W' of a whole storage as a map, ‖W' − W‖); `groups` may change some rows only."""
    if base.site.rows is None:
        program = site_program(store, groups[0], training=False, outside=True)
        W = fold_weight(program)
        return W, float((W - program.base.dense()).norm())
    W, change = at_least_float32(base.all_rows()), 0.0
    for group in groups:
        assert group[0].site.rows is not None
        rows = W[slice(*group[0].site.rows)]
        changed = fold_weight(site_program(store, group, training=False, outside=True)).to(W.dtype)
        change += float((changed - rows).square().sum())
        rows.copy_(changed)
    return W, change**0.5


@torch.no_grad()
def requantisation_errors(store: Store) -> dict[str, float]:
    """‖Q(W') − W'‖ / ‖W' − W‖ by module, for bases that are stored quantised: what storing W' in their format would lose.

    Raises:
        LayoutError: as `fold`; no base is quantised, or a format that can't be written.
    """
    _ready(store)
    errors: dict[str, float] = {}
    for change in _changes(store):
        base = change.base
        if isinstance(base, QuantisedBase):
            lost = float((base.rounded(change.W) - change.W).norm())
            errors[base.site.name] = lost / change.size if change.size else 0.0
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
    _ready(store)
    _refuse_shared_pieces(store)
    users: dict[int, list[str]] = {}
    for name, parameter in store.model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    errors: dict[str, float] = {}
    swaps: list[tuple[_Place, Tensor]] = []
    for change in _changes(store):  # before anything is swapped: whatever is refused, the model is as it was
        W = change.restored()
        errors[change.base.site.name] = change.rounding(W)
        swaps.append((change.place, cut_like(W, change.place.stored)))
    for place, W in swaps:
        original = place.stored
        sharers = [n.removesuffix(".weight") for n in users[id(original)] if n != place.name]
        if sharers:
            text = f"fold: {place.module} shared its weight with {', '.join(sharers)}; it now has a folded one of its own"
            warnings.warn(text, stacklevel=3)
        place.owner._parameters[place.param] = nn.Parameter(W, requires_grad=False)
        store.folded.setdefault(place.name.rpartition(".")[0], []).append((place.param, original))
    owned: dict[tuple[str, ...], nn.Parameter] = {}
    for path, (module, host) in _hosts(store.model).items():  # every module that shares an owned parameter: the tie stays
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

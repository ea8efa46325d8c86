"""What a rank policy may ask for, and the one engine that does it: tensors, optimizer state and groups change together.

Mask      entries to zero, or to where an offset started            moments kept: the entry may come back
Gate      a whole tensor set to values                              moments kept
Slice     fewer components                                          moments sliced alike, step kept
Grow      more components                                           moments of the new ones zero
Replace   other factors, of another rank if need be                 moments start anew
Freeze    entries stay bitwise, under decay and momentum too        moments of these entries zero
Restart   nothing but the optimizer's memory                        moments start anew
LrScale   entries move by a factor of what they would               moments kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.core.attaching import specs_of
from rankfold.core.store import Member, Slot, Store
from rankfold.core.structure import Spec, Structure
from rankfold.errors import CompositionError, LayoutError, OptionError, UnknownName

from .contracts import Edit

__all__ = ["Freeze", "Gate", "Grow", "LrScale", "Mask", "Replace", "Restart", "Slice", "apply", "keys_by_role"]


@dataclass(frozen=True, eq=False)
class Mask(Edit):
    """The entries at `index` along `dim` become zero, or, in a tensor that is measured from a start, what they started from."""

    role: str
    index: Tensor
    dim: int = 0
    moments: ClassVar[str] = "keep"


@dataclass(frozen=True, eq=False)
class Gate(Edit):
    """A tensor gets these values."""

    role: str
    values: Tensor
    moments: ClassVar[str] = "keep"


@dataclass(frozen=True, eq=False)
class Slice(Edit):
    """Only the components `keep` (indices along the rank) stay, in every tensor of the site that has them, starts included.

    The scale of the product stays; which dimensions are ranks follows from the structure's shapes at the two ranks.
    """

    keep: Tensor
    shape_stable: ClassVar[bool] = False
    moments: ClassVar[str] = "slice"


@dataclass(frozen=True, eq=False)
class Grow(Edit):
    """`count` components more, at the end; `values` gives their entries by role ([out, count] for B, [count, in] for A).

    A role left out grows by zeros. In a structure with an offset the new components start where they stand: their change is zero.
    Adam's bias correction of the new entries goes by the step of the old ones.
    """

    count: int
    values: Mapping[str, Tensor]
    shape_stable: ClassVar[bool] = False
    moments: ClassVar[str] = "zero"


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Other tensors by role, at another rank if `rank` says so."""

    values: Mapping[str, Tensor]
    rank: int | None = None
    shape_stable: ClassVar[bool] = False
    moments: ClassVar[str] = "reset"


@dataclass(frozen=True, eq=False)
class Freeze(Edit):
    """The entries at `index` along `dim` (all without an index) stay bitwise as they are, whatever decay and momentum say."""

    role: str
    index: Tensor | None = None
    dim: int = 0
    moments: ClassVar[str] = "zero"


@dataclass(frozen=True, eq=False)
class Restart(Edit):
    """The optimizer forgets what it knows of these tensors (all of the site without roles): moments and step."""

    roles: tuple[str, ...] | None = None
    moments: ClassVar[str] = "reset"


@dataclass(frozen=True, eq=False)
class LrScale(Edit):
    """These tensors (all of the site without roles) move by `factor` times what the optimizer asks; 1 thaws what Freeze froze."""

    factor: float
    roles: tuple[str, ...] | None = None
    moments: ClassVar[str] = "keep"


def keys_by_role(slot: Slot) -> dict[str, str]:
    """{role: name in the store} of a site's tensors, without roles that two of them share and without slices of shared ones."""
    specs = specs_of(slot.structure, slot.site)
    found: dict[str, list[str]] = {}
    for name, (key, slices) in slot.binding.items():
        if slices is None:
            found.setdefault(specs[name].role, []).append(key)
    return {role: keys[0] for role, keys in found.items() if len(keys) == 1}


def apply(
    edits: Sequence[Edit],
    store: Store,
    member: Member,
    optimizer: torch.optim.Optimizer | None = None,
    paces: dict[str, Tensor] | None = None,
) -> dict[str, int]:
    """Do the edits in order; give {site: tensors touched}.

    Args:
        optimizer: its state and groups change along; None where there is none yet.
        paces: {name in the store: factor per entry}, kept by whoever holds the optimizer's steps to them; Freeze and LrScale
            write it.

    Raises:
        UnknownName: a site or a role that isn't there. OptionError: values of another shape, an index outside.
        CompositionError: a rank that this site shares with others, or that the structure has not.
        LayoutError: Freeze or LrScale without `paces`.
    """
    surgeon = _Surgeon(store, member, getattr(optimizer, "optimizer", optimizer), paces)  # accelerate wraps the optimizer
    touched: dict[str, int] = {}
    with torch.no_grad():
        for edit in edits:
            if edit.site not in member.slots:
                raise UnknownName.of("site", edit.site, member.slots)
            touched[edit.site] = touched.get(edit.site, 0) + surgeon.perform(edit, member.slots[edit.site])
    return touched


class _Surgeon:
    """Does one edit after another on the tensors, optimizer and paces that it was given."""

    def __init__(self, store: Store, member: Member, optimizer: Any, paces: dict[str, Tensor] | None) -> None:
        self.store, self.member, self.optimizer, self.paces = store, member, optimizer, paces

    def perform(self, edit: Edit, slot: Slot) -> int:
        match edit:
            case Mask():
                return self._mask(edit, slot)
            case Gate():
                tensor = self._tensor(slot, edit.role)
                _require_shape(edit, edit.role, edit.values, tuple(tensor.shape))
                tensor.copy_(edit.values)
                return 1
            case Slice():
                return self._slice(edit, slot)
            case Grow():
                return self._grow(edit, slot)
            case Replace():
                return self._replace(edit, slot)
            case Freeze():
                return self._freeze(edit, slot)
            case Restart():
                return sum(self._forget(key) for key in self._keys(slot, edit.roles))
            case LrScale():
                for key in self._keys(slot, edit.roles):
                    self._pace(key).fill_(edit.factor)
                return len(self._keys(slot, edit.roles))
        raise OptionError(f"edit {type(edit).__name__} is none that rankfold knows how to apply")

    # entries

    def _mask(self, edit: Mask, slot: Slot) -> int:
        tensor = self._tensor(slot, edit.role)
        start = keys_by_role(slot).get(edit.role + "0")
        index = edit.index.to(tensor.device)
        if start is None:
            tensor.index_fill_(edit.dim, index, 0.0)
        else:
            tensor.index_copy_(edit.dim, index, self.store.tensor(start).index_select(edit.dim, index))
        return 1

    def _freeze(self, edit: Freeze, slot: Slot) -> int:
        key = self._key(slot, edit.role)
        pace = self._pace(key)
        index = torch.arange(pace.shape[edit.dim]) if edit.index is None else edit.index
        for tensor in [pace, *self._moments(key).values()]:
            tensor.index_fill_(edit.dim, index.to(tensor.device), 0.0)
        return 1

    def _pace(self, key: str) -> Tensor:
        if self.paces is None:
            raise LayoutError("freeze and lr_scale act at every step: train with adaptation.optimizer(...), which keeps them")
        return self.paces.setdefault(key, torch.ones_like(self.store.tensor(key)))

    # shapes

    def _slice(self, edit: Slice, slot: Slot) -> int:
        keep = edit.keep

        def cut(tensor: Tensor, dims: Sequence[int]) -> Tensor:
            for dim in dims:
                tensor = tensor.index_select(dim, keep.to(tensor.device))
            return tensor

        return self._resize(slot, len(keep), lambda name, spec: cut, cut)

    def _grow(self, edit: Grow, slot: Slot) -> int:
        values = dict(edit.values)
        for role in edit.values:
            self._key(slot, role)

        def longer(name: str, spec: Spec) -> Callable[[Tensor, Sequence[int]], Tensor]:
            value = values.get(spec.role, values.get(spec.role.removesuffix("0")))

            def pad(tensor: Tensor, dims: Sequence[int]) -> Tensor:
                if value is None:
                    return zeros(tensor, dims)
                if len(dims) > 1:
                    raise OptionError(f"grow at {edit.site}: {spec.role} grows on two sides; leave its values out, they are zero")
                wanted = [edit.count if d in dims else n for d, n in enumerate(tensor.shape)]
                _require_shape(edit, spec.role, value, tuple(wanted))
                return torch.cat([tensor, value.to(tensor)], dims[0])

            return pad

        def zeros(tensor: Tensor, dims: Sequence[int]) -> Tensor:
            for dim in dims:
                shape = [edit.count if d == dim else n for d, n in enumerate(tensor.shape)]
                tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim)
            return tensor

        return self._resize(slot, slot.structure.core.rank + edit.count, longer, zeros)  # type: ignore[attr-defined]

    def _resize(self, slot: Slot, rank: int, of_tensor: Callable, of_state: Callable) -> int:
        """Every tensor with a rank dimension by `of_tensor`, its optimizer state by `of_state`; the structure follows."""
        structure, dims = self._at_rank(slot, rank)
        specs = specs_of(slot.structure, slot.site)
        for name, which in dims.items():
            key = slot.binding[name][0]
            self._swap(key, of_tensor(name, specs[name])(self.store.tensor(key), which), partial(of_state, dims=which))
        slot.structure = structure
        return len(dims)

    def _replace(self, edit: Replace, slot: Slot) -> int:
        structure, dims = (slot.structure, {}) if edit.rank is None else self._at_rank(slot, edit.rank)
        specs = specs_of(structure, slot.site)
        names = {self._key(slot, role): role for role in edit.values}
        given = {n: names[key] for n, (key, _) in slot.binding.items() if key in names}
        left = sorted(set(dims) - set(given))
        if left:
            raise OptionError(f"replace at {edit.site}: rank {edit.rank} changes {', '.join(left)} too; give their values")
        for name, role in given.items():
            _require_shape(edit, role, edit.values[role], specs[name].shape)
        for name, role in given.items():
            key = slot.binding[name][0]
            self._swap(key, edit.values[role].to(self.store.tensor(key)).clone(), None)
        slot.structure = structure
        return len(given)

    def _at_rank(self, slot: Slot, rank: int) -> tuple[Structure, dict[str, list[int]]]:
        """(the structure at another rank, {tensor: its dimensions that are ranks})."""
        structure = slot.structure.at_rank(rank)
        now, then = specs_of(slot.structure, slot.site), specs_of(structure, slot.site)
        dims = {n: [d for d, (a, b) in enumerate(zip(now[n].shape, then[n].shape)) if a != b] for n in now}
        dims = {n: which for n, which in dims.items() if which}
        shared = sorted(n for n in dims if now[n].scope != "site")
        if shared:
            raise CompositionError(f"{slot.site.key} shares {', '.join(shared)} with other sites: its rank can't change alone")
        return structure, dims

    # the optimizer

    def _swap(self, key: str, value: Tensor, of_state: Callable[[Tensor], Tensor] | None) -> None:
        """A new tensor under an old name, in store, optimizer and paces; without `of_state` its state starts anew."""
        old = self.store.tensor(key)
        self.store.replace(key, value.contiguous())
        new = self.store.tensor(key)
        if self.paces is not None and key in self.paces:
            if of_state is None:
                del self.paces[key]
            else:
                pace = of_state(self.paces[key])
                self.paces[key] = (
                    pace if pace.numel() <= old.numel() else torch.where(of_state(torch.ones_like(old)) > 0, pace, 1.0)
                )
        if old.grad is not None and of_state is not None:
            new.grad = of_state(old.grad)
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        starts = getattr(self.optimizer, "starts", {})
        for p, start in list(starts.items()):
            if p is old:
                starts[new] = starts.pop(old)
            elif start is old:
                starts[p] = new
        state = self.optimizer.state.pop(old, None)
        if not state or of_state is None:
            return
        edited = {k: of_state(v) if isinstance(v, Tensor) and v.shape == old.shape else v for k, v in state.items()}
        odd = any(isinstance(v, Tensor) and v.numel() > 1 and v.shape != old.shape for v in state.values())
        if not odd:  # a state of another shape (factored moments) can't follow: the tensor starts anew
            self.optimizer.state[new] = edited

    def _moments(self, key: str) -> dict[str, Tensor]:
        """The optimizer's tensors of the parameter's own shape."""
        param = self.store.tensor(key)
        state = {} if self.optimizer is None else self.optimizer.state.get(param, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == param.shape}

    def _forget(self, key: str) -> int:
        if self.optimizer is not None:
            self.optimizer.state.pop(self.store.tensor(key), None)
        return 1

    # names

    def _keys(self, slot: Slot, roles: Sequence[str] | None) -> list[str]:
        if roles is None:
            own = [key for key, slices in slot.binding.values() if slices is None]
            return [key for key in own if self.store.tensor(key).requires_grad]
        return [self._key(slot, role) for role in roles]

    def _key(self, slot: Slot, role: str) -> str:
        keys = keys_by_role(slot)
        if role not in keys:
            raise UnknownName.of(f"role at {slot.site.key}", role, keys)
        return keys[role]

    def _tensor(self, slot: Slot, role: str) -> nn.Parameter:
        return self.store.tensor(self._key(slot, role))  # type: ignore[return-value]


def _require_shape(edit: Edit, role: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise OptionError(
            f"{type(edit).__name__.lower()} at {edit.site}: {role} needs shape {list(shape)}, got {list(value.shape)}"
        )

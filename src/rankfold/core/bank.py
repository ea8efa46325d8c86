"""A bank: thousands of adapters beside one model, a choice for each row of a batch.

One frozen arena [slots, numbers] holds every adapter as one row; the sites read it through strided views. Adding is one row copy,
removing a name, switching one index tensor. Serving form: diag(gain)·(W + B A), in which additive, rotated and scaled changes
are exact. Slot 0 is the base: all zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters.adapter import Adapter, Entry
from rankfold.errors import LayoutError, OptionError, TargetError, UnknownName
from rankfold.kernels import segments
from rankfold.linalg import Magnitude

from .base import base_of
from .kinds import kind_named
from .site import Site
from .store import store_of
from .targets import Targets, find_sites

__all__ = ["Bank"]

SERVED = ("linear", "conv1d", "embedding")
BUCKETS = (2, 4, 8, segments.MASKED)
SMALLEST = 8


@dataclass(eq=False)
class _Place:
    """One site's columns in the arena: A [r, in], B [r, out], and gain − 1 [out]."""

    site: Site
    module: nn.Module
    rank: int
    start: int
    first_row: int

    @property
    def numbers(self) -> int:
        out, in_ = self.site.shape
        return self.rank * (in_ + out) + out

    def views(self, arena: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(A [slots, r, in], B [slots, r, out], gain − 1 [slots, out]), views of the arena."""
        out, in_ = self.site.shape
        a, b = self.rank * in_, self.rank * out
        A = arena.narrow(1, self.start, a).unflatten(1, (self.rank, in_))
        B = arena.narrow(1, self.start + a, b).unflatten(1, (self.rank, out))
        return A, B, arena.narrow(1, self.start + a + b, out)


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter as one row of the arena, checked and in serving form; `scaled` where it rescales rows of a weight."""

    row: Tensor
    scaled: bool


class Bank:
    """Many frozen adapters of one model, chosen per row of the batch.

    y_n = gain_{i(n)} ⊙ (x_n Wᵀ + (x_n A_{i(n)}ᵀ) B_{i(n)}) + bias

    Args:
        model: its weights are never written; forward hooks at the sites add the changes.
        rank: the rank bucket: adapters of smaller rank are padded with zeros, larger ones refused.
        slots: adapters that the arena holds at first; it doubles when full and halves when three quarters are free.
        targets: where adapters may change the model, as in `rf.adapt`.
        dtype: of the arena; None takes that of the weights.

    Raises:
        TargetError: a target whose kind of weight a bank can't serve (convolutions, experts, multi-head attention).
        OptionError: a rank or number of slots below 1.

    >>> import torch, rankfold as rf
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> bank = rf.Bank(model, rank=2)
    >>> entry = rf.Entry("0", torch.ones(3, 1), torch.ones(1, 4))
    >>> _ = bank.add("ones", rf.Adapter.of([entry]))
    >>> x = torch.ones(2, 4)
    >>> before = model(x)
    >>> bank.select(["ones", None])
    >>> (model(x) - before).detach().round().tolist()
    [[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 16,
        slots: int = SMALLEST,
        targets: Any = "all-linear",
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank < 1 or slots < 1:
            raise OptionError(f"bank: rank {rank}, slots {slots}; both must be at least 1")
        self.model, self.rank = model, rank
        self.places = self._lay_out(Targets.of(targets))
        weight = next(iter(self.places.values())).module.weight
        assert isinstance(weight, Tensor)
        numbers = sum(p.numbers for p in self.places.values())
        self.smallest = slots + 1
        self.arena = torch.zeros(self.smallest, numbers, dtype=dtype or weight.dtype, device=weight.device)
        self.slots: dict[str, int] = {}
        self.free = list(range(slots, 0, -1))
        self.scaled: set[str] = set()
        self.version = 0
        self._choose([])
        self._kept: dict[str, tuple[int, Tensor, Tensor, Tensor]] = {}
        self._hooks = [p.module.register_forward_hook(self._hook(key)) for key, p in self.places.items()]

    def _lay_out(self, targets: Targets) -> dict[str, _Place]:
        modules = dict(self.model.named_modules())
        places: dict[str, _Place] = {}
        start = 0
        for site in find_sites(self.model, targets):
            if site.kind not in SERVED:
                if targets.automatic:
                    continue
                raise TargetError(f"{site.key}: a bank serves {', '.join(SERVED)} weights, not {site.kind}; fold such a change")
            first = 0 if site.rows is None else site.rows[0]
            rank = min(self.rank, *site.shape)
            places[site.key] = _Place(site, modules[site.module], rank, start, first)
            start += places[site.key].numbers
        if not places:
            raise TargetError(f"targets: nothing that a bank can serve in {type(self.model).__name__}: {', '.join(SERVED)}")
        return places

    # what there is

    @property
    def names(self) -> list[str]:
        return list(self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self.arena.numel() * self.arena.element_size()

    def __len__(self) -> int:
        return len(self.slots)

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    @property
    def _precise(self) -> torch.dtype:
        return torch.promote_types(self.arena.dtype, torch.float32)

    # add, replace, remove

    @torch.no_grad()
    def add(self, name: str, adapter: Adapter | Packed) -> None:
        """Copy an adapter into a free slot; nothing that is compiled changes while the arena need not grow.

        A row that `pack` made beforehand is one copy, whatever the number of adapters and sites.

        Raises:
            OptionError: the name is taken; a rank above the bucket; whole tensors (heads), which rows of a batch can't choose.
            TargetError: a site that the bank doesn't have.
        """
        if name in self.slots:
            raise OptionError(f"bank: {name!r} is there already; bank.replace swaps it")
        packed = self.pack(adapter, name)
        if not self.free:
            self._resize(2 * self.arena.shape[0])
        self.slots[name] = self.free.pop()
        self._write(name, packed)

    @torch.no_grad()
    def replace(self, name: str, adapter: Adapter | Packed) -> None:
        """Swap an adapter in place, of whatever rank and scale; a selection that holds it goes on with the new one.

        Raises:
            UnknownName: no adapter of that name. Else as `add`.
        """
        self._slot(name)
        self._write(name, self.pack(adapter, name))

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Free the slot; the arena halves when three quarters of it are free.

        Raises:
            UnknownName: no adapter of that name.
            LayoutError: a row of the present selection uses it.
        """
        slot = self._slot(name)
        if name in self.selected:
            raise LayoutError(f"bank: {name!r} is selected; bank.select() something else first")
        del self.slots[name]
        self.scaled.discard(name)
        self.free.append(slot)
        half = self.arena.shape[0] // 2
        if half >= self.smallest and len(self.slots) + 1 <= half // 2:
            self._resize(half)

    def _slot(self, name: str) -> int:
        if name not in self.slots:
            raise UnknownName.of("adapter", name, self.slots)
        return self.slots[name]

    @torch.no_grad()
    def pack(self, adapter: Adapter | Packed, name: str = "adapter") -> Packed:
        """An adapter as a row of this bank: checked, gains computed, scale taken into B. Gives a packed one back.

        Raises:
            OptionError, TargetError: as `add`.
        """
        if isinstance(adapter, Packed):
            if adapter.row.shape[0] != self.arena.shape[1]:
                raise OptionError(
                    f"bank: {name!r} was packed for another bank: {adapter.row.shape[0]} numbers, here {self.arena.shape[1]}"
                )
            return adapter
        if adapter.extras:
            raise OptionError(
                f"bank: {name!r} owns whole tensors ({', '.join(list(adapter.extras)[:3])}); the rows of a batch share these"
            )
        row = torch.zeros(1, self.arena.shape[1], dtype=self.arena.dtype, device=self.arena.device)
        for key, entry in adapter.entries.items():
            place = self.places.get(key)
            if place is None:
                raise TargetError(f"bank: {name!r} changes {key}, which this bank doesn't serve; give its name in targets")
            self._fill(place, entry, row, name)
        return Packed(row[0], not all(e.additive for e in adapter.entries.values()))

    def _fill(self, place: _Place, entry: Entry, row: Tensor, name: str) -> None:
        if entry.shape != place.site.shape or entry.kind != place.site.kind:
            raise TargetError(
                f"bank: {name!r}: {entry.key} is {entry.kind} {entry.shape}; here {place.site.kind} {place.site.shape}"
            )
        if entry.rank > place.rank:
            raise OptionError(
                f"bank: {name!r} has rank {entry.rank} at {entry.key}, above the bank's {place.rank}: cut it to that rank with "
                f"rf.normal_form(adaptation, rank={place.rank}), or make a bank with rank={entry.rank}"
            )
        A, B, gain1 = place.views(row)
        gain = self._gain(place, entry)
        factor = entry.B.to(row.device, self._precise) * entry.scale
        A[0, : entry.rank] = entry.A.to(A.device, A.dtype)
        B[0, : entry.rank] = (factor if gain is None else gain[:, None] * factor).mT.to(B.dtype)
        if gain is not None:
            gain1[0] = (gain - 1.0).to(gain1.dtype)

    def _gain(self, place: _Place, entry: Entry) -> Tensor | None:
        """[out] in at least float32, or None where the change is additive."""
        device = self.arena.device
        if entry.gain is not None:
            return entry.gain.to(device, self._precise)
        if entry.magnitude is None:
            return None
        W = base_of(place.module, place.site).gather()
        moved = Entry(entry.name, entry.B.to(device), entry.A.to(device), entry.scale, entry.kind, entry.rows)
        return Magnitude(entry.magnitude.to(device), moved.weight(W)).gain().to(self._precise)

    def _write(self, name: str, packed: Packed) -> None:
        self.arena[self.slots[name]].copy_(packed.row)
        self.scaled.discard(name)
        if packed.scaled:
            self.scaled.add(name)
        self.rescales = any(n in self.scaled for n in self.selected if n is not None)
        self.version += 1

    def _resize(self, slots: int) -> None:
        """Another arena with the adapters in its first slots: the old one's memory is returned."""
        arena = torch.zeros(slots, self.arena.shape[1], dtype=self.arena.dtype, device=self.arena.device)
        kept = sorted(self.slots.items(), key=lambda item: item[1])
        for new, (_, old) in enumerate(kept, 1):
            arena[new].copy_(self.arena[old])
        self.arena = arena
        self.slots = {name: new for new, (name, _) in enumerate(kept, 1)}
        self.free = list(range(slots - 1, len(kept), -1))
        self._kept.clear()
        self._choose(self.selected)

    # choose

    def select(self, names: str | Sequence[str | None] | None = None) -> None:
        """Which adapter each row of the next batches uses: one name for all, or a name (None: the base) for each row.

        Beams and flattened tokens follow their row: a batch of k·rows is read as k in a row for each.

        Raises:
            UnknownName: no adapter of that name.
            LayoutError: adapters in training are switched on beneath.
        """
        store = store_of(self.model)
        if names is not None and store is not None and store.active:
            raise LayoutError(
                f"bank: {', '.join(store.active)} is switched on in the model itself; adaptation.use() turns it off"
            )
        chosen: list[str | None] = [] if names is None else [names] if isinstance(names, str) else list(names)
        for name in chosen:
            if name is not None:
                self._slot(name)
        self._choose(chosen if any(n is not None for n in chosen) else [])

    def _choose(self, names: list[str | None]) -> None:
        device = self.arena.device
        slots = [0 if n is None else self.slots[n] for n in names]
        self.selected = names
        present = list(dict.fromkeys(slots))
        self.rows = len(slots)
        self.way = segments.way(len(present)) if slots else "none"
        if self.way == "masked":
            size = next(b for b in BUCKETS if b >= len(present))  # few shapes, so that compiled graphs are used again
            where = {slot: k for k, slot in enumerate(present)}
            self.chosen = torch.zeros(len(slots), size, device=device)
            self.chosen[torch.arange(len(slots)), torch.tensor([where[s] for s in slots])] = 1.0
            present += [0] * (size - len(present))
        self.index = torch.tensor(slots if self.way == "gathered" else present or [0], device=device)
        self.each = torch.tensor(slots or [0], device=device)
        self.rescales = any(n in self.scaled for n in names if n is not None)
        self.version += 1

    # the forward pass

    def _hook(self, key: str) -> Any:
        place = self.places[key]

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return None if self.way == "none" else self._changed(key, place, module, args[0], output)

        return hook

    def _factors(self, key: str, place: _Place) -> tuple[Tensor, Tensor, Tensor]:
        """The selection's own factors; copied once for each selection, since decoding runs many steps with one."""
        if not torch.compiler.is_compiling():
            kept = self._kept.get(key)
            if kept is not None and kept[0] == self.version:
                return kept[1:]
        A, B, gain1 = place.views(self.arena)
        found = A[self.index], B[self.index], gain1[self.each]
        if not torch.compiler.is_compiling():
            self._kept[key] = (self.version, *found)
        return found

    def _changed(self, key: str, place: _Place, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        A, B, gain1 = self._factors(key, place)
        if self.way == "one" and self._may_write(place, x, y, A):
            flat = x.view(-1, x.shape[-1])
            y.view(-1, y.shape[-1]).addmm_(flat @ A[0].mT, B[0])
            return y
        embedded = kind_named(place.site.kind).tokens
        lead = x.shape if embedded else x.shape[:-1]
        rows = 1 if self.way == "one" else self.rows
        if not lead or lead.numel() % rows or lead[0] % rows:
            raise LayoutError(
                f"bank: a batch of {lead[0] if lead else 1} rows, {self.rows} selected; select one adapter for each row"
            )
        if embedded:
            own = A[0:1].expand(rows, -1, -1) if self.way == "one" else self._own(place)
            i = x.reshape(rows, -1)
            h = own.gather(2, i[:, None].expand(-1, own.shape[1], -1)).mT
            B = B if self.way == "one" else place.views(self.arena)[1][self.each]
            change = h @ B
        else:
            flat = x.reshape(rows, -1, x.shape[-1]).to(A.dtype)
            if self.way == "one":
                change = segments.one(flat, A, B)
            elif self.way == "masked":
                change = segments.masked(flat, A, B, self.chosen)
            else:
                change = segments.gathered(flat, A, B)
        change = change.to(y.dtype)
        out = place.site.shape[0]
        part = y.narrow(-1, place.first_row, out).reshape(rows, -1, out)
        if self.rescales:
            bias = getattr(module, "bias", None)
            u = part if bias is None else part - bias.narrow(0, place.first_row, out).to(y.dtype)
            g = gain1 if self.way != "one" else gain1[:1]
            change = change + u * g[:, None].to(y.dtype)
        changed = (part + change).reshape(*y.shape[:-1], out)
        if out == y.shape[-1]:
            return changed
        return torch.cat([y[..., : place.first_row], changed, y[..., place.first_row + out :]], -1)

    def _may_write(self, place: _Place, x: Tensor, y: Tensor, A: Tensor) -> bool:
        """Whether the change may be added into the module's fresh output."""
        plain = not (
            torch.is_grad_enabled() or self.rescales or kind_named(place.site.kind).tokens or torch.compiler.is_compiling()
        )
        whole = place.site.shape[0] == y.shape[-1] and x.is_contiguous() and y.is_contiguous()
        return plain and whole and x.dtype == y.dtype == A.dtype

    def _own(self, place: _Place) -> Tensor:
        return place.views(self.arena)[0][self.each]

    def close(self) -> None:
        """Take the bank off the model, which is then as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._kept.clear()

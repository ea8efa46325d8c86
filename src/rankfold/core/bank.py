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
from rankfold.kernels.segments import WIDTH, Segments, add_gathered, add_one, add_segments, split
from rankfold.linalg import Magnitude

from .base import base_of
from .kinds import kind_named
from .site import Site
from .store import store_of
from .targets import Targets, find_sites

__all__ = ["Packed", "PlainBank"]

SLOTS = 8


@dataclass(frozen=True, eq=False)
class _Place:
    """One site's columns in the arena: A [r, in], B [r, out], and gain − 1 [out]; r is a multiple of a block's ranks."""

    number: int
    site: Site
    module: nn.Module
    rank: int
    start: int
    gains: bool
    tokens: bool

    @property
    def numbers(self) -> int:
        out, in_ = self.site.shape
        return self.rank * (in_ + out) + self.gains * out

    def factors(self, arena: Tensor) -> tuple[Tensor, Tensor]:
        """A [slots, r, in] and B [slots, r, out], views of the arena."""
        out, in_ = self.site.shape
        a, b = self.rank * in_, self.rank * out
        A = arena.narrow(1, self.start, a).unflatten(1, (self.rank, in_))
        return A, arena.narrow(1, self.start + a, b).unflatten(1, (self.rank, out))

    def gain1(self, arena: Tensor) -> Tensor:
        """gain − 1 [slots, out], a view of the arena."""
        out, in_ = self.site.shape
        return arena.narrow(1, self.start + self.rank * (in_ + out), out)


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter as one row of the arena, checked and in serving form.

    Args:
        row: [numbers].
        rank: the largest of its sites.
        scaled: whether it rescales rows of a weight.
        touches: bit k is set where it changes the bank's site k.
        layout: of the arena that it fits.
    """

    row: Tensor
    rank: int
    scaled: bool
    touches: int
    layout: tuple[Any, ...]


@dataclass(frozen=True)
class _Held:
    """What the bank knows of an adapter beside its row."""

    slot: int
    rank: int
    scaled: bool
    touches: int


BASE = _Held(0, 0, False, 0)


class PlainBank:
    """Many frozen adapters of one model, chosen per row of the batch; adapters come as plain data. See `rf.Bank`, which takes
    folders and adapters in training as well.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> bank = PlainBank(model, rank=2)
    >>> _ = bank.add("ones", Adapter.of([Entry("0", torch.ones(3, 1), torch.ones(1, 4))]))
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
        slots: int = SLOTS,
        targets: Any = "all-linear",
        gains: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank < 1 or slots < 1:
            raise OptionError(f"bank: rank {rank}, slots {slots}; both must be at least 1")
        self.model, self.rank, self.gains = model, rank, gains
        self.places = self._lay_out(Targets.of(targets))
        weight = self._weight
        if dtype is None and not weight.is_floating_point():  # a packed weight: in what its products give
            first = next(iter(self.places.values()))
            dtype = base_of(first.module, first.site).dtype
        self.smallest = slots + 1
        numbers = sum(p.numbers for p in self.places.values())
        self.layout = (rank, gains, *((key, place.site.shape) for key, place in self.places.items()))
        self.arena = torch.zeros(self.smallest, numbers, dtype=dtype or weight.dtype, device=weight.device)
        self.held: dict[str, _Held] = {}
        self.free = list(range(slots, 0, -1))
        self._cuts: dict[int, Segments] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._direct: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept_gain: dict[int, Tensor] = {}
        self._choose([])
        self._hooks = [p.module.register_forward_hook(self._hook(p), with_kwargs=True) for p in self.places.values()]

    def _lay_out(self, targets: Targets) -> dict[str, _Place]:
        modules = dict(self.model.named_modules())
        places: dict[str, _Place] = {}
        start = 0
        for site in find_sites(self.model, targets):
            kind = kind_named(site.kind)
            served = kind.flat and site.batch is None
            reason = kind.refusal(modules[site.module], site) if served else f"a {site.kind} site runs in a way of its own"
            if reason is not None:
                if targets.automatic:
                    continue
                raise TargetError(f"{site.key}: a bank serves linear layers and embeddings; here {reason}. Fold such a change")
            rank = -(-min(self.rank, *site.shape) // WIDTH) * WIDTH
            places[site.key] = place = _Place(len(places), site, modules[site.module], rank, start, self.gains, kind.tokens)
            start += place.numbers
        if not places:
            raise TargetError(f"targets: {type(self.model).__name__} has no linear layer or embedding that a bank can serve")
        return places

    # what there is

    @property
    def names(self) -> list[str]:
        return list(self.held)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self.arena.numel() * self.arena.element_size()

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} adapters up to rank {self.rank} at {len(self.places)} sites, "
            f"{self.arena.shape[0] - 1} slots, {self.nbytes / 2**20:.1f} MB)"
        )

    @property
    def _weight(self) -> Tensor:
        weight = next(iter(self.places.values())).module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _precise(self) -> torch.dtype:
        return torch.promote_types(self.arena.dtype, torch.float32)

    # add, replace, remove

    @torch.no_grad()
    def add(self, name: str, source: Adapter | Packed) -> float:
        """Copy an adapter into a free slot; nothing that is compiled changes while the arena need not grow.

        A row that `pack` made beforehand is one copy, whatever the number of adapters and sites. Returns the relative error of
        what was added: 0, plain data are taken whole or refused.

        Raises:
            OptionError: the name is taken; a rank above the bucket; whole tensors (heads), which rows of a batch can't choose;
                gains in a bank without them.
            TargetError: a site that the bank doesn't have.
        """
        if name in self.held:
            raise OptionError(f"bank: {name!r} is there already; bank.replace swaps it")
        packed = self.pack(source, name)
        if not self.free:
            self._resize(2 * self.arena.shape[0])
        self._write(name, self.free.pop(), packed)
        return 0.0

    @torch.no_grad()
    def replace(self, name: str, source: Adapter | Packed) -> float:
        """Swap an adapter in place, of whatever rank and scale; a choice that holds it goes on with the new one.

        Raises:
            UnknownName: no adapter of that name. Else as `add`.
        """
        slot = self._known(name).slot
        self._write(name, slot, self.pack(source, name))
        if name in self.selected:
            self._choose(self.selected)
        return 0.0

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Free the slot; the arena halves, and its memory is returned, when three quarters of it are free.

        Raises:
            UnknownName: no adapter of that name.
            LayoutError: a row of the present choice uses it.
        """
        slot = self._known(name).slot
        if name in self.selected:
            raise LayoutError(f"bank: {name!r} is selected; bank.select() something else first")
        del self.held[name]
        self.free.append(slot)
        half = self.arena.shape[0] // 2
        if half >= self.smallest and len(self.held) + 1 <= half // 2:
            self._resize(half)

    @torch.no_grad()
    def shrink(self) -> None:
        """Return the memory of all free slots now; the next `add` makes the arena grow again."""
        self._resize(len(self.held) + 1)

    def _known(self, name: str) -> _Held:
        if name not in self.held:
            raise UnknownName.of("adapter", name, self.held)
        return self.held[name]

    @torch.no_grad()
    def pack(self, adapter: Adapter | Packed, name: str = "adapter") -> Packed:
        """An adapter as a row of this bank: checked, gains computed, scale taken into B. Gives a packed one back.

        Raises:
            OptionError, TargetError: as `add`.
        """
        if isinstance(adapter, Packed):
            if adapter.layout != self.layout:
                raise OptionError(f"bank: {name!r} was packed for another bank, of rank {adapter.layout[0]} or other sites")
            return adapter
        if adapter.extras:
            raise OptionError(
                f"bank: {name!r} owns whole tensors ({', '.join(list(adapter.extras)[:3])}); the rows of a batch share these"
            )
        row = torch.zeros(1, self.arena.shape[1], dtype=self.arena.dtype, device=self.arena.device)
        touches = 0
        for key, entry in adapter.entries.items():
            place = self.places.get(key)
            if place is None:
                raise TargetError(f"bank: {name!r} changes {key}, which this bank doesn't serve; give its name in targets")
            self._fill(place, entry, row, name)
            touches |= 1 << place.number
        entries = adapter.entries.values()
        rank = max((e.rank for e in entries), default=0)
        return Packed(row[0], rank, not all(e.additive for e in entries), touches, self.layout)

    def _fill(self, place: _Place, entry: Entry, row: Tensor, name: str) -> None:
        if entry.shape != place.site.shape or entry.kind != place.site.kind:
            raise TargetError(
                f"bank: {name!r}: {entry.key} is {entry.kind} {entry.shape}; here {place.site.kind} {place.site.shape}"
            )
        if entry.rank > min(self.rank, place.rank):
            raise OptionError(
                f"bank: {name!r} has rank {entry.rank} at {entry.key}, above the bank's {self.rank}: cut it to that rank with "
                f"rf.normal_form(adaptation, rank={self.rank}), or make a bank with rank={entry.rank}"
            )
        if not entry.additive and not self.gains:
            raise OptionError(f"bank: {name!r} rescales rows of {entry.key}, and this bank has gains=False")
        A, B = place.factors(row)
        gain = self._gain(place, entry)
        factor = entry.B.to(row.device, self._precise) * entry.scale
        A[0, : entry.rank] = entry.A.to(A.device, A.dtype)
        B[0, : entry.rank] = (factor if gain is None else gain[:, None] * factor).mT.to(B.dtype)
        if gain is not None:
            place.gain1(row)[0] = (gain - 1.0).to(row.dtype)

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

    def _write(self, name: str, slot: int, packed: Packed) -> None:
        self.arena[slot].copy_(packed.row)
        self.held[name] = _Held(slot, packed.rank, packed.scaled, packed.touches)

    def _resize(self, slots: int) -> None:
        """Another arena with the adapters in its first slots: the old one's memory is returned."""
        arena = torch.zeros(slots, self.arena.shape[1], dtype=self.arena.dtype, device=self.arena.device)
        for new, (name, old) in enumerate(self.held.items(), 1):
            arena[new].copy_(self.arena[old.slot])
            self.held[name] = _Held(new, old.rank, old.scaled, old.touches)
        self.arena = arena
        self.free = list(range(slots - 1, len(self.held), -1))
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
                self._known(name)
        self._choose(chosen if any(n is not None for n in chosen) else [])

    def _choose(self, names: list[str | None]) -> None:
        """Take a choice as it is, with the arena where the model is."""
        if self.arena.device != self._weight.device:
            self.arena = self.arena.to(self._weight.device)
        chosen = [BASE if n is None else self.held[n] for n in names]
        self.selected, self._chosen = names, chosen
        self._alone = len({held.slot for held in chosen}) == 1
        self.rows = 1 if self._alone else len(chosen)
        self.scaled = any(held.scaled for held in chosen)
        self._touched = 0
        for held in chosen:
            self._touched |= held.touches
        self.index = torch.tensor([h.slot for h in chosen[: self.rows]], dtype=torch.long, device=self.arena.device)
        self._cuts.clear()
        self._kept.clear()
        self._direct.clear()
        self._kept_gain.clear()

    # the forward pass

    def _hook(self, place: _Place) -> Any:
        out, in_ = place.site.shape

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            if not self.rows:
                return None
            compiled = torch.compiler.is_compiling()  # then every site and every rank is run, so that any choice fits the graph
            if not compiled and not self._touched >> place.number & 1:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            direct = self._direct.get(place.number)
            if direct is not None and not compiled and not torch.is_grad_enabled():
                AT, B = direct
                if x.dtype == y.dtype == B.dtype and y.is_contiguous():  # few calls: they are what such a step costs
                    y.view(-1, out).addmm_(x.reshape(-1, in_).mm(AT), B)
                    return y
            if compiled or (y.requires_grad and torch.is_grad_enabled()) or not y.is_contiguous():
                y = y.clone(memory_format=torch.contiguous_format)
            part = self._part(place, x, y)
            if self.gains and (compiled or self.scaled):
                self._rescale(place, module, part, compiled)
            if compiled:
                A, B = place.factors(self.arena)
                h = self._columns(x, A, self.index) if place.tokens else self._low(x, A[self.index])
                add_gathered(part, h, B[self.index])
                return y
            A, B = self._own(place)
            cut = None if self._alone else self._cut(place)
            if cut is not None and not len(cut.slots):  # gains alone
                return y
            h = self._columns(x, A, self.index, cut) if place.tokens else self._low(x, A, cut)
            if cut is None:
                add_one(part, h.flatten(0, -2), B)
                if not (self.scaled or place.tokens or place.site.rows):
                    self._direct[place.number] = A.mT, B
            else:
                add_segments(part, h, B, cut)
            return y

        return hook

    def _part(self, place: _Place, x: Tensor, y: Tensor) -> Tensor:
        """The site's own part of the module's output, [rows, tokens, out]: a view."""
        lead = x.shape if place.tokens else x.shape[:-1]
        if self.rows > 1 and (not lead or lead[0] % self.rows):
            raise LayoutError(
                f"bank: a batch of {lead[0] if lead else 1} rows, {self.rows} selected; select one adapter for each row"
            )
        part = y.view(self.rows, -1, y.shape[-1])
        rows = place.site.rows
        return part if rows is None else part[..., rows[0] : rows[1]]

    def _rescale(self, place: _Place, module: nn.Module, part: Tensor, compiled: bool) -> None:
        """part += (gain − 1) ∘ (part − bias): exactly the base's where the gain is 1."""
        gain1 = self._kept_gain.get(place.number) if not compiled else None
        if gain1 is None:
            gain1 = place.gain1(self.arena)[self.index][:, None].to(part.dtype)  # [rows, 1, out]
            if not compiled:
                self._kept_gain[place.number] = gain1
        bias = getattr(module, "bias", None)
        if bias is None:
            part.addcmul_(part.clone(), gain1)
        else:
            rows = place.site.rows
            part.addcmul_(part - (bias if rows is None else bias[rows[0] : rows[1]]).to(part.dtype), gain1)

    def _cut(self, place: _Place) -> Segments:
        """The blocks of the present choice at a site of that rank."""
        cut = self._cuts.get(place.rank)
        if cut is None:
            chosen = self._chosen
            ranks = [min(h.rank, place.rank) for h in chosen]
            cut = self._cuts[place.rank] = split([h.slot for h in chosen], ranks, self.arena.device)
        return cut

    def _own(self, place: _Place) -> tuple[Tensor, Tensor]:
        """The factors of the present choice: of one adapter [r, in] and [r, out], views; of several their blocks, copies."""
        kept = self._kept.get(place.number)
        if kept is None:
            A, B = place.factors(self.arena)
            if self._alone:
                held = self._chosen[0]
                A, B = A if place.tokens else A[held.slot, : held.rank], B[held.slot, : held.rank]
            else:
                cut = self._cut(place)
                A, B = A if place.tokens else cut.of(A), cut.of(B)  # a vocabulary is read where it stands
            kept = A, B
            self._kept[place.number] = kept
        return kept

    def _low(self, x: Tensor, A: Tensor, cut: Segments | None = None) -> Tensor:
        """x Aᵀ: [rows, tokens, r], or by block."""
        x = x.to(A.dtype)
        if A.ndim == 2:
            return x.reshape(-1, x.shape[-1]).mm(A.mT)
        x = x.reshape(self.rows, -1, x.shape[-1])
        if cut is not None and not cut.straight:
            x = x.index_select(0, cut.rows).view(len(cut.slots), -1, x.shape[-1])
        return torch.bmm(x, A.mT)

    def _columns(self, ids: Tensor, A: Tensor, slots: Tensor, cut: Segments | None = None) -> Tensor:
        """The columns of the arena's A [slots, r, vocabulary] that tokens pick: [rows, tokens, r], or by block."""
        ids = ids.reshape(self.rows, -1)
        if cut is None:
            size = A.shape[1] if self.rows > 1 or torch.compiler.is_compiling() else self._chosen[0].rank
            ranks = torch.arange(size, device=ids.device)[None]
        else:
            slots, ids = cut.slots, ids.index_select(0, cut.rows).view(len(cut.slots), -1)
            ranks = cut.parts[:, None] * WIDTH + torch.arange(WIDTH, device=ids.device)
        return A[slots[:, None, None], ranks[:, None], ids[:, :, None]]

    def close(self) -> None:
        """Take the bank off the model, which is then as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._choose([])

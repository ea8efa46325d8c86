"""A bank: thousands of adapters beside one model, a choice for each row of a batch.

Adding is one copy into a free slot of the arena, removing a name, switching one index tensor. Serving form: diag(gain)·(W + B A),
in which additive, rotated and scaled changes are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn

from rankfold.adapters.adapter import Adapter, Entry
from rankfold.errors import LayoutError, OptionError, UnknownName

from .arena import Arena, Packed, lay_out
from .serving import BASE, Held, Serving
from .store import store_of
from .targets import Targets

__all__ = ["Packed", "PlainBank"]

SLOTS = 8


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
        self.model, self.rank = model, rank
        self.arena = Arena(lay_out(model, Targets.of(targets)), rank, slots, gains, dtype)
        self.smallest = slots + 1
        self.held: dict[str, Held] = {}
        self.free = list(range(slots, 0, -1))
        self.selected: list[str | None] = []
        self._stamps = count(1)
        self._serving = Serving(self.arena)

    # what there is

    @property
    def names(self) -> list[str]:
        return list(self.held)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self.arena.nbytes

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} adapters up to rank {self.rank} at {len(self.arena.places)} sites, "
            f"{self.arena.slots - 1} slots, {self.nbytes / 2**20:.1f} MB)"
        )

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
            self._resize(2 * self.arena.slots)
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
        half = self.arena.slots // 2
        if half >= self.smallest and len(self.held) + 1 <= half // 2:
            self._resize(half)

    @torch.no_grad()
    def shrink(self) -> None:
        """Return the memory of all free slots now; the next `add` makes the arena grow again."""
        self._resize(len(self.held) + 1)

    def _known(self, name: str) -> Held:
        if name not in self.held:
            raise UnknownName.of("adapter", name, self.held)
        return self.held[name]

    @torch.no_grad()
    def pack(self, adapter: Adapter | Packed, name: str = "adapter") -> Packed:
        """An adapter as a row of this bank: checked, gains computed, scale taken into B. Gives a packed one back.

        Raises:
            OptionError, TargetError: as `add`.
        """
        return self.arena.pack(adapter, name)

    def _write(self, name: str, slot: int, packed: Packed) -> None:
        self.arena.write(slot, packed)
        self.held[name] = Held(slot, packed.rank, packed.scaled, packed.touches, next(self._stamps))

    def _resize(self, slots: int) -> None:
        """Another arena with the adapters in its first slots: the old one's memory is returned."""
        self.arena.resized(slots, {new: old.slot for new, old in enumerate(self.held.values(), 1)})
        for new, (name, old) in enumerate(self.held.items(), 1):
            self.held[name] = replace(old, slot=new)
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
        self.selected = names
        self._serving.choose([BASE if n is None else self.held[n] for n in names])

    def close(self) -> None:
        """Take the bank off the model, which is then as it was."""
        self.selected = []
        self._serving.close()

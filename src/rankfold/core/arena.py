"""How the adapters of a bank lie in memory: one frozen tensor of equal rows, read at the sites through strided views.

A slot is `parts` rows of 8 ranks each, and a row holds these ranks' A and B of every site: what a batch needs of one adapter is a
few whole rows. Serving form: diag(gain)·(W + B A); gains − 1 lie apart, one row for each slot. Slot 0 is the base: all zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters.adapter import Adapter, Entry
from rankfold.errors import OptionError, TargetError
from rankfold.kernels.segments import WIDTH
from rankfold.linalg import Magnitude

from .base import base_of
from .kinds import kind_named
from .site import Site
from .targets import Targets, find_sites

__all__ = ["Arena", "Packed", "Place", "lay_out"]


@dataclass(frozen=True, eq=False)
class Place:
    """One site's columns: of A [8, in] and B [8, out] in each row of factors, and of gain − 1 [out] in each row of gains."""

    number: int
    site: Site
    module: nn.Module
    tokens: bool
    A: int
    B: int
    gain: int

    def factors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A [n, 8, in] and B [n, 8, out], views of n rows."""
        out, in_ = self.site.shape
        A = rows.narrow(1, self.A, WIDTH * in_).unflatten(1, (WIDTH, in_))
        return A, rows.narrow(1, self.B, WIDTH * out).unflatten(1, (WIDTH, out))


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter as a slot of the arena, checked and in serving form.

    Args:
        rows: [parts, numbers].
        gain1: gain − 1 of every site side by side; None in a bank without gains.
        rank: the largest of its sites.
        scaled: whether it rescales rows of a weight.
        touches: bit k is set where it changes the bank's site k.
        layout: of the arena that it fits.
    """

    rows: Tensor
    gain1: Tensor | None
    rank: int
    scaled: bool
    touches: int
    layout: tuple[Any, ...]


def lay_out(model: nn.Module, targets: Targets) -> dict[str, Place]:
    """The sites that a bank can serve, in the order of their columns; the A of vocabularies last, which a step does not copy.

    Raises:
        TargetError: a target of a kind that rows of a batch can't choose for; no site at all.
    """
    modules = dict(model.named_modules())
    served: list[tuple[Site, bool]] = []
    for site in find_sites(model, targets):
        kind = kind_named(site.kind)
        if not kind.flat or site.batch is not None:
            reason: str | None = f"a {site.kind} site runs in a way of its own"
        else:
            reason = kind.refusal(modules[site.module], site)
        if reason is None:
            served.append((site, kind.tokens))
        elif not targets.automatic:
            raise TargetError(f"{site.key}: a bank serves linear layers and embeddings; here {reason}. Fold such a change")
    if not served:
        raise TargetError(f"targets: {type(model).__name__} has no linear layer or embedding that a bank can serve")
    places: dict[str, Place] = {}
    column = gain = 0
    last = sum(WIDTH * (s.shape[0] + (0 if tokens else s.shape[1])) for s, tokens in served)
    for site, tokens in served:
        out, in_ = site.shape
        A, column, last = (last, column, last + WIDTH * in_) if tokens else (column, column + WIDTH * in_, last)
        places[site.key] = Place(len(places), site, modules[site.module], tokens, A, column, gain)
        column, gain = column + WIDTH * out, gain + out
    return places


class Arena:
    """The rows of all adapters, and how an adapter becomes one.

    Args:
        places: as `lay_out` gives them.
        rank: the largest of an adapter.
        slots: of adapters, at first.
        gains: whether adapters may rescale rows of a weight.
        dtype: None takes that of the weights.
    """

    def __init__(self, places: Mapping[str, Place], rank: int, slots: int, gains: bool, dtype: torch.dtype | None = None) -> None:
        self.places, self.rank, self.parts = places, rank, -(-rank // WIDTH)
        weight = self.weight
        if dtype is None and not weight.is_floating_point():  # a packed weight: in what its products give
            first = next(iter(places.values()))
            dtype = base_of(first.module, first.site).dtype
        self.layout = (rank, gains, *((key, place.site.shape) for key, place in places.items()))
        self.copied = sum(WIDTH * (p.site.shape[0] + (0 if p.tokens else p.site.shape[1])) for p in places.values())
        numbers = self.copied + sum(WIDTH * p.site.shape[1] for p in places.values() if p.tokens)
        size = sum(p.site.shape[0] for p in places.values())
        self.factors = torch.zeros((slots + 1) * self.parts, numbers, dtype=dtype or weight.dtype, device=weight.device)
        self.gain1 = self.factors.new_zeros(slots + 1, size) if gains else None

    @property
    def weight(self) -> Tensor:
        """Of the first site: it says where the model is."""
        weight = next(iter(self.places.values())).module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def slots(self) -> int:
        """With the base's."""
        return self.factors.shape[0] // self.parts

    @property
    def nbytes(self) -> int:
        return self.factors.nbytes + (0 if self.gain1 is None else self.gain1.nbytes)

    @property
    def precise(self) -> torch.dtype:
        return torch.promote_types(self.factors.dtype, torch.float32)

    def of(self, slot: int) -> Tensor:
        """[parts, numbers], a view."""
        return self.factors[slot * self.parts : (slot + 1) * self.parts]

    def write(self, slot: int, packed: Packed) -> None:
        """One copy of a slot's rows, and one of its gains."""
        self.of(slot).copy_(packed.rows)
        if self.gain1 is not None and packed.gain1 is not None:
            self.gain1[slot].copy_(packed.gain1)

    def follow(self) -> None:
        """Go where the model is."""
        device = self.weight.device
        if self.factors.device != device:
            self.factors = self.factors.to(device)
            self.gain1 = None if self.gain1 is None else self.gain1.to(device)

    def resized(self, slots: int, kept: Mapping[int, int]) -> None:
        """Other memory for so many slots, with slot `kept[k]` of the old in slot k; the old one's is returned."""
        factors = self.factors.new_zeros(slots * self.parts, self.factors.shape[1])
        gain1 = None if self.gain1 is None else self.gain1.new_zeros(slots, self.gain1.shape[1])
        for new, old in kept.items():
            factors[new * self.parts : (new + 1) * self.parts].copy_(self.of(old))
            if gain1 is not None and self.gain1 is not None:
                gain1[new].copy_(self.gain1[old])
        self.factors, self.gain1 = factors, gain1

    @torch.no_grad()
    def pack(self, adapter: Adapter | Packed, name: str) -> Packed:
        """An adapter in serving form: checked, gains computed, scale taken into B. Gives a packed one back.

        Raises:
            OptionError: it was packed for another bank; whole tensors; a rank above the bucket; gains in a bank without them.
            TargetError: a site that the bank doesn't have.
        """
        if isinstance(adapter, Packed):
            if adapter.layout != self.layout:
                raise OptionError(f"bank: {name!r} was packed for another bank, of rank {adapter.layout[0]} or other sites")
            return adapter
        if adapter.extras:
            raise OptionError(
                f"bank: {name!r} owns whole tensors ({', '.join(list(adapter.extras)[:3])}); the rows of a batch share these"
            )
        rows = self.factors.new_zeros(self.parts, self.factors.shape[1])
        gain1 = None if self.gain1 is None else self.gain1.new_zeros(self.gain1.shape[1])
        touches = 0
        for key, entry in adapter.entries.items():
            place = self.places.get(key)
            if place is None:
                raise TargetError(f"bank: {name!r} changes {key}, which this bank doesn't serve; give its name in targets")
            self._fill(place, entry, rows, gain1, name)
            touches |= 1 << place.number
        entries = adapter.entries.values()
        rank = max((e.rank for e in entries), default=0)
        return Packed(rows, gain1, rank, not all(e.additive for e in entries), touches, self.layout)

    def _fill(self, place: Place, entry: Entry, rows: Tensor, gain1: Tensor | None, name: str) -> None:
        if entry.shape != place.site.shape or entry.kind != place.site.kind:
            raise TargetError(
                f"bank: {name!r}: {entry.key} is {entry.kind} {entry.shape}; here {place.site.kind} {place.site.shape}"
            )
        if entry.rank > self.rank:
            raise OptionError(
                f"bank: {name!r} has rank {entry.rank} at {entry.key}, above the bank's {self.rank}: cut it to that rank with "
                f"rf.normal_form(adaptation, rank={self.rank}), or make a bank with rank={entry.rank}"
            )
        if not entry.additive and gain1 is None:
            raise OptionError(f"bank: {name!r} rescales rows of {entry.key}, and this bank has gains=False")
        gain = self._gain(place, entry)
        factor = entry.B.to(rows.device, self.precise) * entry.scale
        B = (factor if gain is None else gain[:, None] * factor).mT
        A, BT = place.factors(rows)
        for part, start in enumerate(range(0, entry.rank, WIDTH)):
            stop = min(start + WIDTH, entry.rank)
            A[part, : stop - start] = entry.A[start:stop].to(rows.device, rows.dtype)
            BT[part, : stop - start] = B[start:stop].to(rows.dtype)
        if gain is not None and gain1 is not None:
            gain1[place.gain : place.gain + len(gain)] = (gain - 1.0).to(gain1.dtype)

    def _gain(self, place: Place, entry: Entry) -> Tensor | None:
        """[out] in at least float32, or None where the change is additive."""
        device = self.factors.device
        if entry.gain is not None:
            return entry.gain.to(device, self.precise)
        if entry.magnitude is None:
            return None
        W = base_of(place.module, place.site).gather()
        moved = Entry(entry.name, entry.B.to(device), entry.A.to(device), entry.scale, entry.kind, entry.rows)
        return Magnitude(entry.magnitude.to(device), moved.weight(W)).gain().to(self.precise)

"""The forward pass of a bank: a hook at every site adds the changes that the rows of the batch chose.

By one of four products: one adapter for all rows; blocks of rows and ranks over copies of the chosen adapters (the reference);
runs over the arena itself, where the device has kernels; and each row by its index, in a graph or where gradients pass kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.kernels import has_path
from rankfold.kernels.operators import gathered
from rankfold.kernels.paths import segments_for
from rankfold.kernels.segments import WIDTH, Block, Segments, add_gathered, add_one, add_segments, split

from .arena import Arena, Place

__all__ = ["BASE", "Held", "Serving"]


@dataclass(frozen=True, eq=False)
class Held:
    """What is known of an adapter beside its rows. `stamp` is its own for ever: what was copied under it stays true."""

    slot: int
    rank: int
    scaled: bool
    touches: int
    stamp: int


BASE = Held(0, 0, False, 0, 0)


class Copies:
    """The arena's rows that the present choice needs, block by block, so that all of them are one batched product.

    Only blocks that an earlier choice did not have are copied. Views of them at the sites are made once.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.cut: Segments | None = None
        self.where = torch.empty(0, dtype=torch.long)
        self.views: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, arena: Arena, chosen: Sequence[Held]) -> Segments:
        """Bring the copies to a choice."""
        standing = [] if self.cut is None else self.cut.blocks
        device = arena.factors.device
        cut = split([h.stamp for h in chosen], [h.rank for h in chosen], device, standing)
        n = len(cut.blocks)
        if self.rows is None or not n <= len(self.rows) <= 4 * max(1, n) or self.rows.device != device:
            self.rows, standing = arena.factors.new_empty(n, arena.copied), []
        slots = {h.stamp: h.slot for h in chosen}
        where = [slots[stamp] * arena.parts + part for stamp, part in cut.blocks]
        for position, (block, row) in enumerate(zip(cut.blocks, where)):
            if position >= len(standing) or standing[position] != block:
                self.rows[position].copy_(arena.factors[row, : arena.copied])
        self.where = torch.tensor(where, dtype=torch.long, device=device)
        self.views.clear()
        self.cut = cut
        return cut

    def of(self, place: Place, arena: Arena) -> tuple[Tensor, Tensor]:
        """A [n, 8, in] and B [n, 8, out] of the present blocks; a vocabulary's A is the arena's own, read where it stands."""
        found = self.views.get(place.number)
        if found is None:
            assert self.rows is not None
            rows = self.rows[: len(self.where)]
            if place.tokens:
                B = rows.narrow(1, place.B, WIDTH * place.site.shape[0]).unflatten(1, (WIDTH, -1))
                found = place.factors(arena.factors)[0], B
            else:
                found = place.factors(rows)
            self.views[place.number] = found
        return found


class Serving:
    """A choice of adapters for the rows of a batch, and the hooks that add them.

    Args:
        arena: asked anew in every pass, since it may be resized and moved.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.copies: Copies | None = None
        self.one: dict[int, tuple[Tensor, Tensor]] = {}
        self.quick: dict[int, tuple[Tensor, Tensor]] = {}
        self.runs: dict[int, Any] = {}
        self.gains: dict[int, Tensor] = {}
        self.fresh = False
        self.choose([])
        self.hooks = [p.module.register_forward_hook(self._hook(p), with_kwargs=True) for p in arena.places.values()]

    def choose(self, chosen: Sequence[Held]) -> None:
        """Take a choice; factors are copied by the first step that needs them."""
        arena = self.arena
        arena.follow()
        self.chosen = chosen
        self.alone = len({held.stamp for held in chosen}) == 1
        self.rows = 1 if self.alone else len(chosen)
        self.scaled = any(held.scaled for held in chosen)
        self.touched = 0
        for held in chosen:
            self.touched |= held.touches
        device = arena.factors.device
        self.index = torch.tensor([h.slot for h in chosen[: self.rows]], dtype=torch.long, device=device)
        self.kernels: ModuleType | None = None if arena.factors.dtype == torch.float64 else segments_for(device)
        self.fresh = False
        if self.rows < 2 or self.kernels is not None:
            self.copies = None
        for kept in (self.one, self.quick, self.runs, self.gains):
            kept.clear()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.choose([])

    # the forward pass

    def _hook(self, place: Place) -> Any:
        out, in_ = place.site.shape

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            if not self.rows:
                return None
            compiled = torch.compiler.is_compiling()  # then every site and every rank is run, so that any choice fits the graph
            if not compiled:
                if not self.touched >> place.number & 1:
                    return None
                quick = self.quick.get(place.number)
                if quick is not None and not torch.is_grad_enabled():
                    x = args[0] if args else next(iter(kwargs.values()))
                    A, B = quick
                    if x.dtype == y.dtype == B.dtype and y.is_contiguous():  # few calls: they are what such a step costs
                        y.view(-1, out).addmm_(x.reshape(-1, in_).mm(A), B)
                        return y
            x = args[0] if args else next(iter(kwargs.values()))
            traced = y.requires_grad and torch.is_grad_enabled()
            if compiled or traced or not y.is_contiguous():
                y = y.clone(memory_format=torch.contiguous_format)
            part = self._part(place, x, y)
            if self.arena.gain1 is not None and (compiled or self.scaled):
                self._rescale(place, module, part, compiled)
            if compiled:
                self._add_in_graph(place, x, part)
            elif self.alone:
                self._add_one(place, x, part)
            elif self.kernels is not None and not place.tokens:
                self._add_runs(self.kernels, place, x, part, traced)
            else:
                self._add_blocks(place, x, part)
            return y

        return hook

    def _part(self, place: Place, x: Tensor, y: Tensor) -> Tensor:
        """The site's own part of the module's output, [rows, tokens, out]: a view."""
        lead = x.shape if place.tokens else x.shape[:-1]
        if self.rows > 1 and (not lead or lead[0] % self.rows):
            raise LayoutError(
                f"bank: a batch of {lead[0] if lead else 1} rows, {self.rows} selected; select one adapter for each row"
            )
        part = y.view(self.rows, -1, y.shape[-1])
        rows = place.site.rows
        return part if rows is None else part[..., rows[0] : rows[1]]

    def _rescale(self, place: Place, module: nn.Module, part: Tensor, compiled: bool) -> None:
        """part += (gain − 1) ∘ (part − bias): exactly the base's where the gain is 1."""
        gain1 = self.gains.get(place.number) if not compiled else None
        if gain1 is None:
            assert self.arena.gain1 is not None
            columns = self.arena.gain1.narrow(1, place.gain, place.site.shape[0])
            gain1 = columns[self.index][:, None].to(part.dtype)  # [rows, 1, out]
            if not compiled:
                self.gains[place.number] = gain1
        bias = getattr(module, "bias", None)
        if bias is None:
            part.addcmul_(part.clone(), gain1)
        else:
            rows = place.site.rows
            part.addcmul_(part - (bias if rows is None else bias[rows[0] : rows[1]]).to(part.dtype), gain1)

    def _by_row(self, place: Place, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, tokens, in], or [rows, tokens] where the site takes tokens."""
        return x.reshape(self.rows, -1) if place.tokens else x.to(dtype).reshape(self.rows, -1, x.shape[-1])

    def _add_in_graph(self, place: Place, x: Tensor, part: Tensor) -> None:
        """Each row by its index, with all ranks of the bucket: what is chosen is data."""
        arena = self.arena
        A, B = place.factors(arena.factors)
        x = self._by_row(place, x, A.dtype)
        own = self.index[:, None] * arena.parts + torch.arange(arena.parts, device=x.device)  # [rows, parts]
        if place.tokens:
            add_gathered(part, _columns(A, own, x), B[own].flatten(1, 2))
        elif has_path(x.device):
            part.add_(gathered(x, A, B, self.index, arena.parts).to(part.dtype))
        else:
            add_gathered(part, torch.bmm(x, A[own].flatten(1, 2).mT), B[own].flatten(1, 2))

    def _add_one(self, place: Place, x: Tensor, part: Tensor) -> None:
        """One adapter for all rows: [r, in] and [r, out], of what ranks it has."""
        held, arena = self.chosen[0], self.arena
        if not held.rank:  # gains alone
            return
        kept = self.one.get(place.number)
        if kept is None:
            A, B = place.factors(arena.of(held.slot))
            kept = A if place.tokens else A.flatten(0, 1)[: held.rank].mT, B.flatten(0, 1)[: held.rank]
            self.one[place.number] = kept
            if not (self.scaled or place.tokens or place.site.rows):
                self.quick[place.number] = kept
        A, B = kept
        if place.tokens:
            every = torch.arange(arena.parts, device=x.device)[None]
            h = _columns(A, every, x.reshape(1, -1))[0, :, : held.rank]
        else:
            h = x.to(A.dtype).reshape(-1, x.shape[-1]).mm(A)
        add_one(part, h, B)

    def _add_runs(self, kernels: ModuleType, place: Place, x: Tensor, part: Tensor, traced: bool) -> None:
        """By the device's kernels over the arena, which gradients pass by an operator of the library."""
        arena = self.arena
        A, B = place.factors(arena.factors)
        x = self._by_row(place, x, A.dtype)
        if traced or not part.is_contiguous():
            part.add_(gathered(x, A, B, self.index, arena.parts).to(part.dtype))
            return
        tokens = x.shape[1]
        if tokens not in self.runs:
            slots, ranks = [h.slot for h in self.chosen], [h.rank for h in self.chosen]
            self.runs[tokens] = kernels.runs(slots, ranks, tokens, x.device)
        kernels.add_runs(part.flatten(0, 1), x.flatten(0, 1), A, B, arena.parts, self.runs[tokens])

    def _add_blocks(self, place: Place, x: Tensor, part: Tensor) -> None:
        """By batched products over the copies."""
        if self.copies is None:
            self.copies = Copies()
        if not self.fresh:
            self.copies.take(self.arena, self.chosen)
            self.fresh = True
        cut = self.copies.cut
        assert cut is not None
        if not cut.blocks:  # gains alone
            return
        A, B = self.copies.of(place, self.arena)
        x = self._by_row(place, x, A.dtype)
        if not cut.straight:
            x = x.index_select(0, cut.rows).view(len(cut.blocks), -1, *x.shape[2:])
        h = _columns(A, self.copies.where[:, None], x) if place.tokens else torch.bmm(x, A.mT)
        add_segments(part, h, B, cut)


def _columns(A: Tensor, own: Tensor, ids: Tensor) -> Tensor:
    """The columns of A [slots·parts, 8, vocabulary] that tokens [n, tokens] pick from rows `own` [n, k]: [n, tokens, 8·k]."""
    ranks = torch.arange(WIDTH, device=ids.device)
    return A[own[:, None, :, None], ranks, ids[:, :, None, None]].flatten(2)

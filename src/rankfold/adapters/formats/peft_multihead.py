"""nn.MultiheadAttention in peft's folder: one target, the module, for its fused q, k, v and its output projection together, at
one rank and one scale.

peft (0.21) puts the change of the output projection into its weight twice, whether it runs, merges or unloads. So it is written
at half its size and read at double, both exactly: the function is the same. In training the gradient of that A differs by two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from rankfold.errors import CompositionError

from ..adapter import Entry

__all__ = ["INSIDE", "KIND", "attention_of", "is_attention", "paired", "places", "renamed"]

KIND = "multihead"
FUSED, OUTPUT = "in_proj_weight", "out_proj"
INSIDE = ".base_layer.out_proj"
TIMES = 2  # how often peft adds the change of the output projection


def places(entries: Iterable[Entry]) -> dict[str, str]:
    """Where peft puts the factors of each projection.

    >>> places([Entry("attn.out_proj", torch.ones(2, 1), torch.ones(1, 2), kind="multihead")])
    {'attn.out_proj': 'attn.base_layer.out_proj'}
    """
    found = {}
    for e in entries:
        if e.kind == KIND:
            module, _, leaf = e.name.rpartition(".")
            found[e.name] = module + INSIDE if leaf == OUTPUT else module
    return found


def paired(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with both projections of every attention that has one, at one rank: what is missing is written as zeros.

    Raises:
        CompositionError: projections in weights of their own, a magnitude, or two scales in one module: peft has none of these.
    """
    entries = list(entries)
    out = [e for e in entries if e.kind != KIND]
    modules: dict[str, dict[str, Entry]] = {}
    for e in entries:
        if e.kind == KIND:
            module, _, leaf = e.name.rpartition(".")
            modules.setdefault(module, {})[leaf] = e
    for module, own in modules.items():
        if not module:
            raise CompositionError(f"{next(iter(own))}: the model itself is the attention, which peft can't target")
        if other := sorted(own.keys() - {FUSED, OUTPUT}):
            raise CompositionError(f"{module}.{other[0]}: peft's LoRA takes nn.MultiheadAttention with one width only")
        if any(e.magnitude is not None for e in own.values()):
            raise CompositionError(f"{module}: peft has no DoRA for nn.MultiheadAttention")
        if len({e.scale for e in own.values()}) > 1:
            raise CompositionError(f"{module}: its projections have two scales, and peft has one for both")
        rank, first = max(e.rank for e in own.values()), next(iter(own.values()))
        width = first.shape[1]
        for leaf, out_width in ((FUSED, 3 * width), (OUTPUT, width)):
            e = own.get(leaf) or replace(
                first, name=f"{module}.{leaf}", B=first.B.new_zeros(out_width, rank), A=first.A.new_zeros(rank, width)
            )
            B, A = (torch.nn.functional.pad(t, pad) for t, pad in ((e.B, (0, rank - e.rank)), (e.A, (0, 0, 0, rank - e.rank))))
            out.append(replace(e, B=B / TIMES if leaf == OUTPUT else B, A=A))
    return out


def attention_of(entry: Entry) -> Entry | None:
    """The entry as peft's config speaks of it: under the module's name, once; None for the output projection."""
    if entry.kind != KIND:
        return entry
    module, _, leaf = entry.name.rpartition(".")
    return None if leaf == OUTPUT else replace(entry, name=module)


def is_attention(site: str, sites: Iterable[str]) -> bool:
    """Whether peft's target `site` is an nn.MultiheadAttention: its output projection has factors inside it."""
    return site + INSIDE in sites


def renamed(entry: Entry, site: str) -> Entry | None:
    """An entry that stood at `site` under our name; None if it changes nothing, being there for peft alone."""
    if not (entry.B.any() or entry.A.any()):
        return None
    if not site.endswith(INSIDE):
        return replace(entry, name=f"{site}.{FUSED}", kind=KIND)
    return replace(entry, name=f"{site.removesuffix(INSIDE)}.{OUTPUT}", B=entry.B * TIMES, kind=KIND)

"""The numbers behind `rankfold inspect`: what an adapter changes, site by site, or what the weights of a model look like."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters.adapter import Adapter
from rankfold.adapters.fingerprint import Fingerprint
from rankfold.adapters.formats.foreign import Foreign
from rankfold.adapters.formats.peft import read_peft
from rankfold.adapters.native import NativeAdapter, load_native
from rankfold.core.base import base_of
from rankfold.core.host import site_program
from rankfold.core.site import Site
from rankfold.core.structure import SideModule, Structure, trait
from rankfold.core.targets import every_site
from rankfold.errors import RankfoldError
from rankfold.linalg import Operator, contains, difference
from rankfold.linalg.decompositions import product_svd
from rankfold.linalg.spectra import SpectralStats, spectral_stats
from rankfold.training.adaptation import Adaptation
from rankfold.training.method import method
from rankfold.training.prints import fingerprint

from .exchange import borrowed, folder_format
from .foreign import FOREIGN, read_foreign

__all__ = ["Inspection", "SiteRow", "inspect_adaptation", "inspect_folder", "inspect_model", "spectrum"]

NEEDS_BASE = "the change leans on the base: --model M"
SHARED = "tensors shared among sites: --model M"
NO_MATRIX = "depends on the input, so it is no fixed matrix"
TOO_LARGE = "too large to be measured without the model that says its size: --model M"
MOST_NUMBERS = 1 << 28
"""Of a change that is measured: a few factors in a file of a stranger can stand for a matrix that no memory holds."""


@dataclass(frozen=True)
class SiteRow:
    """One site.

    Args:
        site, kind, shape: where; shape is (out, in) of the map.
        rank: that it was given; None where the structure has none.
        parameters: numbers stored for this site alone.
        stats: of the singular values of the change (of W for a model); None where `note` says why.
        relative: ‖ΔW‖ / ‖W‖; None without the base.
    """

    site: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    parameters: int
    stats: SpectralStats | None
    relative: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        what: "rankfold adapter", "peft adapter" and so on, or the class of a model.
        method, options: that made it.
        rows: one per site.
        extras: shapes of the tensors that train whole, by name.
        shared: shapes of tensors that sites share.
        labels, trained: as stored with the adapter.
        base: hash of the base that it belongs to, or of the model.
        parameters: all numbers of it.
    """

    what: str
    rows: tuple[SiteRow, ...]
    parameters: int
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    trained: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None


def inspect_folder(path: str | Path, model: nn.Module | None = None, force: bool = False) -> Inspection:
    """An adapter of rankfold, peft, kohya, LyCORIS, diffusers or torchtune.

    Args:
        model: its base. Without one, changes that lean on W (rotations, magnitudes, products with W) have a note for numbers.

    Raises:
        FileError: no adapter there, or a damaged one. FingerprintError: the model is another base (unless force).
    """
    kind = folder_format(path)
    if model is not None:
        with borrowed(model, path, force=force) as (handle, name):
            rows = inspect_adaptation(handle, name)
    if kind == "peft":
        adapter = read_peft(path)
        found = _peft(adapter)
    elif kind in FOREIGN:
        found = _foreign(read_foreign(path, kind))  # type: ignore[arg-type]
    else:
        found = _native(load_native(path))
    return found if model is None else Inspection(**{**found.__dict__, "rows": rows})


def inspect_adaptation(adaptation: Adaptation, name: str | None = None) -> tuple[SiteRow, ...]:
    """The sites of an adapter that is attached, measured against its base.

    >>> import torch, rankfold as rf
    >>> adaptation = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), "lora", rank=2)
    >>> for p in adaptation.parameters():
    ...     _ = p.data.fill_(0.5)
    >>> (row,) = inspect_adaptation(adaptation)
    >>> row.site, row.rank, round(row.stats.stable_rank, 6), round(row.stats.frobenius, 4)
    ('0', 2, 1.0, 3.4641)
    """
    rows = []
    for slot in adaptation.slots(name):
        parameters = sum(
            adaptation.store.tensor(key).numel()
            for key, slices in slot.binding.values()
            if key not in slot.member.shared.values()
        )
        rank = getattr(slot.structure.core, "rank", None)
        stats, relative, note = None, None, ""
        if slot.base is None:
            note = "a side module, no change of a weight"
        else:
            program = site_program(adaptation.store, [slot], training=False, outside=True)
            if program.dense_ok:
                with torch.no_grad():
                    stats = spectral_stats(spectrum(difference(program.expression(), program.base)))
                    size = float(program.base.dense().norm())
                relative = stats.frobenius / size if size else None
            else:
                note = NO_MATRIX
        rows.append(SiteRow(slot.site.key, slot.site.kind, slot.site.shape, rank, parameters, stats, relative, note))
    return tuple(rows)


def inspect_model(model: nn.Module) -> Inspection:
    """Every weight of a model that could be adapted, with its spectrum.

    >>> (row,) = inspect_model(torch.nn.Sequential(torch.nn.Linear(8, 6))).rows
    >>> row.site, row.shape, 1 <= row.stats.stable_rank <= 6
    ('0', (6, 8), True)
    """
    modules = dict(model.named_modules())
    rows = []
    for site in every_site(model):
        W = base_of(modules[site.module], site).gather().dense().detach()
        stats = spectral_stats(_singular_values(W))
        rows.append(
            SiteRow(site.name, site.kind, site.shape, None, W.numel(), stats, note=f"shares {site.tied}" if site.tied else "")
        )
    own = {n: p for n, p in model.named_parameters() if not n.startswith("rankfold.")}
    return Inspection(type(model).__name__, tuple(rows), sum(p.numel() for p in own.values()), base=fingerprint(model).hash)


def spectrum(change: Operator) -> Tensor:
    """Singular values of an operator, float64, from its factors where it is of low rank; of a stack those of all its maps."""
    if change.rank_bound() < min(change.shape):
        B, A, _ = change.to_lowrank(None)
        return product_svd(B.double(), A.double())[1].flatten()
    return _singular_values(change.dense())


def _singular_values(W: Tensor) -> Tensor:
    """By the Gram matrix of the smaller side, which is cheap for embeddings; exact to 1e-8 of the largest."""
    small = W if W.shape[-2] <= W.shape[-1] else W.mT
    gram = sum((part.double() @ part.double().mT for part in small.split(4096, dim=-1)), torch.zeros((), dtype=torch.float64))
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flatten()


class _NeedsBase(RankfoldError):
    """Something asked for the numbers of a base that is not there."""


class _Unread(Operator):
    """The base as a bare symbol: it has a shape, and no numbers."""

    def __init__(self, shape: tuple[int, int]) -> None:
        object.__setattr__(self, "size", shape)

    @property
    def shape(self) -> tuple[int, int]:
        size: tuple[int, int] = self.size  # type: ignore[attr-defined]
        return size

    def leaves(self) -> Iterator[Tensor]:
        raise _NeedsBase(NEEDS_BASE)

    def dense(self) -> Tensor:
        raise _NeedsBase(NEEDS_BASE)


def _native(record: NativeAdapter) -> Inspection:
    structure = method(record.method, **record.options).structure
    rows = []
    for item in record.sites:
        own = record.tensors[item.key]
        site = Site(item.name, item.shape, item.kind, item.rows, item.batch, item.group, item.tied)
        stats, note = None, ""
        if isinstance(structure, SideModule):
            note = "a side module, no change of a weight"
        else:
            here = structure if item.rank is None else structure.at_rank(item.rank, item.alpha)
            stats, note = _without_base(here, site, own)
        rows.append(SiteRow(item.key, item.kind, item.shape, item.rank, sum(t.numel() for t in own.values()), stats, None, note))
    shapes = {n: tuple(t.shape) for n, t in record.shared.items()}
    extras = {n: tuple(t.shape) for n, t in record.extras.items()}
    whole = sum(t.numel() for t in (*record.shared.values(), *record.extras.values()))
    parameters = sum(r.parameters for r in rows) + whole
    base = record.base.hash if isinstance(record.base, Fingerprint) else None
    return Inspection(
        "rankfold adapter",
        tuple(rows),
        parameters,
        record.method,
        dict(record.options),
        extras,
        shapes,
        record.labels or (),
        dict(record.trained),
        base,
    )


def _without_base(structure: Structure, site: Site, own: Mapping[str, Tensor]) -> tuple[SpectralStats | None, str]:
    specs = structure.tensors(site)
    if trait(structure, "input_dependent"):
        return None, NO_MATRIX
    if specs.keys() - own.keys():
        return None, SHARED
    W = _Unread(site.shape)
    t = namedtuple("Tensors", list(specs))(**{n: own[n] for n in specs})
    try:
        change = difference(structure.weight(W, t, site), W)
        return (None, NEEDS_BASE) if contains(change, W) else (spectral_stats(spectrum(change)), "")
    except _NeedsBase:
        return None, NEEDS_BASE


def _peft(adapter: Adapter) -> Inspection:
    rows = []
    for key, e in adapter.entries.items():
        numbers = sum(t.numel() for t in (e.B, e.A, e.magnitude) if t is not None)
        stats = spectral_stats(spectrum(e.delta())) if e.additive else None
        rows.append(SiteRow(key, e.kind, e.shape, e.rank, numbers, stats, None, "" if e.additive else NEEDS_BASE))
    about = adapter.metadata
    return Inspection(
        "peft adapter",
        tuple(rows),
        adapter.parameters,
        about.get("method"),
        {k: v for k, v in (about.get("options") or {}).items() if v},
        {n: tuple(t.shape) for n, t in adapter.extras.items()},
        trained={k: about[k] for k in ("task_type", "base_model") if about.get(k)},
    )


def _foreign(found: Foreign) -> Inspection:
    rows = []
    for key, c in found.changes.items():
        numbers = sum(t.numel() for t in (*c.tensors.values(), c.magnitude) if t is not None)
        change = c.operator()
        built = min(prod(change.shape), sum(change.shape) * change.rank_bound())
        note = NEEDS_BASE if c.magnitude is not None else TOO_LARGE if built > MOST_NUMBERS else ""
        stats = None if note else spectral_stats(spectrum(change))
        kind = "linear" if c.kernel is None else "convolution"
        rows.append(SiteRow(key, kind, c.shape, c.rank, numbers, stats, None, note))
    added = sum(t.numel() for t in found.differences.values())
    return Inspection(
        f"{found.format} adapter",
        tuple(rows),
        sum(r.parameters for r in rows) + added,
        "+".join(found.methods) or None,
        extras={n: tuple(t.shape) for n, t in found.differences.items()},
        trained={"stored_dtype": ", ".join(found.dtypes), **found.metadata},
    )

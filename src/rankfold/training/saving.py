"""An adapter to a folder and back: the tensors as they are trained; loading runs no init and asks whether the base is the
right one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankfold.adapters.adapter import Adapter, Entry
from rankfold.adapters.fingerprint import compare
from rankfold.adapters.native import NativeAdapter, SiteRecord, load_native, save_native
from rankfold.adapters.rows import split_rows
from rankfold.core.attaching import attach, specs_of
from rankfold.core.checkpointing import InputGradients, LostGradients
from rankfold.core.extras import add_extra
from rankfold.core.host import site_program
from rankfold.core.planner import require_known
from rankfold.core.probing import CallWatch
from rankfold.core.sharding import is_sharded
from rankfold.core.site import Site
from rankfold.core.store import Extra, Member, Slot, Store, store_of
from rankfold.core.structure import SideModule, Structure
from rankfold.core.targets import every_site
from rankfold.errors import CompositionError, FileError, FingerprintError, OptionError, RankfoldError, nearest
from rankfold.linalg import Deviation, LowRank, Magnitude, Operator, Sum, difference, simplify

from .adaptation import Adaptation, Attached, member_store
from .method import method
from .own_update import OwnUpdate
from .prints import fingerprint
from .processes import is_first

if TYPE_CHECKING:
    from rankfold.core.base import Base

__all__ = ["attach_record", "fitting_site", "load", "normal_form", "record_of", "save"]


def record_of(adaptation: Adaptation, name: str | None = None) -> NativeAdapter:
    """Everything that one adapter consists of, as plain data."""
    a = adaptation._get(name)
    store, member = adaptation.store, a.member
    shared_keys = set(member.shared.values())
    sites, tensors = [], {}
    for key, slot in member.slots.items():
        s = slot.site
        rank, alpha = (getattr(slot.structure.core, number, None) for number in ("rank", "alpha"))
        follows = alpha == getattr(_at_rank(a.method.structure, rank, None, key).core, "alpha", None)
        sites.append(SiteRecord(s.name, s.kind, s.shape, s.rows, rank, s.batch, s.group, s.tied, None if follows else alpha))
        own = {f: store.tensor(k).detach().cpu() for f, (k, _) in slot.binding.items() if k not in shared_keys}
        tensors[key] = own
    shared = {
        name_in_file(member.name, key): store.tensor(key).detach().cpu() for key in sorted(_shared(member.slots, member.name))
    }
    return NativeAdapter(
        method=a.method.text,
        options=dict(a.method.options),
        sites=tuple(sites),
        tensors=tensors,
        shared=shared,
        extras={e.name: store.tensor(e.key).detach().cpu() for e in member.extras.values()},
        labels=a.labels,
        base=adaptation.fingerprint(name),
        trained={"seed": a.seed, **a.trained},
        untied=tuple(e.name for e in member.extras.values() if e.alone),
    )


def name_in_file(owner: str, key: str) -> str:
    """What a file calls a shared tensor of the store: no path characters.

    >>> name_in_file("default", "default/group:layers.0/A"), name_in_store("default", "group:layers.0:A")
    ('group:layers.0:A', 'default/group:layers.0/A')
    """
    return ":".join(key.removeprefix(owner + "/").rsplit("/", 1))


def name_in_store(owner: str, name: str) -> str:
    """The other way round."""
    return "/".join([owner, *name.rsplit(":", 1)])


def _shared(slots: Mapping[str, Slot], owner: str) -> set[str]:
    return {k for key, s in slots.items() for f, (k, _) in s.binding.items() if k != f"{owner}/{key}/{f}"}


def save(adaptation: Adaptation, path: str | Path, name: str | None = None) -> Path:
    """See `Adaptation.save`."""
    record = record_of(adaptation, name)
    cut = is_sharded(adaptation.model)
    try:
        if not cut or is_first():
            save_native(path, record)
    finally:
        if cut:
            torch.distributed.barrier()  # afterwards it is there for all
    return Path(path)


def load(
    model: nn.Module, path: str | Path, *, name: str = "default", force: bool = False, plan: str = "auto", memory: str = "auto"
) -> Adaptation:
    """Attach a saved adapter to its base: same function, without running an init.

    Args:
        force: take a base with another fingerprint all the same.

    Raises:
        FingerprintError: the base is another one. FileError: damaged, foreign, or not fitting this model.
    """
    return attach_record(model, load_native(path), str(path), name=name, force=force, plan=plan, memory=memory)


def attach_record(
    model: nn.Module,
    record: NativeAdapter,
    source: str,
    *,
    name: str = "default",
    force: bool = False,
    plan: str = "auto",
    memory: str = "auto",
) -> Adaptation:
    """Attach an adapter given as plain data.

    Raises: as `load`. The model is then as it was before.
    """
    require_known(plan, memory)
    try:
        m = method(record.method, **record.options)
    except RankfoldError as error:
        raise FileError(f"{source}: its method {str(record.method)[:80]!r} can't be made here: {error}") from error
    known, modules = {s.name: s for s in every_site(model)}, dict(model.named_modules())
    sites = [_site(item, known, modules, source) for item in record.sites]
    if record.base is not None and not force:
        verdict = compare(record.base, fingerprint(model, sorted({s.name for s in sites})))
        if verdict.verdict == "different":
            raise FingerprintError(
                f"{source}: made for another base ({verdict.reason}). Load it all the same: force=True (--force)"
            )
        if verdict.verdict != "same":
            warnings.warn(f"{source}: {verdict}", stacklevel=3)
    structures = {
        s.key: _at_rank(m.structure, item.rank, item.alpha, f"{source}: {s.key}") for s, item in zip(sites, record.sites)
    }
    _check_tensors(record, sites, structures, source)
    found = {f"{k}": dict(v) for k, v in record.tensors.items()}

    def fill(site: Site, structure: Structure, base: Base, specs: Any) -> dict[str, Tensor]:
        shared = {n.rpartition(":")[2]: t for n, t in record.shared.items() if _serves(n, site)}
        return {**shared, **found[site.key]}

    on_before = dict(there.active) if (there := store_of(model)) is not None else {}
    member = attach(model, name, sites, structures, fill, int(record.trained.get("seed", 0)))
    store = member_store(model)
    handle = store.handle = store.handle or Adaptation(store)
    a = handle.attached[name] = Attached(m, member, int(record.trained.get("seed", 0)), labels=record.labels)
    member.plan, member.memory = plan, memory
    a.trained = {k: v for k, v in record.trained.items() if k != "seed"}
    try:
        _check_shared(record, store, member, source)
        for full, value in record.extras.items():
            extra = _extra(store, member, full, alone=full in record.untied)
            if extra is None or store.tensor(extra.key).shape != value.shape:
                raise FileError(f"{source}: extra tensor {full!r} {tuple(value.shape)} does not fit this model")
            store.replace(extra.key, value.to(store.tensor(extra.key)))
        store.switch({name: 1.0})
    except BaseException:
        handle.remove(name)
        store.switch(on_before)
        raise
    store.watchers += [InputGradients(store, member), LostGradients(store, member), CallWatch(store, member), OwnUpdate(a)]
    return handle


def _extra(store: Store, member: Member, full: str, alone: bool) -> Extra | None:
    """The extra tensor of that name at its start; None where the model has no such parameter, or not these rows."""
    name, rows = split_rows(full)
    owner, _, param = name.rpartition(".")
    if rows is not None:
        parameter = dict(store.model.named_parameters(remove_duplicate=False)).get(name)
        try:
            rows = None if parameter is None else split_rows(full, parameter.shape[0])[1]
        except OptionError:
            return None
    return add_extra(store, member, owner, param, alone, rows)


def _serves(shared_name: str, site: Site) -> bool:
    owner = shared_name.rpartition(":")[0]
    return owner == "shared" or owner == f"group:{site.group or site.name}"


def _at_rank(structure: Structure, rank: int | None, alpha: float | None, where: str) -> Structure:
    """The structure of one site, as a rank policy or a file from elsewhere gave it."""
    if alpha is not None and (rank is None or not hasattr(structure.core, "alpha")):
        raise FileError(f"{where}: has an alpha, which {type(structure.core).__name__} knows nothing of")
    same = rank is None or rank == getattr(structure.core, "rank", rank)
    return structure if same and alpha is None else structure.at_rank(rank, alpha)  # type: ignore[arg-type]


def fitting_site(item: SiteRecord | Entry, known: Mapping[str, Site], source: str) -> Site:
    """The site of the model that a file's entry speaks of; the file's word for its kind is not needed.

    Raises:
        FileError: no such site, or one of another shape.
    """
    site = known.get(item.name)
    if site is None:
        close = ", ".join(nearest(item.name, known)) or "none: it has no linear layer and no embedding"
        raise FileError(f"{source}: this model has no site {item.name!r}; nearest: {close}")
    total = site.shape[0]
    if item.rows is not None:
        site = replace(site, rows=item.rows, shape=(item.rows[1] - item.rows[0], site.shape[1]))
    outside = item.rows is not None and item.rows[1] > total
    if item.batch != site.batch:
        raise FileError(
            f"{source}: {item.key} changes a stack of {item.batch or 1}; in this model {item.name} is one of {site.batch or 1}"
        )
    if outside or item.shape != site.shape or (item.kind == "embedding") != (site.kind == "embedding"):
        raise FileError(
            f"{source}: {item.key} changes a map {item.shape} ({item.kind}); in this model {item.name} is "
            f"{(total, site.shape[1])} ({site.kind})"
        )
    return site


def _site(item: SiteRecord, known: Mapping[str, Site], modules: Mapping[str, nn.Module], source: str) -> Site:
    if item.kind == "block":
        if item.name not in modules:
            close = ", ".join(nearest(item.name, modules))
            raise FileError(f"{source}: this model has no module {item.name!r}; nearest: {close}")
        return Site(item.name, item.shape, item.kind)
    return replace(fitting_site(item, known, source), group=item.group, tied=item.tied)


def _check_shared(record: NativeAdapter, store: Store, member: Member, source: str) -> None:
    wanted = {name_in_file(member.name, key): tuple(store.tensor(key).shape) for key in _shared(member.slots, member.name)}
    here = {n: tuple(t.shape) for n, t in record.shared.items()}
    if here != wanted:
        raise FileError(f"{source}: holds the shared tensors {here or 'none'}; method {record.method!r} wants {wanted or 'none'}")


def _check_tensors(record: NativeAdapter, sites: list[Site], structures: Mapping[str, Structure], source: str) -> None:
    for site in sites:
        specs = specs_of(structures[site.key], site)
        own = {n: s for n, s in specs.items() if s.scope == "site"}
        here = record.tensors[site.key]
        if own.keys() != here.keys():
            raise FileError(f"{source}: site {site.key} holds {sorted(here)}; method {record.method!r} has {sorted(own)}")
        for n, spec in own.items():
            if tuple(here[n].shape) != spec.shape:
                raise FileError(f"{source}: {site.key}.{n} is {tuple(here[n].shape)}; this model and method want {spec.shape}")


@torch.no_grad()
def normal_form(adaptation: Adaptation, name: str | None = None, rank: int | None = None) -> tuple[Adapter, dict[str, float]]:
    """The adapter as factors and numbers that other tools know, and the relative error at each site (0 where the form is exact).

    A change that is a LoRA, a deviation (as rank 2r), a rotation or a magnitude over these is exact; anything else is cut by
    SVD at `rank` (None: at the rank that holds it whole).

    Raises:
        CompositionError: a side module, or a change that depends on the input: neither is a matrix.
    """
    a = adaptation._get(name)
    entries, errors = [], {}
    for key, slot in a.member.slots.items():
        if isinstance(slot.structure, SideModule):
            raise CompositionError(f"{a.method}: a side module is no change of a weight; no other tool's adapter form holds it")
        program = site_program(adaptation.store, [slot], training=False, outside=True)
        if not program.dense_ok:
            raise CompositionError(f"{a.method}: the change depends on the input, so it is no fixed matrix; it can't be exported")
        expr = program.expression()
        entry, errors[key] = _entry(adaptation, slot, expr, program.base, rank)
        entries.append(entry)
    extras = {e.name: adaptation.store.tensor(e.key).detach().cpu() for e in a.member.extras.values()}
    meta = {"method": a.method.text, "options": dict(a.method.options), "labels": list(a.labels or [])}
    return Adapter.of(entries, extras, meta), errors


def _entry(adaptation: Adaptation, slot: Slot, expr: Operator, base: Base, rank: int | None) -> tuple[Entry, float]:
    site = slot.site
    total = None if site.rows is None else base.total_rows
    magnitude = None
    if isinstance(expr, Magnitude) and _low(expr.inner, base) is not None:
        magnitude, expr = expr.m.detach().cpu(), expr.inner
    low = _low(expr, base)
    if low is not None:
        B, A, scale, error = low.B, low.A, low.scale, 0.0
        by_map = isinstance(scale, Tensor) and scale.ndim > 0
        if low.diag is not None or low.core is not None or by_map:
            (B, A), scale = low.factors(), 1.0
        if rank is not None and rank < A.shape[-2]:
            B, A, error = low.to_lowrank(rank)
            scale = 1.0
    else:
        B, A, error = difference(expr, base).to_lowrank(rank)
        scale = 1.0
    lead = () if site.batch is None else (site.batch,)  # a factor that all maps of a stack share is written for each
    B, A = (t.detach().cpu().expand(*lead, *t.shape[-2:]).contiguous() for t in (B, A))
    kernel = getattr(base.module, "kernel_size", None) if site.kind == "convolution" else None
    return Entry(site.name, B, A, float(scale), site.kind, site.rows, total, magnitude, kernel=kernel), error


def _low(expr: Operator, base: Base) -> LowRank | None:
    """The change of W + (LowRank or Deviation), exactly; None for other forms."""
    change = simplify(difference(expr, base)) if isinstance(expr, Sum) or expr is base else difference(expr, base)
    if isinstance(change, Deviation):
        return change.stacked()
    return change if isinstance(change, LowRank) else None

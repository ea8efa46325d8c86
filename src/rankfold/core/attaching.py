"""Attaching an adapter to a model, and taking it off: tensors allocated, joined and started; modules given their hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankfold.errors import CompositionError, LayoutError, TargetError, UnknownName
from rankfold.linalg.random import Random

from .base import Base, base_of
from .bases import refusal as packed_refusal
from .host import Host, host_module, release_module
from .kinds import kind_named
from .sharding import close
from .site import Site
from .store import Member, Slot, Store, store_of
from .structure import ROLE_STARTS, SideModule, Spec, StartContext, Structure, TooLarge, trait

__all__ = ["Fill", "attach", "check_sites", "detach", "specs_of"]

Fill = Callable[[Site, Structure, Base, Mapping[str, Spec]], Mapping[str, Tensor]]
"""What the init axis gives: the start of a site's tensors by name; what it leaves out starts by its Spec's own law."""


def specs_of(structure: Structure, site: Site) -> dict[str, Spec]:
    """The tensors of a site as stored: with the leading batch of experts."""
    specs = structure.tensors(site)
    if site.batch is None:
        return specs
    lead = (site.batch,)
    return {n: _with_shape(s, lead + s.shape) if s.scope == "site" else s for n, s in specs.items()}


def _with_shape(spec: Spec, shape: tuple[int, ...]) -> Spec:
    return Spec(shape, spec.role, spec.trainable, spec.scope, spec.join, spec.start, spec.dtype)


def check_sites(
    model: nn.Module, structure: Structure, sites: Sequence[Site], automatic: bool
) -> tuple[list[Site], list[tuple[str, str]]]:
    """(sites that can carry the structure, [(site, why not)]). What the user named is refused with an error, what we chose
    is listed.

    Raises:
        TargetError: a named site can't carry the structure, or none is left. A rank above the matrix is an error either way.
    """
    modules = dict(model.named_modules())
    good, dropped = [], []
    for site in sites:
        wrong = structure.fits(site)
        if isinstance(wrong, TooLarge):
            raise TargetError(
                f"{site.key} {site.shape}: {wrong.reason}. Choose a smaller rank, or leave the site out: exclude={site.name!r}"
            )
        reason = (wrong and wrong.reason) or _kind_refusal(structure, site) or _place_refusal(modules, site)
        if reason and not automatic:
            raise TargetError(f"{site.key}: {reason}")
        if reason:
            dropped.append((site.key, reason))
        else:
            good.append(site)
    if not good:
        raise TargetError(f"no site can carry {type(structure).__name__}: {'; '.join(f'{k}: {r}' for k, r in dropped[:5])}")
    return good, dropped


def _kind_refusal(structure: Structure, site: Site) -> str | None:
    kinds = structure.core.kinds
    if kinds is not None and site.kind not in kinds:
        return f"{type(structure.core).__name__} is for {', '.join(sorted(kinds))}, not for {site.kind}"
    if site.batch is not None and trait(structure, "input_dependent"):
        return "a gate that looks at the input needs one input, and here each map of a stack has its own"
    if site.kind == "block":
        return None
    if kind_named(site.kind).swapped and (trait(structure, "input_dependent") or trait(structure, "stochastic")):
        return "a gate or dropout on the input can't act: the library's own forward runs here, on one weight"
    if not kind_named(site.kind).tokens:
        return None
    if trait(structure, "acts_on_input"):
        return "a transform of the input makes no sense on a vocabulary"
    if trait(structure, "input_dependent") or trait(structure, "stochastic"):
        return "a gate or dropout on the input makes no sense on token indices"
    return None


def _place_refusal(modules: Mapping[str, nn.Module], site: Site) -> str | None:
    if site.kind == "block":
        return None
    return kind_named(site.kind).refusal(modules[site.module], site) or packed_refusal(modules[site.module], site)


def attach(
    model: nn.Module,
    name: str,
    sites: Sequence[Site],
    structures: Mapping[str, Structure],
    fill: Fill | None = None,
    seed: int = 0,
) -> Member:
    """Allocate, start and bind the tensors of one adapter, host its modules and freeze the base. Switches nothing on.

    Args:
        sites: where; `structures` gives each site's structure by key (ranks may differ).
        fill: the init axis; None starts every tensor by its own law.
        seed: of the counter-based generator; the same seed gives the same start whatever the order or sharding.

    Raises:
        LayoutError: the name is taken, or the model is folded. Whatever an init or a structure raises: the model is then as it
            was before.
    """
    store = store_of(model, create=True)
    assert store is not None
    if name in store.members:
        raise LayoutError(f"adapter {name!r} exists already; remove it, or give another name. Here: {', '.join(store.members)}")
    if store.is_folded:
        raise LayoutError("the model is folded; unfold before attaching another adapter")
    close(model)
    if not store.members:
        _freeze(store)
    member = store.members[name] = Member(name, structures[sites[0].key])
    try:
        _place(store, member, sites, structures, fill, seed)
    except BaseException:  # Ctrl-C too: a large init takes minutes
        detach(model, name)
        raise
    store.version += 1
    return member


def _place(
    store: Store, member: Member, sites: Sequence[Site], structures: Mapping[str, Structure], fill: Fill | None, seed: int
) -> None:
    modules = dict(store.model.named_modules())
    bases: dict[str, Base] = {}
    for site in sites:
        side = isinstance(structures[site.key], SideModule)
        bases[site.key] = _Nowhere(modules[site.module], site) if side else _base(modules[site.module], site)
    sites = [bases[site.key].site for site in sites]
    specs = {s.key: specs_of(structures[s.key], s) for s in sites}
    shared = _join(member, sites, specs)
    for site in sites:
        W = bases[site.key].gather()  # of one site at a time
        values = dict(fill(site, structures[site.key], W, specs[site.key])) if fill else {}
        slot = _bind(store, member, site, structures[site.key], W, specs[site.key], values, shared, seed)
        slot.base = bases[site.key]
        host = host_module(store, site.module, modules[site.module])
        if isinstance(slot.structure, SideModule):
            slot.base = None
            host.sides.append(slot)
        else:
            host.slots.setdefault(site.key, []).append(slot)
            kind_named(site.kind).hosted(modules[site.module])


def _base(module: nn.Module, site: Site) -> Base:
    """The base of a site, one object for all adapters there: its row norms are computed once, and a compiled forward can't tell
    the adapters apart."""
    host = module.__dict__.get("_rankfold")
    there = host.slots.get(site.key, []) if host is not None else []
    return next((slot.base for slot in there if slot.site == site), None) or base_of(module, site)


class _Nowhere(Base):
    """Stands in for a base where a side module has none."""

    def dense(self) -> Tensor:
        raise LayoutError("a side module has no base weight")


def _key(member: Member, site: Site, name: str, spec: Spec) -> str:
    if spec.scope == "model":
        return f"{member.name}/shared/{name}"
    if spec.scope == "group":
        return f"{member.name}/group:{site.group or site.name}/{name}"
    return f"{member.name}/{site.key}/{name}"


def _join(
    member: Member, sites: Sequence[Site], specs: Mapping[str, Mapping[str, Spec]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Requests for shared tensors, {key: {site key: requested shape}}, in sorted site order."""
    requests: dict[str, dict[str, tuple[int, ...]]] = {}
    for site in sorted(sites, key=lambda s: s.key):
        for name, spec in specs[site.key].items():
            if spec.scope in ("model", "group"):
                requests.setdefault(_key(member, site, name, spec), {})[site.key] = spec.shape
    return requests


def joined_shape(join: str, shapes: Sequence[tuple[int, ...]], name: str) -> tuple[int, ...]:
    """One shape for all requests: equal, elementwise largest, or concatenated along the first dimension."""
    if join == "max":
        return tuple(max(dims) for dims in zip(*shapes))
    if join == "cat":
        return (sum(s[0] for s in shapes), *shapes[0][1:])
    if len(set(shapes)) > 1:
        raise CompositionError(
            f"shared tensor {name!r} is asked for in different shapes {sorted(set(shapes))}: choose sites of one shape"
        )
    return shapes[0]


def _slices(join: str, requests: Mapping[str, tuple[int, ...]], key: str, whole: tuple[int, ...]) -> tuple[slice, ...] | None:
    shape = requests[key]
    if join == "cat":
        start = 0
        for other, s in requests.items():
            if other == key:
                break
            start += s[0]
        return (slice(start, start + shape[0]),)
    return None if shape == whole else tuple(slice(0, n) for n in shape)


def _bind(
    store: Store,
    member: Member,
    site: Site,
    structure: Structure,
    base: Base,
    specs: Mapping[str, Spec],
    values: dict[str, Tensor],
    shared: Mapping[str, Mapping[str, tuple[int, ...]]],
    seed: int,
) -> Slot:
    emits = tuple(n for n, s in specs.items() if s.scope == "emitted")
    slot = member.slots[site.key] = Slot(member, site, structure, base, {}, tuple(specs), emits)
    so_far: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if spec.scope == "emitted":
            continue
        key = _key(member, site, name, spec)
        shape, slices, owner = spec.shape, None, site.key
        if key in shared:
            shape = joined_shape(spec.join, list(shared[key].values()), name)
            slices = _slices(spec.join, shared[key], site.key, shape)
            owner = key.split("/", 1)[1]
            member.shared[name] = key
        if not hasattr(store, store.flat(key)):  # a shared tensor is made once
            start = values.get(name)
            if start is not None and start.shape != shape and key not in shared:
                raise CompositionError(f"{site.key}: tensor {name!r} has shape {shape}; its init gave {tuple(start.shape)}")
            if start is None or start.shape != shape:  # a shared tensor is larger than what one site asks for
                law = spec.start if spec.start is not None else ROLE_STARTS.get(spec.role, 0.0)
                ctx = StartContext(shape, Random(seed, "start", owner, name), site, base, so_far)
                start = law(ctx) if callable(law) else torch.full(shape, float(law))
            store.put(key, _stored(start, spec, base), spec.trainable)
        tensor = store.tensor(key)
        so_far[name] = tensor if slices is None else tensor[slices]
        slot.binding[name] = (key, slices)
    return slot


def _stored(start: Tensor, spec: Spec, base: Base) -> Tensor:
    if not start.is_floating_point():
        return start.to(base.module_device)
    dtype = spec.dtype or (torch.float64 if base.module_dtype == torch.float64 else torch.float32)
    return start.detach().to(device=base.module_device, dtype=dtype).clone().contiguous()


def _freeze(store: Store) -> None:
    for name, parameter in store.model.named_parameters():
        if not name.startswith("rankfold."):
            store.trainable_before[name] = parameter.requires_grad
            parameter.requires_grad_(False)


def detach(model: nn.Module, name: str) -> None:
    """Take one adapter off: its tensors leave the store, modules without adapters get their class back, the last one
    unfreezes the base.

    Raises:
        UnknownName: no adapter of that name.
        LayoutError: the model is folded.
    """
    store = store_of(model)
    if store is None or name not in store.members:
        raise UnknownName.of("adapter", name, store.members if store else [])
    if store.is_folded:
        raise LayoutError("the model is folded; unfold before removing an adapter")
    if name in store.active:
        store.switch({n: weight for n, weight in store.active.items() if n != name})
    member = store.members.pop(name)
    store.watchers = [w for w in store.watchers if w.member is not member]
    for key in member.owned():
        store.drop(key)
    for module in reversed(list(model.modules())):  # from the inside: a reader keeps its host while something in it has one
        host = module.__dict__.get("_rankfold")
        if not isinstance(host, Host):
            continue
        host.slots = {k: kept for k, v in host.slots.items() if (kept := [s for s in v if s.member is not member])}
        host.extras = [(n, e) for n, e in host.extras if n != name]
        host.sides = [s for s in host.sides if s.member is not member]
        release_module(module)
    if not store.members:
        for path, trained in store.trainable_before.items():
            _find(model, path).requires_grad_(trained)
        store.uninstall()
        del model._modules["rankfold"]


def _find(model: nn.Module, path: str) -> nn.Parameter:
    owner, _, leaf = path.rpartition(".")
    return model.get_submodule(owner)._parameters[leaf]  # type: ignore[return-value]

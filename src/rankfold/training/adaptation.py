"""`rf.adapt` and the handle that it returns: one object per model, owner of its adapters, their tensors, switches, optimizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters.fingerprint import Fingerprint
from rankfold.core.attaching import attach, check_sites, detach, specs_of
from rankfold.core.base import Base
from rankfold.core.blocks import find_blocks
from rankfold.core.checkpointing import InputGradients
from rankfold.core.extras import add_extra, find_extras
from rankfold.core.folding import fold, folded_weights, requantisation_errors, unfold
from rankfold.core.kinds import weight_of
from rankfold.core.planner import require_known
from rankfold.core.probing import CallWatch, probe
from rankfold.core.site import Site
from rankfold.core.store import Member, Slot, Store, store_of
from rankfold.core.structure import SideModule, Spec, Structure, added, trait
from rankfold.core.targets import Targets, find_sites
from rankfold.errors import CompositionError, InactiveError, LayoutError, OptionError, TargetError, UnknownName
from rankfold.linalg.random import Random

from .bucket import Bucket
from .contracts import InitContext, Statistic, Trainable, roles_of
from .method import Method, method
from .prints import fingerprint
from .processes import in_all
from .stacks import Stacked, collect_stack, fill_stack, score_stack

__all__ = ["Adaptation", "Attached", "adapt", "adaptation"]

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(eq=False)
class Attached:
    """What the handle knows of one adapter beside its tensors."""

    method: Method
    member: Member
    seed: int
    dropped: list[tuple[str, str]] = field(default_factory=list)
    labels: tuple[str, ...] | None = None
    trained: dict[str, Any] = field(default_factory=dict)
    engine: Any = None


class Adaptation:
    """The adapters of one model. `rf.adapt` makes it, `rf.adaptation(model)` finds it again.

    >>> import torch, rankfold as rf
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    >>> adaptation = rf.adapt(model, "lora", rank=2)
    >>> [site.key for site in adaptation.sites], adaptation.parameter_count()
    (['0', '2'], 48)
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attached: dict[str, Attached] = {}

    @property
    def model(self) -> nn.Module:
        return self.store.model

    def __repr__(self) -> str:
        lines = [f"{n}: {a.method} at {len(a.member.slots)} sites" for n, a in self.attached.items()]
        return f"Adaptation({'; '.join(lines)}; on: {', '.join(self.store.active) or 'none'})"

    # what there is

    @property
    def active(self) -> dict[str, float | Tensor]:
        """Names of the adapters that are on, with their weights."""
        return dict(self.store.active)

    @property
    def names(self) -> list[str]:
        return list(self.attached)

    @property
    def method(self) -> Method:
        """The method of the first adapter that is on."""
        return self._get(None).method

    def _get(self, name: str | None) -> Attached:
        if name is None:
            name = next(iter(self.store.active), next(iter(self.attached), ""))
        if name not in self.attached:
            raise UnknownName.of("adapter", name, self.attached)
        return self.attached[name]

    @property
    def sites(self) -> list[Site]:
        """Every adapted site, once, in model order."""
        found = {s.site.key: s.site for a in self.attached.values() for s in a.member.slots.values()}
        return list(found.values())

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """Sites that "all-linear" chose and that were left out, with the reason."""
        return [pair for a in self.attached.values() for pair in a.dropped]

    def slots(self, name: str | None = None) -> list[Slot]:
        """The slots of one adapter."""
        return list(self._get(name).member.slots.values())

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Every tensor that one adapter owns, shared ones once: {name in the store: tensor}."""
        return {key: self.store.tensor(key) for key in self._get(name).member.owned()}

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The tensors that train."""
        return [t for t in self.tensors(name).values() if isinstance(t, nn.Parameter) and t.requires_grad]

    def parameter_count(self, name: str | None = None) -> int:
        """Numbers that train, from unique storage."""
        return sum(p.numel() for p in self.parameters(name))

    def trainables(self, name: str | None = None) -> list[Trainable]:
        """The tensors that train as an update sees them."""
        member = self._get(name).member
        found: dict[str, Trainable] = {}
        for key, slot in member.slots.items():
            specs = specs_of(slot.structure, slot.site)
            for field_, (stored, _) in slot.binding.items():
                param = self.store.tensor(stored)
                if stored in found or not param.requires_grad:
                    continue
                start = slot.binding.get(field_ + "0")
                spec = specs[field_]
                found[stored] = Trainable(
                    stored, param, spec.role, key if spec.scope == "site" else None, slot.structure.scale,  # type: ignore[arg-type]
                    self.store.tensor(start[0]) if start and specs[field_ + "0"].role == spec.role + "0" else None,
                    slot.site.kind,
                )  # fmt: skip
        for extra in member.extras.values():
            found[extra.key] = Trainable(extra.key, self.store.tensor(extra.key), "extra")  # type: ignore[arg-type]
        return list(found.values())

    # on and off

    def use(self, *names: str, weight: float | Tensor | Sequence[float] = 1.0) -> Adaptation:
        """Switch to these adapters, each at its weight: W + Σ_k weight_k · (W_k − W), the exact sum of their changes.

        Raises:
            UnknownName: no such adapter.
            OptionError: a name twice, or another number of weights than one, or one for each.
            CompositionError: a weight other than 1 for an adapter that owns whole tensors.
            LayoutError: the model is folded.
        """
        weights: list[Any] = list(weight) if isinstance(weight, list | tuple) else [weight] * len(names)
        if len(weights) != len(names):
            raise OptionError(f"use: {len(names)} adapters and {len(weights)} weights; give one weight, or one for each")
        if len(set(names)) < len(names):
            raise OptionError(f"use: {', '.join(names)}: a name stands there twice; give each adapter one weight")
        for name, w in zip(names, weights):
            if name in self.attached and self.attached[name].member.extras and not (isinstance(w, float | int) and w == 1.0):
                raise CompositionError(f"use: adapter {name!r} owns whole tensors (heads, biases), which have no weight but 1")
        if self.store.is_folded:
            raise LayoutError("the model is folded; unfold before switching adapters")
        self.store.switch(dict(zip(names, weights)))
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model itself, bitwise, within the block.

        Raises:
            LayoutError: the model is folded.
        """
        if self.store.is_folded:
            raise LayoutError("the model is folded; unfold to get at the base")
        with self.store.disabled():
            yield

    @contextmanager
    def context(self, **values: Any) -> Iterator[None]:
        """Values that gates read during forward passes in the block: weights, token_mask, conditioning, time."""
        before = {k: getattr(self.store.context, k) for k in values}
        try:
            for k, v in values.items():
                setattr(self.store.context, k, v)
            yield
        finally:
            for k, v in before.items():
                setattr(self.store.context, k, v)

    def fold(self) -> dict[str, float]:
        """Put W' in the place of W, keeping W: then the model runs at the speed of the base. Gives the rounding error by module.

        Raises:
            LayoutError: already folded, a side module, or a change that depends on the input.
        """
        return fold(self.store)

    def requantisation_errors(self) -> dict[str, float]:
        """‖Q(W') − W'‖ / ‖W' − W‖ by module: what of a change would be lost if the folded weights of a quantised base were
        stored in its format again, which `fold` therefore doesn't do.

        Raises:
            LayoutError: no base is quantised, a format that can't be written, or as `fold`.
        """
        return requantisation_errors(self.store)

    def unfold(self) -> None:
        """The original weights again, bitwise.

        Raises:
            LayoutError: the model is not folded.
        """
        unfold(self.store)

    def folded_weights(self) -> dict[str, Tensor]:
        """{name of the stored weight: W'} without touching the model."""
        return folded_weights(self.store)

    def remove(self, name: str | None = None) -> None:
        """Take an adapter off and free its tensors; with the last one the model is as it was before `adapt`."""
        names = [name] if name else list(self.attached)
        for n in names:
            engine = self._get(n).engine
            detach(self.model, n)
            if engine is not None:
                engine.uninstall()
            del self.attached[n]

    # training

    def objectives(self) -> dict[str, Tensor]:
        """Named loss terms of the structures, policies and losses that are on; add their sum to the loss."""
        terms: list[dict[str, Tensor]] = []
        for name in self.store.active:
            a = self.attached[name]
            slots = list(a.member.slots.values())
            terms.append(a.member.structure.objectives({s.site.key: s.t(self.store) for s in slots}, [s.site for s in slots]))
            if a.engine is not None:
                terms.append(a.engine.objectives())
        return added(*terms)

    def bucket(self, name: str | None = None, group: Any = None) -> Bucket:
        """The gradients of one adapter as one flat buffer: `adaptation.bucket().all_reduce()` averages them over the processes of
        torch.distributed, for a loop of your own whose model no DistributedDataParallel wraps."""
        return Bucket(self.parameters(name), group)

    def optimizer(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        name: str | None = None,
        total_steps: int | None = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer of the method's update over this adapter's tensors, with its rank policy acting around each step.

        Args:
            total_steps: length of the run; a policy with a schedule needs it.

        Raises:
            OptionError: a policy that needs `total_steps` without it.
            InactiveError: (from the first step) nothing had a gradient.
        """
        from .engine import Engine

        a = self._get(name)
        if a.method.rank.steps and total_steps is None:
            raise OptionError(f"optimizer: rank policy {a.method.rank.name!r} follows a schedule; give total_steps")
        optimizer = a.method.update.optimizer(self.trainables(name), lr=lr, weight_decay=weight_decay, **options)
        a.engine = a.engine or Engine(a.method.rank, a.method.losses, self.store, a.member)
        a.engine.install(optimizer, total_steps)
        return optimizer

    # files

    def save(self, path: str | Path, name: str | None = None) -> Path:
        """Write one adapter to a folder: tensors as they are trained, method, base fingerprint. A crash leaves the previous
        one whole. Where the base is cut over processes each must call this, and the first one writes."""
        from .saving import save

        return save(self, path, name)

    def fingerprint(self, name: str | None = None) -> Fingerprint:
        """Of the base weights that this adapter changes."""
        return fingerprint(self.model, sorted({s.site.name if s.base is None else s.site.weight for s in self.slots(name)}))


def adaptation(model: nn.Module) -> Adaptation:
    """The handle of a model that has adapters.

    Raises:
        LayoutError: it has none.
    """
    store = store_of(model)
    if store is None:
        raise LayoutError(f"{type(model).__name__} has no adapter; rf.adapt(model, METHOD) gives it one")
    if store.handle is None or store.handle.store is not store:
        raise LayoutError("the model's adapters have lost their handle: it was pickled by hand; use adaptation.save and rf.load")
    return store.handle


def choose_sites(
    model: nn.Module, m: Method, targets: Any, exclude: Any = (), regex: bool = False
) -> tuple[list[Site], list[tuple[str, str]], Targets]:
    """(sites, those left out with the reason, the parsed targets) for a method on a model."""
    chosen = Targets.of(targets, exclude, regex)
    for pattern in (p for p in (*chosen.patterns, *chosen.exclude) if chosen.regex and p.startswith("re:")):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise TargetError(f"targets: {pattern!r} is no regular expression: {error}") from None
    if isinstance(m.structure, SideModule):
        sites = m.structure.places(find_blocks(model, chosen))
    else:
        sites = find_sites(model, chosen)
    good, dropped = check_sites(model, m.structure, sites, chosen.automatic)
    return good, dropped, chosen


def adapt(
    model: nn.Module,
    method_: str | Method,
    *,
    targets: Any = "all-linear",
    exclude: Any = (),
    name: str = "default",
    extras: str | Sequence[str] = (),
    batches: Iterable[Any] | None = None,
    loss: LossFunction | None = None,
    seed: int = 0,
    plan: str = "auto",
    memory: str = "auto",
    regex: bool = False,
    budget: int | None = None,
    progress: Any = None,
    **options: Any,
) -> Adaptation:
    """Give a model an adapter: a trained change of its weights, beside weights that are never written.

    The model stays the same object. Its parameters are frozen; the adapter's are `adaptation.parameters()`, and also in
    `model.parameters()`. Disabled, or at the start of every method that declares it, the function is the base's.

    Args:
        model: any module; transformers' need nothing special.
        method_: "lora", "dora", "magnitude+hra", "lora+init:pissa", ... (see `rf.method`), or a Method.
        targets: "all-linear" (no heads, routers, embeddings), "all", names, globs, row slices ("c_attn[q]").
        exclude: patterns taken out again.
        name: of this adapter; a model may carry several. The new one is switched on alone.
        extras: what trains whole, in copies that belong to the adapter: modules (a head) and parameters by name or glob
            ("classifier", "*.bias", "cls_token"), "biases" (of the adapted modules), "all-biases", "norms", and rows of a weight
            ("embed_tokens[50:52]" after resize_token_embeddings), stored as these rows. Tied weights stay tied.
        batches: what a data-driven init looks at, and what the probe runs; any iterable of model inputs.
        loss: loss(model, batch) -> scalar, for gradient-driven inits and the probe.
        seed: of every random start; the same seed gives the same tensors on every machine.
        plan, memory: what the planner may do ("auto", or one of rankfold.core.PLANS; "auto", "keep", "recompute"), for the whole
            model: the last call decides.
        regex: take patterns that start with "re:" as regular expressions.
        budget: bytes that statistics may hold; more is refused before the pass starts.
        progress: called with a line of text as the pass for statistics goes on.
        **options: of the method, bare or qualified: rank=8, alpha=16, **{"init.iterations": 4}.

    Raises:
        TargetError: targets that match nothing, a rank above the matrix, a site that can't be adapted.
        CompositionError, UnknownName, OptionError: from the method.
        InactiveError: the probe found a site that is bypassed or gets no gradient.
        LayoutError: the name is taken, or the model is folded.
        DataError, NumericError, BudgetError: from the pass for statistics.

        Whatever is raised, the model is as it was before.

    >>> import torch, rankfold as rf
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    >>> x = torch.ones(1, 8)
    >>> before = model(x)
    >>> adaptation = rf.adapt(model, "dora", rank=2)
    >>> torch.equal(model(x), before)
    True
    """
    require_known(plan, memory)
    m = method(method_, **options)
    sites, dropped, chosen = choose_sites(model, m, targets, exclude, regex)
    seen = _several(batches)
    statistics, unreached = _statistics(model, m, sites, seen, loss, budget, progress)
    if unreached and not chosen.automatic:
        raise InactiveError(f"no gradient reaches {', '.join(unreached)}: init {m.init.name!r} has nothing to start from there")
    dropped += [(key, "gets no gradient") for key in unreached]
    structures, removed = _allocate(m, [s for s in sites if s.key not in unreached], statistics)
    dropped += removed
    on_before = dict(there.active) if (there := store_of(model)) is not None else {}
    while True:
        sites = [s for s in sites if s.key in structures]
        member = attach(model, name, sites, structures, _filler(m, statistics, seed), seed)
        store = member_store(model)
        handle = store.handle = store.handle or Adaptation(store)
        a = handle.attached[name] = Attached(m, member, seed, dropped)
        try:
            _add_extras(store, member, m, sites, extras)
            store.switch({name: 1.0})
            watch = CallWatch(store, member)
            silent = in_all(probe(store, member, seen, loss, chosen.automatic)) if seen is not None else []
        except BaseException:
            handle.remove(name)
            store.switch(on_before)
            raise
        if not silent:
            break
        handle.remove(name)  # once more without the sites that "all-linear" chose and that no gradient reaches
        dropped += silent
        structures = {key: structure for key, structure in structures.items() if key not in dict(silent)}
        if not structures:
            raise InactiveError("no gradient reaches any site: the loss does not depend on what the model gives")
    store.plan, store.memory = plan, memory
    store.watchers += [InputGradients(store, member), OwnUpdate(a), *([watch] if seen is None else [])]
    return handle


def member_store(model: nn.Module) -> Store:
    store = store_of(model)
    assert store is not None
    return store


def _several(batches: Iterable[Any] | None) -> Sequence[Any] | None:
    """Batches that can be gone over more than once: a pass for statistics and the probe both read them."""
    if batches is None or isinstance(batches, Sequence) or hasattr(batches, "__len__"):
        return batches  # type: ignore[return-value]
    return list(batches)


def _statistics(
    model: nn.Module, m: Method, sites: Sequence[Site], batches: Any, loss: Any, budget: Any, progress: Any
) -> tuple[dict[str, Statistic], list[str]]:
    """(what the init asked for, by site; the sites that no gradient reached)."""
    wanted: dict[str, tuple[Site, Statistic]] = {}
    for site in sites:
        collect_one = m.init.collect if site.batch is None else partial(collect_stack, m.init)
        statistic = collect_one(site, _roles(m, m.structure, specs_of(m.structure, site)))
        if statistic is not None:
            wanted[site.key] = (site, statistic)
    if not wanted:
        return {}, []
    if batches is None:
        raise OptionError(f"init {m.init.name!r} looks at data: give batches=..., an iterable of model inputs")
    from .statistics import collect

    found = collect(model, wanted, batches, loss, budget=budget, progress=progress)
    return found, [key for key in wanted if key not in found]


def _roles(m: Method, structure: Structure, specs: Mapping[str, Spec]) -> Any:
    return roles_of(specs, getattr(structure.core, "rank", 0) or 0, structure.scale, trainable=not m.init.frozen)


def _allocate(
    m: Method, sites: Sequence[Site], statistics: Mapping[str, Statistic]
) -> tuple[dict[str, Structure], list[tuple[str, str]]]:
    if not m.rank.allocates:
        return {s.key: m.structure for s in sites}, []
    scores = {}
    for site in sites:  # a site without a statistic (an embedding) keeps its rank
        statistic = statistics.get(site.key)
        if isinstance(statistic, Stacked):
            found = score_stack(m.init, site, statistic)
        else:
            found = m.init.scores(site, statistic) if statistic is not None else None
        if found is not None:
            scores[site.key] = found
    core: Any = m.structure.core
    start = core.rank
    limits, costs = {s.key: min(s.shape) for s in sites}, {s.key: sum(s.shape) for s in sites}
    ranks = m.rank.allocate(scores, dict.fromkeys(limits, start), limits, costs)
    structures = {key: m.structure.at_rank(r) for key, r in ranks.items() if r}
    if not structures:
        raise TargetError(f"rank {m.rank.name!r} left no site with a rank above zero")
    return structures, [(key, "given rank 0") for key, r in ranks.items() if not r]


def _filler(m: Method, statistics: Mapping[str, Statistic], seed: int) -> Any:
    def fill(site: Site, structure: Structure, base: Base, specs: Mapping[str, Spec]) -> dict[str, Tensor]:
        roles = _roles(m, structure, specs)
        fill_one = m.init.fill if site.batch is None else partial(fill_stack, m.init)
        with torch.no_grad():
            values = fill_one(site, base.gather(), roles, InitContext(Random(seed, "init", site.key), statistics.get(site.key)))
        mine = {n: spec.role for n, spec in specs.items() if spec.trainable or m.init.frozen or spec.role.endswith("0")}
        names = {role: n for n, role in mine.items() if role in values}
        return {names[role]: value for role, value in values.items() if role in names}

    return fill


def _add_extras(store: Store, member: Member, m: Method, sites: Sequence[Site], extras: str | Sequence[str]) -> None:
    patterns = [extras] if isinstance(extras, str) else list(extras)
    for wanted in find_extras(store.model, patterns, sites):
        add_extra(store, member, wanted.module, wanted.param, rows=wanted.rows, named=wanted.named)
    if trait(m.structure, "owns"):  # a full copy of every weight means every other parameter too
        covered = {id(weight_of(s.base.module, s.site)) for s in member.slots.values() if s.base is not None}
        modules = {n: mod for n, mod in store.model.named_modules() if n.partition(".")[0] != "rankfold"}
        covered |= {id(modules[e.module]._parameters[e.param]) for e in member.extras.values()}
        for path, module in modules.items():
            for param, value in list(module._parameters.items()):
                if value is not None and id(value) not in covered:
                    covered.add(id(value))
                    add_extra(store, member, path, param)


class OwnUpdate:
    """Law 6 for updates and policies: if another optimizer moved the tensors of a method that needs ours, the next forward
    raises."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.member = attached.member
        self.seen: int | None = None
        self.sample: list[Tensor] = []

    def before_forward(self, store: Store) -> None:
        a = self.attached
        if not (a.method.update.own or a.method.rank.steps) or not store.model.training:
            return
        tensors = [t for t in map(store.tensor, a.member.owned()) if t.requires_grad]
        version = sum(t._version for t in tensors)
        # fused optimizers leave the versions as they are; where ours was never made, it is worth looking at the values
        sample = [t.detach().flatten()[:16].clone() for t in tensors] if a.engine is None else []
        drifted = any(not torch.equal(now, then) for now, then in zip(sample, self.sample))
        by_us = a.engine is not None and a.engine.moved
        if self.seen is not None and (version != self.seen or drifted) and not by_us:
            what = f"update {a.method.update.name!r}" if a.method.update.own else f"rank policy {a.method.rank.name!r}"
            raise InactiveError(
                f"adapter {a.member.name!r}: another optimizer moved its tensors, so {what} did nothing. "
                f"Train with adaptation.optimizer(lr=...), or choose update:adamw and rank:fixed"
            )
        if a.engine is not None:
            a.engine.moved = False
        self.seen, self.sample = version, sample

    def after_forward(self, store: Store) -> None:
        return None

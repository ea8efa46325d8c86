"""`rf.adapt`: which sites, statistics for a data-driven init, ranks, the start of the tensors, and the probe."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.attaching import attach, check_sites, specs_of
from rankfold.core.base import Base
from rankfold.core.blocks import find_blocks
from rankfold.core.checkpointing import InputGradients, LostGradients
from rankfold.core.extras import add_extra, find_extras
from rankfold.core.kinds import weight_of
from rankfold.core.planner import require_known
from rankfold.core.probing import CallWatch, among_experts, probe
from rankfold.core.site import Site
from rankfold.core.store import Member, Store, store_of
from rankfold.core.structure import SideModule, Spec, Structure, trait
from rankfold.core.targets import Targets, find_sites
from rankfold.errors import InactiveError, OptionError, TargetError
from rankfold.linalg.random import Random

from .adaptation import Adaptation, Attached, member_store
from .contracts import InitContext, Statistic, roles_of
from .method import Method, method
from .own_update import OwnUpdate
from .processes import in_all
from .stacks import Stacked, collect_stack, fill_stack, score_stack

__all__ = ["adapt"]

LossFunction = Callable[[nn.Module, Any], Tensor]


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
        plan, memory: what the planner may do ("auto", or one of rankfold.core.PLANS; "auto", "keep", "recompute") while this
            adapter is on.
        regex: take patterns that start with "re:" as regular expressions.
        budget: bytes that statistics may hold; more is refused before the pass starts.
        progress: called with a line of text as the pass for statistics goes on.
        **options: of the method, bare or qualified: rank=8, alpha=16, **{"init.iterations": 4}.

    Raises:
        TargetError: targets that match nothing, a rank above the matrix, a site that can't be adapted.
        CompositionError, UnknownName, OptionError: from the method; OptionError also for what is no module.
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
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: got {type(model).__name__}; adapt takes the torch.nn.Module itself")
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
        member.plan, member.memory = plan, memory
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
    store.watchers += [
        InputGradients(store, member),
        LostGradients(store, member),
        OwnUpdate(a),
        *([watch] if seen is None else []),
    ]
    return handle


def _several(batches: Iterable[Any] | None) -> Sequence[Any] | None:
    """Batches that can be gone over more than once: a pass for statistics and the probe both read them."""
    if batches is None or isinstance(batches, Sequence) or hasattr(batches, "__len__"):
        return batches  # type: ignore[return-value]
    return list(batches)


def _statistics(
    model: nn.Module, m: Method, sites: Sequence[Site], batches: Any, loss: Any, budget: Any, progress: Any
) -> tuple[dict[str, Statistic], list[str]]:
    """(what the init asked for, by site; the sites that no gradient reached). An expert without tokens is in neither."""
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
    unreached = {key: site.module for key, (site, _) in wanted.items() if key not in found}
    idle = among_experts(model, {wanted[key][0].module for key in found}, unreached)
    if idle:
        warnings.warn(
            f"init {m.init.name!r}: no token of these batches reached {len(idle)} site(s) of experts: "
            f"{', '.join(sorted(idle)[:5])}. They start without data, by the structure's own law; more batches may reach them",
            stacklevel=3,
        )
    return found, [key for key in unreached if key not in idle]


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

"""One pass over data for every statistic that an init asked for: inputs of sites, and gradients of weights that stay frozen."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.bases import is_packed
from rankfold.core.kinds import kind_named, weight_of
from rankfold.core.probing import among_experts, call_model, unchanged
from rankfold.core.sharding import close
from rankfold.core.site import Site
from rankfold.core.store import store_of
from rankfold.errors import BudgetError, DataError, InactiveError, LayoutError, NumericError, OptionError
from rankfold.linalg.sharded import whole

from .contracts import Statistic
from .processes import process_count

__all__ = ["MODES", "Plan", "collect", "plan"]

MODES = ("joint", "by_block")
Wanted = Mapping[str, tuple[Site, Statistic]]
LossFunction = Callable[[nn.Module, Any], Tensor]
_BLOCK = re.compile(r"^(?:.*?\.)??\d+(?=\.|$)")


@dataclass(frozen=True)
class Plan:
    """What will be held, in bytes: by site (a shared statistic counts at its first), at most at one time; and how many passes."""

    sites: dict[str, int]
    peak: int
    passes: int

    def __str__(self) -> str:
        return f"statistics: {self.peak:,} bytes for {len(self.sites)} sites in {self.passes} pass{'es' * (self.passes > 1)}"


def plan(wanted: Wanted, mode: str = "joint") -> Plan:
    """The bytes that `collect` will hold: the statistics of all sites at once, or of the largest block, and one dense gradient.

    >>> from rankfold.training.streams import GradientSum
    >>> wanted = {key: (Site(key, (4, 2)), GradientSum((4, 2), rank=1)) for key in ("layer.0.fc", "layer.1.fc")}
    >>> plan(wanted).peak, plan(wanted, "by_block").peak
    (96, 64)
    """
    if mode not in MODES:
        raise OptionError(f"mode: got {mode!r}; allowed: {', '.join(MODES)}")
    seen: set[int] = set()
    sites = {}
    for key, (_, statistic) in wanted.items():
        sites[key] = 0 if id(statistic) in seen else statistic.nbytes
        seen.add(id(statistic))
    blocks = _blocks(wanted, mode)
    peaks = []
    for block in blocks:
        shapes = [(wanted[k][0].batch or 1, *wanted[k][0].shape) for k in block if wanted[k][1].source == "gradient"]
        dense = [4 * prod(shape) for shape in shapes]
        peaks.append(sum(sites[k] for k in block) + max(dense, default=0))
    return Plan(sites, max(peaks, default=0), len(blocks))


def _blocks(wanted: Wanted, mode: str) -> list[list[str]]:
    """Keys that are collected together: all, or those of one numbered layer at a time."""
    if mode == "joint":
        return [list(wanted)]
    groups: dict[str, list[str]] = {}
    owner: dict[int, str] = {}  # sites that share a statistic stay together, else it would see the data twice
    for key, (site, statistic) in wanted.items():
        match = _BLOCK.match(site.name)
        block = owner.setdefault(id(statistic), match[0] if match else "")
        groups.setdefault(block, []).append(key)
    return list(groups.values())


def collect(
    model: nn.Module,
    wanted: Wanted,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    *,
    mode: str = "joint",
    budget: int | None = None,
    drop_unlabelled: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Statistic]:
    """Show every statistic its data and give them back by site key, finished.

    Inputs are seen by hooks, padding left out; sites that read the same tensor share one statistic. Gradients are those of the
    frozen weights [out, in]: each is handed over and freed inside the backward pass, so that one dense gradient is alive at a
    time; tied weights have one gradient, which all their sites see. The model runs in eval mode (running averages of norm layers
    belong to the base and are never written) with its adapters off; mode, gradients, random state and `requires_grad` are put
    back. Over processes of torch.distributed the statistics are joined at the end.

    Args:
        model: whose sites these are.
        wanted: {site key: (site, its statistic)}.
        batches: model inputs; "by_block" goes over them once per block.
        loss: loss(model, batch) -> scalar; needed where a statistic looks at gradients.
        mode: "joint" is one pass for all; "by_block" one pass per numbered layer, holding one layer's statistics at a time.
        budget: bytes that may be held.
        drop_unlabelled: leave out the tokens whose label in batch["labels"] is -100.
        progress: called with a line of text: the byte plan first, then the state after each batch.

    Returns:
        {site key: statistic}; left out are sites that no gradient reached, and experts of a list that no token reached while
        others of their list were called.

    Raises:
        BudgetError: the plan is above the budget. OptionError: gradients are needed and there is no loss.
        DataError: no batches, or an iterator that can't be gone over again. InactiveError: a site's module was never called.
        NumericError: NaN or Inf in a site's input or gradient, or in the loss. LayoutError: a weight that can't have a gradient.
    """
    gradients = [key for key, (_, s) in wanted.items() if s.source == "gradient"]
    if gradients and loss is None:
        raise OptionError(f"statistics: {gradients[0]} needs gradients: give loss=..., a function loss(model, batch) -> scalar")
    if not wanted:
        return {}
    if mode == "by_block" and iter(batches) is batches:
        raise DataError("statistics: by_block goes over the batches once per block; give a list or a DataLoader, not an iterator")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise DataError("statistics: no batches at all; give at least one")
    with ExitStack() as stack:
        stack.enter_context(_untouched(model))
        looks = _Pass(model, loss, drop_unlabelled, progress)
        wanted = looks.share(wanted, first)
        planned = plan(wanted, mode)
        if progress:
            progress(str(planned))
        if budget is not None and planned.peak > budget:
            largest = max(planned.sites, key=lambda k: planned.sites[k])
            raise BudgetError(
                f"statistics need {planned.peak:,} bytes, allowed are {budget:,}; the largest is {largest} with "
                f"{planned.sites[largest]:,}.\n  choose fewer targets, a smaller rank, a sketch, or mode='by_block'"
            )
        reached: set[str] = set()
        for k, block in enumerate(_blocks(wanted, mode)):
            data = chain([first], iterator) if k == 0 else iter(batches)
            reached |= looks.run({key: wanted[key] for key in block}, data)
    _require_inputs(model, wanted, reached)
    return {key: statistic for key, (_, statistic) in wanted.items() if key in reached}


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode, adapters off; afterwards gradients, `requires_grad` and whatever `unchanged` looks after are as they were."""
    close(model)
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    store = store_of(model)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        if store is not None:
            stack.enter_context(store.disabled())
        try:
            model.eval()
            for p, _, _ in before:
                p.requires_grad_(False)
                p.grad = None
            yield
        finally:
            for p, required, grad in before:
                p.requires_grad_(required)
                p.grad = grad


@dataclass
class _Seen:
    """The distinct inputs of one forward pass. A tensor that is gone matches nothing: its memory may hold another one by now."""

    alive: list[tuple[weakref.ref, tuple]] = field(default_factory=list)
    calls: dict[str, list[int]] = field(default_factory=dict)

    def note(self, name: str, x: Tensor) -> None:
        mark = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        known = [k for k, (ref, other) in enumerate(self.alive) if ref() is not None and other == mark]
        if not known:
            known = [len(self.alive)]
            self.alive.append((weakref.ref(x), mark))
        self.calls.setdefault(name, []).append(known[0])


class _Pass:
    """The hooks of a pass, and what they look up: the batch and its masks."""

    def __init__(self, model: nn.Module, loss: LossFunction | None, drop_unlabelled: bool, progress: Any) -> None:
        self.model, self.loss, self.drop_unlabelled, self.progress = model, loss, drop_unlabelled, progress
        self.modules = dict(model.named_modules())
        self.batch: Any = None
        self.call: Mapping[str, Any] = {}
        self.fired: set[int | str] = set()

    def share(self, wanted: Wanted, batch: Any) -> dict[str, tuple[Site, Statistic]]:
        """The same with one statistic for all sites that read the same tensors at every call of a first forward pass."""
        inputs = {key: (site, s) for key, (site, s) in wanted.items() if s.source == "input" and kind_named(site.kind).flat}
        if len(inputs) < 2:
            return dict(wanted)
        seen = _Seen()
        names = sorted({site.name for site, _ in inputs.values()})
        hooks = [self._on_input(name, partial(seen.note, name)) for name in names]
        try:
            with torch.no_grad():
                self._forward(batch)
        finally:
            _remove(hooks)
        leaders: dict[tuple, Statistic] = {}
        shared = dict(wanted)
        for key, (site, statistic) in inputs.items():
            if site.name in seen.calls:
                alike = (tuple(seen.calls[site.name]), type(statistic), statistic.nbytes)
                shared[key] = (site, leaders.setdefault(alike, statistic))
        return shared

    def run(self, wanted: Wanted, batches: Iterable[Any]) -> set[str]:
        """Show the batches to these statistics until all are done; join processes; give the keys that saw something."""
        reached: set[str] = set()
        distinct = list({id(s): s for _, s in wanted.values()}.values())
        joint = process_count() > 1
        hooks = [*self._input_hooks(wanted, reached), *self._gradient_hooks(wanted, reached)]
        try:
            for k, batch in enumerate(batches, 1):
                backward = any(s.source == "gradient" and not s.done for s in distinct)
                self._step(batch, backward)
                left = sum(not s.done for s in distinct)
                if self.progress:
                    self.progress(f"statistics: batch {k}, {len(distinct) - left} of {len(distinct)} settled")
                if not left and not joint:  # processes must agree on the number of passes: a sharded model talks in each
                    break
        finally:
            _remove(hooks)
            for site, statistic in wanted.values():
                if statistic.source == "gradient":
                    weight_of(self.modules[site.module], site).requires_grad_(False)
        if joint:
            reached = _join(distinct, wanted, reached)
        for statistic in {id(wanted[key][1]): wanted[key][1] for key in reached}.values():
            statistic.finish()
        return reached

    def _step(self, batch: Any, backward: bool) -> None:
        if not backward:
            with torch.no_grad():
                self._forward(batch)
            return
        self.fired.clear()
        with torch.enable_grad():
            value = self._forward(batch)
            if not torch.isfinite(value).all():
                raise NumericError(
                    "statistics: the loss is NaN or Inf before any training; look at the batch and the model's dtype"
                )
            if value.requires_grad:
                value.backward()

    def _forward(self, batch: Any) -> Tensor:
        self.batch, self.call = batch, {}
        hook = self.model.register_forward_pre_hook(self._on_call, with_kwargs=True)
        try:
            return self.loss(self.model, batch) if self.loss is not None else call_model(self.model, batch)
        finally:
            hook.remove()
            self.batch, self.call = None, {}

    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.call = kwargs

    # inputs

    def _on_input(self, name: str, see: Callable[[Tensor], Any]) -> Any:
        return self._on_call_of(name, lambda module, args, kwargs: see(args[0] if args else next(iter(kwargs.values()))))

    def _on_call_of(self, name: str, see: Callable[[nn.Module, tuple, dict], Any]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            see(module, args, kwargs)

        return self.modules[name].register_forward_pre_hook(hook, with_kwargs=True)

    def _input_hooks(self, wanted: Wanted, reached: set[str]) -> list[Any]:
        """One hook per statistic, at the first of the sites that share it."""
        sharing: dict[int, list[str]] = {}
        for key, (_, statistic) in wanted.items():
            if statistic.source == "input":
                sharing.setdefault(id(statistic), []).append(key)
        return [self._feed(wanted[keys[0]], keys, reached) for keys in sharing.values()]

    def _feed(self, leader: tuple[Site, Statistic], keys: Sequence[str], reached: set[str]) -> Any:
        site, statistic = leader

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            reached.update(keys)
            if not statistic.done:
                with torch.no_grad():
                    rows = kind_named(site.kind).inputs(module, site, args, kwargs, self._keep)
                for part in [rows] if isinstance(rows, Tensor) else rows:
                    _require_finite(part, site, "input")
                statistic.observe(rows)  # type: ignore[arg-type]

        return self._on_call_of(site.module, see)

    def _keep(self, lead: torch.Size) -> Tensor | None:
        """Which of the rows of an input [*lead, in] count: padding is left out, and where asked what has no label."""
        keep: Tensor | None = None
        for name in ("attention_mask", "labels") if self.drop_unlabelled else ("attention_mask",):
            value = self.call.get(name)
            if value is None and hasattr(self.batch, "keys"):
                value = self.batch[name] if name in self.batch.keys() else None  # noqa: SIM118  (a BatchEncoding, not a dict)
            if isinstance(value, Tensor) and (value.shape == lead or (len(lead) == 1 and value.numel() == lead[0])):
                here = (value != -100 if name == "labels" else value.bool()).reshape(lead)
                keep = here if keep is None else keep & here
        return keep

    # gradients

    def _gradient_hooks(self, wanted: Wanted, reached: set[str]) -> list[Any]:
        """One hook per weight: tied sites and row slices of one weight are fed from one gradient."""
        users: dict[int, tuple[nn.Parameter, list[str]]] = {}
        packed: dict[str, list[str]] = {}
        for key, (site, statistic) in wanted.items():
            if statistic.source != "gradient":
                continue
            if is_packed(self.modules[site.module]):
                packed.setdefault(site.module, []).append(key)
                continue
            weight: Any = weight_of(self.modules[site.module], site)
            if not weight.is_floating_point():
                raise LayoutError(f"{key}: its weight is stored as {weight.dtype}, which has no gradient; load it in bfloat16")
            weight.requires_grad_(True)
            users.setdefault(id(weight), (weight, []))[1].append(key)
        hooks = [self._hand_over(weight, [(k, *wanted[k]) for k in keys], reached) for weight, keys in users.values()]
        return hooks + [h for path, keys in packed.items() for h in self._beside(path, [(k, *wanted[k]) for k in keys], reached)]

    def _beside(self, path: str, users: Sequence[tuple[str, Site, Statistic]], reached: set[str]) -> list[Any]:
        """A packed weight gets no gradient of its own: gᵀ x from the input of its module and the gradient of what comes out."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if args and torch.is_grad_enabled() and not args[0].requires_grad:  # then nothing before it trains
                return (args[0].detach().requires_grad_(), *args[1:]), kwargs
            return None

        def leave(module: nn.Module, args: tuple, y: Tensor) -> None:
            if y.requires_grad:
                x = args[0].detach()
                y.register_hook(lambda g: take(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])))

        def take(g: Tensor, x: Tensor) -> None:
            if path in self.fired:
                raise LayoutError(
                    f"{users[0][0]}: its module is called several times in one pass, so its gradient comes in pieces"
                )
            self.fired.add(path)
            for key, site, statistic in users:
                G = g.mT @ x if site.rows is None else g[:, slice(*site.rows)].mT @ x
                _require_finite(G, site, "gradient")
                reached.add(key)
                if not statistic.done:
                    statistic.observe(G)

        module = self.modules[path]
        return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    def _hand_over(self, weight: nn.Parameter, users: Sequence[tuple[str, Site, Statistic]], reached: set[str]) -> Any:
        def hook(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None  # freed on return: one dense gradient at a time
            assert grad is not None
            if id(parameter) in self.fired:
                raise LayoutError(
                    f"{users[0][0]}: its gradient comes in pieces; use gradient checkpointing with use_reentrant=False"
                )
            self.fired.add(id(parameter))
            grad = whole(grad.to_dense() if grad.is_sparse else grad)  # where W is cut, the mean over the processes
            for key, site, statistic in users:
                G = kind_named(site.kind).view(grad, site)
                G = G if site.rows is None else G[..., site.rows[0] : site.rows[1], :]
                _require_finite(G, site, "gradient")
                reached.add(key)
                if not statistic.done:
                    statistic.observe(G)

        return weight.register_post_accumulate_grad_hook(hook)


def _require_inputs(model: nn.Module, wanted: Wanted, reached: set[str]) -> None:
    called = {wanted[key][0].module for key in reached}
    silent = {key: site.module for key, (site, s) in wanted.items() if s.source == "input" and key not in reached}
    idle = among_experts(model, called, silent)
    if never := [key for key in silent if key not in idle]:
        raise InactiveError(
            f"statistics: {', '.join(never[:5])} saw no input: the forward pass does not call these modules. "
            f"Leave them out: exclude={sorted({wanted[k][0].name for k in never})[:3]}"
        )


def _remove(hooks: Iterable[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _require_finite(value: Tensor, site: Site, what: str) -> None:
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise NumericError(f"statistics: {site.key}: {bad} of {value.numel()} values of its {what} are NaN or Inf")


def _join(distinct: Sequence[Statistic], wanted: Wanted, reached: set[str]) -> set[str]:
    """Every process gets the statistic of all data, and the keys that any of them saw."""
    on_gpu = torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    flags = torch.tensor([key in reached for key in wanted], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    for statistic in distinct:
        local = statistic.state()
        states: list[dict[str, Tensor]] = [{} for _ in range(process_count())]
        for name, tensor in local.items():
            sent = tensor.to(device).contiguous()
            parts = [torch.empty_like(sent) for _ in states]
            torch.distributed.all_gather(parts, sent)
            for state, part in zip(states, parts):
                state[name] = part.to(tensor.device)
        statistic.merge(states)
    return {key for key, flag in zip(wanted, flags.tolist()) if flag}

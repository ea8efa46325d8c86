"""How a change gets into a model: the site's module changes class in place and its forward asks the host first.

The module keeps its place, its name, its state_dict keys and its isinstance answers; only `forward` is new.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.linalg import Operator, Scaled, Sum, difference, like

from .kinds import kind_named
from .planner import Program, run
from .store import Extra, Slot, Store
from .structure import Context, SideModule, trait

__all__ = ["Host", "fold_weight", "host_module", "hosted", "release_module", "site_program", "swapped"]


class Host:
    """What stands behind a hosted module: its adapters' slots by site, its extra parameters, its side modules, and a call
    counter."""

    def __init__(self, store: Store, path: str) -> None:
        self.store = store
        self.path = path
        self.slots: dict[str, list[Slot]] = {}
        self.extras: list[tuple[str, Extra]] = []
        self.sides: list[Slot] = []
        self.calls = 0
        self._ready: dict[str, tuple[int, bool, Program]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}  # programs hold closures over this model: a copy makes its own

    @property
    def empty(self) -> bool:
        return not (self.slots or self.extras or self.sides)

    def forward(self, module: nn.Module, native: Any, args: tuple, kwargs: dict) -> Any:
        store = self.store
        if not torch.compiler.is_compiling():
            self.calls += 1
        if not store.enabled or not store.active:
            return native(module, *args, **kwargs)
        with swapped(module, self._own(module, store)) if self.extras and not store.is_folded else nullcontext():
            on = self._on()
            if on:
                y = kind_named(on[0][0].site.kind).forward(self, module, native, on, args, kwargs)
            else:
                y = native(module, *args, **kwargs)
        for slot in self.sides:
            if slot.member.name in store.active:
                y = _first(y, lambda h, slot=slot: self._beside(module, slot, h))
        return y

    def _beside(self, module: nn.Module, slot: Slot, h: Tensor) -> Tensor:
        weight = self.store.active[slot.member.name]
        assert isinstance(slot.structure, SideModule)
        changed = slot.structure.forward(h, slot.t(self.store), slot.site, Context(module.training))
        return changed if isinstance(weight, float | int) and weight == 1.0 else h + weight * (changed - h)

    def _own(self, module: nn.Module, store: Store) -> dict[str, Tensor]:
        """The adapter's own parameters in the dtype of those that they stand for: the masters are float32, the module may be
        bf16."""
        on = [extra for name, extra in self.extras if name in store.active]
        return {e.param: like(store.tensor(e.key), module._parameters[e.param]) for e in on}  # type: ignore[arg-type]

    def _on(self) -> list[list[Slot]]:
        """Slots of the adapters that are on, by site."""
        store = self.store
        if store.is_folded:
            return []
        groups = ([s for s in group if s.member.name in store.active] for group in self.slots.values())
        return [group for group in groups if group]

    def run(self, module: nn.Module, slots: Sequence[Slot], x: Tensor, bias: Tensor | None) -> Tensor:
        """x W'ᵀ + bias at one site, by the planner."""
        return run(self.program(slots, module.training), x, bias, self.store.plan, self.store.memory)

    def program(self, slots: Sequence[Slot], training: bool) -> Program:
        """The program of a site, kept while nothing about it changes."""
        key = slots[0].site.key
        ready = self._ready.get(key)
        if ready is not None and ready[0] == self.store.version and ready[1] == training:
            return ready[2]
        program = site_program(self.store, slots, training)
        if program.keep():
            self._ready[key] = (self.store.version, training, program)
        return program


def site_program(store: Store, slots: Sequence[Slot], training: bool) -> Program:
    """One adapter at weight 1: its own expression. Several, or weighted: W + Σ_k w_k (expr_k − W), the sum of their changes."""
    ts = [slot.t(store) for slot in slots]
    weights = [store.active.get(slot.member.name, 1.0) for slot in slots]
    stochastic = training and any(trait(s.structure, "stochastic") for s in slots)
    needs_x = any(trait(s.structure, "input_dependent") for s in slots)
    seeds = [int(torch.randint(0, 2**62, ())) if stochastic else None for _ in slots]
    base = slots[0].base
    assert base is not None
    alone = len(slots) == 1 and isinstance(weights[0], float | int) and weights[0] == 1.0
    context = store.context
    leaves = [leaf for t in ts for leaf in t] + [w for w in weights if isinstance(w, Tensor)]

    def build(values: Sequence[Tensor], x: Tensor | None) -> Operator:
        values = list(values)
        terms: list[Operator] = [base]
        scales = iter(values[sum(len(t) for t in ts) :])
        for slot, t, weight, seed in zip(slots, ts, weights, seeds):
            here, values = type(t)(*values[: len(t)]), values[len(t) :]
            ctx = Context(training, x, context.weights, context.token_mask, context.conditioning, context.time, seed)
            expr = slot.weight(here, ctx)
            if alone:
                return expr
            number = next(scales) if isinstance(weight, Tensor) else weight
            terms.append(Scaled(difference(expr, base), number))
        return Sum(tuple(terms))

    return Program(base, build, leaves, not (stochastic or needs_x), needs_x)


def _first(output: Any, change: Any) -> Any:
    """A block's output with its hidden state changed: the tensor itself, or the first of a tuple."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


@contextmanager
def swapped(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The module with other tensors under its parameters' names, for one call."""
    before = {name: module._parameters[name] for name in tensors}
    try:
        module._parameters.update(tensors)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(before)


@functools.cache
def hosted(cls: Any) -> type[nn.Module]:
    """The cached subclass of `cls` whose forward asks the host first. It keeps the name of `cls`, and pickles and copies as
    itself."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_rankfold"].forward(self, cls.forward, args, kwargs)

    def reduce(self: nn.Module, protocol: Any = None) -> Any:
        return _revive, (cls,), self.__dict__

    forward.__wrapped__ = cls.forward  # type: ignore[attr-defined]  # signatures are read by libraries that filter arguments
    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_native": cls,
    }
    return type(cls.__name__, (cls,), body)


def _revive(cls: Any) -> nn.Module:
    kind: Any = hosted(cls)
    return kind.__new__(kind)


def host_module(store: Store, path: str, module: nn.Module) -> Host:
    """Give a module its host: the class changes, the object stays."""
    host = module.__dict__.get("_rankfold")
    if host is None:
        host = Host(store, path)
        module.__dict__["_rankfold"] = host
        kind: Any = type(module)
        module.__class__ = hosted(kind)
    return host


def release_module(module: nn.Module) -> None:
    """The module as it was before `host_module`."""
    if module.__dict__.pop("_rankfold", None) is not None:
        module.__class__ = type(module)._native  # type: ignore[attr-defined]


def fold_weight(program: Program) -> Tensor:
    """W' of a program in at least float32, [out, in]."""
    if not program.dense_ok:
        raise LayoutError("this change depends on the input: it can't be folded into a weight")
    with torch.no_grad():
        return program.expression().dense().detach()

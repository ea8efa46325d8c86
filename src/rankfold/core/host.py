"""How a change gets into a model: the site's module changes class in place and its forward asks the host first.

The module keeps its place, its name, its state_dict keys and its isinstance answers; only `forward` is new.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import LayoutError
from rankfold.linalg import Operator, Scaled, Sum, difference

from .bases import forward_of
from .kinds import kind_named
from .planner import Program, run
from .readers import children_read, is_reader, unfused
from .rows import into_output, run_beside
from .sharding import close
from .store import Extra, Slot, Store
from .structure import Context, SideModule, never_dense, trait

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
        self.calls = self.graded = 0
        self.reads = False
        self.live: list[list[Slot]] = []
        self.live_sides: list[Slot] = []
        self._ready: dict[str, tuple[int, bool, Program]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}  # programs hold closures over this model: a copy makes its own

    def settle(self) -> None:
        """Hold what is on: see `Store.settle`."""
        store = self.store
        self.live = self.slots_on()
        self.live_sides = self._sides_on()
        for slot in [slot for group in self.live for slot in group] + self.live_sides:
            slot.on = store.active[slot.member.name]
            slot.t(store)

    def note(self) -> None:
        """Count a call, and remember whether it was with gradients, or without them in a training pass."""
        self.calls += 1
        if torch.is_grad_enabled():
            self.graded = self.store.passes
        elif self.store.in_training_pass:
            self.store.blind.append(self)

    @property
    def empty(self) -> bool:
        return not (self.slots or self.extras or self.sides)

    def forward(self, module: nn.Module, native: Any, args: tuple, kwargs: dict) -> Any:
        store = self.store
        if store.is_folded:
            native = forward_of(module, native)
        if not torch.compiler.is_compiling():
            self.note()
        held = torch.compiler.is_compiling() and store.settled and not store.is_folded
        if not store.enabled or (store.idle if held else not store.active):
            return native(module, *args, **kwargs)
        on, sides = (self.live, self.live_sides) if held else (self._on(), self._sides_on())
        if self.extras or self.reads:
            y = native(module, *args, **kwargs) if store.is_folded else self._with_own(module, native, on, args, kwargs)
        elif on:
            y = kind_named(on[0][0].site.kind).forward(self, module, native, on, args, kwargs)
        else:
            y = native(module, *args, **kwargs)
        for slot in sides:
            y = _first(y, lambda h, slot=slot: self._beside(module, slot, h))
        return y

    def _with_own(self, module: nn.Module, native: Any, on: list[list[Slot]], args: tuple, kwargs: dict) -> Any:
        """The forward with the adapter's own parameters in the module, and in what it reads without calling."""
        beside = [] if on else self._rows_beside(module, native)
        with ExitStack() as stack:
            stack.enter_context(swapped(module, self.own_values(module, beside)))
            if self.reads:
                stack.enter_context(unfused(module))
            for child in children_read(module):
                if (host := child.__dict__.get("_rankfold")) is not None:
                    host.calls += 1
                    stack.enter_context(swapped(child, host.own_values(child)))
            if on:
                return kind_named(on[0][0].site.kind).forward(self, module, native, on, args, kwargs)
            y = native(module, *args, **kwargs)
            for extra in beside:
                x = args[0] if args else next(iter(kwargs.values()))
                y = into_output(module, y, x, extra.index(y.device), self.store.tensor(extra.key))
            return y

    def _beside(self, module: nn.Module, slot: Slot, h: Tensor) -> Tensor:
        weight = weight_of(self.store, slot)
        assert isinstance(slot.structure, SideModule)
        changed = slot.structure.forward(h, slot.t(self.store), slot.site, Context(module.training))
        return changed if isinstance(weight, float | int) and weight == 1.0 else h + weight * (changed - h)

    def _rows_beside(self, module: nn.Module, native: Any) -> list[Extra]:
        """Rows of the weight that are on and can be put into the output; one adapter's, since those of a second come after."""
        on = [e for name, e in self.extras if name in self.store.active and e.param == "weight"]
        return on if len(on) == 1 and on[0].rows is not None and run_beside(module, native, "weight") else []

    def own_values(self, module: nn.Module, beside: Sequence[Extra] = ()) -> dict[str, Tensor]:
        """The adapter's own parameters in the dtype of those that they stand for: the masters are float32, the module may be
        bf16. Without those that go into the output."""
        own: dict[str, Tensor] = {}
        for name, e in self.extras:
            if name in self.store.active and e not in beside:
                parameter = own.get(e.param, module._parameters[e.param])
                assert parameter is not None
                own[e.param] = e.value(parameter, self.store.tensor(e.key))
        return own

    def _on(self) -> list[list[Slot]]:
        """Slots of the adapters that are on, by site."""
        return [] if self.store.is_folded else self.slots_on()

    def slots_on(self) -> list[list[Slot]]:
        """As `_on`, whether folded or not."""
        groups = ([s for s in group if s.member.name in self.store.active] for group in self.slots.values())
        return [group for group in groups if group]

    def _sides_on(self) -> list[Slot]:
        return [slot for slot in self.sides if slot.member.name in self.store.active]

    def run(self, module: nn.Module, slots: Sequence[Slot], x: Tensor, bias: Tensor | None) -> Tensor:
        """x W'ᵀ + bias at one site, by the planner."""
        return run(self.program(slots, module.training), x, bias, self.store.plan, self.store.memory)

    def program(self, slots: Sequence[Slot], training: bool) -> Program:
        """The program of a site, kept while nothing about it changes."""
        if torch.compiler.is_compiling():
            return site_program(self.store, slots, training)
        key = slots[0].site.key
        ready = self._ready.get(key)
        if ready is not None and ready[0] == self.store.version and ready[1] == training:
            return ready[2]
        program = site_program(self.store, slots, training)
        if program.keep():
            self._ready[key] = (self.store.version, training, program)
        return program


def weight_of(store: Store, slot: Slot) -> float | Tensor:
    """The weight of an adapter at a site; 1 where it is off and looked at alone."""
    if store.settled and torch.compiler.is_compiling():
        return slot.on
    return store.active.get(slot.member.name, 1.0)


def site_program(store: Store, slots: Sequence[Slot], training: bool, outside: bool = False) -> Program:
    """One adapter at weight 1: its own expression. Several, or weighted: W + Σ_k w_k (expr_k − W), the sum of their changes.

    `outside` the forward pass a weight that is cut over processes is gathered: every process must then evaluate the program.
    """
    ts = [slot.t(store) for slot in slots]
    weights = [weight_of(store, slot) for slot in slots]
    stochastic = training and any(trait(s.structure, "stochastic") for s in slots)
    needs_x = any(trait(s.structure, "input_dependent") for s in slots)
    seeds = [_seed() if stochastic else None for _ in slots]
    base = slots[0].base
    assert base is not None
    if outside:
        close(store.model)
        base = base.gather()
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
            expr = slot.weight(here, ctx, base)
            if alone:
                return expr
            number = next(scales) if isinstance(weight, Tensor) else weight
            terms.append(Scaled(difference(expr, base), number))
        return Sum(tuple(terms))

    factored = all(never_dense(slot.structure) for slot in slots)
    return Program(base, build, leaves, not (stochastic or needs_x), needs_x, factored)


def _seed() -> int | Tensor:
    """Drawn from torch's generator on the CPU, so that no device waits; a compiled graph can't turn it into a number."""
    seed = torch.randint(0, 2**62, ())
    return seed if torch.compiler.is_compiling() else int(seed)


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
    """Give a module its host: the class changes, the object stays. Modules around it that read its parameters get one as well."""
    around = path
    while around:
        around = around.rpartition(".")[0]
        above = store.model.get_submodule(around)
        if is_reader(above):
            _host(store, around, above)
    return _host(store, path, module)


def _host(store: Store, path: str, module: nn.Module) -> Host:
    host = module.__dict__.get("_rankfold")
    if host is None:
        host = Host(store, path)
        host.reads = is_reader(module)
        module.__dict__["_rankfold"] = host
        kind: Any = type(module)
        module.__class__ = hosted(kind)
    return host


def release_module(module: nn.Module) -> None:
    """The module as it was before `host_module`, unless an adapter still needs its host."""
    host = module.__dict__.get("_rankfold")
    if host is None or not host.empty or (is_reader(module) and any("_rankfold" in m.__dict__ for m in inside(module))):
        return
    del module.__dict__["_rankfold"]
    module.__class__ = _without_host(type(module))


def _without_host(cls: Any) -> type[nn.Module]:
    if "_native" in vars(cls):
        return cls._native
    if not hasattr(cls, "_native"):
        return cls
    # somebody has made a class of the hosted one since (FSDP does): the same one without the host below
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(_without_host(base) for base in cls.__bases__), body)


def inside(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a module, without itself."""
    return (m for m in module.modules() if m is not module)


def fold_weight(program: Program) -> Tensor:
    """W' of a program in at least float32, [out, in]."""
    if not program.dense_ok:
        raise LayoutError("this change depends on the input: it can't be folded into a weight")
    with torch.no_grad():
        return program.expression().dense().detach()

"""The registered child `model.rankfold`: every adapter's tensors, and which adapters are on.

Trainable tensors are ordinary Parameters of this child, so optimizers, `.to`, deepcopy and sharding see them, while every
state_dict of the model holds the base alone.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters.rows import rows_text
from rankfold.errors import LayoutError, OptionError, UnknownName
from rankfold.linalg import Operator, like
from rankfold.linalg.sharded import is_cut, whole

from .base import Base
from .rows import into_weight
from .site import Site
from .structure import Context, Structure, Tensors

__all__ = ["Extra", "Member", "Slot", "Store", "store_of"]

CHILD = "rankfold"


@dataclass(eq=False)
class Slot:
    """One adapter at one site: its structure there, and where its tensors stand in the store.

    `binding` maps each field of t to (name in the store, slices): shared tensors hand out slices. The fields that `emits`
    names are filled by `prepare`, once per forward of the model. A side module has no base. `on` is its adapter's weight as of
    the last `Store.settle`.
    """

    member: Member
    site: Site
    structure: Structure
    base: Base | None
    binding: dict[str, tuple[str, tuple[slice, ...] | None]]
    fields: tuple[str, ...] = ()
    emits: tuple[str, ...] = ()
    emitted: dict[str, Tensor] = field(default_factory=dict)
    on: float | Tensor = 1.0
    _t: Tensors = None
    _version: int = -1

    def __post_init__(self) -> None:
        _tuple_class(self.fields)  # made now, so that a traced forward only looks it up

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_t": None, "_version": -1}

    def t(self, store: Store) -> Tensors:
        """The namedtuple of the site's tensors; made once, and again only when tensors were replaced or are slices that train."""
        if torch.compiler.is_compiling():  # a graph that asked for the version would be made anew for every other one
            if store.settled and self._t is not None:
                return self._t
        elif self._t is not None and self._version == store.version:
            return self._t
        values = [self._read(store, name) for name in self.fields]
        t = _tuple_class(self.fields)(*values)
        fixed = not self.emits and all(s is None or not store.tensor(n).requires_grad for n, s in self.binding.values())
        if not torch.compiler.is_compiling():
            self._t, self._version = t if fixed else None, store.version
        return t

    def _read(self, store: Store, name: str) -> Tensor:
        if name not in self.binding:
            return self.emitted[name]
        key, slices = self.binding[name]
        tensor = store.tensor(key)
        return tensor if slices is None else tensor[slices]

    def weight(self, t: Tensors, ctx: Context | None = None, base: Base | None = None) -> Operator:
        """W' as an expression in `base`: the slot's own, or another that stands for the same weight."""
        base = base or self.base
        assert base is not None
        return self.structure.weight(base, t, self.site, ctx)


_classes: dict[tuple[str, ...], type] = {}  # not functools.cache, of which torch.compile warns


def _tuple_class(fields: tuple[str, ...]) -> type:
    if fields not in _classes:
        _classes[fields] = namedtuple("Tensors", fields)
    return _classes[fields]


@dataclass(eq=False)
class Extra:
    """One parameter of the model that an adapter trains in a copy of its own: heads, biases, norms; or some of its rows.

    Args:
        alone: other modules that share the parameter keep the base's; else they all get the copy.
        rows: those that train, rising; the tensor holds them alone. None is the whole parameter.
        named: whether the user gave its name: then it must act.
    """

    module: str
    param: str
    key: str
    alone: bool = False
    rows: tuple[int, ...] | None = None
    named: bool = False

    @property
    def name(self) -> str:
        """Full name of the parameter, with the rows where there are some: "embed_tokens.weight[50:52]"."""
        whole = f"{self.module}.{self.param}" if self.module else self.param
        return whole if self.rows is None else whole + rows_text(self.rows)

    def index(self, device: torch.device) -> Tensor:
        """The rows as a tensor."""
        return torch.tensor(self.rows, device=device)

    def value(self, parameter: Tensor, own: Tensor) -> Tensor:
        """What stands in the place of `parameter` while the adapter is on, in its dtype."""
        return like(own, parameter) if self.rows is None else into_weight(_whole(parameter), self.index(parameter.device), own)


def _whole(parameter: Tensor) -> Tensor:
    return whole(parameter) if is_cut(parameter) else parameter


@dataclass(eq=False)
class Member:
    """One named adapter of a model: its structure, slots by site key, shared tensors and extra tensors.

    `plan` and `memory` are what it lets the planner do while it is on.
    """

    name: str
    structure: Structure
    slots: dict[str, Slot] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Extra] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    plan: str = "auto"
    memory: str = "auto"

    def owned(self) -> list[str]:
        """Names in the store of everything that this adapter owns, each once."""
        own = [key for slot in self.slots.values() for key, _ in slot.binding.values()]
        return list(dict.fromkeys([*own, *self.shared.values(), *(e.key for e in self.extras.values())]))


class Store(nn.Module):
    """The registered child `model.rankfold`: every adapter's tensors, and which adapters are on.

    It adds nothing to any state_dict: checkpoints of the model hold the base's keys only, adapters have files of their own.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # plain reference: a registered one would make the model its own grandchild
        self.members: dict[str, Member] = {}
        self.active: dict[str, float | Tensor] = {}
        self.enabled = True
        self.settled, self.idle = False, True
        self.emitting: list[Member] = []
        self.version = 0
        self.plan, self.memory = "auto", "auto"
        self.context = Context()
        self.folded: dict[str, list[tuple[str, nn.Parameter]]] = {}
        self.trainable_before: dict[str, bool] = {}
        self.handle: Any = None
        self.watchers: list[Any] = []
        self.passes, self.in_training_pass = 0, False
        self.blind: list[Any] = []  # hosts that ran without gradients in this training pass
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    @property
    def version(self) -> int:
        """Counts whatever replaces a tensor or changes what is on; what was remembered of an older one is out of date."""
        return self._version

    @version.setter
    def version(self, number: int) -> None:
        self._version = number
        self.settled = False

    def settle(self) -> None:
        """Let every host hold what is on as plain objects, so that a compiled forward asks for no adapter's name.

        A graph is guarded by what its tracing read: with names out of it, adapters of one structure, rank and set of sites
        share a graph, whose inputs their tensors are.
        """
        self.emitting = [m for m in (self.members[n] for n in self.active) if any(s.emits for s in m.slots.values())]
        for module in self.model.modules():
            host = module.__dict__.get("_rankfold")
            if host is not None:
                host.settle()
        self.settled, self.idle = True, not self.active

    def uninstall(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, x: Any) -> Any:
        """The identity: a model that runs all its children in turn (nn.Sequential) runs this one too."""
        return x

    # tensors

    @staticmethod
    def flat(key: str) -> str:
        return key.replace(".", "|")

    def put(self, key: str, value: Tensor, trainable: bool) -> None:
        """Register a tensor; integer ones become buffers."""
        name = self.flat(key)
        if value.is_floating_point():
            self.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
        else:
            self.register_buffer(name, value, persistent=False)
        self.version += 1

    def tensor(self, key: str) -> Tensor:
        return getattr(self, self.flat(key))

    def replace(self, key: str, value: Tensor) -> None:
        """Another tensor under the same name (a rank edit): the Parameter object is new."""
        old = self.tensor(key)
        self.drop(key)
        self.put(key, value, old.requires_grad)

    def drop(self, key: str) -> None:
        name = self.flat(key)
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        self.version += 1

    def _apply(self, fn: Any, recurse: bool = True) -> Store:
        super()._apply(fn, recurse)
        self.version += 1
        return self

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        return None

    # on and off

    def switch(self, active: dict[str, float | Tensor]) -> None:
        """Exactly these adapters on, each at its weight; the planner does what they say.

        Raises:
            UnknownName: no adapter of that name.
            OptionError: two of them want different plans.
        """
        for name in active:
            if name not in self.members:
                raise UnknownName.of("adapter", name, self.members)
        members = [self.members[name] for name in active]
        self.plan, self.memory = _agreed("plan", members), _agreed("memory", members)
        self.active = dict(active)
        self.version += 1
        self.settle()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @property
    def is_folded(self) -> bool:
        return len(self.folded) > 0  # of bool(dict) torch.compile keeps no guard

    # the model's forward as a whole

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if getattr(self, "_is_fsdp_managed_module", False):
            raise LayoutError(
                "FSDP has cut the adapters' tensors along with the base, where training doesn't reach them. Make the model anew "
                "and cut it by rf.shard(model), or give fully_shard ignored_params=set(model.rankfold.parameters())"
            )
        if not self.enabled:
            return
        if not torch.compiler.is_compiling():
            if not self.settled:
                self.settle()
            for watcher in self.watchers:
                watcher.before_forward(self)
        for member in self.emitting if self.settled else [self.members[name] for name in self.active]:
            emit(self, member)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self.enabled and self.active:
            for watcher in list(self.watchers):
                watcher.after_forward(self, output)


def _agreed(option: str, members: Sequence[Member]) -> str:
    """The value of plan or memory that adapters which are on together share; one that says "auto" follows the others."""
    wanted = {m.name: getattr(m, option) for m in members if getattr(m, option) != "auto"}
    if len(set(wanted.values())) > 1:
        said = ", ".join(f"{name} {option}={value!r}" for name, value in wanted.items())
        raise OptionError(
            f"{option}: adapters that are on together run as one, and these want different ones: {said}. Switch one of them on "
            f"alone, or make all but one with {option}='auto'"
        )
    return next(iter(wanted.values()), "auto")


def emit(store: Store, member: Member) -> None:
    """Let the structure's `prepare` fill the tensors of scope "emitted", for all sites at once."""
    slots = [slot for slot in member.slots.values() if slot.emits]
    if not slots:
        return
    shared = _tuple_class(tuple(member.shared))(*(store.tensor(key) for key in member.shared.values()))
    for slot in slots:
        slot.emitted = {name: torch.empty(0) for name in slot.emits}  # while `prepare` reads the other fields
    made = slots[0].structure.prepare(shared, {s.site.key: s.t(store) for s in slots}, [s.site for s in slots])
    for slot in slots:
        slot.emitted = (made or {})[slot.site.key]


def store_of(model: nn.Module, create: bool = False) -> Store | None:
    """The store of a model, or None; `create` makes and registers one. Of a compiled model, that of the model inside.

    Raises:
        LayoutError: the model has an attribute of that name already, or is what torch.compile made.
    """
    inside = model._modules.get("_orig_mod")
    if inside is not None:
        if create:
            raise LayoutError(
                "this is a compiled model, whose sites have other names: adapt the model that was compiled (model._orig_mod); "
                "the compiled one follows"
            )
        return store_of(inside)
    store = model._modules.get(CHILD)
    if store is None and create:
        if hasattr(model, CHILD):
            raise LayoutError(
                f"{type(model).__name__} has an attribute 'rankfold' of its own; adapters can't be registered there"
            )
        store = Store(model)
        model.add_module(CHILD, store)
    return store if isinstance(store, Store) else None

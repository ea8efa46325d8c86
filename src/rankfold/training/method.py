"""A method is a point in the product of four axes, and a name for it: parsing, options and what composes with what."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rankfold.core import registry
from rankfold.core.options import Options, option_names
from rankfold.core.registry import AXES, Entry
from rankfold.core.site import Site
from rankfold.core.structure import Decorator, Offset, SideModule, Stack, Structure, layers
from rankfold.errors import CompositionError, OptionError, UnknownName

from .contracts import Init, Loss, RankPolicy, Roles, Update, require, roles_of

__all__ = ["Method", "compositions", "method", "methods", "trainable_roles"]

SAMPLE = Site("sample", (96, 64))


@dataclass(frozen=True)
class Method:
    """Structure, init, rank, update and losses, ready to be attached.

    `text` and `options` are its canonical form: `method(m.text, **m.options)` is the same method, in another process or year.
    """

    text: str
    structure: Structure
    init: Init
    rank: RankPolicy
    update: Update
    losses: tuple[Loss, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text

    @property
    def parts(self) -> list[Options]:
        """Its members: structure layers from the outermost, then init, rank, update, losses."""
        return [*layers(self.structure), self.init, self.rank, self.update, *self.losses]

    @property
    def starts(self) -> str:
        """How near the base the function starts: the farthest of what its members declare."""
        order = {"base": 0, "near": 1, "elsewhere": 2}
        said = [*(layer.starts for layer in layers(self.structure)), self.init.starts]
        return max(said, key=lambda s: order[s.partition("(")[0]])

    @property
    def is_side(self) -> bool:
        return isinstance(self.structure, SideModule)

    def describe(self) -> str:
        """One line: structure lora (rank 8) · init pissa · update adamw."""
        groups: dict[str, list[str]] = {}
        for part in self.parts:
            shown = [f"{n} {v}" for n in option_names(type(part)) if (v := getattr(part, n)) is not None]
            groups.setdefault(part.axis, []).append(f"{part.name} ({', '.join(shown)})" if shown else part.name)
        return " · ".join(f"{axis} {' over '.join(parts)}" for axis, parts in groups.items())


def compositions() -> Mapping[str, Any]:
    """The named compositions of the catalogue."""
    return importlib.import_module(f"{registry.PACKAGE}.catalogue").COMPOSITIONS


def methods() -> list[str]:
    """Every name that `method` takes alone: the structures and the named compositions."""
    decorators = {e.name for e in registry.entries("structure") if issubclass(registry.resolve(e), Decorator)}
    return sorted({e.name for e in registry.entries("structure")} - decorators | set(compositions()))


def _is_composition(token: str, alone: bool) -> bool:
    """Whether a token of a chain means a composition of the catalogue: always when alone, else where no member has its name."""
    return token in compositions() and (alone or not registry.find(token))


def _one(token: str, alone: bool) -> tuple[list[Entry], dict[str, Any]]:
    """The members that one token of a chain means, and the options that come with them."""
    axis, _, name = token.rpartition(":")
    if axis and axis not in AXES:
        raise UnknownName.of("axis", axis, AXES)
    named = compositions()
    if _is_composition(token, alone):
        return _expand(named[name].parts, dict(named[name].options))
    found = registry.find(name, axis or None)
    if alone and not axis and len(found) > 1:
        found = [e for e in found if e.axis == "structure"] or found
    if len(found) > 1:
        raise CompositionError(f"{name!r} is a member of several axes: {', '.join(e.key for e in found)}; write one of these")
    if not found:
        known = [e.name for e in registry.entries(axis or None)] + ([] if axis else list(named))
        raise UnknownName.of(axis if axis else "method", name, known, "every name: rankfold methods")
    return found, {}


def _expand(parts: str, options: dict[str, Any]) -> tuple[list[Entry], dict[str, Any]]:
    found: list[Entry] = []
    for token in parts.split("+"):
        more, extra = _one(token, alone=False)
        found += more
        options = {**extra, **options}
    return found, options


def method(text: str | Method, **options: Any) -> Method:
    """The method that a name or a chain stands for: "lora", "dora", "magnitude+hra", "dora+init:eva+loraplus".

    "+" only separates; decorators come first, the leftmost outermost. A bare name alone may be a composition of the
    catalogue; inside a chain it is a member of an axis; `axis:name` is explicit. Options are bare where one part owns the
    name (`rank=8`), else `part.option`.

    Raises:
        UnknownName: a name or an option that nobody knows; the nearest are listed.
        CompositionError: members that cannot work together, with the traits that clash.
        OptionError: an option outside its bounds.

    >>> method("lora", rank=4, alpha=8).structure.scale
    2.0
    >>> method("lorra")
    Traceback (most recent call last):
    ...
    rankfold.errors.UnknownName: unknown method 'lorra'; ...
    """
    if isinstance(text, Method):
        return method(text.text, **{**text.options, **options}) if options else text
    tokens = [t.strip() for t in text.split("+")]
    if not all(tokens):
        raise UnknownName(f"method {text!r}: an empty name beside '+'; write names with single '+' between them")
    found: list[Entry] = []
    brought: set[Entry] = set()
    preset: dict[str, Any] = {}
    for token in tokens:
        more, extra = _one(token, alone=len(tokens) == 1)
        replaced = {e.axis for e in more} - {"structure", "loss"}
        # a later init replaces the one that a composition brought; two that were both asked for are refused below
        found = [e for e in found if e.axis not in replaced or e not in brought] + more
        brought |= set(more) if _is_composition(token, len(tokens) == 1) else set()
        preset.update(extra)
    if not any(e.axis == "structure" for e in found):
        found = [_default_structure(), *found]
    _refuse_doubles(found)
    classes = [(e, registry.resolve(e)) for e in found]
    present = {e.axis for e in found}
    for axis in ("init", "rank", "update"):
        if axis not in present:
            classes += _default_member(axis, classes)
    kept = {k: v for k, v in preset.items() if k.partition(".")[0] in {e.name for e, _ in classes} | set(AXES)}
    values = _assign(classes, {**kept, **options})
    return _compose(classes, values)


def _default_structure() -> Entry:
    """The structure that stands where none is named: the one that declares `default = True`."""
    return next(e for e in registry.entries("structure") if dict(e.traits).get("default") == "True")


def _default_member(axis: str, classes: list[tuple[Entry, type]]) -> list[tuple[Entry, type]]:
    """What stands where none is named: the init that the innermost structure asks for, else what declares `default = True`."""
    own = next((getattr(cls, "init", None) for e, cls in reversed(classes) if e.axis == "structure" and axis == "init"), None)
    is_it = _is_default if own is None else lambda e: e.name == own
    entry = next((e for e in registry.entries(axis) if is_it(e)), None)
    return [(entry, registry.resolve(entry))] if entry else []


def _refuse_doubles(found: list[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in found:
        single = entry.key if entry.axis in ("structure", "loss") else entry.axis
        if single in seen:
            other = seen[single]
            if entry.axis not in ("structure", "loss"):
                raise CompositionError(f"{other.key} + {entry.key}: a method has one {entry.axis}; leave one of the two out")
            raise CompositionError(
                f"{other.key} + {entry.key}: the same {entry.axis} twice; "
                "attach the second as an adapter of its own (name='second')"
            )
        seen[single] = entry


def _assign(classes: list[tuple[Entry, type]], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options to their owners: {member key: {option: value}}."""
    owners = {e.key: (e, set(option_names(cls))) for e, cls in classes}
    values: dict[str, dict[str, Any]] = {key: {} for key in owners}
    every = sorted(
        {f"{e.name}.{o}" for e, names in owners.values() for o in names} | {o for _, names in owners.values() for o in names}
    )
    for key, value in options.items():
        part, _, name = key.rpartition(".")
        hits = [k for k, (e, names) in owners.items() if name in names and part in ("", e.name, e.axis, e.key, *e.aliases)]
        if not hits:
            there = "; ".join(f"{e.key} has {', '.join(option_names(cls))}" for e, cls in classes if option_names(cls))
            raise UnknownName.of("option", key, every, f"options of this method: {there or 'none'}")
        if len(hits) > 1:
            raise OptionError(
                f"option {key!r} belongs to several parts; write {' or '.join(owners[k][0].name + '.' + name for k in hits)}"
            )
        values[hits[0]][name] = value
    return values


def _compose(classes: list[tuple[Entry, type]], values: dict[str, dict[str, Any]]) -> Method:
    def make(entry: Entry, cls: type, **extra: Any) -> Any:
        return cls(**values[entry.key], **extra)

    chain = [(e, c) for e, c in classes if e.axis == "structure"]
    members = {e.axis: make(e, c) for e, c in classes if e.axis in ("init", "rank", "update")}
    losses = tuple(make(e, c) for e, c in classes if e.axis == "loss")
    init = members["init"]
    structure: Structure | None = None
    for entry, cls in reversed(chain):
        if issubclass(cls, Decorator):
            if structure is None:
                raise CompositionError(
                    f"{entry.name} decorates another structure; write for instance '{entry.name}+{_default_structure().name}'"
                )
            structure = make(entry, cls, inner=structure)
        elif structure is None:
            structure = make(entry, cls)
            offset = Offset(inner=structure)
            structure = offset if init.offset and offset.names(SAMPLE) else structure
        else:
            structure = Stack(outer=make(entry, cls), inner=structure)
    assert structure is not None
    names = "+".join(e.name for e, _ in chain)
    _check(names, structure, init, members["rank"], members["update"], bool(chain[1:]))
    unsaid = {e.key for axis in ("init", "rank", "update") for e, _ in _default_member(axis, chain)}
    text = "+".join([*(e.name for e, _ in chain), *(e.key for e, _ in classes if e.axis != "structure" and e.key not in unsaid)])
    canonical = {}
    for entry, cls in classes:
        made = next(p for p in [*layers(structure), *members.values(), *losses] if type(p) is cls)
        for f in dataclasses.fields(cls):
            if f.metadata.get("option", True) and getattr(made, f.name) != f.default:
                canonical[f"{entry.name}.{f.name}"] = getattr(made, f.name)
    return Method(text, structure, init, members["rank"], members["update"], losses, canonical)


def _is_default(entry: Entry) -> bool:
    return dict(entry.traits).get("default") == "True"


def trainable_roles(structure: Structure, site: Site = SAMPLE, frozen: bool = False) -> Roles:
    """Roles of the trainable tensors at a site; of all with `frozen`."""
    return roles_of(structure.tensors(site), getattr(structure.core, "rank", 0) or 0, structure.scale, trainable=not frozen)


def _check(names: str, structure: Structure, init: Init, rank: RankPolicy, update: Update, several: bool) -> None:
    if several and any(isinstance(layer, SideModule) for layer in layers(structure)):
        raise CompositionError(f"{names}: a side module is no weight, so no structure can decorate it or stand inside it")
    if several and any(layer.owns for layer in layers(structure)[:-1]):
        raise CompositionError(f"{names}: a structure that owns the weight discards what stands inside it; put it last")
    try:
        roles, every = trainable_roles(structure), trainable_roles(structure, frozen=True)
    except CompositionError as error:
        raise CompositionError(f"{names}: {error}") from None
    for member in (init, rank, update):
        require(member, every if getattr(member, "frozen", False) else roles, names)
    core = trainable_roles(structure.core, frozen=init.frozen)
    if init.offset and not init.requires <= core.shapes.keys():
        raise CompositionError(
            f"{names} + {init.name}: init {init.name!r} starts from an offset, which belongs to the innermost structure; "
            f"that one trains {', '.join(sorted(core.shapes))}, not {', '.join(sorted(init.requires))}"
        )
    for k, layer in enumerate(chain := layers(structure)):
        if layer.reads_entries and any(inner.input_dependent for inner in chain[k + 1 :]):
            raise CompositionError(
                f"{names}: {layer.name} reads the entries of the weight inside it, which depends on the input: none exists"
            )
    if rank.allocates:
        if not hasattr(structure.core, "rank"):
            raise CompositionError(f"{names} + rank:{rank.name}: structure {names!r} has no rank that could be spread")
        if type(init).scores is Init.scores:
            raise CompositionError(f"init {init.name!r} gives no scores from which rank:{rank.name} could spread a budget")

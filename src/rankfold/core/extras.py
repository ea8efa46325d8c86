"""What an adapter trains beside changes of weights: whole parameters (heads, biases, norms), or rows of them (new tokens)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from rankfold.adapters.rows import split_rows
from rankfold.errors import OptionError, TargetError, UnknownName
from rankfold.linalg.sharded import whole

from .host import host_module
from .site import Site
from .store import Extra, Member, Store

__all__ = ["WORDS", "WantedExtra", "add_extra", "find_extras"]

BIASES, ALL_BIASES, NORMS = WORDS = ("biases", "all-biases", "norms")


@dataclass(frozen=True)
class WantedExtra:
    """One parameter to train in a copy; `named` where the user gave its name, or that of a module around it."""

    module: str
    param: str
    rows: tuple[int, ...] | None = None
    named: bool = True


def find_extras(model: nn.Module, patterns: Sequence[str], sites: Sequence[Site]) -> list[WantedExtra]:
    """The parameters that these patterns mean, each once.

    Args:
        patterns: "biases" (of the modules of `sites`), "all-biases", "norms" (weights and biases of every norm layer), names or
            globs of modules ("classifier", "encoder.*.LayerNorm") or parameters ("cls_token", "*.bias"), and rows of a weight
            ("embed_tokens[50:52]").

    Raises:
        UnknownName: a name that nothing here has. OptionError: rows that the weight doesn't have.
        TargetError: a word that finds nothing, or rows of a module with several parameters.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(52, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> [f"{w.module}.{w.param}" for w in find_extras(model, ["norms", "2"], [])]
    ['1.weight', '1.bias', '2.weight', '2.bias']
    >>> find_extras(model, ["0[50:52]"], [])[0].rows
    (50, 51)
    """
    parameters = _parameters(model)
    found: dict[tuple[str, str], WantedExtra] = {}
    for pattern in patterns:
        for wanted in _wanted(model, pattern, sites, parameters):
            key = (wanted.module, wanted.param)
            before = found.get(key, wanted)
            rows = None if before.rows is None or wanted.rows is None else tuple(sorted({*before.rows, *wanted.rows}))
            found[key] = replace(wanted, rows=rows, named=wanted.named or before.named)
    return list(found.values())


def _parameters(model: nn.Module) -> dict[str, tuple[str, str, Tensor]]:
    """{full name: (module, leaf, parameter)} of the model without its adapters, by every name."""
    return {
        f"{path}.{leaf}" if path else leaf: (path, leaf, p)
        for path, module in model.named_modules()
        if path.partition(".")[0] != "rankfold"
        for leaf, p in module._parameters.items()
        if p is not None
    }


def _wanted(
    model: nn.Module, pattern: str, sites: Sequence[Site], parameters: Mapping[str, tuple[str, str, Tensor]]
) -> Iterator[WantedExtra]:
    if pattern in WORDS:
        hits = list(_by_word(model, pattern, sites, parameters))
        if not hits:
            raise TargetError(f"extras: {pattern!r} finds nothing in {type(model).__name__}")
        yield from hits
        return
    plain, rows = split_rows(pattern)
    inside = [n for n, (path, _, _) in parameters.items() if any(_matches(plain, part) for part in _around(path))]
    own = [n for n in parameters if _matches(plain, n)]
    names = list(dict.fromkeys([*inside, *own]))
    if not names:
        known = {n for n, _ in model.named_modules() if n.partition(".")[0] != "rankfold"} | set(parameters)
        short = {n.rpartition(".")[2] for n in known}
        raise UnknownName.of("module or parameter for extras", plain, known | short, f"words: {', '.join(WORDS)}")
    if rows is not None:
        names = [n for n in names if n in own or (parameters[n][1] == "weight" and _matches(plain, parameters[n][0]))]
        if not names:
            raise TargetError(f"extras: {pattern!r}: {plain} has no weight; name the parameter whose rows are meant")
    for name in names:
        path, leaf, p = parameters[name]
        chosen = split_rows(f"{name}{pattern[len(plain) :]}", p.shape[0])[1] if rows is not None else None
        yield WantedExtra(path, leaf, chosen)


def _around(path: str) -> list[str]:
    """A module's path and those of the modules around it; "" is the model, which nobody names."""
    parts = path.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith("." + pattern) or ("*" in pattern and fnmatch.fnmatchcase(name, pattern))


def _by_word(
    model: nn.Module, word: str, sites: Sequence[Site], parameters: Mapping[str, tuple[str, str, Tensor]]
) -> Iterator[WantedExtra]:
    adapted = {site.module for site in sites}
    read = {site.weight.rpartition(".")[0] for site in sites}
    modules = dict(model.named_modules())
    for path, leaf, p in parameters.values():
        if word == NORMS:
            wanted = is_norm(modules[path])
        else:
            # beside a router's or a table's there are parameters called "..._bias" that are none: they have more dimensions
            bias = leaf == "bias" or (leaf.endswith("_bias") and p.ndim <= 2)
            wanted = bias and (word == ALL_BIASES or path in adapted or path in read)
        if wanted:
            yield WantedExtra(path, leaf, named=False)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer: called so, and without modules inside.

    >>> is_norm(nn.LayerNorm(4)), is_norm(nn.Linear(4, 4))
    (True, False)
    """
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def add_extra(
    store: Store,
    member: Member,
    module_name: str,
    param: str,
    alone: bool = False,
    rows: tuple[int, ...] | None = None,
    named: bool = False,
) -> Extra | None:
    """Train a copy of one parameter, or of some of its rows, beside the adapter; None where the module has no such parameter,
    or one of whole numbers that nobody named.

    Modules that share the parameter (a tied head) all get the copy: the tie stays. With `alone` they keep the base's, as other
    tools have it. Asked for twice, by any of its names, it is the copy that is there.

    Raises:
        UnknownName: no such module. TargetError: rows of it train already, and others are asked for.
    """
    modules = {n: m for n, m in store.model.named_modules() if n.partition(".")[0] != "rankfold"}
    if module_name not in modules:
        raise UnknownName.of("module", module_name, modules)
    parameter = modules[module_name]._parameters.get(param)
    if parameter is None:
        return None
    if not parameter.is_floating_point():
        if named:
            raise OptionError(f"extras: {module_name}.{param} is stored as {parameter.dtype}, which can't train")
        return None
    host = modules[module_name].__dict__.get("_rankfold")
    there = [e for owner, e in host.extras if owner == member.name and e.param == param] if host is not None else []
    if there:
        if there[0].rows != rows:
            raise TargetError(f"extras: {there[0].name} trains already; name all of its rows at once, or the whole of it")
        return next(e for e in member.extras.values() if e.key == there[0].key)
    first = Extra(module_name, param, "", alone, rows, named)
    first.key = f"{member.name}/extra/{first.name}"
    dtype = parameter.dtype if parameter.dtype.itemsize > 4 else None
    value = whole(parameter) if rows is None else whole(parameter)[list(rows)]
    store.put(first.key, value.clone().to(dtype or value.float().dtype), True)
    # an order of its own, for optimizers after a restart
    member.extras = dict(sorted({**member.extras, first.name: first}.items()))
    for path, module in {module_name: modules[module_name]}.items() if alone else modules.items():
        for name, value in module._parameters.items():
            if value is parameter:
                host_module(store, path, module).extras.append((member.name, replace(first, module=path, param=name)))
    return first

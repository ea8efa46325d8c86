"""The weights of a model that may be changed, and the patterns that choose among them."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from rankfold.errors import TargetError, nearest

from .kinds import kind_named, kind_of, weight_of
from .site import Site

__all__ = ["Targets", "every_site", "find_sites"]

ALL_LINEAR = "all-linear"
ALL = "all"
_ROWS = re.compile(r"^(?P<name>.+)\[(?P<rows>[^\]]+)\]$")


def every_site(model: nn.Module) -> list[Site]:
    """All sites of the model, in module order, with ties noted."""
    first: dict[int, str] = {}
    sites = []
    shared: set[str] = set()
    names: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=True):
        kind = kind_of(module)
        for site in kind.sites(path, module) if kind is not None else ():
            if site.name in names:  # a child whose weight its parent reads
                continue
            names.add(site.name)
            weight = weight_of(module, site)
            owner = first.setdefault(id(weight), site.name)
            if owner != site.name:
                shared.add(owner)
            sites.append(replace(site, tied=owner))
    return [s if s.tied in shared else replace(s, tied=None) for s in sites]


def _heads(model: nn.Module) -> set[str]:
    """Names of output heads: what stands outside the base model, and the output embedding."""
    names: set[str] = set()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    prefix = getattr(model, "base_model_prefix", "")
    has_body = bool(prefix) and hasattr(model, prefix)
    for name, module in model.named_modules():
        if module is output or (has_body and name and name.partition(".")[0] not in (prefix, "rankfold")):
            names.add(name)
    return names


def _is_router(name: str, module: nn.Module) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last in {"router", "gate"} or type(module).__name__.endswith("Router")


@dataclass(frozen=True)
class Targets:
    """Patterns that choose sites: "all-linear", names ("query", "layer.0.attention.self.query"), globs ("*.attention.*"), row
    slices ("c_attn[q]", "c_attn[0:768]"); comma-separated or a list. Regular expressions ("re:...") only where `regex=True`:
    a pattern from a file is never compiled as one.

    Raises:
        TargetError: a pattern matches nothing; the message lists the nearest names.
    """

    patterns: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    regex: bool = False

    @classmethod
    def of(
        cls, targets: str | Sequence[str] | Targets = ALL_LINEAR, exclude: str | Sequence[str] = (), regex: bool = False
    ) -> Targets:
        if isinstance(targets, Targets):
            return replace(targets, exclude=targets.exclude + _patterns(exclude), regex=targets.regex or regex)
        return cls(_patterns(targets), _patterns(exclude), regex)

    @property
    def automatic(self) -> bool:
        """Whether the choice was left to us: then a site without effect is dropped and listed, not refused."""
        return set(self.patterns) <= {ALL_LINEAR, ALL}

    def matches(self, pattern: str, name: str) -> bool:
        if pattern.startswith("re:"):
            if not self.regex:
                raise TargetError(
                    f"targets: {pattern!r}: regular expressions are taken only from your own command line (regex=True)"
                )
            return re.fullmatch(pattern[3:], name) is not None
        return (
            name == pattern
            or name.endswith("." + pattern)
            or (any(c in pattern for c in "*?") and fnmatch.fnmatchcase(name, pattern))
        )


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    parts = (
        value.split(",")
        if isinstance(value, str) and not value.startswith("re:")
        else [value]
        if isinstance(value, str)
        else value
    )
    return tuple(p.strip() for p in parts if p.strip())


def _rows(spec: str, site: Site, pattern: str) -> tuple[int, int]:
    out = site.shape[0]
    if spec in "qkv" and len(spec) == 1:
        if out % 3:
            raise TargetError(
                f"targets: {pattern!r}: {out} rows of {site.name} don't split into q, k, v; give a range like [0:{out // 2}]"
            )
        start = "qkv".index(spec) * (out // 3)
        return start, start + out // 3
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    if not match or not 0 <= int(match[1]) < int(match[2]) <= out:
        raise TargetError(f"targets: {pattern!r}: rows must be q, k, v or start:stop within 0:{out}, got {spec!r}")
    return int(match[1]), int(match[2])


def find_sites(
    model: nn.Module, targets: str | Sequence[str] | Targets = ALL_LINEAR, exclude: str | Sequence[str] = ()
) -> list[Site]:
    """The sites that `targets` choose, in module order.

    "all-linear" takes every linear and transposed linear layer except output heads, routers and embeddings; "all" takes
    every site.

    Raises:
        TargetError: nothing matches a pattern (nearest names shown), or nothing is left after `exclude`.
    """
    targets = Targets.of(targets, exclude)
    sites = every_site(model)
    modules = dict(model.named_modules())
    heads = _heads(model)
    chosen: dict[str, Site] = {}
    for pattern in targets.patterns:
        if pattern == ALL_LINEAR:
            found = hits = [
                s
                for s in sites
                if kind_named(s.kind).automatic and s.module not in heads and not _is_router(s.module, modules[s.module])
            ]
        elif pattern == ALL:
            found = hits = sites
        else:
            slice_ = None if pattern.startswith("re:") else _ROWS.match(pattern)
            plain = slice_["name"] if slice_ else pattern
            hits = [s for s in sites if targets.matches(plain, s.name)]
            found = hits
            if slice_:
                ranges = [_rows(slice_["rows"], s, pattern) for s in hits]
                found = [replace(s, rows=r, shape=(r[1] - r[0], s.shape[1])) for s, r in zip(hits, ranges)]
        if not hits:
            raise TargetError(_no_match(pattern, sites, model))
        chosen.update({s.key: s for s in found})
    for pattern in targets.exclude:
        gone = [k for k, s in chosen.items() if targets.matches(pattern, s.name) or pattern == k]
        if not gone:
            raise TargetError(_no_match(pattern, list(chosen.values()), model, what="exclude"))
        for key in gone:
            del chosen[key]
    if not chosen:
        raise TargetError(f"targets: {', '.join(targets.patterns)} leaves nothing after exclude {', '.join(targets.exclude)}")
    _refuse_overlap(chosen.values())
    order = {s.name: k for k, s in enumerate(sites)}
    return sorted(chosen.values(), key=lambda s: (order[s.name], s.rows or (0, 0)))


def _refuse_overlap(sites: Iterable[Site]) -> None:
    by_name: dict[str, list[Site]] = {}
    for site in sites:
        by_name.setdefault(site.name, []).append(site)
    for name, group in by_name.items():
        spans = sorted(s.rows or (0, 1 << 62) for s in group)
        for (_, stop), (start, _) in itertools.pairwise(spans):
            if start < stop:
                raise TargetError(f"targets: {name} is chosen twice, by overlapping rows: {', '.join(s.key for s in group)}")


def _no_match(pattern: str, sites: Sequence[Site], model: nn.Module, what: str = "targets") -> str:
    counts: dict[str, int] = {}
    for site in sites:
        last = site.name.rsplit(".", 1)[-1] or "(the model itself)"
        counts[last] = counts.get(last, 0) + 1
    close = nearest(pattern.rsplit(".", 1)[-1], counts, n=8)
    close += [k for k in counts if k not in close][: max(0, 8 - len(close))]
    listing = ", ".join(f"{k} x{counts[k]}" for k in close) or "none: the model has no linear layer and no embedding"
    what_is_there = 'every kind of site: targets="all"' if pattern == "all-linear" else 'every linear layer: targets="all-linear"'
    return (
        f"{what}: pattern {pattern!r} matches none of the {len(sites)} sites of {type(model).__name__}.\n"
        f"  last names here, nearest first: {listing}\n"
        f"  to see every site: rankfold inspect MODEL; to take {what_is_there}"
    )

"""Inits at stacked sites (groups of a convolution, experts): each map starts as if it stood alone, and sees its own data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rankfold.core.site import Site
from rankfold.core.structure import ROLE_STARTS, StartContext
from rankfold.linalg import Dense, Operator

from .contracts import Init, InitContext, Roles, Statistic

__all__ = ["Stacked", "collect_stack", "fill_stack", "score_stack"]


class Stacked(Statistic):
    """One statistic for each map of a stack; a value is a list of rows by map, or a gradient [maps, out, in].

    >>> from rankfold.training.streams import GradientSum
    >>> both = Stacked([GradientSum((2, 2), rank=1), GradientSum((2, 2), rank=1)])
    >>> both.observe(torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(2, 2)]))
    >>> both.finish()
    >>> [part.triplets[1].tolist() for part in both.parts], both.seen
    ([[3.0], [0.0]], [2, 2])
    """

    def __init__(self, parts: Sequence[Statistic]) -> None:
        self.parts = list(parts)
        self.seen = [0] * len(self.parts)
        self.source = self.parts[0].source  # type: ignore[misc]

    def observe(self, value: Tensor | Sequence[Tensor]) -> None:
        for k, (part, own) in enumerate(zip(self.parts, value, strict=True)):
            self.seen[k] += len(own)
            if len(own) and not part.done:
                part.observe(own)

    @property
    def done(self) -> bool:
        return all(part.done for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def state(self) -> dict[str, Tensor]:
        own = {f"{k}:{name}": t for k, part in enumerate(self.parts) for name, t in part.state().items()}
        return {**own, "seen": torch.tensor(self.seen)}

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        self.seen = sum((s["seen"] for s in states), torch.zeros(len(self.parts), dtype=torch.int64)).tolist()
        for k, part in enumerate(self.parts):
            lead = f"{k}:"
            part.merge([{n.removeprefix(lead): t for n, t in s.items() if n.startswith(lead)} for s in states])

    def finish(self) -> None:
        for part, count in zip(self.parts, self.seen):
            if count:
                part.finish()


def _alone(site: Site, roles: Roles) -> tuple[Site, Roles]:
    """One map of a stack as a site, with the roles' shapes without their batch."""
    return replace(site, batch=None), replace(roles, shapes={role: shape[1:] for role, shape in roles.shapes.items()})


def collect_stack(init: Init, site: Site, roles: Roles) -> Statistic | None:
    """What each map needs, or None."""
    assert site.batch is not None
    one, own = _alone(site, roles)
    parts = [init.collect(one, own) for _ in range(site.batch)]
    return None if parts[0] is None else Stacked([p for p in parts if p is not None])


def score_stack(init: Init, site: Site, statistic: Stacked) -> Tensor | None:
    """The mean over the maps that saw data: a stack has one rank."""
    one = replace(site, batch=None)
    scores = [init.scores(one, part) for part, count in zip(statistic.parts, statistic.seen) if count]
    known = [s for s in scores if s is not None]
    if not known:
        return None
    longest = max(len(s) for s in known)
    return torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in known]).mean(0)


def fill_stack(init: Init, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
    """Each map filled alone, then stacked. A map that saw fewer rows than its rank (an expert that no router chose) starts by the
    roles' own laws."""
    assert site.batch is not None
    one, own = _alone(site, roles)
    dense = W.dense()
    statistic = ctx.statistic if isinstance(ctx.statistic, Stacked) else None
    made: list[dict[str, Tensor]] = []
    for k in range(site.batch):
        short = statistic is not None and statistic.seen[k] < roles.rank
        part = None if statistic is None else statistic.parts[k]
        made.append({} if short else init.fill(one, Dense(dense[k]), own, InitContext(ctx.random.child(f"map {k}"), part)))
    names = next((list(values) for values in made if values), [])
    for k, values in enumerate(made):
        for role in (r for r in names if r not in values):
            law = ROLE_STARTS.get(role.removesuffix("0"), 0.0)
            random = ctx.random.child(f"map {k}", role.removesuffix("0"))
            shape = own.shapes[role.removesuffix("0")]
            start = StartContext(shape, random, one, Dense(dense[k]), {})
            values[role] = law(start) if callable(law) else torch.full(shape, float(law))
    return {role: torch.stack([values[role].to(made[0][role].dtype) for values in made]) for role in names}

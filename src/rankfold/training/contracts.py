"""The contracts of the other axes: where tensors start, how capacity is spread, how a gradient becomes a step, what is added
to the loss.

Members are frozen dataclasses whose fields are their options. What composes with what follows from the traits declared here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.core.base import Base
from rankfold.core.options import Options
from rankfold.core.site import Site
from rankfold.core.structure import Spec
from rankfold.errors import CompositionError
from rankfold.linalg import Operator
from rankfold.linalg.random import Random

__all__ = ["POINTS", "Edit", "Init", "InitContext", "Loss", "RankPolicy", "Roles", "SiteView", "Statistic", "Trainable", "Update"]

POINTS = ("before_forward", "after_backward", "after_clip", "after_step", "between_steps")


class Statistic:
    """A streaming sum over data at one site: sees a tensor, keeps what it needs, forgets the rest.

    `source` is "input" (the site's input rows [tokens, in], padding dropped) or "gradient" (∂L/∂W [out, in] of one batch).
    """

    source: ClassVar[str] = "input"

    def observe(self, value: Tensor) -> None:
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """Whether more data would change nothing that matters."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes that it will hold; the plan printed before a pass is the sum of these."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Its tensors, all of fixed shape: what processes exchange."""
        raise NotImplementedError

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Take the states of all processes (this one's among them) in place of its own."""
        raise NotImplementedError

    def finish(self) -> None:
        """The pass is over: reduce what is held to what the init will ask for. Afterwards nothing is observed or merged."""


@dataclass(frozen=True)
class Roles:
    """What an init is to fill at one site: shapes by role, and the rank and scale of s·B A."""

    shapes: Mapping[str, tuple[int, ...]]
    rank: int
    scale: float

    def __contains__(self, role: str) -> bool:
        return role in self.shapes


@dataclass(frozen=True)
class InitContext:
    """What an init may use beside W: a generator of its own for this site, and the statistic that it asked for."""

    random: Random
    statistic: Statistic | None = None


@dataclass(frozen=True, kw_only=True)
class Init(Options):
    """Where the tensors of a structure start, by role, for a whole site at once.

    Traits:
        needs: what must be known: weights, activations, gradients.
        requires: roles that the structure must have as trainable tensors; an init may fill fewer.
        frozen: fills factors that do not train as well; `requires` then asks for tensors of either kind.
        offset: the start is not zero and enters as a deviation: `fill` gives B0 and A0 beside B and A, and core0 beside a core
            (`measured` does); one that it leaves out is a copy.
        starts: "base", "near(tol)" or "elsewhere".
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    frozen: ClassVar[bool] = False
    offset: ClassVar[bool] = False
    starts: ClassVar[str] = "base"

    def collect(self, site: Site, roles: Roles) -> Statistic | None:
        """The statistic that this site needs, or None. Sites that read the same input share one."""
        return None

    def scores(self, site: Site, statistic: Statistic) -> Tensor | None:
        """How much each component of this site is worth, for policies that spread a budget; None where it doesn't say."""
        return None

    def fill(self, site: Site, W: Operator, roles: Roles, ctx: InitContext) -> dict[str, Tensor]:
        """{role: tensor} in at least float32. Roles left out start by their Spec's own law."""
        raise NotImplementedError


@dataclass
class SiteView:
    """A site as a rank policy sees it: tensors and gradients by role, the frozen weight, and tensors of the policy's own that are
    saved with the run."""

    key: str
    site: Site
    tensors: dict[str, Tensor]
    rank: int
    scale: float
    state: dict[str, Tensor] = field(default_factory=dict)
    base: Base | None = None

    def grad(self, role: str) -> Tensor:
        g = self.tensors[role].grad
        return torch.zeros_like(self.tensors[role]) if g is None else g


@dataclass(frozen=True)
class Edit:
    """One change that a policy asks for; `training/edits.py` has the kinds and the one engine that applies them."""

    site: str
    shape_stable: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class RankPolicy(Options):
    """How capacity is spread over sites and over time. Returns edits; owns no tensor, no optimizer, no generator.

    Traits:
        point: which of the five points of a step `on_step` runs at.
        requires: roles that the structure must have.
        allocates: spreads a budget before training from the init's scores; needs a structure with a rank.
        steps: acts during training: the loop, or `adaptation.optimizer(total_steps=...)`, must call it.
    """

    point: ClassVar[str] = "between_steps"
    requires: ClassVar[frozenset[str]] = frozenset()
    allocates: ClassVar[bool] = False
    steps: ClassVar[bool] = False

    def allocate(
        self,
        scores: Mapping[str, Tensor],
        ranks: Mapping[str, int],
        limits: Mapping[str, int],
        costs: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """Ranks by site key before training; 0 removes the adapter there. `ranks` is the uniform start, `limits` min(out,
        in), `costs` the parameters of one rank. A site without scores keeps its rank."""
        return dict(ranks)

    def on_step(self, t: int, total: int, sites: Sequence[SiteView]) -> list[Edit]:
        """Edits at step t of `total`, counted from 1."""
        return []

    def finalise(self, sites: Sequence[SiteView]) -> list[Edit]:
        """Edits after the last step: compaction."""
        return []

    def objectives(self, sites: Sequence[SiteView]) -> dict[str, Tensor]:
        """Named loss terms."""
        return {}


@dataclass(frozen=True)
class Trainable:
    """One tensor as an update sees it: with its role, its site and the site's kind, the scale of its product and, for
    offsets, where it started."""

    name: str
    param: torch.nn.Parameter
    role: str
    site: str | None = None
    scale: float = 1.0
    start: Tensor | None = None
    kind: str | None = None


@dataclass(frozen=True, kw_only=True)
class Update(Options):
    """How a gradient becomes a step. Gives an ordinary torch optimizer over groups.

    Traits:
        requires: roles that the structure must have.
        own: the step is not plain AdamW over all tensors: training with another optimizer would silently drop it, so that raises.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[bool] = True

    def optimizer(
        self, tensors: Sequence[Trainable], lr: float, weight_decay: float = 0.0, **options: Any
    ) -> torch.optim.Optimizer:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Loss(Options):
    """A named term added to the user's loss, from the adapter's tensors or from the model's outputs."""

    def objectives(self, sites: Sequence[SiteView]) -> dict[str, Tensor]:
        raise NotImplementedError


def measured(start: dict[str, Tensor]) -> dict[str, Tensor]:
    """A start with itself as its offset: B0 beside B, A0 beside A, core0 beside core."""
    return {**start, **{role + "0": value for role, value in start.items()}}


def roles_of(specs: Mapping[str, Spec], rank: int, scale: float, trainable: bool = True) -> Roles:
    """The roles of a site's tensors; a role that two trainable tensors share is not a role that an init could fill."""
    names: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if spec.trainable or not trainable:
            names.setdefault(spec.role, []).append(name)
    shapes = {role: specs[ns[0]].shape for role, ns in names.items() if len(ns) == 1}
    if "A" in shapes:  # its own rows say more than the innermost structure, which may be another one
        rank = shapes["A"][-2]
    return Roles(shapes, rank, scale)


def require(member: Any, roles: Roles, structure: str) -> None:
    """Refuse a member whose roles the structure lacks.

    Raises:
        CompositionError: with the roles that are missing and those that are there.
    """
    missing = sorted(member.requires - set(roles.shapes))
    if missing:
        works, there = ("tensors ", "has") if getattr(member, "frozen", False) else ("trainable ", "trains")
        raise CompositionError(
            f"{structure} + {member.name}: {member.axis} {member.name!r} works on {works}"
            f"{', '.join(sorted(member.requires))}; "
            f"structure {structure!r} {there} {', '.join(sorted(roles.shapes)) or 'nothing of its own'}.\n"
            f"  every pair and its reason: rankfold methods --matrix"
        )

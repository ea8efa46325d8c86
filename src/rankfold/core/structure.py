"""What a method's author writes: which tensors a change has, and the expression in W that they make.

    tensors(site) -> dict[str, Spec]
    delta(t, site, ctx) -> Operator                 additive methods write only this
    weight(W, t, site, ctx) -> Operator             the primitive: an expression in W

Everything else is derived: forward and backward, fold, export, norms, counts, files, documentation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.errors import CompositionError
from rankfold.linalg import Operator, deviation, difference
from rankfold.linalg.random import Random

from .options import Options
from .site import Site

__all__ = [
    "Context",
    "Decorator",
    "Offset",
    "SideModule",
    "Spec",
    "Stack",
    "StartContext",
    "Structure",
    "Tensors",
    "TooLarge",
    "Unfit",
    "added",
    "kaiming",
    "layers",
    "never_dense",
    "trait",
]

Tensors = Any
"""The tensors of one site: a namedtuple whose fields are the keys of `tensors(site)`, made once per site."""


@dataclass(frozen=True)
class StartContext:
    """What a start law may look at: the tensor's shape, a generator of its own, the site and its base weight, and the
    tensors before it."""

    shape: tuple[int, ...]
    random: Random
    site: Site
    W: Operator
    tensors: Mapping[str, Tensor]


Start = float | Callable[[StartContext], Tensor]


def kaiming(ctx: StartContext) -> Tensor:
    """Uniform on ±1/√fan_in with fan_in the last dimension: what nn.Linear starts from (He et al. 2015, a = √5)."""
    bound = ctx.shape[-1] ** -0.5
    return ctx.random.uniform(ctx.shape, -bound, bound)


ROLE_STARTS: dict[str, Start] = {"A": kaiming, "B": 0.0}
"""Where a tensor starts that neither its Spec nor the init axis speaks of."""


@dataclass(frozen=True)
class Spec:
    """One tensor of a structure.

    Args:
        shape: without the batch of experts; core adds that.
        role: what inits and updates know it by: B, A, core, gate, magnitude, basis, value, weight, router.
        trainable: False for a frozen basis, True for what the optimizer gets.
        scope: site; group (sites that share an input); model (one for all); emitted (filled by `prepare`, stored nowhere).
        join: how the requests of many sites for one shared tensor are united: same, max (leading slices), cat (own slice each).
        start: a constant, or a law; None leaves it to the init axis.
        dtype: None means float32, the master precision.
    """

    shape: tuple[int, ...]
    role: str = "value"
    trainable: bool = True
    scope: str = "site"
    join: str = "same"
    start: Start | None = None
    dtype: torch.dtype | None = None


@dataclass
class Context:
    """What a forward pass carries beside its input; gates read it.

    Args:
        training: mode of the module.
        x: the site's input, for gates that look at it.
        weights: [samples, k] or [k] mixing weights, where somebody else decides them.
        token_mask: [samples, tokens] of which tokens the change may touch.
        conditioning, time: for models that are conditioned.
        seed: what stochastic structures drew for this pass; the recomputation gets the same.
    """

    training: bool = False
    x: Tensor | None = None
    weights: Tensor | None = None
    token_mask: Tensor | None = None
    conditioning: Tensor | None = None
    time: Tensor | None = None
    seed: int | Tensor | None = None


@dataclass(frozen=True)
class Unfit:
    """Why a site can't carry a structure: another site may. "all-linear" leaves it out."""

    reason: str


@dataclass(frozen=True)
class TooLarge(Unfit):
    """An option beyond what a weight of that shape holds: another option is due, so it is refused also under "all-linear"."""


@dataclass(frozen=True, kw_only=True)
class Structure(Options):
    """How a change of one weight is built from tensors. Subclasses are frozen dataclasses: their fields are the options.

    Traits, from which it follows what composes with what:
        starts: "base" (same function, bitwise in float32), "near(tol)" (relative), or "elsewhere".
        input_dependent: the expression depends on the input: cannot fold or be exported.
        stochastic: the expression differs between training passes.
        acts_on_input: multiplies W from the right: refused where the input is a vocabulary.
        reads_entries: multiplies entries or blocks of W: refused over a structure that leaves no one weight to read.
        kinds: site kinds that it is meant for; None means all.
        never_dense: at a linear layer or an embedding no pass makes a tensor of out·in entries, forward or backward, whatever
            the number of tokens; the planner keeps to it, and a chain does where every layer does.
        owns: trains its own copy of the weight: every other parameter of the model is then owned as well.
        init: name of the init that stands where a method names none; None is the general default.
        exempt: {law: reason}, printed by `rankfold methods`.
    """

    starts: ClassVar[str] = "base"
    input_dependent: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    acts_on_input: ClassVar[bool] = False
    reads_entries: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str] | None] = None
    never_dense: ClassVar[bool] = False
    owns: ClassVar[bool] = False
    init: ClassVar[str | None] = None
    exempt: ClassVar[Mapping[str, str]] = {}

    def tensors(self, site: Site) -> dict[str, Spec]:
        raise NotImplementedError

    def delta(self, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        raise NotImplementedError

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return W + self.delta(t, site, ctx)

    def objectives(self, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, Tensor]:
        """Named loss terms, added to the user's loss; {} for most."""
        return {}

    def prepare(self, shared: Tensors, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, dict[str, Tensor]] | None:
        """Tensors of scope "emitted" for every site, once per step; None where there are none."""
        return None

    def fits(self, site: Site) -> Unfit | None:
        """Why this site can't carry the structure, or None; a `TooLarge` where another option, not another site, is due."""
        rank = getattr(self, "rank", None)
        if rank is not None and rank > min(site.shape):
            return TooLarge(f"rank {rank} is larger than the matrix: min(out, in) = {min(site.shape)}")
        return None

    @property
    def scale(self) -> float:
        """s of s·B A; 1 where a structure has none."""
        return 1.0

    @property
    def core(self) -> Structure:
        """The innermost structure: what decorators decorate."""
        return self

    def at_rank(self, rank: int, alpha: float | None = None) -> Structure:
        """The same structure at another rank.

        Raises:
            CompositionError: it has no rank, or no alpha where one is given.
        """
        if not hasattr(self, "rank"):
            raise CompositionError(f"{type(self).__name__} has no rank that could be redistributed")
        if alpha is not None:
            raise CompositionError(f"{type(self).__name__} has no alpha")
        return self if rank == self.rank else dataclasses.replace(self, rank=rank)  # type: ignore[call-arg]


@dataclass(frozen=True, kw_only=True)
class Decorator(Structure):
    """A structure around another one. Writes `own(site)` and `weight`; the inner one's tensors come along."""

    inner: Structure = field(default=None, metadata={"option": False})  # type: ignore[assignment]

    def own(self, site: Site) -> dict[str, Spec]:
        return {}

    def tensors(self, site: Site) -> dict[str, Spec]:
        return union(self.inner.tensors(site), self.own(site), self)

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        raise NotImplementedError

    def fits(self, site: Site) -> Unfit | None:
        return self.inner.fits(site)

    def objectives(self, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, Tensor]:
        return self.inner.objectives(t, sites)

    def prepare(self, shared: Tensors, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, dict[str, Tensor]] | None:
        return self.inner.prepare(shared, t, sites)

    @property
    def scale(self) -> float:
        return self.inner.scale

    @property
    def core(self) -> Structure:
        return self.inner.core

    def at_rank(self, rank: int, alpha: float | None = None) -> Structure:
        return dataclasses.replace(self, inner=self.inner.at_rank(rank, alpha))


@dataclass(frozen=True, kw_only=True)
class Stack(Decorator):
    """`outer` applied to the weight that `inner` already changed: how two plain structures of one chain compose."""

    outer: Structure = field(default=None, metadata={"option": False})  # type: ignore[assignment]

    def tensors(self, site: Site) -> dict[str, Spec]:
        return union(self.inner.tensors(site), self.outer.tensors(site), self.outer)

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        return self.outer.weight(self.inner.weight(W, t, site, ctx), t, site, ctx)

    def fits(self, site: Site) -> Unfit | None:
        return self.inner.fits(site) or self.outer.fits(site)

    def objectives(self, t: Mapping[str, Tensors], sites: Sequence[Site]) -> dict[str, Tensor]:
        return added(self.inner.objectives(t, sites), self.outer.objectives(t, sites))


@dataclass(frozen=True, kw_only=True)
class Offset(Decorator):
    """The inner structure measured from where an init started it: W + (change(t) − change(t₀)), with t₀ frozen.

    Exactly zero at the start in every dtype, without forming W − s·B₀A₀; two such adapters on one base don't disturb each other.
    """

    ROLES: ClassVar[tuple[str, ...]] = ("B", "A", "core")

    def names(self, site: Site) -> list[str]:
        return [n for n, spec in self.inner.tensors(site).items() if spec.role in self.ROLES and spec.trainable]

    def own(self, site: Site) -> dict[str, Spec]:
        inner = self.inner.tensors(site)
        frozen = partial(dataclasses.replace, trainable=False)
        return {n + "0": frozen(inner[n], role=inner[n].role + "0", start=partial(_copied, n)) for n in self.names(site)}

    def weight(self, W: Operator, t: Tensors, site: Site, ctx: Context | None = None) -> Operator:
        start = t._replace(**{n: getattr(t, n + "0") for n in self.names(site)})
        now, then = (difference(self.inner.weight(W, at, site, ctx), W) for at in (t, start))
        return W + deviation(now, then)


def _copied(name: str, ctx: StartContext) -> Tensor:
    """The start of another tensor of the site."""
    return ctx.tensors[name]


def added(*groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named loss terms of several owners as one; terms of one name add up.

    >>> added({"orthogonality": torch.tensor(1.0)}, {"orthogonality": torch.tensor(2.0)})
    {'orthogonality': tensor(3.)}
    """
    terms: dict[str, Tensor] = {}
    for group in groups:
        for name, term in group.items():
            terms[name] = terms[name] + term if name in terms else term
    return terms


def union(inner: dict[str, Spec], own: dict[str, Spec], who: Structure) -> dict[str, Spec]:
    """The tensors of two layers of one chain; they share a namespace, so a clash is refused."""
    both = sorted(inner.keys() & own.keys())
    if both:
        raise CompositionError(
            f"{type(who).__name__} and the structure inside it both own tensors named {', '.join(both)}; "
            f"attach the second as an adapter of its own: rf.adapt(model, ..., name='second')"
        )
    return {**inner, **own}


def layers(structure: Structure) -> list[Structure]:
    """The chain from the outermost to the innermost, the offset left out."""
    if isinstance(structure, Stack):
        return [*layers(structure.outer), *layers(structure.inner)]
    if isinstance(structure, Offset):
        return layers(structure.inner)
    if isinstance(structure, Decorator):
        return [structure, *layers(structure.inner)]
    return [structure]


def never_dense(structure: Structure) -> bool:
    """Whether every layer of the chain declares that it makes no tensor of the weight's size."""
    return all(layer.never_dense for layer in layers(structure))


def trait(structure: Structure, name: str) -> bool:
    """Whether any layer of the chain declares the trait."""
    return any(getattr(layer, name) for layer in layers(structure))


@dataclass(frozen=True, kw_only=True)
class SideModule(Structure):
    """A change that is no weight: a small network at a named point of a block (bottleneck, ladder, memory).

    The same contract as a structure, with `forward` in place of `weight`: h' = forward(h, t, site, ctx) for h: [..., width].
    Sites are the model's blocks (kind "block", shape (width, width)).
    """

    point: ClassVar[str] = "after_block"
    kinds: ClassVar[frozenset[str] | None] = frozenset({"block"})

    def places(self, blocks: Sequence[Site]) -> list[Site]:
        """Which of the blocks get one; all by default."""
        return list(blocks)

    def forward(self, h: Tensor, t: Tensors, site: Site, ctx: Context | None = None) -> Tensor:
        raise NotImplementedError

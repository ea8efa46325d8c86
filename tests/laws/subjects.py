"""What the laws run over: every name that `rf.method` takes alone, and every other member in the first method that takes it.

The list is read from the registry: a new file in methods/ is tested with no edit here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

import rankfold as rf
from rankfold.core import registry
from rankfold.core.registry import Entry
from rankfold.core.structure import Decorator, trait
from rankfold.errors import CompositionError, OptionError, TargetError
from rankfold.training.method import Method

from .models import BLOCK, KINDS, Case

__all__ = ["adapt", "cells", "decorators", "home", "plain_structures", "refused_by", "shake", "small", "subjects", "train"]

SMALL = 2
STACKS = ("grouped", "experts")
"""Kinds whose sites are several maps, each with an input of its own."""


def small(text: str, **options: object) -> Method:
    """The method with the whole-number options of its structures cut to 2, so that it fits on tiny sites."""
    made = rf.method(text, **options)
    for part in made.parts:
        if part.axis != "structure":
            continue
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.metadata.get("option", True) and type(value) is int and value > SMALL and field.name not in options:
                with contextlib.suppress(OptionError):
                    made = rf.method(made.text, **{**made.options, f"{part.name}.{field.name}": SMALL})
    return made


def decorators() -> list[str]:
    return [e.name for e in registry.entries("structure") if issubclass(registry.resolve(e), Decorator)]


def plain_structures() -> list[str]:
    return [e.name for e in registry.entries("structure") if e.name not in decorators()]


def default_structure() -> str:
    return next(e.name for e in registry.entries("structure") if dict(e.traits).get("default") == "True")


def _chains(entry: Entry) -> Iterator[str]:
    """Methods that a member may be at home in, the plainest first."""
    base = default_structure()
    others = [n for n in plain_structures() if n != base]
    if entry.axis == "structure":
        yield from (f"{entry.name}+{inner}" for inner in [base, *others])
        return
    yield from (name for name in rf.methods() if any(f"{p.axis}:{p.name}" == entry.key for p in rf.method(name).parts))
    frames = [base, *others, *(f"{d}+{base}" for d in decorators())]
    yield from (f"{frame}+{entry.key}" for frame in frames)
    helpers = [e.key for e in registry.entries() if e.axis in ("init", "rank", "update") and e.axis != entry.axis]
    yield from (f"{frame}+{helper}+{entry.key}" for frame, helper in itertools.product(frames, helpers))


@functools.cache
def home(key: str) -> str:
    """The first chain that takes a member of an axis.

    Raises:
        AssertionError: it composes with nothing, so that no law would ever see it.
    """
    entry = next(e for e in registry.entries() if e.key == key)
    for chain in _chains(entry):
        with contextlib.suppress(CompositionError):
            rf.method(chain)
            return chain
    raise AssertionError(f"{key} composes with no structure of the catalogue")


@functools.cache
def subjects() -> tuple[str, ...]:
    """Names of methods that cover the whole registry."""
    alone = list(rf.methods())
    held = [e.key for e in registry.entries() if e.axis != "structure" and dict(e.traits).get("default") != "True"]
    held += [f"structure:{d}" for d in decorators()]
    return tuple(dict.fromkeys([*alone, *(home(key) for key in held)]))


def cells() -> list[tuple[str, str]]:
    """(method, kind): every site kind for changes of a weight, blocks for what stands beside them."""
    return [(s, kind) for s in subjects() for kind in ((BLOCK,) if rf.method(s).is_side else KINDS)]


def refused_by(method: Method, kind: str) -> str | None:
    """The trait by which a kind is refused, or None. Tied weights are adapted at the head where only the embedding is refused."""
    kinds = method.structure.core.kinds
    if method.is_side:
        return None if kind == BLOCK else "kinds"
    if kind == "embedding":
        if kinds is not None and kind not in kinds:
            return "kinds"
        return next((t for t in ("acts_on_input", "input_dependent", "stochastic") if trait(method.structure, t)), None)
    if kind in STACKS and trait(method.structure, "input_dependent"):
        return "input_dependent"
    if kind == "multihead" and (kinds is None or kind in kinds):
        return next((t for t in ("input_dependent", "stochastic") if trait(method.structure, t)), None)
    actual = {"rows": "linear", "tied": "linear", "grouped": "convolution"}.get(kind, kind)
    return "kinds" if kinds is not None and actual not in kinds else None


def adapt(case: Case, method: Method | str, **options: object) -> rf.Adaptation:
    """`rf.adapt` with what the method needs: batches and a loss for inits that look at data."""
    method = small(method) if isinstance(method, str) else method
    targets = case.targets
    if case.kind == "tied" and refused_by(method, "embedding"):
        targets = ["head"]
    data = {"batches": [case.batch], "loss": case.loss} if method.init.needs & {"activations", "gradients"} else {}
    return rf.adapt(case.model, method, **{"targets": targets, "seed": 1, **data, **options})


def refuses(case: Case, method: Method) -> bool:
    """Whether attaching is refused with a TargetError."""
    try:
        adapt(case, method)
    except TargetError:
        return True
    return False


def shake(adaptation: rf.Adaptation, size: float = 0.3, seed: int = 7, name: str | None = None) -> None:
    """Every tensor that trains moved at random, by `size` times its own root mean square (1 where it is zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adaptation.parameters(name):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            rms = p.double().square().mean().sqrt()
            p.add_((size * noise * (rms if rms > 0 else 1.0)).to(p.dtype))


def train(case: Case, adaptation: rf.Adaptation, steps: int = 2, lr: float = 0.02, name: str | None = None) -> list[Tensor]:
    """Steps with the method's own optimizer; gives the losses and leaves the model in eval mode."""
    method = adaptation._get(name).method
    optimizer = adaptation.optimizer(lr=lr, name=name, total_steps=steps if method.rank.steps else None)
    losses = []
    case.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = case.loss(case.model, case.batch) + sum(adaptation.objectives().values())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    case.model.eval()
    return losses

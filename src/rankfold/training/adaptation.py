"""The handle of a model with adapters: one object per model, owner of its adapters, their tensors, switches, optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapters.fingerprint import Fingerprint
from rankfold.core.attaching import detach, specs_of
from rankfold.core.folding import fold, folded_weights, requantisation_errors, unfold
from rankfold.core.site import Site
from rankfold.core.store import Member, Slot, Store, store_of
from rankfold.core.structure import added
from rankfold.errors import CompositionError, LayoutError, OptionError, UnknownName

from .bucket import Bucket
from .contracts import Trainable
from .method import Method
from .prints import fingerprint

__all__ = ["Adaptation", "Attached", "adaptation", "member_store"]


@dataclass(eq=False)
class Attached:
    """What the handle knows of one adapter beside its tensors."""

    method: Method
    member: Member
    seed: int
    dropped: list[tuple[str, str]] = field(default_factory=list)
    labels: tuple[str, ...] | None = None
    trained: dict[str, Any] = field(default_factory=dict)
    engine: Any = None


class Adaptation:
    """The adapters of one model. `rf.adapt` makes it, `rf.adaptation(model)` finds it again.

    >>> import torch, rankfold as rf
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    >>> adaptation = rf.adapt(model, "lora", rank=2)
    >>> [site.key for site in adaptation.sites], adaptation.parameter_count()
    (['0', '2'], 48)
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attached: dict[str, Attached] = {}

    @property
    def model(self) -> nn.Module:
        return self.store.model

    def __repr__(self) -> str:
        lines = [f"{n}: {a.method} at {len(a.member.slots)} sites" for n, a in self.attached.items()]
        return f"Adaptation({'; '.join(lines)}; on: {', '.join(self.store.active) or 'none'})"

    # what there is

    @property
    def active(self) -> dict[str, float | Tensor]:
        """Names of the adapters that are on, with their weights."""
        return dict(self.store.active)

    @property
    def names(self) -> list[str]:
        return list(self.attached)

    @property
    def method(self) -> Method:
        """The method of the first adapter that is on."""
        return self._get(None).method

    def _get(self, name: str | None) -> Attached:
        if name is None:
            name = next(iter(self.store.active), next(iter(self.attached), ""))
        if name not in self.attached:
            raise UnknownName.of("adapter", name, self.attached)
        return self.attached[name]

    @property
    def sites(self) -> list[Site]:
        """Every adapted site, once, in model order."""
        found = {s.site.key: s.site for a in self.attached.values() for s in a.member.slots.values()}
        return list(found.values())

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """Sites that "all-linear" chose and that were left out, with the reason."""
        return [pair for a in self.attached.values() for pair in a.dropped]

    def slots(self, name: str | None = None) -> list[Slot]:
        """The slots of one adapter."""
        return list(self._get(name).member.slots.values())

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Every tensor that one adapter owns, shared ones once: {name in the store: tensor}."""
        return {key: self.store.tensor(key) for key in self._get(name).member.owned()}

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The tensors that train."""
        return [t for t in self.tensors(name).values() if isinstance(t, nn.Parameter) and t.requires_grad]

    def parameter_count(self, name: str | None = None) -> int:
        """Numbers that train, from unique storage."""
        return sum(p.numel() for p in self.parameters(name))

    def trainables(self, name: str | None = None) -> list[Trainable]:
        """The tensors that train as an update sees them."""
        member = self._get(name).member
        found: dict[str, Trainable] = {}
        for key, slot in member.slots.items():
            specs = specs_of(slot.structure, slot.site)
            for field_, (stored, _) in slot.binding.items():
                param = self.store.tensor(stored)
                if stored in found or not param.requires_grad:
                    continue
                start = slot.binding.get(field_ + "0")
                spec = specs[field_]
                found[stored] = Trainable(
                    stored, param, spec.role, key if spec.scope == "site" else None, slot.structure.scale,  # type: ignore[arg-type]
                    self.store.tensor(start[0]) if start and specs[field_ + "0"].role == spec.role + "0" else None,
                    slot.site.kind,
                )  # fmt: skip
        for extra in member.extras.values():
            found[extra.key] = Trainable(extra.key, self.store.tensor(extra.key), "extra")  # type: ignore[arg-type]
        return list(found.values())

    # on and off

    def use(self, *names: str, weight: float | Tensor | Sequence[float] = 1.0) -> Adaptation:
        """Switch to these adapters, each at its weight: W + Σ_k weight_k · (W_k − W), the exact sum of their changes.

        Raises:
            UnknownName: no such adapter.
            OptionError: a name twice, another number of weights than one, or one for each, or different plans.
            CompositionError: a weight other than 1 for an adapter that owns whole tensors.
            LayoutError: the model is folded.
        """
        weights: list[Any] = list(weight) if isinstance(weight, list | tuple) else [weight] * len(names)
        if len(weights) != len(names):
            raise OptionError(f"use: {len(names)} adapters and {len(weights)} weights; give one weight, or one for each")
        if len(set(names)) < len(names):
            raise OptionError(f"use: {', '.join(names)}: a name stands there twice; give each adapter one weight")
        for name, w in zip(names, weights):
            if name in self.attached and self.attached[name].member.extras and not (isinstance(w, float | int) and w == 1.0):
                raise CompositionError(f"use: adapter {name!r} owns whole tensors (heads, biases), which have no weight but 1")
        if self.store.is_folded:
            raise LayoutError("the model is folded; unfold before switching adapters")
        self.store.switch(dict(zip(names, weights)))
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model itself, bitwise, within the block.

        Raises:
            LayoutError: the model is folded.
        """
        if self.store.is_folded:
            raise LayoutError("the model is folded; unfold to get at the base")
        with self.store.disabled():
            yield

    @contextmanager
    def context(self, **values: Any) -> Iterator[None]:
        """Values that gates read during forward passes in the block: weights, token_mask, conditioning, time."""
        before = {k: getattr(self.store.context, k) for k in values}
        try:
            for k, v in values.items():
                setattr(self.store.context, k, v)
            yield
        finally:
            for k, v in before.items():
                setattr(self.store.context, k, v)

    def fold(self) -> dict[str, float]:
        """Put W' in the place of W, keeping W: then the model runs at the speed of the base. Gives the rounding error by module.

        Raises:
            LayoutError: already folded, a side module, or a change that depends on the input.
        """
        return fold(self.store)

    def requantisation_errors(self) -> dict[str, float]:
        """‖Q(W') − W'‖ / ‖W' − W‖ by module: what of a change would be lost if the folded weights of a quantised base were
        stored in its format again, which `fold` therefore doesn't do.

        Raises:
            LayoutError: no base is quantised, a format that can't be written, or as `fold`.
        """
        return requantisation_errors(self.store)

    def unfold(self) -> None:
        """The original weights again, bitwise.

        Raises:
            LayoutError: the model is not folded.
        """
        unfold(self.store)

    def folded_weights(self) -> dict[str, Tensor]:
        """{name of the stored weight: W'} without touching the model."""
        return folded_weights(self.store)

    def remove(self, name: str | None = None) -> None:
        """Take an adapter off and free its tensors; with the last one the model is as it was before `adapt`."""
        names = [name] if name else list(self.attached)
        for n in names:
            engine = self._get(n).engine
            detach(self.model, n)
            if engine is not None:
                engine.uninstall()
            del self.attached[n]

    # training

    def objectives(self) -> dict[str, Tensor]:
        """Named loss terms of the structures, policies and losses that are on; add their sum to the loss."""
        terms: list[dict[str, Tensor]] = []
        for name in self.store.active:
            a = self.attached[name]
            slots = list(a.member.slots.values())
            terms.append(a.member.structure.objectives({s.site.key: s.t(self.store) for s in slots}, [s.site for s in slots]))
            if a.engine is not None:
                terms.append(a.engine.objectives())
        return added(*terms)

    def bucket(self, name: str | None = None, group: Any = None) -> Bucket:
        """The gradients of one adapter as one flat buffer: `adaptation.bucket().all_reduce()` averages them over the processes of
        torch.distributed, for a loop of your own whose model no DistributedDataParallel wraps."""
        return Bucket(self.parameters(name), group)

    def optimizer(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        name: str | None = None,
        total_steps: int | None = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer of the method's update over this adapter's tensors, with its rank policy acting around each step.

        Each call begins a run: the policy starts at step 0 with nothing remembered, and the optimizer before is let go. A run
        goes on only where a checkpoint was restored before the call.

        Args:
            total_steps: length of the run; a policy with a schedule needs it.

        Raises:
            OptionError: a policy that needs `total_steps` without it.
            InactiveError: (from the first step) nothing had a gradient.
        """
        from .engine import engine_of_next_run

        a = self._get(name)
        if a.method.rank.steps and total_steps is None:
            raise OptionError(f"optimizer: rank policy {a.method.rank.name!r} follows a schedule; give total_steps")
        optimizer = a.method.update.optimizer(self.trainables(name), lr=lr, weight_decay=weight_decay, **options)
        a.engine = engine_of_next_run(a.engine, a.method.rank, a.method.losses, self.store, a.member)
        a.engine.install(optimizer, total_steps)
        return optimizer

    # files

    def save(self, path: str | Path, name: str | None = None) -> Path:
        """Write one adapter to a folder: tensors as they are trained, method, base fingerprint. A crash leaves the previous
        one whole. Where the base is cut over processes each must call this, and the first one writes."""
        from .saving import save

        return save(self, path, name)

    def fingerprint(self, name: str | None = None) -> Fingerprint:
        """Of the base weights that this adapter changes."""
        return fingerprint(self.model, sorted({s.site.name if s.base is None else s.site.weight for s in self.slots(name)}))


def adaptation(model: nn.Module) -> Adaptation:
    """The handle of a model that has adapters.

    Raises:
        LayoutError: it has none.
    """
    store = store_of(model)
    if store is None:
        raise LayoutError(f"{type(model).__name__} has no adapter; rf.adapt(model, METHOD) gives it one")
    if store.handle is None or store.handle.store is not store:
        raise LayoutError("the model's adapters have lost their handle: it was pickled by hand; use adaptation.save and rf.load")
    return store.handle


def member_store(model: nn.Module) -> Store:
    store = store_of(model)
    assert store is not None
    return store

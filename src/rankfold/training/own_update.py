"""Law 6 for updates and rank policies: what another optimizer trains in their place is noticed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankfold.core.store import Store
from rankfold.errors import InactiveError

if TYPE_CHECKING:
    from .adaptation import Attached

__all__ = ["OwnUpdate"]


class OwnUpdate:
    """Watches one adapter: if another optimizer moved the tensors of a method that needs ours, the next forward raises."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.member = attached.member
        self.seen: int | None = None
        self.sample: list[Tensor] = []

    def before_forward(self, store: Store) -> None:
        a = self.attached
        if not (a.method.update.own or a.method.rank.steps) or not store.model.training:
            return
        tensors = [t for t in map(store.tensor, a.member.owned()) if t.requires_grad]
        version = sum(t._version for t in tensors)
        # fused optimizers leave the versions as they are; where ours was never made, it is worth looking at the values
        sample = [t.detach().flatten()[:16].clone() for t in tensors] if a.engine is None else []
        drifted = any(not torch.equal(now, then) for now, then in zip(sample, self.sample))
        by_us = a.engine is not None and a.engine.moved
        if self.seen is not None and (version != self.seen or drifted) and not by_us:
            what = f"update {a.method.update.name!r}" if a.method.update.own else f"rank policy {a.method.rank.name!r}"
            raise InactiveError(
                f"adapter {a.member.name!r}: another optimizer moved its tensors, so {what} did nothing. "
                f"Train with adaptation.optimizer(lr=...), or choose update:adamw and rank:fixed"
            )
        if a.engine is not None:
            a.engine.moved = False
        self.seen, self.sample = version, sample

    def after_forward(self, store: Store, output: Any) -> None:
        return None

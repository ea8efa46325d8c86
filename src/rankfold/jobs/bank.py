"""`rf.Bank`: a bank that takes adapters from wherever they are: folders, training, plain data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rankfold.adapters.adapter import Adapter
from rankfold.core.bank import Packed, PlainBank
from rankfold.core.targets import Targets
from rankfold.errors import CompositionError, OptionError
from rankfold.training.adaptation import Adaptation
from rankfold.training.saving import normal_form

from .exchange import borrowed

__all__ = ["Bank", "Source"]

Source = str | Path | Adaptation | Adapter | Packed
"""A folder (ours, peft's, or what else `rf.load` reads), the handle of a model's own adapters, plain data, or a packed row."""


class Bank(PlainBank):
    """Many frozen adapters of one model, chosen per row of the batch.

    y_n = gain_{i(n)} ⊙ (x_n Wᵀ + (x_n A_{i(n)}ᵀ) B_{i(n)}) + bias

    Additive changes of low rank, offsets (as rank 2r), rotations and magnitudes over these are exact; anything else is cut to the
    bank's rank, if that loses at most `tolerance` of it.

    Args:
        model: its weights are never written; forward hooks at the sites add the changes.
        rank: the rank bucket: adapters of smaller rank are padded with zeros, larger ones are cut or refused.
        slots: adapters that the arena holds at first; it doubles when full, and halves when three quarters are free.
        targets: where adapters may change the model, as in `rf.adapt`.
        gains: whether adapters may rescale rows of a weight (DoRA).
        dtype: of the arena; None takes that of the weights.
        tolerance: the largest relative error (Frobenius, at any site) of a change that is cut to the bank's rank.

    Cost: a step reads the factors of the adapters present once, in blocks of 8 ranks. The first step after a choice copies those
    that the choice before did not have; on a GPU with Triton they are read where they lie.

    Raises:
        TargetError: a target whose kind of weight a bank can't serve (convolutions, experts, multi-head attention).
        OptionError: a rank or number of slots below 1.

    >>> import torch, rankfold as rf
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.ones(2, 4)
    >>> adaptation = rf.adapt(model, "dora", rank=2)
    >>> _ = adaptation.parameters()[0].data.add_(1.0)
    >>> trained = model(x)
    >>> bank = rf.Bank(model, rank=2)
    >>> bank.add("mine", adaptation) < 1e-6                   # the largest relative error: DoRA is exact
    True
    >>> _ = adaptation.use()                                  # off: the bank stands beside the bare model
    >>> bank.select(["mine", None])
    >>> torch.allclose(model(x)[0], trained[0], atol=1e-5), torch.allclose(model(x)[1], trained[1], atol=1e-5)
    (True, False)
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 16,
        slots: int = 8,
        targets: str | list[str] | Targets = "all-linear",
        gains: bool = True,
        dtype: torch.dtype | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        super().__init__(model, rank, slots, targets, gains, dtype)
        self.tolerance = tolerance

    def add(self, name: str, source: Source, of: str | None = None) -> float:
        """Copy an adapter into a free slot; nothing that is compiled changes while the arena need not grow.

        Args:
            source: a folder, an adaptation of this model (`of` names the adapter, if it has several), plain data, or what `pack`
                gave.

        Returns:
            The largest relative error of its sites: 0 where the serving form is exact.

        Raises:
            OptionError: the name is taken; a rank that the bank can't hold; whole tensors (heads), which rows of a batch can't
                choose; gains in a bank without them.
            TargetError: a site that the bank doesn't have.
            CompositionError: a change that is no fixed matrix. FileError, FingerprintError: as `rf.load`.
        """
        plain, error = self._plain(name, source, of)
        super().add(name, plain)
        return error

    def replace(self, name: str, source: Source, of: str | None = None) -> float:
        """Swap an adapter in place, of whatever rank and scale; a choice that holds it goes on with the new one.

        Raises:
            UnknownName: no adapter of that name. Else as `add`.
        """
        self._known(name)
        plain, error = self._plain(name, source, of)
        super().replace(name, plain)
        return error

    def _plain(self, name: str, source: Source, of: str | None) -> tuple[Adapter | Packed, float]:
        if isinstance(source, Adapter | Packed):
            return source, 0.0
        if isinstance(source, Adaptation):
            if source.model is not self.model:
                raise CompositionError(f"bank: {name!r} comes from another model's adaptation; save it and give the folder")
            adapter, errors = normal_form(source, of, self.rank)
        else:
            with borrowed(self.model, source) as (adaptation, there):
                adapter, errors = normal_form(adaptation, there, self.rank)
        key = max(errors, key=errors.__getitem__)
        if errors[key] > self.tolerance:
            raise OptionError(
                f"bank: {name!r} cut to the bank's rank {self.rank} loses {errors[key]:.1%} of its change at {key}: "
                f"make a bank of larger rank, or allow it: rf.Bank(..., tolerance={errors[key] * 1.1:.2g})"
            )
        return adapter, errors[key]

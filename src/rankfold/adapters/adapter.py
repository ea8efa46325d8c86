"""An adapter as plain data: for every site two factors and a number, and beside them extra tensors.

This is the normal form: what tools exchange, and what can be added, compared and merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg import Diagonal, LowRank, Magnitude, Operator

__all__ = ["KINDS", "Adapter", "Entry"]

KINDS = ("linear", "conv1d", "embedding", "convolution", "experts", "experts-transposed", "multihead")
STACKED = ("convolution", "experts", "experts-transposed")


@dataclass(frozen=True, eq=False)
class Entry:
    """The change of one weight: W' = W + scale · B A, its rows then rescaled if a magnitude or a gain is given.

    Args:
        name: path of the module; of the parameter for experts and multi-head attention, whose modules hold several.
        B: [out, r]; [k, out, r] for a stack of k maps (experts, groups of a convolution), and everything below likewise.
        A: [r, in]; (out, in) is the shape of the map, whatever the storage.
        scale: kept apart from the factors, so that their bytes stay as they were trained.
        kind: linear, conv1d (weight stored as [in, out]), embedding ([vocab, dim]; the map is [dim, vocab]), convolution (`in`
            counts the entries of a patch), experts or experts-transposed ([k, in, out]).
        rows: half-open range of output rows, where this is a slice of a fused weight.
        total_rows: rows of the whole weight, needed to write a slice in a format that knows none.
        magnitude: [out], the lengths of the rows of W' (Liu et al., "DoRA", 2024).
        gain: [out], factors of the rows instead of lengths: W' = diag(gain)(W + scale · B A).
        kernel: of a convolution, so that A can be written as one.

    Raises:
        OptionError: shapes that don't fit, an unknown kind, or both a magnitude and a gain.

    >>> entry = Entry("layers.0.q", torch.ones(3, 1), torch.ones(1, 2), scale=0.5)
    >>> entry.shape, entry.rank, entry.delta().dense().sum()
    ((3, 2), 1, tensor(3.))
    """

    name: str
    B: Tensor
    A: Tensor
    scale: float = 1.0
    kind: str = "linear"
    rows: tuple[int, int] | None = None
    total_rows: int | None = None
    magnitude: Tensor | None = None
    gain: Tensor | None = None
    kernel: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"{self.name}: kind {self.kind!r}; an adapter in normal form holds {', '.join(KINDS)}")
        stacked = self.kind in STACKED and self.B.ndim == 3
        fit = self.B.ndim == self.A.ndim == (3 if stacked else 2) and self.B.shape[:-2] == self.A.shape[:-2]
        if not fit or self.B.shape[-1] != self.A.shape[-2]:
            raise OptionError(f"{self.name}: B {list(self.B.shape)} and A {list(self.A.shape)} are not [out, r] and [r, in]")
        for label, v in (("magnitude", self.magnitude), ("gain", self.gain)):
            if v is not None and v.shape != self.B.shape[:-1]:
                raise OptionError(
                    f"{self.name}: {label} {list(v.shape)} beside B {list(self.B.shape)}; it must hold one number per row"
                )
        if self.magnitude is not None and self.gain is not None:
            raise OptionError(f"{self.name}: rows are rescaled by a magnitude or by a gain, not by both")
        if self.rows is not None and self.rows[1] - self.rows[0] != self.B.shape[-2]:
            raise OptionError(f"{self.name}: rows {self.rows} beside B {list(self.B.shape)}")

    @property
    def key(self) -> str:
        """The name, with the row range where there is one: "h.0.attn.c_attn[0:768]"."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.B.shape[-2], self.A.shape[-1])

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def batch(self) -> int | None:
        """Number of maps in a stack; None for one plain map."""
        return self.B.shape[0] if self.B.ndim == 3 else None

    @property
    def additive(self) -> bool:
        """Whether W' − W does not depend on W."""
        return self.magnitude is None and self.gain is None

    def delta(self) -> LowRank:
        """scale · B A, before any rescaling of rows."""
        return LowRank(self.B, self.A, scale=self.scale)

    def weight(self, W: Operator) -> Operator:
        """The changed weight as an expression in the base W: [out, in]."""
        changed = W + self.delta()
        if self.magnitude is not None:
            return Magnitude(self.magnitude, changed)
        return changed if self.gain is None else Diagonal(self.gain) @ changed


@dataclass(frozen=True, eq=False)
class Adapter:
    """Entries by key, extra tensors by parameter name (heads, biases, norms), and what else is known.

    Extra tensors are whole values, not changes: "classifier.weight" replaces the model's own.

    Raises:
        OptionError: an entry under another key than its own.

    >>> entry = Entry("q", torch.ones(3, 1), torch.ones(1, 2))
    >>> adapter = Adapter.of([entry], metadata={"method": "lora"})
    >>> list(adapter.entries), adapter.parameters
    (['q'], 5)
    """

    entries: Mapping[str, Entry]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [k for k, e in self.entries.items() if e.key != k]
        if wrong:
            raise OptionError(f"the entry under {wrong[0]!r} calls itself {self.entries[wrong[0]].key!r}")

    @classmethod
    def of(
        cls, entries: list[Entry], extras: Mapping[str, Tensor] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Adapter:
        """From a list; two entries of one key are refused."""
        by_key = {e.key: e for e in entries}
        if len(by_key) < len(entries):
            raise OptionError(
                "two entries change one weight: " + ", ".join(sorted({e.key for e in entries if by_key[e.key] is not e}))
            )
        return cls(by_key, dict(extras or {}), dict(metadata or {}))

    @property
    def parameters(self) -> int:
        """Numbers that it holds, factors, magnitudes and extras; a tensor that is shared is counted once."""
        tensors = [t for e in self.entries.values() for t in (e.B, e.A, e.magnitude, e.gain) if t is not None]
        return sum(t.numel() for t in {id(t): t for t in [*tensors, *self.extras.values()]}.values())

    @property
    def ranks(self) -> dict[str, int]:
        return {key: e.rank for key, e in self.entries.items()}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Adapter:
        """Every tensor cast or moved."""

        def move(t: Tensor | None) -> Any:
            return None if t is None else t.to(device=device, dtype=dtype)

        entries = {
            k: replace(e, B=move(e.B), A=move(e.A), magnitude=move(e.magnitude), gain=move(e.gain))
            for k, e in self.entries.items()
        }
        return Adapter(entries, {k: move(t) for k, t in self.extras.items()}, self.metadata)

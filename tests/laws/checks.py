"""Counted assertions: a cell of a law that checked nothing fails."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from .tolerances import distance

__all__ = ["Checks"]


class Checks:
    """`with Checks("law 2, lora, linear") as check:` fails when the block ends without one assertion made.

    >>> with Checks("nothing"):
    ...     pass
    Traceback (most recent call last):
    ...
    AssertionError: nothing: this cell checked nothing
    """

    def __init__(self, cell: str) -> None:
        self.cell = cell
        self.count = 0

    def that(self, truth: bool, message: str) -> None:
        self.count += 1
        assert truth, f"{self.cell}: {message}"

    def bitwise(self, found: Tensor, expected: Tensor, message: str) -> None:
        """The same shape, dtype and bits; −0.0 and 0.0 are the same number."""
        self.that(found.shape == expected.shape, f"{message}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        self.that(found.dtype == expected.dtype, f"{message}: {found.dtype}, expected {expected.dtype}")
        self.that(torch.equal(found, expected), f"{message}: differs by {distance(found, expected):.3g}, expected the same bits")

    def close(self, found: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
        self.that(found.shape == expected.shape, f"{message}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        gap = distance(found, expected)
        self.that(gap <= tolerance, f"{message}: relative distance {gap:.3g} > {tolerance:.1g}")

    def __enter__(self) -> Checks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            assert self.count, f"{self.cell}: this cell checked nothing"

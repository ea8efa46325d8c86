"""Batches in an order that depends on (seed, epoch) alone, read by position: a resumed run goes on at the very next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rankfold.errors import DataError, OptionError
from rankfold.linalg.random import Random

__all__ = ["Batches", "Source", "as_source", "to_device"]


@runtime_checkable
class Source(Protocol):
    """Where the loop gets its data: so many batches an epoch, each by its place."""

    def __len__(self) -> int: ...

    def batch(self, epoch: int, index: int) -> Any:
        """Batch `index` of the epoch, the same at every call."""


class Batches:
    """Rows shuffled anew each epoch, collated into batches.

    Args:
        rows: any sequence.
        collate: list of rows to one batch.
        size: rows of a batch; the last one of an epoch holds what is left.
        seed: of the order.
        drop_last: leave a short last batch out, where there is a full one.
        length: of a row; given, batches hold rows of similar length (sorted within stretches of 16 batches, which stay
            shuffled), so that little is padded.

    Raises:
        DataError: no rows. OptionError: a size below 1.

    >>> source = Batches(range(6), list, size=4)
    >>> len(source), source.batch(0, 0), source.batch(0, 1), source.batch(1, 0)
    (2, [4, 2, 3, 1], [5, 0], [3, 1, 2, 5])
    """

    def __init__(
        self,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        size: int,
        seed: int = 0,
        *,
        drop_last: bool = False,
        length: Callable[[Any], int] | None = None,
    ) -> None:
        if not len(rows):
            raise DataError("no rows to make batches of")
        if size < 1:
            raise OptionError(f"batch size {size}: must be at least 1")
        self.rows, self.collate, self.size, self.seed, self.length = rows, collate, size, seed, length
        full = len(rows) // size
        self.count = full if drop_last and full else -(-len(rows) // size)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, index: int) -> Any:
        """Batch `index` of an epoch."""
        return self.collate([self.rows[i] for i in self.order(epoch)[index]])

    def order(self, epoch: int) -> list[list[int]]:
        """Row numbers of every batch of an epoch."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1]

    def _order(self, epoch: int) -> list[list[int]]:
        order = Random(self.seed, "order of rows", epoch).permutation(len(self.rows)).tolist()
        if self.length is not None:
            stretch = 16 * self.size
            parts = [sorted(order[i : i + stretch], key=self._length_of) for i in range(0, len(order), stretch)]
            order = [i for part in parts for i in part]
        batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        if self.length is not None:
            # a short last batch stays last: it is the one that drop_last leaves out
            tail = [batches.pop()] if len(batches[-1]) < self.size else []
            mixed = Random(self.seed, "order of batches", epoch).permutation(len(batches)).tolist()
            batches = [batches[i] for i in mixed] + tail
        return batches[: self.count]

    def _length_of(self, index: int) -> int:
        assert self.length is not None
        return self.length(self.rows[index])


class _Given:
    """A list of ready batches, in another order each epoch."""

    def __init__(self, batches: Sequence[Any], seed: int) -> None:
        self.batches, self.seed = batches, seed
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, epoch: int, index: int) -> Any:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, Random(self.seed, "order of batches", epoch).permutation(len(self.batches)).tolist())
        return self.batches[self._epoch[1][index]]


def as_source(batches: Source | Sequence[Any], seed: int = 0) -> Source:
    """Anything that the loop takes as data: a Source as it is, a sequence of batches shuffled each epoch.

    Raises:
        DataError: an iterator, which can be gone over only once, or nothing.

    >>> as_source(["a", "b"]).batch(0, 1)
    'a'
    """
    if isinstance(batches, Source):
        source: Source = batches
    elif hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        source = _Given(batches, seed)
    elif hasattr(batches, "__len__"):  # a DataLoader: its own order can't be kept apart from the global random state
        source = _Given(list(batches), seed)
    else:
        raise DataError(f"{type(batches).__name__}: an iterator can be gone over only once; give a list of batches or a Batches")
    if not len(source):
        raise DataError("no batches at all; give at least one")
    return source


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on a device.

    >>> to_device({"x": [torch.ones(1)], "name": "a"}, torch.device("cpu"))
    {'x': [tensor([1.])], 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "items"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch

"""What a task is to the job: how rows become tensors, what is minimised, what is measured. Each has a file beside this one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankfold.core.probing import call_model
from rankfold.jobs.data import Table
from rankfold.jobs.models import Loaded
from rankfold.training.batches import to_device

__all__ = ["Row", "Task", "evaluating", "pad", "task_for"]

Row = dict[str, Any]


class Task(ABC):
    """One task over one loaded model.

    Traits:
        metric: name of the figure that decides which state is the best; `better` is its direction.
        shown: metrics in the order in which they are printed, with their headings.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    better: ClassVar[Literal["higher", "lower"]]
    shown: ClassVar[Mapping[str, str]]

    def __init__(self, loaded: Loaded, max_length: int, temperature: float = 0.05) -> None:
        self.tokenizer = loaded.tokenizer
        self.labels = loaded.labels
        self.max_length = min(max_length, loaded.context or max_length)
        self.temperature = temperature
        self.cut = 0  # rows that were longer than max_length
        self.lost = 0  # rows of which nothing was left to learn

    @abstractmethod
    def rows(self, table: Table) -> list[Row]:
        """Tokenised rows; `cut` and `lost` count what did not fit."""

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One batch, padded to its longest row."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss of a batch, in float32."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """The task's metrics over rows."""

    @abstractmethod
    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int, **options: Any) -> Iterator[Any]:
        """One prediction per row, in order."""

    def weight(self, batch: Mapping[str, Any]) -> float:
        """How many terms the mean of `loss` is over: batches of one step are joined by it."""
        return float(len(batch["input_ids"]))

    def length(self, row: Row) -> int:
        """Tokens of a row."""
        return len(row["input_ids"])

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Token ids of texts, cut to max_length, with the tokenizer's own marks at the ends."""
        from rankfold.jobs.models import quiet_loading

        with quiet_loading():
            whole = self.tokenizer(list(texts), add_special_tokens=special, truncation=False)["input_ids"]
            # where only few are too long, the tokenizer cuts just those: it knows which marks have to stay
            long = [i for i, ids in enumerate(whole) if len(ids) > self.max_length]
            self.cut += len(long)
            for i in long:
                whole[i] = self.tokenizer(texts[i], add_special_tokens=special, truncation=True, max_length=self.max_length)[
                    "input_ids"
                ]
        return whole

    def batches(self, rows: Sequence[Row], size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """(places, batch) over all rows; rows of similar length share a batch."""
        order = sorted(range(len(rows)), key=lambda i: -self.length(rows[i]))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield places, self.collate([rows[i] for i in places])


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids [rows, longest], mask of the same shape).

    >>> pad([[5, 6], [7]], 0)
    (tensor([[5, 6],
            [7, 0]]), tensor([[1, 1],
            [1, 0]]))
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    return ids, mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients; gives the model's device."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(mode)


def run_model(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Any:
    """The model's output for what of a batch is its input."""
    return call_model(model, to_device({k: batch[k] for k in ("input_ids", "attention_mask")}, device))


def task_for(name: str, loaded: Loaded, max_length: int, temperature: float = 0.05) -> Task:
    """The task `name`: the class `Task` of the file of that name."""
    made: Task = importlib.import_module(f".{name}", __package__).THIS(loaded, max_length, temperature)
    return made

"""Task classify: one label of a fixed set for a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.jobs.data import Table, label_ids
from rankfold.measure import accuracy, f1

from .task import Row, Task, evaluating, pad, run_model

__all__ = ["THIS", "Classify"]


class Classify(Task):
    """Cross-entropy over the labels, from the model's own head."""

    name = "classify"
    metric = "accuracy"
    better = "higher"
    shown = {"accuracy": "accuracy", "f1": "F1", "loss": "loss"}

    def rows(self, table: Table) -> list[Row]:
        """Rows with `input_ids`, and `label` where the table has it.

        Raises:
            DataError: a label that training does not know.
        """
        ids = self.encode(table["text"])
        if "label" not in table.columns:
            return [{"input_ids": row} for row in ids]
        assert self.labels is not None
        return [{"input_ids": row, "label": label} for row, label in zip(ids, label_ids(table, self.labels))]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids, mask = pad([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits.float(), batch["labels"])

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """accuracy, macro F1, mean cross-entropy."""
        gold = torch.tensor([row["label"] for row in rows])
        logits = self.logits(model, rows, batch_size, progress)
        predicted = logits.argmax(-1)
        loss = nn.functional.cross_entropy(logits, gold)
        return {"accuracy": accuracy(predicted, gold), "f1": f1(predicted, gold), "loss": float(loss)}

    def logits(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """[rows, labels], in order."""
        found: dict[int, Tensor] = {}
        with evaluating(model) as device:
            for places, batch in self.batches(rows, batch_size):
                found.update(zip(places, run_model(model, batch, device).logits.float().cpu()))
                if progress:
                    progress(len(found))
        return torch.stack([found[i] for i in range(len(rows))])

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int, **options: Any) -> Iterator[dict[str, Any]]:
        """{label, probability, and every label's probability}."""
        assert self.labels is not None
        for p in self.logits(model, rows, batch_size).softmax(-1):
            best = int(p.argmax())
            yield {"label": self.labels[best], "probability": float(p[best]), "probabilities": dict(zip(self.labels, p.tolist()))}


THIS = Classify

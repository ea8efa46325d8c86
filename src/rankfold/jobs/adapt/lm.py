"""Task lm: the next token of running text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rankfold.errors import DataError
from rankfold.jobs.data import Table
from rankfold.measure import perplexity

from .task import Row, Task, evaluating, pad, run_model

__all__ = ["THIS", "CausalTask", "Lm", "token_losses"]

IGNORED = -100


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(summed −log p of every labelled token given those before it, number of these tokens).

    Args:
        logits: [rows, tokens, vocabulary].
        labels: [rows, tokens]; −100 is not counted, nor is a row's first token, which nothing predicts.

    >>> import torch
    >>> total, count = token_losses(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
    >>> round(total.exp().item(), 4), int(count)
    (4.0, 1)
    """
    predicted, wanted = logits[:, :-1].float(), labels[:, 1:]
    total = nn.functional.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (wanted != IGNORED).sum()


class CausalTask(Task):
    """What lm and sft share: loss and perplexity over labelled tokens, and writing text."""

    metric = "loss"
    better = "lower"
    shown = {"perplexity": "perplexity", "loss": "loss"}

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids, mask = pad([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)
        labels, _ = pad([row["labels"] if "labels" in row else row["input_ids"] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def weight(self, batch: Mapping[str, Any]) -> float:
        return float((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total, count = token_losses(logits, batch["labels"])
        return total / count.clamp_min(1)

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Perplexity and mean −log p a token, over all labelled tokens."""
        total, count, seen = 0.0, 0, 0
        with evaluating(model) as device:
            for places, batch in self.batches(rows, batch_size):
                here, tokens = token_losses(run_model(model, batch, device).logits, batch["labels"].to(device))
                total, count, seen = total + float(here), count + int(tokens), seen + len(places)
                if progress:
                    progress(seen)
        mean = total / count if count else math.nan
        return {"perplexity": perplexity(total, count), "loss": mean}

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int, **options: Any) -> Iterator[dict[str, str]]:
        """{text}: what the model writes after each row, always taking its likeliest token."""
        written: dict[int, str] = {}
        with evaluating(model) as device:
            order = sorted(range(len(rows)), key=lambda i: -self.length(rows[i]))
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                ids, mask = pad([rows[i]["input_ids"] for i in places], self.tokenizer.pad_token_id, left=True)
                made = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
                    max_new_tokens=options.get("max_new_tokens", 128), pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
                texts = self.tokenizer.batch_decode(made[:, ids.shape[1] :].cpu(), skip_special_tokens=True)
                written.update(zip(places, texts))
        yield from ({"text": written[i]} for i in range(len(rows)))


class Lm(CausalTask):
    """Documents one after the other, each closed by the end token, cut into windows of max_length: nothing is lost or padded."""

    name = "lm"

    def rows(self, table: Table) -> list[Row]:
        """Windows of max_length tokens.

        Raises:
            DataError: less than two tokens in all.
        """
        whole: list[int] = []
        for ids in self._encoded(table["text"]):
            whole += [*ids, self.tokenizer.eos_token_id]
        windows = [whole[i : i + self.max_length] for i in range(0, len(whole), self.max_length)]
        windows = [w for w in windows if len(w) > 1]  # one token alone is predicted by nothing
        if not windows:
            raise DataError(f"{table.source}: too little text for a language model: {len(whole)} tokens")
        return [{"input_ids": window} for window in windows]

    def prompts(self, table: Table) -> list[Row]:
        """One row a text, to be continued; of a long one its end."""
        ids = self._encoded(table["text"])
        self.cut += sum(len(row) > self.max_length for row in ids)
        return [{"input_ids": row[-self.max_length :]} for row in ids]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        from rankfold.jobs.models import quiet_loading

        with quiet_loading():
            encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return encoded


THIS = Lm

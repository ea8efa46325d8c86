"""Task embed: vectors of texts such that a query lies nearest to its document.

InfoNCE with in-batch negatives: van den Oord et al., "Representation learning with contrastive predictive coding", 2018,
arXiv:1807.03748, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.jobs.data import Table
from rankfold.measure import mrr, ndcg_at, ranks_of, recall_at

from .task import Row, Task, evaluating, pad, run_model

__all__ = ["THIS", "Embed", "info_nce", "mean_pooled"]


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """[rows, d]: the mean over the tokens that are no padding, with length 1. In float32.

    >>> mean_pooled(torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
    tensor([[0.6000, 0.8000]])
    """
    kept = mask[..., None].to(torch.float32)  # [rows, tokens, 1]
    mean = (hidden.float() * kept).sum(1) / kept.sum(1).clamp_min(1.0)
    return nn.functional.normalize(mean, dim=-1)


def info_nce(queries: Tensor, documents: Tensor, same: Tensor, temperature: float) -> Tensor:
    """−mean_i log( exp(qᵢ·dᵢ/τ) / Σ_j exp(qᵢ·dⱼ/τ) ), averaged with the same from documents to queries.

    Args:
        queries: [n, d], of length 1. documents: [n, d], of length 1.
        same: [n, n], true where row j is no wrong answer for row i: the pair itself, and copies of its query or document.
            Copies are left out of the sum.
        temperature: τ.

    >>> eye = torch.eye(2)
    >>> info_nce(eye, eye, eye.bool(), 0.05) < 1e-6, info_nce(eye, eye.flip(0), eye.bool(), 1.0).round(decimals=3)
    (tensor(True), tensor(1.3130))
    """
    scores = queries @ documents.mT / temperature  # [n, n]
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(same & ~own, float("-inf"))
    gold = torch.arange(len(scores), device=scores.device)
    return (nn.functional.cross_entropy(scores, gold) + nn.functional.cross_entropy(scores.mT, gold)) / 2


class Embed(Task):
    """Mean pooling over the last layer, vectors of length 1, InfoNCE against the other rows of the batch."""

    name = "embed"
    metric = "mrr"
    better = "higher"
    shown = {"recall@1": "R@1", "recall@5": "R@5", "mrr": "MRR", "ndcg@10": "nDCG@10"}

    def rows(self, table: Table) -> list[Row]:
        """Rows with `query` and `document`, or with `input_ids` for a table that has one of both."""
        columns = {role: self.encode(table[role]) for role in ("query", "document") if role in table.columns}
        keys = {role: [hash(text) for text in table[role]] for role in columns}
        if len(columns) == 1:
            return [{"input_ids": ids} for ids in next(iter(columns.values()))]
        pairs = zip(columns["query"], columns["document"], keys["query"], keys["document"])
        return [{"query": q, "document": d, "keys": (a, b)} for q, d, a, b in pairs]

    def length(self, row: Row) -> int:
        return len(row["document"] if "document" in row else row["input_ids"])

    def weight(self, batch: Mapping[str, Any]) -> float:
        return float(len(batch["same"]))

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        if "input_ids" in rows[0]:
            return self._padded([row["input_ids"] for row in rows])
        query, document = (torch.tensor([row["keys"][k] for row in rows]) for k in (0, 1))
        same = (query[:, None] == query) | (document[:, None] == document)
        return {
            "query": self._padded([row["query"] for row in rows]),
            "document": self._padded([row["document"] for row in rows]),
            "same": same,
        }

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        ids, mask = pad(rows, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        q, d = (
            mean_pooled(model(**batch[side]).last_hidden_state, batch[side]["attention_mask"]) for side in ("query", "document")
        )
        return info_nce(q, d, batch["same"], self.temperature)

    def vectors(
        self, model: nn.Module, rows: Sequence[list[int]], batch_size: int, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """[rows, d] in float32, in order."""
        plain: list[Row] = [{"input_ids": ids} for ids in rows]
        found: dict[int, Tensor] = {}
        with evaluating(model) as device:
            for places, batch in self.batches(plain, batch_size):
                hidden = run_model(model, batch, device).last_hidden_state
                found.update(zip(places, mean_pooled(hidden, batch["attention_mask"].to(device)).cpu()))
                if progress:
                    progress(len(found) // 2)
        return torch.stack([found[i] for i in range(len(rows))])

    def ranks(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, progress: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, Tensor]:
        """(rank of each query's own document among all documents of the rows, similarities [queries, documents])."""
        both = self.vectors(model, [r["query"] for r in rows] + [r["document"] for r in rows], batch_size, progress)
        similarity = both[: len(rows)] @ both[len(rows) :].mT
        documents = torch.tensor([row["keys"][1] for row in rows])
        queries = torch.tensor([row["keys"][0] for row in rows])
        gold = torch.arange(len(rows))
        # copies of the right document, and right answers of the same question, are no rivals
        rivals = similarity.masked_fill((documents[:, None] == documents) | (queries[:, None] == queries), -2.0)
        rivals[gold, gold] = similarity[gold, gold]
        return ranks_of(rivals, gold), similarity

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """R@1, R@5, MRR and nDCG@10 of every query among all documents."""
        ranks, _ = self.ranks(model, rows, batch_size, progress)
        return {
            "recall@1": recall_at(ranks, 1),
            "recall@5": recall_at(ranks, 5),
            "mrr": mrr(ranks),
            "ndcg@10": ndcg_at(ranks, 10),
        }

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int, **options: Any) -> Iterator[Tensor]:
        """One vector a row."""
        yield from self.vectors(model, [row["input_ids"] for row in rows], batch_size)


THIS = Embed

"""Ranks by sorting out loud, and scikit-learn's gain where nothing ties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from rankfold.errors import DataError, NumericError, OptionError
from rankfold.measure import mrr, ndcg_at, ranks_of, recall_at


def slow_rank(scores, gold):
    """Sort best first with the right document behind every equal one, then count from 1."""
    order = sorted(range(len(scores)), key=lambda d: (-scores[d], d == gold))
    return 1 + order.index(gold)


@given(st.integers(1, 6), st.integers(1, 8), st.data())
def test_ranks_are_pessimistic(queries, documents, data):
    scores = data.draw(
        st.lists(st.lists(st.integers(-2, 2), min_size=documents, max_size=documents), min_size=queries, max_size=queries)
    )
    gold = data.draw(st.lists(st.integers(0, documents - 1), min_size=queries, max_size=queries))
    assert ranks_of(scores, gold).tolist() == [slow_rank(row, g) for row, g in zip(scores, gold)]


def test_a_constant_model_is_worst():
    assert ranks_of(np.zeros((3, 5)), [0, 1, 2]).tolist() == [5, 5, 5]


def test_scikit_learn_agrees_without_ties():
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(20.0), (30, 1)), axis=1)
    gold = np.arange(30) % 20
    ranks = ranks_of(torch.tensor(scores, dtype=torch.bfloat16), torch.tensor(gold))
    relevance = np.eye(20)[gold]
    for k in (1, 5, 20):
        assert ndcg_at(ranks, k) == pytest.approx(ndcg_score(relevance, scores, k=k), abs=1e-12)
        top = np.argsort(-scores, axis=1)[:, :k]
        assert recall_at(ranks, k) == np.mean([g in row for g, row in zip(gold, top)])
    assert mrr(ranks) == pytest.approx(math.fsum(1 / r for r in ranks) / 30)


def test_mistakes():
    with pytest.raises(NumericError, match=r"similarity: nan at \(0, 1\)"):
        ranks_of([[1, math.nan]], [0])
    with pytest.raises(DataError, match="gold: 2 at 0; expected 0 to 1"):
        ranks_of([[1, 2]], [2])
    with pytest.raises(DataError, match="1 queries, gold has 2"):
        ranks_of([[1, 2]], [0, 1])
    with pytest.raises(DataError, match="at least 1"):
        mrr([0])
    with pytest.raises(DataError, match="non-empty"):
        mrr([])
    with pytest.raises(OptionError, match="k=0"):
        recall_at([1], 0)

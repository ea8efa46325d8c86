"""Accuracy, F1, confusion and perplexity against scikit-learn and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from rankfold.errors import DataError, NumericError, OptionError
from rankfold.measure import accuracy, confusion, f1, perplexity

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(PAIRS)
def test_scikit_learn_agrees(pairs):
    predicted, gold = map(list, zip(*pairs))
    assert accuracy(predicted, gold) == pytest.approx(metrics.accuracy_score(gold, predicted), abs=1e-15)
    assert f1(predicted, gold) == pytest.approx(metrics.f1_score(gold, predicted, average="macro", zero_division=0), abs=1e-15)
    binary = metrics.f1_score([g == 1 for g in gold], [p == 1 for p in predicted], zero_division=0)
    assert f1(predicted, gold, average="binary") == pytest.approx(binary, abs=1e-15)
    assert (confusion(predicted, gold, range(5)) == metrics.confusion_matrix(gold, predicted, labels=range(5))).all()


def test_text_labels_and_tensors():
    assert f1(["a", "b", "b"], ["a", "b", "a"], average="binary", positive="a") == pytest.approx(2 / 3)
    assert accuracy(torch.tensor([1, 2, 3]), np.array([1, 2, 4])) == pytest.approx(2 / 3)


def test_perplexity_weighs_tokens_not_batches():
    first, second = (math.log(2) * 10, 10), (math.log(8) * 30, 30)
    assert perplexity(first[0] + second[0], 40) == pytest.approx(2 ** ((10 + 90) / 40))
    assert perplexity(1e9, 1) == math.inf


def test_mistakes():
    with pytest.raises(DataError, match=r"\(2,\) and \(3,\)"):
        accuracy([1, 2], [1, 2, 3])
    with pytest.raises(DataError, match="non-empty"):
        f1([], [])
    with pytest.raises(DataError, match="one holds text"):
        accuracy(["1"], [1])
    with pytest.raises(DataError, match="label 7 is none of the 2 classes"):
        confusion([7], [0], [0, 1])
    with pytest.raises(OptionError, match="average='micro'"):
        f1([1], [1], average="micro")
    with pytest.raises(DataError, match="0 tokens"):
        perplexity(1.0, 0)
    with pytest.raises(NumericError, match="NaN"):
        perplexity(math.nan, 3)

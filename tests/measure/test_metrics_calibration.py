"""Calibration errors against loops over their definitions, and on predictors whose error is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import DataError, NumericError, OptionError
from rankfold.measure import ace, ace_top, ece, mce


def slow_bins(p, y, bins):
    """(share, gap) of every non-empty bin (lo, hi], the first closed on the left."""
    rows = [(max(row), int(np.argmax(row)) == g) for row, g in zip(p, y)]
    for b in range(bins):
        inside = [(c, h) for c, h in rows if (b / bins < c or b == 0) and (c <= (b + 1) / bins or b == bins - 1)]
        if inside:
            yield len(inside) / len(rows), abs(sum(h for _, h in inside) - math.fsum(c for c, _ in inside)) / len(inside)


def draw(n, classes, seed):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(classes), n)
    y = np.array([generator.choice(classes, p=row) for row in p])
    return p, y


@given(st.integers(1, 60), st.integers(2, 5), st.integers(1, 20), st.integers(0, 1000))
def test_definitions(n, classes, bins, seed):
    p, y = draw(n, classes, seed)
    binned = list(slow_bins(p, y, bins))
    assert ece(p, y, bins) == pytest.approx(sum(share * gap for share, gap in binned), abs=1e-12)
    assert mce(p, y, bins) == pytest.approx(max(gap for _, gap in binned), abs=1e-12)

    gaps = []
    for k in range(classes):
        column = sorted(zip(p[:, k], y == k))
        parts = min(bins, n)
        cuts = [i * (n // parts) + min(i, n % parts) for i in range(parts + 1)]  # sizes differ by one, the larger first
        for low, high in itertools.pairwise(cuts):
            gaps.append(abs(np.mean([h for _, h in column[low:high]]) - np.mean([q for q, _ in column[low:high]])))
    assert ace(p, y, bins) == pytest.approx(np.mean(gaps), abs=1e-12)

    ordered = sorted(zip(p.max(1), p.argmax(1) == y))
    size = n // min(bins, n)
    total = 0.0
    for i in range(min(bins, n)):
        part = ordered[i * size :] if i == min(bins, n) - 1 else ordered[i * size : (i + 1) * size]
        total += abs(sum(h for _, h in part) - math.fsum(c for c, _ in part))
    assert ace_top(p, y, bins) == pytest.approx(total / n, abs=1e-12)


def test_a_calibrated_predictor_tends_to_zero():
    few, many = (ece(*draw(n, 4, seed=0)) for n in (200, 20_000))
    assert many < 0.02 < few
    assert ace(*draw(20_000, 4, seed=0)) < 0.02
    assert ace_top(*draw(20_000, 4, seed=0)) < 0.02


def test_known_errors():
    sure = np.tile([1.0, 0.0], (10, 1))
    assert ece(sure, [0] * 7 + [1] * 3) == pytest.approx(0.3)
    assert ece(sure, [1] * 10) == mce(sure, [1] * 10) == 1
    assert ece(sure, [0] * 10) == 0
    p = [[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.55, 0.45]]
    assert ece(p, [0, 1, 0, 0]) == pytest.approx((0.45 + 0.45) / 2)
    assert mce(p, [0, 1, 0, 1]) == pytest.approx(0.45)


def test_edges_belong_to_the_bin_below():
    p = [[0.6, 0.4], [0.65, 0.35]]  # bins=10: (.5, .6] and (.6, .7]; in one bin they would nearly cancel
    assert mce(p, [0, 1], bins=10) == pytest.approx(0.65)
    assert ece(p, [0, 1], bins=10) == pytest.approx((0.4 + 0.65) / 2)


def test_tensors_in_half_precision():
    p, y = draw(500, 5, seed=1)
    half = torch.tensor(p, dtype=torch.bfloat16)
    assert ece(half, torch.tensor(y)) == pytest.approx(ece(p, y), abs=0.02)


def test_mistakes():
    with pytest.raises(DataError, match="apply softmax"):
        ece([[2.0, -1.0]], [0])
    with pytest.raises(NumericError, match="nan"):
        ece([[math.nan, 1.0]], [0])
    with pytest.raises(DataError, match="expected 0 to 1"):
        ace([[0.5, 0.5]], [2])
    with pytest.raises(DataError, match="differ in length: 1 and 2"):
        ece([[0.5, 0.5]], [0, 1])
    for metric in (ece, mce, ace, ace_top):
        with pytest.raises(OptionError, match="bins=0"):
            metric([[0.5, 0.5]], [0], bins=0)

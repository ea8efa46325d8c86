"""Streams: the same as the batch when nothing is cut off, close to it otherwise, in any order and over processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.linalg.streaming import FrequentDirections, IncrementalSVD


def rows(count=240, width=9, seed=0, mean=3.0):
    """Anisotropic rows about a mean far from zero, float64."""
    scale = torch.tensor([8.0, 5.0, 3.0, 1.5] + [0.3] * (width - 4), dtype=torch.float64)
    turn = Random("turn").haar(width, width, torch.float64)
    return Random("rows", seed).normal((count, width), dtype=torch.float64) * scale @ turn + mean


def stream(X, rank, size, **options):
    svd = IncrementalSVD(rank, **options)
    for batch in X.split(size):
        svd.update(batch)
    return svd


def batch_svd(X, center=True):
    _, S, Vh = torch.linalg.svd(X - X.mean(0) if center else X, full_matrices=False)
    sign = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
    return S, Vh * sign


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 100), center=st.booleans(), seed=st.integers(0, 1000))
def test_without_truncation_a_stream_is_its_batch(size, center, seed):
    X = rows(60, 6, seed)
    svd = stream(X, 6, size, center=center)
    S, Vh = batch_svd(X, center)
    torch.testing.assert_close(svd.S, S, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(svd.Vh, Vh, rtol=0, atol=1e-7)
    assert svd.count == 60
    if center:
        torch.testing.assert_close(svd.mean, X.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(svd.variance(), X.var(0, correction=0), rtol=1e-10, atol=0)
    else:
        torch.testing.assert_close(svd.variance(), X.square().mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(svd.explained_variance_ratio().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("size", [7, 40])
def test_truncated_stream_follows_the_leading_components(size):
    """EVA's oracle: |cos| > 0.99 where the gap is above 1.2, singular values within 2 %."""
    X = rows()
    svd = stream(X, 6, size)
    S, Vh = batch_svd(X)
    cosine = (svd.Vh * Vh[:6]).sum(1).abs()
    gap = S[:4] / S[1:5]
    assert (cosine[:4][gap > 1.2] > 0.99).all()
    assert ((svd.S[:4] / S[:4] - 1).abs() < 0.02).all()
    torch.testing.assert_close(svd.Vh @ svd.Vh.mT, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)
    ratio = S[:4].square() / S.square().sum()
    torch.testing.assert_close(svd.explained_variance_ratio()[:4], ratio, rtol=0.04, atol=0)


def test_order_of_batches_hardly_matters():
    X = rows()
    a, b = stream(X, 6, 40), stream(torch.cat(X.split(40)[::-1]), 6, 40)
    assert (a.Vh[:4] - b.Vh[:4]).abs().max() < 1e-2


def test_centring_matters_when_the_mean_is_far():
    X = rows(mean=30.0)
    mean = X.mean(0) / X.mean(0).norm()
    assert float((stream(X, 4, 40, center=False).Vh[0] @ mean).abs()) > 0.99
    assert float((stream(X, 4, 40).Vh[0] @ batch_svd(X)[1][0]).abs()) > 0.999


def test_processes_join_to_the_whole():
    X = rows()
    whole = stream(X, 9, 30)
    parts = [stream(part, 9, 30) for part in (X[:50], X[50:180], X[180:])]
    joined = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(joined.S, whole.S, rtol=1e-9, atol=0)
    torch.testing.assert_close(joined.Vh, whole.Vh, rtol=0, atol=1e-8)
    torch.testing.assert_close(joined.square_sum, whole.square_sum, rtol=1e-10, atol=0)
    assert joined.count == 240
    assert parts[0].count == 50
    empty = IncrementalSVD(9) + parts[0]
    torch.testing.assert_close(empty.S, parts[0].S, rtol=1e-12, atol=0)
    assert (IncrementalSVD(9) + IncrementalSVD(9)).Vh is None


def test_resuming_from_the_state_is_bitwise():
    X = rows().float()
    straight = stream(X, 4, 40)
    half = stream(X[:120], 4, 40)
    state = half.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    resumed = IncrementalSVD.from_state_dict(state)
    for batch in X[120:].split(40):
        resumed.update(batch)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert straight.Vh.dtype == torch.float32
    assert straight.mean.dtype == torch.float64
    fresh = IncrementalSVD.from_state_dict(IncrementalSVD(3, center=False).state_dict())
    assert (fresh.rank, fresh.center, fresh.Vh) == (3, False, None)


def test_small_empty_constant_and_higher_dimensional_batches():
    svd = IncrementalSVD(5)
    svd.update(torch.zeros(0, 4))
    assert svd.Vh is None
    svd.update(torch.full((2, 1, 4), 2.0))
    assert svd.explained_variance_ratio().tolist() == [0.0] * len(svd.S)
    svd.update(rows(12, 9)[:, :4].float().reshape(3, 4, 4))
    svd.update(torch.ones(1, 4, dtype=torch.bfloat16))
    assert (svd.count, tuple(svd.Vh.shape)) == (15, (4, 4))


def test_streaming_refusals():
    svd = IncrementalSVD(2)
    with pytest.raises(OptionError, match="no rows yet"):
        svd.explained_variance_ratio()
    svd.update(torch.eye(3))
    with pytest.raises(OptionError, match="width 4 after rows of width 3"):
        svd.update(torch.ones(2, 4))
    before = svd.S.clone()
    with pytest.raises(NumericError, match="X: 6 of 6"):
        svd.update(torch.full((2, 3), float("nan")))
    assert torch.equal(svd.S, before)
    with pytest.raises(OptionError, match="build both alike"):
        svd + IncrementalSVD(3)
    with pytest.raises(OptionError, match="rank 0"):
        IncrementalSVD(0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", [3, 6])
def test_frequent_directions_bound(seed, size):
    """0 ⪯ XᵀX - SᵀS ⪯ ‖X - X_k‖_F² / (l - k)·I for every k, and below the bound that it reports."""
    X = rows(150, 9, seed, mean=0.5)
    sketch = FrequentDirections(size)
    for batch in X.split(17):
        sketch.update(batch)
    S = sketch.sketch()
    assert len(S) <= size
    lost = torch.linalg.eigvalsh(X.mT @ X - S.mT @ S)
    slack = 1e-9 * float(X.square().sum())
    assert lost[0] >= -slack
    assert 0 < lost[-1] <= sketch.bound + slack
    squares = torch.linalg.svdvals(X).square()
    for k in range(size):
        assert sketch.bound <= squares[k:].sum() / (size - k) + slack


def test_frequent_directions_is_exact_below_its_size_and_joins():
    X = rows(150, 9)
    exact = FrequentDirections(10)
    exact.update(X)
    torch.testing.assert_close(exact.sketch().mT @ exact.sketch(), X.mT @ X, rtol=1e-10, atol=1e-8)
    assert exact.bound == 0.0
    parts = [FrequentDirections(4), FrequentDirections(4)]
    parts[0].update(X[:70])
    parts[1].update(X[70:])
    joined = parts[0] + parts[1]
    lost = torch.linalg.eigvalsh(X.mT @ X - joined.sketch().mT @ joined.sketch())
    assert lost[0] >= -1e-8
    assert lost[-1] <= joined.bound <= torch.linalg.svdvals(X)[2:].square().sum() / 2
    assert torch.equal((FrequentDirections(4) + parts[0]).sketch(), parts[0].sketch())


def test_frequent_directions_refusals():
    sketch = FrequentDirections(2)
    with pytest.raises(OptionError, match="no rows yet"):
        sketch.sketch()
    sketch.update(torch.ones(1, 3))
    with pytest.raises(OptionError, match="width 4 after width 3"):
        sketch.update(torch.ones(1, 4))
    with pytest.raises(OptionError, match="build both alike"):
        sketch + FrequentDirections(3)
    with pytest.raises(NumericError):
        sketch.update(torch.full((1, 3), float("inf")))

"""Streams against the batch: inputs, gradient sums and gradient sketches."""

import pytest
import torch

from rankfold.linalg.random import Random
from rankfold.training.streams import GradientSketch, GradientSum, InputDirections


def matrix(out, in_, singular_values, key="G"):
    k = len(singular_values)
    U, V = Random(key, "U").haar(out, k, torch.float64), Random(key, "V").haar(in_, k, torch.float64)
    return U * torch.tensor(singular_values, dtype=torch.float64) @ V.mT


def largest_angle(A, B):
    """Sine of the largest angle between the row spaces of A and B, both with orthonormal rows."""
    return float(torch.linalg.matrix_norm(A - A @ B.mT @ B, 2))


def rows(count=600, width=12):
    scale = torch.tensor([8.0, 5.0, 3.0, 2.0] + [0.4] * (width - 4), dtype=torch.float64)
    return Random("rows").normal((count, width), dtype=torch.float64) * scale + 3.0


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("iterations", [None, 4])
def test_input_directions_are_those_of_the_batch(center, iterations):
    X = rows()
    stream = InputDirections(12, 4, center, iterations=iterations)
    for part in X.split(100):
        stream.observe(part)
    C = X - X.mean(0) if center else X
    _, S, Vh = torch.linalg.svd(C, full_matrices=False)
    assert float((stream.directions() * Vh[:4]).sum(-1).abs().min()) > 0.99
    torch.testing.assert_close(stream.singular_values(), S[:4], rtol=0.02, atol=0)
    torch.testing.assert_close(stream.explained(), S[:4].square() / S.square().sum(), rtol=0.04, atol=0)


def test_it_is_done_when_the_directions_settle_and_not_before():
    stream = InputDirections(12, 3)
    first, second, *_ = rows().split(150)
    stream.observe(first)
    assert not stream.done
    stream.observe(second)
    assert stream.done
    never = InputDirections(12, 3, tolerance=1.1)
    for part in rows().split(150):
        never.observe(part)
    assert not never.done


def test_input_streams_of_two_processes_join_to_one():
    parts = rows().split(75)
    whole = InputDirections(12, 12)
    halves = [InputDirections(12, 12), InputDirections(12, 12), InputDirections(12, 12)]  # the last one saw nothing
    for k, part in enumerate(parts):
        whole.observe(part)
        halves[k % 2].observe(part)
    states = [h.state() for h in halves]
    assert len({tuple((n, t.shape) for n, t in s.items()) for s in states}) == 1
    for half in halves:
        half.merge(states)
        assert half.svd.count == 600
        torch.testing.assert_close(half.singular_values().double(), whole.singular_values(), rtol=1e-5, atol=0)
        assert largest_angle(half.directions().double()[:4], whole.directions()[:4]) < 1e-5


def test_a_sum_of_gradients_is_their_mean():
    parts = [matrix(9, 7, [5.0, 3.0, 1.0, 0.5], key=f"G{k}") for k in range(3)]
    total = GradientSum((9, 7), rank=2)
    for part in parts:
        total.observe(part)
    total.finish()
    U, S, Vh = total.svd()
    u, s, v = torch.linalg.svd(torch.stack(parts).mean(0), full_matrices=False)
    torch.testing.assert_close(U * S @ Vh, u[:, :2] * s[:2] @ v[:2], rtol=0, atol=1e-12)
    assert total.sum is None, "the dense sum is not kept after the pass"


def test_a_sketch_is_linear_in_the_stream():
    parts = [matrix(30, 20, [5.0, 3.0, 1.0], key=f"G{k}") for k in range(4)]
    one, many = GradientSketch((30, 20), 2, "site"), GradientSketch((30, 20), 2, "site")
    one.observe(torch.stack(parts).mean(0))
    for part in parts:
        many.observe(part)
    one.finish()
    many.finish()
    torch.testing.assert_close(one.svd()[1], many.svd()[1], rtol=1e-10, atol=0)
    assert largest_angle(one.svd()[2], many.svd()[2]) < 1e-9


def test_a_sketch_recovers_a_gradient_of_low_rank_exactly():
    G = matrix(60, 40, [9.0, 5.0, 2.0, 1.0])
    sketch = GradientSketch((60, 40), rank=4)
    sketch.observe(G)
    sketch.finish()
    U, S, Vh = sketch.svd()
    torch.testing.assert_close(U * S @ Vh, G, rtol=0, atol=1e-10)


@pytest.mark.parametrize("r", [2, 4])
def test_a_sketch_finds_the_leading_space_where_the_spectrum_falls(r):
    G = matrix(120, 90, [2.0**-k for k in range(40)])
    sketch = GradientSketch((120, 90), rank=2 * r)
    sketch.observe(G)
    sketch.finish()
    U, _, Vh = sketch.svd()
    u, _, vh = torch.linalg.svd(G, full_matrices=False)
    assert largest_angle(Vh, vh[: 2 * r]) < 1e-2
    assert largest_angle(U.mT, u[:, : 2 * r].mT) < 1e-2


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (1, 4), (4, 1)])
def test_a_sketch_of_a_small_matrix_is_exact(shape):
    G = Random("small").normal(shape, dtype=torch.float64)
    sketch = GradientSketch(shape, rank=8)
    sketch.observe(G)
    sketch.finish()
    U, S, Vh = sketch.svd()
    torch.testing.assert_close(U * S @ Vh, G, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [GradientSum, GradientSketch])
def test_gradients_of_two_processes_join_to_one(kind):
    parts = [matrix(30, 20, [5.0, 3.0, 1.0], key=f"G{k}") for k in range(4)]
    whole, halves = kind((30, 20), 2), [kind((30, 20), 2), kind((30, 20), 2)]
    for k, part in enumerate(parts):
        whole.observe(part)
        halves[k % 2].observe(part)
    states = [h.state() for h in halves]
    for half in halves:
        half.merge(states)
        half.finish()
    whole.finish()
    for half in halves:
        torch.testing.assert_close(half.svd()[1], whole.svd()[1], rtol=1e-10, atol=0)

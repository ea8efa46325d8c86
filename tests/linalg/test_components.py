"""Gates on rank-one components, tilings, per-token gates, paired reflections, and the rules that leave W out of a change."""

import pytest
import torch

from rankfold.errors import LayoutError, OptionError
from rankfold.linalg import (
    BlockDiagonal,
    Dense,
    Deviation,
    Diagonal,
    Hadamard,
    Householder,
    Identity,
    Kronecker,
    LowRank,
    Product,
    contains,
    deviation,
    difference,
    gate_components,
    tiled_identity,
)
from rankfold.linalg.dropout import TokenGate

OUT, IN, R = 7, 5, 3


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


B, A, B0, A0, GATE = draw(OUT, R), draw(R, IN), draw(OUT, R).flip(0), draw(R, IN).flip(1), draw(R)


def test_a_gate_weighs_each_component():
    gated = sum(GATE[k] * torch.outer(B[:, k], A[k]) for k in range(R))
    start = sum(GATE[k] * torch.outer(B0[:, k], A0[k]) for k in range(R))
    d, W = draw(R, 1)[:, 0], draw(OUT, IN)
    for op, truth in [
        (LowRank(B, A, scale=2.0), 2 * gated),
        (LowRank(B, A, diag=d), sum(GATE[k] * d[k] * torch.outer(B[:, k], A[k]) for k in range(R))),
        (Deviation(B, A, B0, A0), gated - start),
        (Hadamard(Dense(W), LowRank(B, A)), W * gated),
    ]:
        torch.testing.assert_close(gate_components(op, GATE).dense(), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [Dense(B @ A), LowRank(B[:, :2], A[:2]), Kronecker(B, A), Hadamard(LowRank(B, A), LowRank(B, A))])
def test_what_has_no_components_of_that_number_is_refused(op):
    with pytest.raises(OptionError, match="no 3 rank-one components"):
        gate_components(op, GATE)


def test_a_core_stands_between_the_gate_and_a():
    core = draw(R, R)
    op = gate_components(LowRank(B, A, core=core), GATE)
    torch.testing.assert_close(op.dense(), B @ torch.diag(GATE) @ core @ A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "width"), [(3, 9), (3, 8), (4, 3), (1, 5)])
def test_tiling_repeats_the_identity_and_cuts_the_last(size, width):
    S = tiled_identity(size, width, draw(1))
    assert S.shape == (size, width)
    for i in range(size):
        for j in range(width):
            assert S[i, j] == (i == j % size)


def test_a_gate_per_token_has_no_dense_form():
    gate, h = draw(2, 4, R), draw(2, 4, R).flip(0)
    op = Dense(B) @ (TokenGate(gate) @ Dense(A))
    x = draw(2, 4, IN)
    truth = torch.stack([torch.stack([B @ (gate[s, t] * (A @ x[s, t])) for t in range(4)]) for s in range(2)])
    torch.testing.assert_close(op.matmul(x), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(TokenGate(gate).rmatmul(h), gate * h)
    with pytest.raises(LayoutError, match="no dense form"):
        op.dense()


def test_change_of_a_weight_times_one_plus_k_is_that_weight_times_k():
    W, K = Dense(draw(OUT, 6)), BlockDiagonal(draw(2, 3, 3))
    change = difference(W @ (Identity(6, K.blocks) + K), W)
    assert isinstance(change, Product)
    torch.testing.assert_close(change.dense(), W.W @ K.dense(), rtol=1e-12, atol=1e-12)
    zero = difference(W @ (Identity(6, K.blocks) + BlockDiagonal(torch.zeros_like(K.blocks))), W)
    assert torch.equal(zero.dense(), torch.zeros(OUT, 6, dtype=torch.float64))
    two = difference(W @ (Identity(6, K.blocks) + K + Diagonal(draw(6))), W)
    torch.testing.assert_close(two.dense(), W.W @ (K.dense() + torch.diag(draw(6))), rtol=1e-12, atol=1e-12)


def test_deviation_of_a_masked_weight_is_the_masked_deviation():
    W = Dense(draw(OUT, IN))
    move = deviation(Hadamard(W, LowRank(B, A)), Hadamard(W, LowRank(B0, A0)))
    assert isinstance(move, Hadamard)
    assert contains(move, W)
    torch.testing.assert_close(move.dense(), W.W * (B @ A - B0 @ A0), rtol=1e-12, atol=1e-12)
    still = deviation(Hadamard(W, LowRank(B, A)), Hadamard(W, LowRank(B.clone(), A.clone())))
    assert torch.equal(still.dense(), torch.zeros(OUT, IN, dtype=torch.float64))


def reflected(U):
    H = torch.eye(U.shape[0], dtype=U.dtype)
    for u in U.T:
        H = H if not u.any() else H - 2 * torch.outer(H @ u, u) / u.dot(u)
    return H


@pytest.mark.parametrize("r", [1, 2, 3, 4, 7, 8])
def test_reflections_in_pairs_are_reflections_one_by_one(r):
    for U in (
        draw(9, r),
        draw(9, r).clone().index_fill_(1, torch.tensor([0]), 0.0),
        draw(9, r).index_fill(1, torch.tensor([r - 1]), 0.0),
    ):
        torch.testing.assert_close(Householder(U).dense(), reflected(U), rtol=1e-12, atol=1e-12)
        U = U.clone().requires_grad_()
        (g,) = torch.autograd.grad((Householder(U).dense() * draw(9, 9)).sum(), U)
        assert torch.isfinite(g).all()
        if all(u.any() for u in U.T):
            (truth,) = torch.autograd.grad((reflected(U) * draw(9, 9)).sum(), U)
            torch.testing.assert_close(g, truth, rtol=1e-10, atol=1e-10)

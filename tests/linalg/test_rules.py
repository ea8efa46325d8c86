"""The rewriting table against dense arithmetic: `simplify` and `difference` return the same map, and say where it is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.linalg import (
    Cayley,
    Dense,
    Deviation,
    Diagonal,
    Hadamard,
    Householder,
    Identity,
    Kronecker,
    LowRank,
    Magnitude,
    Operator,
    Product,
    Scaled,
    Sparse,
    Sum,
    concatenate,
    contains,
    deviation,
    difference,
    khatri_rao,
    simplify,
)
from rankfold.linalg.rules import PRODUCTS, SCALED

OUT, IN = 4, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low(seed: int, rank: int = 2, out: int = OUT, in_: int = IN) -> LowRank:
    return LowRank(draw(out, rank, seed=seed), draw(rank, in_, seed=seed + 1000), scale=0.5 + seed)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def full(op: LowRank) -> Tensor:
    """B diag M A by hand."""
    B = op.B * op.scale
    if op.diag is not None:
        B = B @ torch.diag(op.diag)
    return (B if op.core is None else B @ op.core) @ op.A


def norms(m: Tensor, V: Tensor) -> Tensor:
    return m[:, None] * V / V.norm(dim=1, keepdim=True)


def rotation(U: Tensor) -> Tensor:
    H = torch.eye(len(U), dtype=U.dtype)
    for u in U.unbind(1):
        H = H - 2 * torch.outer(H @ u, u) / u.dot(u)
    return H


@pytest.mark.parametrize("batch", [(), (3,)])
def test_concatenate(batch):
    a = LowRank(draw(*batch, OUT, 2), draw(*batch, 2, IN, seed=1), diag=draw(*batch, 2, seed=2), scale=2.0)
    b = LowRank(draw(*batch, OUT, 3, seed=3), draw(*batch, 3, IN, seed=4), core=draw(*batch, 3, 3, seed=5))
    c = LowRank(draw(*batch, OUT, 0), draw(*batch, 0, IN))
    want = 2 * (a.B * a.diag.unsqueeze(-2)) @ a.A + b.B @ b.core @ b.A
    both = concatenate([a, c, b])
    close(both.dense(), want)
    assert both.rank == 5, "an empty one adds nothing"
    assert concatenate([c]).rank == 0
    assert concatenate([c, a]) is a


def test_concatenate_of_a_shared_and_a_batched_one():
    a, b = LowRank(draw(OUT, 2), draw(2, IN)), LowRank(draw(3, OUT, 2, seed=1), draw(2, IN, seed=2))
    close(concatenate([a, b]).dense(), a.B @ a.A + b.B @ b.A)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_hadamard_of_two_low_ranks(batch):
    a = LowRank(draw(*batch, OUT, 2), draw(*batch, 2, IN, seed=1), scale=3.0)
    b = LowRank(draw(*batch, OUT, 3, seed=3), draw(*batch, 3, IN, seed=4))
    close(khatri_rao(a, b).dense(), 3 * (a.B @ a.A) * (b.B @ b.A))
    assert khatri_rao(a, b).rank == 6
    big = Hadamard(low(0, 1, 40, 60), low(1, 2, 40, 60))
    assert type(simplify(big)) is LowRank
    close(simplify(big).dense(), full(big.left) * full(big.right))
    small = Hadamard(low(0), low(1))
    assert simplify(small) is small, "rank 4 of a 4 x 6 map saves nothing"


def test_every_rule_of_the_scaled_table():
    parts = {
        LowRank: (low(1), full(low(1))),
        Deviation: (Deviation(draw(OUT, 2), draw(2, IN), draw(OUT, 2, seed=5), draw(2, IN, seed=6)), None),
        Sparse: (Sparse(draw(3), torch.tensor([0, 5, 23]), OUT, IN), None),
    }
    assert set(parts) == set(SCALED), "a rule was added: test it here"
    for kind, (op, dense) in parts.items():
        want = 3.0 * (op.dense() if dense is None else dense)
        got = simplify(Scaled(op, 3.0))
        assert type(got) is kind
        close(got.dense(), want)
        number = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        simplify(Scaled(op, number)).dense().sum().backward()
        close(number.grad, want.sum() / 3.0)


def test_a_number_per_batch_entry_survives_simplify():
    s = draw(3)
    for op in (
        LowRank(draw(3, OUT, 2), draw(3, 2, IN)),
        Sparse(draw(3, 2), torch.tensor([1, 7]), OUT, IN),
        Deviation(draw(3, OUT, 2), draw(3, 2, IN), draw(3, OUT, 2, seed=1), draw(3, 2, IN, seed=2)),
    ):
        close(simplify(Scaled(op, s)).dense(), s[:, None, None] * op.dense())
        close(simplify(Scaled(Scaled(op, s), 2.0)).dense(), 2 * s[:, None, None] * op.dense())


def test_every_rule_of_the_product_table():
    left, right = Diagonal(draw(OUT)), Diagonal(draw(IN, seed=1))
    both = LowRank(draw(OUT, 2), draw(2, IN), draw(2, seed=2), draw(2, 2, seed=3), 0.7)
    parts = {
        (Diagonal, LowRank): (left, both, torch.diag(left.d) @ full(both)),
        (LowRank, Diagonal): (both, right, full(both) @ torch.diag(right.d)),
        (Diagonal, Diagonal): (left, left, torch.diag(left.d**2)),
    }
    assert set(parts) == set(PRODUCTS), "a rule was added: test it here"
    for a, b, want in parts.values():
        got = simplify(Product(a, b))
        assert not isinstance(got, Product)
        close(got.dense(), want)


def test_sums_are_flattened_and_their_low_ranks_joined():
    W = Dense(draw(OUT, IN))
    got = simplify(2.0 * (W + 3.0 * (low(0) + low(1))) + low(2))
    assert isinstance(got, Sum)
    assert sum(type(t) is LowRank for t in got.terms) == 1
    assert len(got.terms) == 2
    close(got.dense(), 2 * W.W + 6 * (full(low(0)) + full(low(1))) + full(low(2)))


def test_simplify_reaches_below_a_magnitude():
    W, m = Dense(draw(OUT, IN)), draw(OUT, seed=9)
    got = simplify(Magnitude(m, W + low(0) + low(1), detach=False))
    assert isinstance(got, Magnitude)
    assert not got.detach
    assert len(got.inner.terms) == 2
    close(got.dense(), norms(m, W.W + full(low(0)) + full(low(1))))


def test_difference_of_sums_and_hira():
    W = Dense(draw(OUT, IN))
    assert difference(W, W).rank_bound() == 0
    assert not difference(W, W).dense().any()
    assert not difference(Sum((W,)), W).dense().any()
    plain = difference(W + low(0) + 2.0 * low(1), W)
    assert type(plain) is LowRank, "no base inside"
    close(plain.dense(), full(low(0)) + 2 * full(low(1)))
    hira = difference(W + Hadamard(W, low(0)), W)
    assert isinstance(hira, Hadamard)
    close(hira.dense(), W.W * full(low(0)))
    close(difference(W + W, W).dense(), W.W)
    close(difference(low(0), W).dense(), full(low(0)) - W.W)
    close(difference(2.0 * W, W).dense(), W.W)
    nested = difference(Sum((Sum((W, low(0))), low(1))), W)
    assert type(nested) is LowRank


def test_difference_of_rotations_is_low_rank_and_exact():
    W, U, V = Dense(draw(OUT, IN)), draw(IN, 2, seed=1), draw(IN, 1, seed=2)
    one = difference(W @ Householder(U), W)
    assert type(one) is LowRank
    assert one.rank == 2
    close(one.dense(), W.W @ rotation(U) - W.W)
    two = difference(W @ Householder(U) @ Householder(V), W)
    close(two.dense(), W.W @ rotation(U) @ rotation(V) - W.W)
    assert two.rank_bound() <= 3
    right = difference(W @ (Householder(U) @ Householder(V)), W)
    close(right.dense(), W.W @ rotation(U) @ rotation(V) - W.W)
    mixed = difference((W + low(0)) @ Householder(U), W)
    close(mixed.dense(), (W.W + full(low(0))) @ rotation(U) - W.W)
    assert mixed.rank_bound() <= 4
    X = draw(2, 3, 3, seed=4)
    S = X - X.mT
    eye = torch.eye(3, dtype=torch.float64)
    R = torch.block_diag(*((eye + s) @ torch.linalg.inv(eye - s) for s in S))
    close(difference(W @ Cayley(X), W).dense(), W.W @ R - W.W)


def test_difference_of_a_magnitude_over_a_rotation_over_a_sum():
    W, U, m = Dense(draw(OUT, IN)), draw(IN, 2, seed=1), draw(OUT, seed=2)
    inner = (W.W + full(low(0))) @ rotation(U)
    expr = Magnitude(m, (W + low(0)) @ Householder(U))
    close(expr.dense(), norms(m, inner))
    close(difference(expr, W).dense(), norms(m, inner) - W.W)
    stacked = Magnitude(m, W + low(0) + Hadamard(W, low(1)))
    close(difference(stacked, W).dense(), norms(m, W.W + full(low(0)) + W.W * full(low(1))) - W.W)
    twice = Magnitude(m, Magnitude(2 * m, W + low(0)))
    close(difference(twice, W).dense(), norms(m, norms(2 * m, W.W + full(low(0)))) - W.W)


def test_difference_beside_a_batch():
    W, U = Dense(draw(3, OUT, IN)), draw(3, IN, 2, seed=1)
    B, A, m = draw(3, OUT, 2, seed=2), draw(3, 2, IN, seed=3), draw(3, OUT, seed=4)
    H = torch.stack([rotation(u) for u in U])
    change = difference(W @ Householder(U), W)
    assert type(change) is LowRank
    close(change.dense(), W.W @ H - W.W)
    V = (W.W + B @ A) @ H
    got = difference(Magnitude(m, (W + LowRank(B, A)) @ Householder(U)), W)
    close(got.dense(), m[..., None] * V / V.norm(dim=-1, keepdim=True) - W.W)
    assert not difference(W, W).dense().any()


def test_row_norms_pass_through_an_orthogonal_right_factor():
    class Counting(Dense):
        built = 0

        def dense(self):
            type(self).built += 1
            return self.W

        def row_sqnorm(self):
            return self.W.square().sum(-1)

    W = Counting(draw(OUT, IN))
    expr = W @ Householder(draw(IN, 2)) @ Cayley(draw(2, 3, 3))
    close(expr.row_sqnorm(), W.W.square().sum(-1))
    assert not Counting.built
    loose = W @ Diagonal(draw(IN))
    close(loose.row_sqnorm(), (W.W * draw(IN)).square().sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_deviation_starts_at_zero_bitwise(dtype):
    op = LowRank(draw(OUT, 2).to(dtype), draw(2, IN, seed=1).to(dtype), scale=1.3)
    start = op.map(torch.clone)
    change = deviation(op, start)
    assert isinstance(change, Deviation)
    assert not change.dense().any()
    assert not change.matmul(draw(3, IN, seed=2).to(dtype)).any()
    expr = Dense(draw(OUT, IN, seed=3).to(dtype)) + change
    x = draw(3, IN, seed=4).to(dtype)
    assert torch.equal(expr.matmul(x), x @ expr.terms[0].W.mT), "the base, bitwise"


def test_a_deviation_needs_one_form():
    a, d = low(0), draw(2, seed=7)
    for now, start in [
        (a, low(1)),  # another scale
        (a, LowRank(a.B, a.A, diag=d, scale=a.scale)),
        (LowRank(a.B, a.A, scale=torch.tensor(2.0, dtype=torch.float64)), a),
        (a, low(0, rank=3)),
        (LowRank(a.B, a.A, core=draw(2, 2)), a),
        (a, Kronecker(draw(2, 3), draw(2, 2))),
    ]:
        close(deviation(now, start).dense(), now.dense() - start.dense())


def test_a_deviation_keeps_its_form_under_a_gate_made_anew():
    a, gate = low(0), torch.tensor([0.5, 2.0], dtype=torch.float64)
    now, start = (LowRank(a.B + k, a.A, diag=gate * 1.0, scale=gate[0] * 1.0) for k in (1.0, 0.0))
    assert isinstance(deviation(now, start), Deviation)
    close(deviation(now, start).dense(), 0.5 * torch.ones(OUT, 2, dtype=torch.float64) @ torch.diag(gate) @ a.A)


def test_contains_looks_for_the_object_itself():
    W = Dense(draw(OUT, IN))
    assert contains(Magnitude(draw(OUT), Scaled((W + low(0)) @ Householder(draw(IN, 1)), 2.0)), W)
    assert not contains(Dense(W.W) + low(0), W)


LEAVES = ["W", "low", "sparse", "kron"]
NODES = ["W", "low", "sum", "sum", "scaled", "left", "rotated", "hadamard", "magnitude", "minus"]


@st.composite
def expressions(drawn, W: Operator, dense: Tensor, depth: int = 3):
    """A random expression of shape [OUT, IN] and, beside it, its matrix by plain arithmetic. About half of them contain W."""
    seed = drawn(st.integers(0, 999))
    kind = drawn(st.sampled_from(LEAVES if depth == 0 else NODES))
    if kind == "W":
        return W, dense
    if kind == "low":
        rank = drawn(st.integers(0, 2))
        op = low(seed % 7, rank)
        return op, full(op)
    if kind == "sparse":
        op = Sparse(draw(2, seed=seed), torch.tensor([3, 11]), OUT, IN)
        want = torch.zeros(OUT * IN, dtype=torch.float64)
        want[[3, 11]] = op.values
        return op, want.view(OUT, IN)
    if kind == "kron":
        P, Q = draw(2, 3, seed=seed), draw(2, 2, seed=seed + 1)
        return Kronecker(P, Q), torch.kron(P, Q)
    a, A = drawn(expressions(W, dense, depth - 1))
    if kind in ("sum", "minus", "hadamard"):
        b, B = drawn(expressions(W, dense, depth - 1))
        if kind == "hadamard":
            return Hadamard(a, b), A * B
        return (Sum((a, b)), A + B) if kind == "sum" else (a - b, A - B)
    if kind == "scaled":
        number = drawn(st.sampled_from([-1.0, 0.0, 0.5, 3]))
        return Scaled(a, number), number * A
    if kind == "left":
        d = draw(OUT, seed=seed)
        return Diagonal(d) @ a, torch.diag(d) @ A
    if kind == "rotated":
        U = draw(IN, drawn(st.integers(1, 2)), seed=seed)
        return a @ Householder(U), A @ rotation(U)
    m = draw(OUT, seed=seed)
    if (A.norm(dim=1) < 1e-3).any():  # no direction to keep
        return a, A
    return Magnitude(m, a), norms(m, A)


BASE = Dense(draw(OUT, IN, seed=77))


@settings(max_examples=200, deadline=None)
@given(expressions(BASE, BASE.W))
def test_random_expressions(case):
    expr, want = case
    scale = max(1.0, float(want.abs().max()))
    for got, target in [
        (expr.dense(), want),
        (simplify(expr).dense(), want),
        (difference(expr, BASE).dense(), want - BASE.W),
        (simplify(difference(expr, BASE)).dense(), want - BASE.W),
    ]:
        torch.testing.assert_close(got, target, rtol=1e-7, atol=1e-7 * scale)
    x = draw(3, IN, seed=5)
    torch.testing.assert_close(simplify(expr).matmul(x), x @ want.mT, rtol=1e-7, atol=1e-6 * scale)
    assert simplify(expr).rank_bound() <= min(OUT, IN)


def test_the_properties_can_fail():
    """A rule that forgets the rotation of the added term, one that forgets the gain of W, and one that drops a scale."""
    U, m = draw(IN, 2), draw(OUT, seed=2)
    wrong = low(0) + LowRank(
        -(BASE @ (Householder(U).compact()[0] @ Householder(U).compact()[1])), Householder(U).compact()[0].mT
    )
    assert not torch.allclose(wrong.dense(), (BASE.W + full(low(0))) @ rotation(U) - BASE.W)
    gain = m / (BASE.W + full(low(0))).norm(dim=1)
    assert not torch.allclose((Diagonal(gain) @ low(0)).dense(), norms(m, BASE.W + full(low(0))) - BASE.W)
    joined = LowRank(torch.cat([low(0).B, low(1).B], 1), torch.cat([low(0).A, low(1).A]))
    assert not torch.allclose(joined.dense(), full(low(0)) + full(low(1)))
    assert Identity(3, m).rank_bound() == 3

"""Truncated, randomised and product SVD against their defining identities in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import NumericError, OptionError
from rankfold.linalg._lapack import eigh, gram_svd, thin_svd
from rankfold.linalg.decompositions import product_svd, randomized_svd, truncated_svd
from rankfold.linalg.random import Random


class OnlyProducts:
    """The least that a decomposition may ask of an operator: shape and two products."""

    def __init__(self, M):
        self.M, self.shape, self.dtype = M, tuple(M.shape), M.dtype

    def matmul(self, x):
        return x @ self.M.to(x.dtype).mT

    def rmatmul(self, g):
        return g @ self.M.to(g.dtype)

    def dense(self):
        raise AssertionError("this matrix must not be built")


def spectrum(m, n, S, *key):
    """U diag(S) Vᵀ [m, n] in float64 with Haar U and V."""
    U, V = Random("U", *key).haar(m, len(S), torch.float64), Random("V", *key).haar(n, len(S), torch.float64)
    U, V = torch.linalg.qr(U).Q, torch.linalg.qr(V).Q
    return U * S @ V.mT


def orthonormal(Q, tol=1e-10):
    torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[-1], dtype=Q.dtype).expand(*Q.shape[:-2], -1, -1), atol=tol, rtol=0)


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 10**6), data=st.data())
def test_eckart_young(m, n, seed, data):
    """The error is the tail of the spectrum, and orthonormal factors with the exact singular values attain it."""
    M = Random("eckart", seed).normal((m, n), dtype=torch.float64)
    rank = data.draw(st.integers(0, min(m, n)))
    U, S, Vh = truncated_svd(M, rank)
    true = torch.linalg.svdvals(M)
    assert (U.shape, S.shape, Vh.shape) == ((m, rank), (rank,), (rank, n))
    torch.testing.assert_close(S, true[:rank], atol=1e-12, rtol=1e-12)
    error = M - U * S @ Vh
    torch.testing.assert_close(error.square().sum(), true[rank:].square().sum(), atol=1e-12, rtol=1e-10)
    if rank < min(m, n):
        torch.testing.assert_close(torch.linalg.matrix_norm(error, 2), true[rank], atol=1e-12, rtol=1e-10)
    orthonormal(U)
    orthonormal(Vh.mT)


def test_error_in_float32():
    M = Random("f32").normal((40, 70))
    U, S, Vh = truncated_svd(M, 10)
    tail = torch.linalg.svdvals(M.double())[10:].square().sum()
    assert float((M.double() - (U * S @ Vh).double()).square().sum()) == pytest.approx(float(tail), rel=1e-5)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_randomized_is_within_two_percent_of_the_optimum(shape):
    S = torch.logspace(0, -3, 300, dtype=torch.float64)
    M = spectrum(*shape, S)
    best = S[20:].square().sum().sqrt()
    for draw in range(3):
        U, s, Vh = randomized_svd(M, 20, iterations=2, oversample=10, random=Random("omega", draw))
        error = (M - U * s @ Vh).norm()
        assert best * (1 - 1e-12) <= error <= 1.02 * best
        orthonormal(U)
        orthonormal(Vh.mT)
        assert (s <= S[:20] * (1 + 1e-12)).all()


def test_iterations_improve_a_slow_spectrum():
    M = spectrum(300, 200, torch.linspace(1, 0.5, 200, dtype=torch.float64))
    errors = [float((M - (lambda U, S, Vh: U * S @ Vh)(*randomized_svd(M, 10, q))).norm()) for q in (0, 1, 3, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.005 * errors[-1]


@pytest.mark.parametrize("shape", [(30, 17), (17, 30)])
def test_an_operator_gives_what_its_matrix_gives_and_is_never_built(shape):
    M = spectrum(*shape, torch.logspace(0, -3, 17, dtype=torch.float64))
    for of_operator, of_tensor in zip(randomized_svd(OnlyProducts(M), 5), randomized_svd(M, 5)):
        torch.testing.assert_close(of_operator, of_tensor, atol=1e-10, rtol=0)


def test_an_operator_in_half_precision_is_worked_in_float32():
    M = Random("half").normal((20, 12)).to(torch.bfloat16)
    S = randomized_svd(OnlyProducts(M), 3)[1]
    torch.testing.assert_close(S, randomized_svd(M, 3)[1])
    assert S.dtype == torch.float32


def test_rankfold_operators_are_accepted():
    from rankfold.linalg import LowRank

    B, A = Random("B").normal((13, 3), dtype=torch.float64), Random("A").normal((3, 9), dtype=torch.float64)
    U, S, Vh = truncated_svd(LowRank(B, A), 3, iterations=1)
    torch.testing.assert_close(U * S @ Vh, B @ A, atol=1e-12, rtol=0)
    stacked = LowRank(torch.stack([B, 2 * B]), torch.stack([A, A]))
    U, S, Vh = randomized_svd(stacked, 3)
    torch.testing.assert_close((U * S.unsqueeze(-2)) @ Vh, torch.stack([B @ A, 2 * B @ A]), atol=1e-12, rtol=0)


def test_the_same_call_gives_the_same_bits_and_another_stream_does_not():
    M = Random("M").normal((60, 50))
    assert all(torch.equal(a, b) for a, b in zip(randomized_svd(M, 4, 0), randomized_svd(M, 4, 0)))
    assert not torch.equal(randomized_svd(M, 4, 0)[0], randomized_svd(M, 4, 0, random=Random("other"))[0])


def test_auto_follows_its_rule(monkeypatch):
    import rankfold.linalg.decompositions as d

    used = []
    exact, rand = d.thin_svd, d.randomized_svd
    monkeypatch.setattr(d, "EXACT_BELOW", 20)
    monkeypatch.setattr(d, "randomized_svd", lambda *a: used.append("randomized") or rand(*a))
    monkeypatch.setattr(d, "thin_svd", lambda M: used.append(f"lapack {M.shape[-1]}") or exact(M))
    M = Random("M").normal((40, 30))
    for rank, options, first in [
        (3, {}, "randomized"),
        (8, {}, "lapack 30"),
        (3, {"method": "exact"}, "lapack 30"),
        (8, {"iterations": 1}, "randomized"),
        (8, {"method": "randomized"}, "randomized"),
    ]:
        used.clear()
        truncated_svd(M, rank, **options)
        assert used[0] == first


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 14), n=st.integers(1, 14), r=st.integers(1, 16), seed=st.integers(0, 10**6))
def test_product_svd_is_the_dense_svd(m, n, r, seed):
    B, A = Random("B", seed).normal((m, r), dtype=torch.float64), Random("A", seed).normal((r, n), dtype=torch.float64)
    U, S, Vh = product_svd(B, A)
    scale = B.norm() * A.norm()
    assert len(S) == min(m, n, r)
    assert (U * S @ Vh - B @ A).norm() <= 1e-12 * scale
    assert (S - torch.linalg.svdvals(B @ A)[: len(S)]).abs().max() <= 1e-12 * scale
    orthonormal(U)
    orthonormal(Vh.mT)


def test_product_svd_of_stacked_factors_is_the_svd_of_the_sum():
    B, A = Random("B").normal((2, 11, 3), dtype=torch.float64), Random("A").normal((2, 3, 7), dtype=torch.float64)
    U, S, Vh = product_svd(torch.cat([B[0], B[1]], 1), torch.cat([A[0], A[1]], 0), rank=4)
    dense = truncated_svd(B[0] @ A[0] + B[1] @ A[1], 4)
    for ours, oracle in zip((U, S, Vh), dense):
        torch.testing.assert_close(ours, oracle, atol=1e-12, rtol=1e-12)
    batched = product_svd(B, A)[1]
    torch.testing.assert_close(batched, torch.linalg.svdvals(B @ A)[:, :3], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("route", [truncated_svd, randomized_svd], ids=["exact", "randomized"])
class TestOddInput:
    def test_rank_deficient(self, route):
        M = Random("l").normal((12, 2), dtype=torch.float64) @ Random("r").normal((2, 9), dtype=torch.float64)
        U, S, Vh = route(M, 5)
        assert (S[2:] < 1e-12 * S[0]).all()
        torch.testing.assert_close(U * S @ Vh, M, atol=1e-12, rtol=0)
        orthonormal(U)
        orthonormal(Vh.mT)

    def test_zero(self, route):
        U, S, _ = route(torch.zeros(6, 4), 3)
        assert S.tolist() == [0, 0, 0]
        assert U.isfinite().all()
        orthonormal(U, 1e-6)

    def test_one_row_one_column(self, route):
        row = torch.tensor([[3.0, 0.0, -4.0]])
        U, S, Vh = route(row, 1)
        assert U.tolist() == [[1.0]]
        torch.testing.assert_close(S, torch.tensor([5.0]))
        torch.testing.assert_close(Vh, row / 5)
        assert route(row.mT, 1)[1].item() == pytest.approx(5.0)

    def test_bfloat16_is_worked_in_float32(self, route):
        M = Random("M").normal((9, 7)).to(torch.bfloat16)
        factors = route(M, 7)
        assert {t.dtype for t in factors} == {torch.float32}
        torch.testing.assert_close(factors[0] * factors[1] @ factors[2], M.float(), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
    def test_empty(self, route, shape):
        U, S, Vh = route(torch.zeros(shape), 0)
        assert (U.shape, S.shape, Vh.shape) == ((shape[0], 0), (0,), (0, shape[1]))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, route, value):
        M = torch.ones(3, 4)
        M[1, 2] = value
        with pytest.raises(NumericError, match=r"M: 1 of 12 values are not finite .* first at \(1, 2\)"):
            route(M, 2)

    def test_leading_batch(self, route):
        M = Random("batch").normal((3, 8, 6), dtype=torch.float64)
        U, S, Vh = route(M, 6)
        torch.testing.assert_close((U * S.unsqueeze(-2)) @ Vh, M, atol=1e-12, rtol=0)
        assert (U.gather(-2, U.abs().argmax(-2, keepdim=True)) > 0).all()

    @pytest.mark.parametrize("rank", [-1, 5])
    def test_rank_out_of_range(self, route, rank):
        with pytest.raises(OptionError, match="4 x 6 matrix; it can have 0 to 4"):
            route(torch.ones(4, 6), rank)


def test_a_product_that_overflows_is_named():
    with pytest.raises(NumericError, match="M"):
        randomized_svd(OnlyProducts(torch.full((4, 3), float("inf"))), 2)
    with pytest.raises(NumericError, match=r"^A: "):
        product_svd(torch.ones(3, 2), torch.full((2, 4), float("nan")))


def test_refusals():
    with pytest.raises(OptionError, match='use "auto"'):
        truncated_svd(torch.ones(3, 3), 1, method="magic")
    with pytest.raises(OptionError, match="different inner widths"):
        product_svd(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(OptionError, match="a matrix"):
        truncated_svd(torch.ones(3), 1)


def test_autocast_gradients_and_tf32_do_not_reach_inside():
    M = Random("M").normal((30, 20)).requires_grad_()
    plain = randomized_svd(M, 5)
    assert not plain[0].requires_grad
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            inside = randomized_svd(M, 5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


class TestLapackFailure:
    """LAPACK seldom fails; here it is made to."""

    def test_float32_is_retried_in_float64(self, monkeypatch):
        real = torch.linalg.svd

        def only_float64(M, **kwargs):
            if M.dtype == torch.float32:
                raise torch.linalg.LinAlgError("did not converge")
            return real(M, **kwargs)

        monkeypatch.setattr(torch.linalg, "svd", only_float64)
        monkeypatch.setattr("rankfold.linalg._lapack.gram_svd", None)  # the last resort must not be needed
        M = Random("M").normal((6, 9))
        U, S, Vh = thin_svd(M)
        assert S.dtype == torch.float32
        torch.testing.assert_close(U * S @ Vh, M, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 5, 7)])
    def test_then_the_gram_matrix(self, monkeypatch, shape):
        def never(M, **kwargs):
            raise torch.linalg.LinAlgError("did not converge")

        M = Random("M").normal(shape, dtype=torch.float64)
        true = torch.linalg.svdvals(M)
        monkeypatch.setattr(torch.linalg, "svd", never)
        U, S, Vh = thin_svd(M)
        torch.testing.assert_close(S, true, atol=1e-7, rtol=0)
        torch.testing.assert_close((U * S.unsqueeze(-2)) @ Vh, M, atol=1e-7, rtol=0)
        orthonormal(U)
        orthonormal(Vh.mT)

    def test_nan_singular_values_count_as_a_failure(self, monkeypatch):
        real = torch.linalg.svd

        def poisoned(M, **kwargs):
            U, S, Vh = real(M, **kwargs)
            return U, S * float("nan"), Vh

        monkeypatch.setattr(torch.linalg, "svd", poisoned)
        assert thin_svd(Random("M").normal((4, 3)))[1].isfinite().all()

    def test_gram_svd_of_a_deficient_matrix_is_still_orthonormal(self):
        M = torch.zeros(4, 6, dtype=torch.float64)
        M[0, 0] = 2.0
        U, S, Vh = gram_svd(M)
        assert S.tolist() == [2, 0, 0, 0]
        orthonormal(U)
        orthonormal(Vh.mT)

    def test_eigh_gives_up_with_a_name(self, monkeypatch):
        def never(H):
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(torch.linalg, "eigh", never)
        with pytest.raises(NumericError, match="3 x 3 matrix"):
            eigh(torch.eye(3))

"""Every operator against its matrix, written out in plain float64 torch, with out != in and beside a batch dimension."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg import (
    BlockDiagonal,
    Blockwise,
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
    Scaled,
    Sparse,
    TensorRing,
)

SPARSE_INDEX = torch.tensor([1, 4, 9, 17, 20])  # of a 4 x 6 map


@dataclass(frozen=True)
class Kind:
    """Shapes of its tensors, how the operator is built from them, and the same map as one matrix without the operators."""

    shapes: tuple[tuple[int, ...], ...]
    build: Callable[..., Operator]
    oracle: Callable[..., Tensor]


def reflections(U):
    H = torch.eye(len(U), dtype=U.dtype)
    for u in U.unbind(1):
        H = H @ (torch.eye(len(U), dtype=U.dtype) - 2 * torch.outer(u, u) / u.dot(u))
    return H


def cayley(X):
    parts = []
    for block in X:
        S, eye = block - block.T, torch.eye(len(block), dtype=X.dtype)
        parts.append((eye + S) @ torch.linalg.inv(eye - S))
    return torch.block_diag(*parts)


def sparse(values):
    W = torch.zeros(24, dtype=values.dtype)
    for i, v in zip(SPARSE_INDEX.tolist(), values):
        W[i] += v
    return W.view(4, 6)


def blockwise(W, C):
    out = torch.zeros_like(W)
    r = C.shape[-1]
    for j in range(W.shape[0] // r):
        for k in range(W.shape[1] // r):
            rows, columns = slice(j * r, j * r + r), slice(k * r, k * r + r)
            out[rows, columns] = W[rows, columns] @ C[j]
    return out


def ring(G1, G2, H1, H2):
    out = torch.einsum("aib,bjc,ckd,dla->ijkl", G1, G2, H1, H2)
    return out.reshape(G1.shape[1] * G2.shape[1], H1.shape[1] * H2.shape[1])


def magnitude(m, W, B, A):
    V = W + B @ A
    return m[:, None] * V / V.norm(dim=1, keepdim=True)


KINDS = {
    "dense": Kind(((5, 7),), Dense, lambda W: W),
    "identity": Kind(((5, 5),), lambda W: Identity(5, W.flatten()[:1]), lambda W: torch.eye(5, dtype=W.dtype)),
    "lowrank": Kind(((5, 2), (2, 7)), lambda B, A: LowRank(B, A, scale=1.5), lambda B, A: 1.5 * B @ A),
    "lowrank-diag": Kind(((5, 2), (2, 7), (2,)), lambda B, A, d: LowRank(B, A, diag=d), lambda B, A, d: B @ torch.diag(d) @ A),
    "lowrank-core": Kind(((5, 3), (3, 7), (3, 3)), lambda B, A, M: LowRank(B, A, core=M), lambda B, A, M: B @ M @ A),
    "lowrank-both": Kind(
        ((5, 3), (3, 7), (3,), (3, 3)),
        lambda B, A, d, M: LowRank(B, A, d, M, 0.5),
        lambda B, A, d, M: 0.5 * B @ torch.diag(d) @ M @ A,
    ),
    "lowrank-scale": Kind(((5, 2), (2, 7), ()), lambda B, A, s: LowRank(B, A, scale=s), lambda B, A, s: s * B @ A),
    "deviation": Kind(
        ((5, 2), (2, 7), (5, 2), (2, 7)),
        lambda B, A, B0, A0: Deviation(B, A, B0, A0, scale=2.0),
        lambda B, A, B0, A0: 2.0 * (B @ A - B0 @ A0),
    ),
    "deviation-diag": Kind(
        ((5, 2), (2, 7), (5, 2), (2, 7), (2,)),
        Deviation,
        lambda B, A, B0, A0, d: B @ torch.diag(d) @ A - B0 @ torch.diag(d) @ A0,
    ),
    "diagonal": Kind(((5,),), Diagonal, torch.diag),
    "kronecker": Kind(((2, 3), (4, 2)), Kronecker, torch.kron),
    "kronecker-tall": Kind(((6, 2), (1, 3)), Kronecker, torch.kron),
    "hadamard": Kind(((5, 2), (2, 7), (5, 7)), lambda B, A, W: Hadamard(LowRank(B, A), Dense(W)), lambda B, A, W: (B @ A) * W),
    "sparse": Kind(((5,),), lambda v: Sparse(v, SPARSE_INDEX, 4, 6), sparse),
    "blockdiagonal": Kind(((3, 2, 4),), BlockDiagonal, lambda K: torch.block_diag(*K)),
    "blockwise": Kind(((6, 4), (3, 2, 2)), lambda W, C: Blockwise(Dense(W), C), blockwise),
    "tensorring": Kind(
        ((2, 2, 3), (3, 2, 2), (2, 3, 3), (3, 2, 2)),
        lambda G1, G2, H1, H2: TensorRing((G1, G2), (H1, H2)),
        ring,
    ),
    "householder": Kind(((7, 3),), Householder, reflections),
    "cayley": Kind(((2, 3, 3),), Cayley, cayley),
    "magnitude": Kind(
        ((5,), (5, 7), (5, 2), (2, 7)),
        lambda m, W, B, A: Magnitude(m, Dense(W) + LowRank(B, A), detach=False),
        magnitude,
    ),
    "sum": Kind(
        ((6, 8), (6, 2), (2, 8), (2, 4), (3, 2)),
        lambda W, B, A, P, Q: Dense(W) + LowRank(B, A) + Kronecker(P, Q),
        lambda W, B, A, P, Q: W + B @ A + torch.kron(P, Q),
    ),
    "scaled": Kind(((5, 7), ()), lambda W, s: Scaled(Dense(W), s), lambda W, s: s * W),
    "product": Kind(((5, 7), (7, 3)), lambda W, U: Dense(W) @ Householder(U), lambda W, U: W @ reflections(U)),
    "product-skinny": Kind(((5, 2), (2, 7), (7, 4)), lambda B, A, W: LowRank(B, A) @ Dense(W), lambda B, A, W: B @ A @ W),
}


def tensors(kind: Kind, batch: int | None = None, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    return [torch.randn((*lead, *shape), generator=generator, dtype=torch.float64) for shape in kind.shapes]


def dense_of(kind: Kind, ts: list[Tensor], batch: int | None) -> Tensor:
    if batch is None:
        return kind.oracle(*ts)
    return torch.stack([kind.oracle(*(t[e] for t in ts)) for e in range(batch)])


def build(kind: Kind, ts: list[Tensor], batch: int | None) -> Operator:
    return kind.build(*ts)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check(op: Operator, W: Tensor) -> None:
    """Everything an operator promises, against its matrix W: [*batch, out, in]."""
    *batch, size_out, size_in = W.shape
    generator = torch.Generator().manual_seed(99)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    assert op.shape == (size_out, size_in)
    x, g, M, Y = draw(*batch, 4, size_in), draw(*batch, 4, size_out), draw(*batch, size_in, 3), draw(*batch, size_out, size_in)
    close(op.matmul(x), x @ W.mT)
    close(op.rmatmul(g), g @ W)
    close(op.dense().expand_as(W), W)
    close(op.add_to(Y), Y + W)
    close(op @ M, W @ M)
    close(op.row_sqnorm().expand(W.shape[:-1]), W.square().sum(-1))
    close(op.row_dot(Dense(Y)), (W * Y).sum(-1))
    index = torch.tensor([size_in - 1, 0, 1 % size_in])
    close(op.columns(index).expand(*batch, 3, size_out), W.mT[..., index, :])
    index = torch.tensor([size_out - 1, 0])
    close(op.rows(index).expand(*batch, 2, size_in), W[..., index, :])
    if not batch:
        close(op.matmul(x[0]), x[0] @ W.mT)
        close(op.matmul(x.view(2, 2, -1)), (x @ W.mT).view(2, 2, -1))
        close(op.rmatmul(g.view(2, 2, -1)), (g @ W).view(2, 2, -1))
        nested = torch.tensor([[0, size_in - 1], [1 % size_in, 0]])
        close(op.columns(nested), W.mT[nested])
    assert op.matmul(x[..., :0, :]).shape == (*batch, 0, size_out), "no tokens"
    assert op.rmatmul(g[..., :0, :]).shape == (*batch, 0, size_in)

    assert torch.linalg.matrix_rank(W).max() <= op.rank_bound() <= min(size_out, size_in)
    B, A, error = op.to_lowrank()
    assert error < 1e-12
    close((B @ A).expand_as(W), W)
    for rank in range(min(3, op.rank_bound())):
        B, A, error = op.to_lowrank(rank)
        assert B.shape[-1] == A.shape[-2] == rank
        measured = (W - B @ A).norm() / W.norm()
        best = torch.linalg.svdvals(W)[..., rank:].norm() / W.norm()
        assert abs(error - measured) < 1e-10, "the reported error is the measured one"
        assert abs(error - best) < 1e-10, "and the smallest possible (Eckart and Young)"

    again = op.rebuild(iter([t.clone() for t in op.leaves()]))
    assert type(again) is type(op)
    close(again.dense(), op.dense(), 0.0)
    leaves = [t + torch.linspace(1, 2, t.numel()).view(t.shape) if t.is_floating_point() else t for t in op.leaves()]
    constant = isinstance(op, Identity) or not any(t.numel() for t in leaves)
    assert constant or not torch.allclose(op.rebuild(iter(leaves)).dense(), op.dense()), (
        "rebuild takes the tensors that it is given"
    )

    other = Dense(Y)
    close((op + other).dense(), W + Y)
    close((op - other).dense(), W - Y)
    close((3.0 * op).dense().expand_as(W), 3 * W)
    close((op * 0.5).matmul(x), 0.5 * x @ W.mT)
    right = Dense(draw(*batch, size_in, 3))
    close((op @ right).dense(), W @ right.W)
    left = Dense(draw(*batch, 3, size_out))
    close((left @ op).dense(), left.W @ W)
    close((left @ op).matmul(x), x @ (left.W @ W).mT)
    assert op.flops(8) >= op.flops(1) >= 0
    assert op.dense_flops() >= 0
    assert op.nbytes == 8 * sum(t.numel() for t in {id(t): t for t in op.leaves()}.values())


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("name", KINDS)
def test_operator_is_its_matrix(name, batch):
    kind = KINDS[name]
    ts = tensors(kind, batch)
    check(build(kind, ts, batch), dense_of(kind, ts, batch))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("batch", [None, 2])
def test_gradients_reach_every_tensor(name, batch):
    kind = KINDS[name]
    ts = [t.requires_grad_() for t in tensors(kind, batch)]
    W = dense_of(kind, ts, batch)
    x = torch.randn(*W.shape[:-2], 3, W.shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *ts: build(kind, list(ts), batch).matmul(x), (x, *ts))
    y = torch.randn(*W.shape[:-2], 3, W.shape[-2], dtype=torch.float64)
    mine = torch.autograd.grad((build(kind, ts, batch).matmul(x) * y).sum(), [x, *ts], materialize_grads=True, allow_unused=True)
    plain = torch.autograd.grad((x @ W.mT * y).sum(), [x, *ts], materialize_grads=True, allow_unused=True)
    for a, b in zip(mine, plain):
        close(a, b)


@pytest.mark.parametrize("name", KINDS)
def test_bf16_activations_beside_float32_factors(name):
    kind = KINDS[name]
    ts = tensors(kind)
    W = kind.oracle(*ts)
    op = kind.build(*(t.float() for t in ts))
    x, g = torch.randn(16, W.shape[1], dtype=torch.bfloat16), torch.randn(16, W.shape[0], dtype=torch.bfloat16)
    for got, want in [(op.matmul(x), x.double() @ W.T), (op.rmatmul(g), g.double() @ W)]:
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() / want.norm() < 2e-2  # 8 bits of mantissa through at most four products


@pytest.mark.parametrize("name", KINDS)
def test_bf16_factors_give_float32_norms_and_sums(name):
    op = KINDS[name].build(*(t.bfloat16() for t in tensors(KINDS[name])))
    assert op.row_sqnorm().dtype == torch.float32
    W = torch.randn(*op.shape, dtype=torch.bfloat16)
    assert op.add_to(W).dtype == torch.bfloat16


@dataclass(frozen=True, eq=False)
class Transposed(LowRank):
    """Mutant: rmatmul with the factors in the order of matmul."""

    def rmatmul(self, g):
        return g @ (self.A.mT @ self.B.mT).mT.flip(-1)


@dataclass(frozen=True, eq=False)
class OnlyRows(LowRank):
    """Mutant: the row norms forget the scale."""

    def row_sqnorm(self):
        return (self.B @ self.A).square().sum(-1)


@dataclass(frozen=True, eq=False)
class Optimist(LowRank):
    """Mutant: a truncation that reports no error."""

    def to_lowrank(self, rank=None):
        B, A, _ = super().to_lowrank(rank)
        return B, A, 0.0


@dataclass(frozen=True, eq=False)
class Deaf(LowRank):
    """Mutant: rebuild keeps its own tensors."""

    def rebuild(self, leaves):
        return self


@dataclass(frozen=True, eq=False)
class Swapped(LowRank):
    """Mutant: columns and rows exchanged."""

    def columns(self, index):
        return self.dense()[index.remainder(self.shape[0])] @ torch.ones(self.shape[1], self.shape[0], dtype=self.dtype)


MUTANTS = {
    "transposed core": ("lowrank-core", lambda B, A, M: LowRank(B, A, core=M.mT)),
    "wrong scale": ("lowrank", lambda B, A: LowRank(B, A, scale=1.0)),
    "scale twice": ("lowrank", lambda B, A: 1.5 * LowRank(B, A, scale=1.5)),
    "dropped diag": ("lowrank-diag", lambda B, A, d: LowRank(B, A)),
    "missing core": ("lowrank-both", lambda B, A, d, M: LowRank(B, A, d, None, 0.5)),
    "core before diag": ("lowrank-both", lambda B, A, d, M: LowRank(B @ M, A, d, None, 0.5)),
    "forgotten B0": ("deviation", lambda B, A, B0, A0: LowRank(B, A, scale=2.0)),
    "cross term": ("deviation", lambda B, A, B0, A0: LowRank(B - B0, A - A0, scale=2.0)),
    "factors exchanged": ("kronecker", lambda P, Q: Kronecker(Q, P)),
    "blocks transposed": ("cayley", lambda X: Cayley(X.mT)),
    "reflections reversed": ("householder", lambda U: Householder(U.flip(-1))),
    "block on the left": ("blockwise", lambda W, C: Blockwise(Dense(W), C.mT)),
    "a core missing its turn": ("tensorring", lambda G1, G2, H1, H2: TensorRing((G1, G2), (H1, H2.flip(-2)))),
    "sum of the squares": ("hadamard", lambda B, A, W: Hadamard(Dense(W), Dense(W))),
    "index off by one": ("sparse", lambda v: Sparse(v, SPARSE_INDEX + 1, 4, 6)),
    "gain without norm": ("magnitude", lambda m, W, B, A: Diagonal(m) @ (Dense(W) + LowRank(B, A))),
    "norm of the base": ("magnitude", lambda m, W, B, A: Diagonal(m / W.norm(dim=1)) @ (Dense(W) + LowRank(B, A))),
    "lost term": ("sum", lambda W, B, A, P, Q: Dense(W) + LowRank(B, A)),
    "product in the other order": ("product", lambda W, U: Dense(W) @ Householder(U.flip(-1))),
    "transposed factor in rmatmul": ("lowrank", lambda B, A: Transposed(B, A, scale=1.5)),
    "row norm without scale": ("lowrank", lambda B, A: OnlyRows(B, A, scale=1.5)),
    "no error reported": ("lowrank", lambda B, A: Optimist(B, A, scale=1.5)),
    "deaf rebuild": ("lowrank", lambda B, A: Deaf(B, A, scale=1.5)),
    "columns for rows": ("lowrank", lambda B, A: Swapped(B, A, scale=1.5)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects(mutant):
    name, wrong = MUTANTS[mutant]
    ts = tensors(KINDS[name])
    with pytest.raises((AssertionError, RuntimeError)):
        check(wrong(*ts), KINDS[name].oracle(*ts))


def test_rank_deficient_factors():
    B, A = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    A[2] = A[0] + A[1]
    op = LowRank(B, A)
    check(op, B @ A)
    assert op.to_lowrank(2)[2] < 1e-12


def test_zero_maps():
    for op in (
        LowRank(torch.zeros(5, 2), torch.randn(2, 7)),
        Dense(torch.zeros(5, 7)),
        Sparse(torch.zeros(5), SPARSE_INDEX, 4, 6),
        Scaled(Dense(torch.randn(5, 7)), 0.0),
    ):
        B, A, error = op.to_lowrank(1)
        assert error == 0.0
        assert not (B @ A).any()
        assert not op.row_sqnorm().any()
        assert not op.matmul(torch.randn(3, op.shape[1])).any()


def test_a_zero_row_keeps_magnitude_finite():
    W = torch.randn(3, 4)
    W[1] = 0
    op = Magnitude(torch.ones(3), Dense(W))
    assert torch.isfinite(op.dense()).all()
    assert torch.isfinite(op.matmul(torch.randn(2, 4))).all()
    m, V = torch.ones(3, requires_grad=True), W.clone().requires_grad_()
    Magnitude(m, Dense(V), detach=False).matmul(torch.randn(2, 4)).sum().backward()
    assert torch.isfinite(m.grad).all()
    assert torch.isfinite(V.grad).all()


def test_a_detached_norm_is_a_constant_of_the_backward_pass():
    m, W, B, A = tensors(KINDS["magnitude"])
    x = torch.randn(3, 7, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (B, A)]
    Magnitude(m, Dense(W) + LowRank(*leaves)).matmul(x).square().sum().backward()
    B1, A1 = (t.clone().requires_grad_() for t in (B, A))
    V = W + B1 @ A1
    (x @ (m[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T).square().sum().backward()
    close(leaves[0].grad, B1.grad)
    close(leaves[1].grad, A1.grad)


@pytest.mark.parametrize("shape", [(1, 7), (5, 1), (1, 1)])
def test_thin_maps(shape):
    size_out, size_in = shape
    B, A = torch.randn(size_out, 1, dtype=torch.float64), torch.randn(1, size_in, dtype=torch.float64)
    check(LowRank(B, A), B @ A)
    W = torch.randn(size_out, size_in, dtype=torch.float64)
    check(Dense(W) + LowRank(B, A), W + B @ A)


def test_rank_zero():
    op = LowRank(torch.zeros(5, 0, dtype=torch.float64), torch.zeros(0, 7, dtype=torch.float64))
    check(op, torch.zeros(5, 7, dtype=torch.float64))
    assert op.rank_bound() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_deviation_is_zero_bitwise_at_its_start(dtype, diag, batch):
    B, A = torch.randn(*batch, 5, 2).to(dtype), torch.randn(*batch, 2, 7).to(dtype)
    d = torch.randn(*batch, 2).to(dtype) if diag else None
    op = Deviation(B, A, B.clone(), A.clone(), diag=d, scale=1.7)
    x = torch.randn(*batch, 9, 7).to(dtype)
    assert not op.matmul(x).any()
    assert not op.rmatmul(torch.randn(*batch, 9, 5).to(dtype)).any()
    assert not op.dense().any()
    assert not op.row_sqnorm().any()
    W = torch.randn(*batch, 5, 7).to(dtype)
    assert torch.equal(op.add_to(W), W)
    moved = Deviation(B + 1, A, B, A, diag=d, scale=1.7)
    assert moved.dense().any(), "and is not a map that is always zero"


def test_switching_a_component_off_returns_it_to_its_start():
    B, A, B0, A0 = tensors(KINDS["deviation"])
    op = Deviation(B, A, B0, A0, diag=torch.tensor([1.0, 0.0], dtype=torch.float64))
    close(op.dense(), B[:, :1] @ A[:1] - B0[:, :1] @ A0[:1])


def test_a_sum_of_rows_that_cancel_keeps_its_digits():
    """W ≈ −sBA in two rows: the expanded square loses all digits of float32 there, the guard forms those rows anew."""
    generator = torch.Generator().manual_seed(3)
    B, A = torch.randn(6, 2, generator=generator), torch.randn(2, 40, generator=generator)
    rest = 1e-4 * torch.randn(6, 40, generator=generator)
    W = -2.0 * (B @ A)
    W[[1, 4]] += rest[[1, 4]]
    W[[0, 2, 3, 5]] = torch.randn(4, 40, generator=generator)
    want = (W.double() + 2.0 * B.double() @ A.double()).square().sum(-1)
    for batch in (False, True):
        lift = (lambda t: t.unsqueeze(0)) if batch else (lambda t: t)
        got = (Dense(lift(W)) + LowRank(lift(B), lift(A), scale=2.0)).row_sqnorm().reshape(-1).double()
        assert ((got - want).abs() / want).max() < 1e-2
    expanded = W.square().sum(-1) + (2.0 * B @ A).square().sum(-1) + 2 * (W * (2.0 * B @ A)).sum(-1)
    assert ((expanded.double() - want).abs() / want)[[1, 4]].max() > 1e-2, "the case is one where the expansion fails"


def test_the_guard_has_a_gradient():
    B, A = torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    W = -(B @ A).detach() + 1e-4
    assert torch.autograd.gradcheck(lambda B, A: (Dense(W) + LowRank(B, A)).row_sqnorm(), (B, A), atol=1e-7)


def test_row_norms_of_a_low_rank_map_are_never_negative():
    B = torch.tensor([[1.0, -1.0, 0.0]]).repeat(50, 1) * torch.rand(50, 1)
    A = torch.randn(3, 30)
    A[1] = A[0]
    assert (LowRank(B, A).row_sqnorm() >= 0).all()
    assert torch.isfinite(Magnitude(torch.ones(50), LowRank(B, A)).dense()).all()


def test_one_number_per_batch_entry():
    ts = [
        torch.randn(3, 5, 2, dtype=torch.float64),
        torch.randn(3, 2, 7, dtype=torch.float64),
        torch.randn(3, dtype=torch.float64),
    ]
    W = torch.stack([s * B @ A for B, A, s in zip(*ts)])
    check(Scaled(LowRank(ts[0], ts[1]), ts[2]), W)
    check(LowRank(ts[0], ts[1], scale=ts[2]), W)


def test_one_factor_may_be_shared_by_the_batch():
    B, A = torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    check(LowRank(B, A), B @ A)


def test_repeated_tensors_are_counted_once():
    W = torch.randn(5, 7)
    assert (Dense(W) + Hadamard(Dense(W), LowRank(torch.randn(5, 2), torch.randn(2, 7)))).nbytes == 4 * (35 + 10 + 14)


def test_blocks_that_do_not_tile_are_refused():
    with pytest.raises(OptionError, match="blocks"):
        Blockwise(Dense(torch.randn(6, 5)), torch.randn(3, 2, 2))


def test_nan_does_not_pass_a_truncation():
    from rankfold.errors import NumericError

    with pytest.raises(NumericError):
        Dense(torch.full((3, 4), torch.nan)).to_lowrank(1)


def test_a_sparse_stack_has_positions_of_its_own_for_each_map():
    index = torch.tensor([[1, 4, 9], [0, 13, 23]])
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    values, x, g = draw(2, 3), draw(2, 5, 6), draw(2, 5, 4)
    op = Sparse(values, index, 4, 6)
    whole = torch.zeros(2, 24, dtype=values.dtype)
    for e in range(2):
        whole[e, index[e]] = values[e]
    whole = whole.view(2, 4, 6)
    W = draw(2, 4, 6)
    torch.testing.assert_close(op.dense(), whole)
    torch.testing.assert_close(op.add_to(W), W + whole)
    torch.testing.assert_close(op.matmul(x), x @ whole.mT)
    torch.testing.assert_close(op.rmatmul(g), g @ whole)
    torch.testing.assert_close(op.row_sqnorm(), whole.square().sum(-1))

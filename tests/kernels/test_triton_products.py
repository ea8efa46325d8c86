"""The Triton kernels, run by Triton's interpreter on a CPU, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from rankfold.kernels import lowrank as reference
from rankfold.kernels import magnitude as reference_magnitude
from rankfold.kernels.triton import lowrank, magnitude
from rankfold.kernels.triton.products import Blocks, expand, masked, reduce, shrink
from rankfold.linalg.dropout import keep_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
TINY = Blocks(16, 16, 16)
"""Blocks smaller than the shapes below, so that every loop runs more than once."""


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(DEVICE, dtype)


def near(found, expected, dtype, times=1.0):
    gap = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert gap <= times * TOLERANCES[dtype], f"{gap:.2g}"


SHAPES = [(1, 1, 1, 1), (37, 21, 45, 3), (16, 32, 16, 16), (5, 70, 19, 20)]
"""(tokens, in, out, rank), most no multiple of a block."""


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "out", "rank"), SHAPES)
def test_the_three_products(tokens, width, out, rank, dtype):
    x, A, B, y = (normal(*s, dtype=dtype) for s in [(tokens, width), (rank, width), (out, rank), (tokens, out)])
    h = shrink(x, A, blocks=TINY)
    near(h, x.double() @ A.double().mT, dtype)
    near(expand(y.clone(), h, B.mT, 0.7, blocks=TINY), y.double() + 0.7 * h.double() @ B.double().mT, dtype)
    for splits in (1, 3):
        near(reduce(h, x, 0.7, blocks=TINY, splits=splits), 0.7 * h.double().mT @ x.double(), torch.float32, 4.0)


def test_nothing_to_do():
    x, A = torch.zeros(0, 5, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    assert shrink(x, A).shape == (0, 2)
    assert torch.equal(reduce(shrink(x, A), x, 1.0), torch.zeros(2, 5, device=DEVICE))
    y = torch.ones(3, 4, device=DEVICE)
    assert torch.equal(expand(y.clone(), torch.zeros(3, 0, device=DEVICE), torch.zeros(0, 4, device=DEVICE), 1.0), y)


def test_the_reference_s_own_mask_in_all_products():
    """The same function at an equal seed: the entries that `keep_mask` drops, over 1 − p."""
    x, A, drop = normal(40, 50), normal(4, 50), (0.25, 2**61 + 7)
    z = kept(drop, (40, 50))
    assert set(z.unique().tolist()) == {0.0, 1.0 / 0.75}
    of = masked((40, 50), drop, x.device)
    near(shrink(x, A, of, TINY), (x * z) @ A.double().mT, torch.float32)
    h = normal(40, 4)
    near(reduce(h, x, 2.0, of, TINY), 2.0 * h.double().mT @ (x * z), torch.float32, 4.0)
    near(expand(x.clone(), h, A, 2.0, of, TINY), x.double() + 2.0 * z * (h.double() @ A.double()), torch.float32)


def kept(drop, shape):
    """z / (1 − p) in float64, by the reference's mask."""
    p, seed = drop
    return keep_mask(shape, p, seed, torch.device(DEVICE)).double() / (1.0 - p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_both_forms_compute_one_function_at_an_equal_seed(p):
    """Output and every gradient of the reference and of the kernels, with dropout."""
    W, B, A = normal(18, 21), normal(18, 3).requires_grad_(), normal(3, 21).requires_grad_()
    x, g = normal(5, 7, 21).requires_grad_(), normal(5, 7, 18, seed=9)
    outcomes = []
    for path in (None, lowrank):
        y = reference.lowrank_linear(x, Weight(W), None, B, A, 0.5, p_seed=(p, 2**40 + 3), path=path)
        outcomes.append([y.detach(), *torch.autograd.grad(y, (x, B, A), g)])
    for one, other in zip(*outcomes):
        near(one, other, torch.float32, 2.0)


class Weight:
    """A base that holds a plain weight, as the kernels ask for it."""

    def __init__(self, W):
        self.W, self.dtype = W, W.dtype

    def matmul(self, x, bias=None):
        y = x @ self.W.mT
        return y if bias is None else y + bias

    def rmatmul(self, g):
        return g @ self.W

    def rows(self, index):
        return self.W[index].float()

    def row_sqnorm(self):
        return self.W.float().square().sum(-1)


@pytest.mark.parametrize("drop", [None, (0.3, 11)], ids=["whole", "dropout"])
@pytest.mark.parametrize("offset", [False, True], ids=["plain", "offset"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_lowrank_linear(dtype, offset, drop):
    """Output and every gradient by autograd in float64."""
    W, x = normal(18, 21, dtype=dtype), normal(3, 7, 21, dtype=dtype).requires_grad_()
    B, A, bias = normal(18, 3).requires_grad_(), normal(3, 21).requires_grad_(), normal(18, dtype=dtype).requires_grad_()
    B0, A0 = (normal(18, 3, seed=5), normal(3, 21, seed=5)) if offset else (None, None)
    y = reference.lowrank_linear(x, Weight(W), bias, B, A, 0.5, B0, A0, drop, lowrank)
    g = normal(3, 7, 18, seed=9, dtype=dtype)
    found = torch.autograd.grad(y, (x, bias, B, A), g)
    x64, bias64, B64, A64 = (t.detach().double().requires_grad_() for t in (x, bias, B, A))
    z = 1.0 if drop is None else kept(drop, (3, 7, 21))
    change = B64 @ A64 - (B0.double() @ A0.double() if offset else 0.0)
    y64 = x64 @ W.double().mT + bias64 + 0.5 * (z * x64) @ change.mT
    near(y.detach(), y64.detach(), dtype, 2.0)
    for one, other in zip(found, torch.autograd.grad(y64, (x64, bias64, B64, A64), g.double())):
        near(one, other, dtype, 4.0)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_magnitude_linear(dtype):
    W, x = normal(18, 21, dtype=dtype), normal(3, 7, 21, dtype=dtype).requires_grad_()
    B, A, bias = normal(18, 3).requires_grad_(), normal(3, 21).requires_grad_(), normal(18, dtype=dtype).requires_grad_()
    m = normal(18, seed=2).add_(2.0).requires_grad_()
    norm = magnitude.row_norms(Weight(W), B, A, 0.5)
    y = reference_magnitude.magnitude_linear(x, Weight(W), bias, m, norm, B, A, 0.5, path=magnitude)
    g = normal(3, 7, 18, seed=9, dtype=dtype)
    found = torch.autograd.grad(y, (x, bias, m, B, A), g)
    x64, bias64, m64, B64, A64 = (t.detach().double().requires_grad_() for t in (x, bias, m, B, A))
    V = W.double() + 0.5 * B64 @ A64
    y64 = x64 @ ((m64 / V.detach().norm(dim=1))[:, None] * V).mT + bias64
    near(y.detach(), y64.detach(), dtype, 2.0)
    for one, other in zip(found, torch.autograd.grad(y64, (x64, bias64, m64, B64, A64), g.double())):
        near(one, other, dtype, 6.0)


@pytest.mark.parametrize(("out", "width", "rank"), [(1, 1, 1), (33, 70, 5), (40, 37, 384)])
def test_row_norms_in_chunks_of_the_rank(out, width, rank):
    W, B, A = normal(out, width), normal(out, rank) / rank, normal(rank, width, seed=1)
    near(magnitude.row_norms(Weight(W), B, A, 0.5), (W.double() + 0.5 * B.double() @ A.double()).norm(dim=1), torch.float32)


def test_rows_that_cancel_are_formed_on_the_device():
    """All of them, however many: nobody asks which."""
    W, B = normal(40, 24), torch.zeros(40, 24, device=DEVICE)
    B[3:37] = -2.0 * W[3:37] * (1.0 - 1e-4)
    found = magnitude.row_norms(Weight(W), B, torch.eye(24, device=DEVICE), 0.5)
    near(found, (W.double() + 0.5 * B.double()).norm(dim=1), torch.float32)
    assert (found[3:37] / W[3:37].norm(dim=1) - 1e-4).abs().max() < 1e-6


def test_a_change_of_zero_leaves_the_norm():
    W = normal(20, 30)
    assert torch.equal(
        magnitude.row_norms(Weight(W), torch.zeros(20, 4, device=DEVICE), normal(4, 30), 1.0), W.square().sum(-1).sqrt()
    )

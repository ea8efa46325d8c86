"""Grouped products against the loop over groups, in float64: dtypes, layouts, widths that torch does not take, empty groups."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from rankfold.kernels import grouped
from rankfold.kernels.grouped import grouped_outer, grouped_product, looped_outer, looped_product

SIZES = [[3, 0, 7, 2], [0, 0, 0, 0], [12, 0, 0, 0], [0, 0, 0, 1]]
WIDTHS = [(16, 16), (6, 5), (2, 8), (8, 3), (1, 1), (3, 1)]
CLOSE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def drawn(*shape, dtype=torch.float64, requires_grad=False):
    values = torch.cos(torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).mul(1.7).square())
    return values.view(shape).to(dtype).requires_grad_(requires_grad)


def ends_of(sizes):
    return torch.tensor(sizes).cumsum(0, dtype=torch.int32)


def by_hand(x, W, sizes):
    owner = [k for k, size in enumerate(sizes) for _ in range(size)]
    return torch.stack([W[k] @ row for k, row in zip(owner, x)]) if owner else x.new_zeros(0, W.shape[1])


def outer_by_hand(g, x, sizes):
    G = g.new_zeros(len(sizes), g.shape[1], x.shape[1])
    owner = [k for k, size in enumerate(sizes) for _ in range(size)]
    for k, a, b in zip(owner, g, x):
        G[k] += torch.outer(a, b)
    return G


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=lambda d: str(d).removeprefix("torch."))
def test_every_dtype_layout_and_width_is_the_product_row_by_row(dtype, transposed):
    near = {"rtol": CLOSE[dtype], "atol": 4 * CLOSE[dtype], "check_dtype": False}
    for sizes, (out, in_) in itertools.product(SIZES, WIDTHS):
        lay = (
            (lambda *shape: drawn(*shape[:-2], *shape[:-3:-1], dtype=dtype).mT)
            if transposed
            else lambda *s: drawn(*s, dtype=dtype)
        )
        x, g, W, ends = lay(sum(sizes), in_), lay(sum(sizes), out), lay(len(sizes), out, in_), ends_of(sizes)
        for found, expected in (
            (grouped_product(x, W, ends), by_hand(x.double(), W.double(), sizes)),
            (grouped_product(g, W.mT, ends), by_hand(g.double(), W.double().mT, sizes)),
            (grouped_outer(g, x, ends), outer_by_hand(g.double(), x.double(), sizes)),
        ):
            assert found.dtype == dtype
            assert found.is_contiguous()
            torch.testing.assert_close(found, expected, **near)


def test_rows_of_one_matrix_for_all_groups():
    """A stack that is one matrix expanded, and rows that start amid 16 bytes."""
    W, sizes = drawn(8, 4, dtype=torch.float32).expand(3, 8, 4), [2, 1, 4]
    x = drawn(29, dtype=torch.float32)[1:].view(7, 4)
    assert not grouped._fits(x)
    torch.testing.assert_close(grouped_product(x, W, ends_of(sizes)), x @ W[0].mT)


def test_many_small_products_in_bfloat16_are_one(monkeypatch):
    """The same numbers padded as group by group, an overflow in one group stays there in the product."""
    sizes = [5, 0, 3, 4] * 4
    x, W = drawn(48, 8, dtype=torch.bfloat16), drawn(16, 16, 8, dtype=torch.bfloat16)
    g, ends = drawn(48, 16, dtype=torch.bfloat16), ends_of(sizes)
    assert grouped._block(x, 24, ends) is not None
    x[0] = float("inf")
    both = []
    for limit in (grouped.BLOCK, 0):
        monkeypatch.setattr(grouped, "BLOCK", limit)
        both.append((grouped_product(x, W, ends), grouped_outer(g, x.nan_to_num(posinf=1.0), ends)))
    assert both[0][0][5:].isfinite().all()
    for padded, one_by_one in zip(*both):
        torch.testing.assert_close(padded, one_by_one, rtol=2e-2, atol=2e-2, equal_nan=True)
    lopsided = ends_of([48, *[0] * 15])
    assert grouped._block(x, 24, lopsided) is None  # padding all groups to the longest would cost more
    assert grouped._block(x.float(), 24, ends) is None


def test_gradients_of_any_order():
    x, W, ends = drawn(12, 5, requires_grad=True), drawn(4, 3, 5, requires_grad=True), ends_of([3, 0, 7, 2])
    g = drawn(12, 3, requires_grad=True)
    for function, inputs in ((grouped_product, (x, W)), (grouped_outer, (g, x))):
        assert torch.autograd.gradcheck(lambda a, b, f=function: f(a, b, ends), inputs)
        assert torch.autograd.gradgradcheck(lambda a, b, f=function: f(a, b, ends), inputs)


def test_only_what_asks_for_a_gradient_is_kept():
    x, W, ends = drawn(12, 5, requires_grad=True), drawn(4, 3, 5), ends_of([3, 0, 7, 2])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        grouped_product(x, W, ends)
    assert x.shape not in kept
    assert W.shape in kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_transforms_and_forward_mode_are_those_of_the_loop():
    x, W, ends = drawn(12, 5), drawn(4, 3, 5), ends_of([3, 0, 7, 2])
    expected = looped_product(x.cos(), W, ends)
    value, tangent = torch.func.jvp(lambda t: grouped_product(t, W, ends), (x,), (x.cos(),))
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(value, looped_product(x, W, ends))
    with forward_ad.dual_level():
        dual = grouped_product(forward_ad.make_dual(x, x.cos()), W, ends)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    found = torch.func.vmap(lambda M: grouped_product(x, M, ends))(torch.stack([W, 2 * W]))
    torch.testing.assert_close(found[1], 2 * looped_product(x, W, ends))
    sizes = torch.func.grad(lambda t: grouped_outer(t, x, ends).sum())(drawn(12, 3))
    torch.testing.assert_close(sizes, torch.func.grad(lambda t: looped_outer(t, x, ends).sum())(drawn(12, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_of_the_library_keep_their_word(dtype):
    """Schema, fake tensors and autograd registration, by torch's own check."""
    x, W, ends = drawn(12, 8, dtype=dtype), drawn(4, 3, 8, dtype=dtype), ends_of([3, 0, 7, 2])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(grouped._product_operator, (x.requires_grad_(), W, ends), test_utils=checks)
    torch.library.opcheck(grouped._outer_operator, (drawn(12, 3, dtype=dtype), x, ends), test_utils=checks)


def test_what_is_wide_and_does_not_fit_is_not_copied():
    """Matrices larger than the rows go through the loop: a copy in each pass would cost more than it gives."""
    x, W, ends = drawn(4, 6, dtype=torch.float32), drawn(4, 8, 6, dtype=torch.float32), ends_of([1, 1, 1, 1])
    assert not grouped._fits(W)
    assert torch.equal(grouped_product(x, W, ends), looped_product(x, W, ends))


def test_the_reference_rejects_other_groups():
    """What these tests compare by: a product whose groups are off by one is seen."""
    x, W = drawn(12, 5), drawn(4, 3, 5)
    off = (by_hand(x, W.roll(1, 0), [3, 0, 7, 2]) - grouped_product(x, W, ends_of([3, 0, 7, 2]))).abs().max()
    assert off > 0.1

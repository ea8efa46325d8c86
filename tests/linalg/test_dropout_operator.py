"""The library operator behind dropout in a compiled graph."""

import pytest
import torch

from rankfold.linalg import dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_obeys_the_rules_of_library_operators(dtype):
    """Schema, fake implementation, autograd registration and tracing, as torch's own check has them."""
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.rankfold.dropped.default, (x, 0.25, torch.tensor(2**61 + 3)))


def test_is_what_the_number_gives():
    x = torch.randn(7, 33, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, 33, dtype=torch.float64)
    one, other = (dropout.dropped(x, 0.3, seed) for seed in (11, torch.tensor(11)))
    assert torch.equal(one, other)
    assert 0 < (one == 0).sum() < one.numel()
    assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (one, other)))


def test_keeps_no_mask():
    """Of a compiled product of dropped x, backward keeps one tensor of the size of x."""
    x, A = torch.randn(64, 32, requires_grad=True), torch.randn(2, 32, requires_grad=True)

    def f(x):
        return dropout.dropped(x, 0.5, torch.randint(0, 2**62, ())) @ A.mT

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert sum(t.numel() for t in kept if t.numel() >= x.numel()) == x.numel()
    y.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("p", [0.001, 0.05, 0.15])
def test_the_gaps_drop_each_entry_by_itself(p):
    """The share, that of neighbours both dropped, and that of equal columns, each within four standard errors."""
    shape, cpu = (2000, 501), torch.device("cpu")
    gone = torch.cat([(dropout.draw(shape, p, seed, cpu).times(torch.ones(shape)) == 0) for seed in range(4)])
    n = gone.numel()
    for found, share in (
        (gone.double().mean(), p),
        ((gone[:, 1:] & gone[:, :-1]).double().mean(), p * p),
        ((gone[1:] & gone[:-1]).double().mean(), p * p),
    ):
        assert abs(float(found) - share) < 4 * (share / n) ** 0.5
    columns = gone.double().mean(0)
    assert abs(float(columns.var() / (p * (1 - p) / len(gone))) - 1) < 0.3


def test_the_positions_are_distinct_in_order_and_inside():
    for seed in range(50):
        mask = dropout.draw((3, 7), 0.15, seed, torch.device("cpu"))
        assert (mask.gone.diff() > 0).all()
        assert ((mask.gone >= 0) & (mask.gone < 21)).all()


def test_more_rounds_are_drawn_where_one_falls_short(monkeypatch):
    """Every gap is one: the first round ends early, and every entry is dropped once."""
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.zeros(n))
    mask = dropout.draw((10, 100), 0.1, 0, torch.device("cpu"))
    assert torch.equal(mask.gone, torch.arange(1000))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_forms_of_a_mask_multiply_alike(dtype):
    torch.manual_seed(0)
    few = dropout.draw((9, 12), 0.1, 3, torch.device("cpu"))
    kept = (few.times(torch.ones(9, 12)) != 0).to(torch.int16)
    many = dropout.Mask(0.1, None, kept)
    x, h, A = torch.randn(9, 12, dtype=dtype), torch.randn(9, 2, dtype=dtype), torch.randn(2, 12, dtype=dtype)
    torch.testing.assert_close(few.times(x), many.times(x))
    torch.testing.assert_close(few.times(x), x * kept / 0.9)
    torch.testing.assert_close(few.times(x.mT.contiguous().mT), x * kept / 0.9)
    for y in (torch.ones(9, 12, dtype=dtype), torch.ones(12, 9, dtype=dtype).mT):
        for mask in (few, many):
            found = y.clone(memory_format=torch.preserve_format)
            mask.add_product(found, h, A, 2.0)
            torch.testing.assert_close(found, 1.0 + 2.0 * (h @ A) * kept / 0.9)


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(40, 50, dtype=torch.float64, requires_grad=True)
    y = dropout.dropped(x, 0.1, 5)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g == 0, y == 0)
    assert torch.autograd.gradgradcheck(lambda x: dropout.dropped(x, 0.1, 5) ** 2, x[:2, :5].detach().requires_grad_())
    pure = torch.func.grad(lambda x: dropout.dropped(x, 0.1, 5).sum())(x.detach())
    assert torch.equal(pure, g)

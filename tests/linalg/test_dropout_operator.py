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

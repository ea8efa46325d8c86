"""AdamW towards a start, and parameter groups."""

import pytest
import torch
from torch import nn

from rankfold.training.contracts import Trainable
from rankfold.training.optimizers import DeviationAdamW, groups


def oracle(p, p0, grads, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """AdamW's algorithm on the deviation, entry by entry in float64."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        p = p - lr * decay * (p - p0)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


@pytest.mark.parametrize("start", [None, 2.0])
def test_steps_are_the_definition_s(start):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    p0 = None if start is None else torch.full_like(p, start)
    grads = torch.randn(6, 4, 3, dtype=torch.float64)
    expected = oracle(p.detach().clone(), torch.zeros(()) if p0 is None else p0, grads, lr=0.1, decay=0.3)
    t = Trainable("p", p, "B", start=p0)
    optimizer = DeviationAdamW(groups([t], 0.1, 0.3), {} if p0 is None else {p: p0}, lr=0.1)
    for g in grads:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


def test_without_starts_it_is_torch_s_adamw_bitwise():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    a = DeviationAdamW(groups([Trainable("p", ours, "B")], 0.1, 0.3), lr=0.1)
    b = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3)
    for g in torch.randn(5, 4, 3):
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)


def test_a_tensor_at_its_start_stays_there_bitwise():
    p = nn.Parameter(torch.randn(5, 5))
    p0 = p.detach().clone()
    optimizer = DeviationAdamW(groups([Trainable("p", p, "B", start=p0)], 1.0, 0.5), {p: p0}, lr=1.0)
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, p0)


def test_a_closure_is_called_once_and_its_loss_given_back():
    p, calls = nn.Parameter(torch.ones(2, 2)), []
    optimizer = DeviationAdamW([p], lr=0.1)

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert len(calls) == 1
    assert bool((p < 1).all())


def test_every_tensor_is_in_one_group_and_vectors_do_not_decay():
    tensors = [
        Trainable("B", nn.Parameter(torch.ones(3, 2)), "B"),
        Trainable("A", nn.Parameter(torch.ones(2, 3)), "A", start=torch.ones(2, 3)),
        Trainable("m", nn.Parameter(torch.ones(3)), "magnitude"),
        Trainable("g", nn.Parameter(torch.ones(())), "gate"),
    ]
    found = groups(tensors, 0.1, 0.2)
    assert sorted(id(p) for g in found for p in g["params"]) == sorted(id(t.param) for t in tensors)
    decay = {id(p): (g["weight_decay"], g.get("deviation_decay", 0.0)) for g in found for p in g["params"]}
    assert [decay[id(t.param)] for t in tensors] == [(0.2, 0.0), (0.0, 0.2), (0.0, 0.0), (0.0, 0.0)]

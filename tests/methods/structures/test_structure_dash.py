"""LoRA-Dash: the sum of a LoRA and coordinates, and the launch that picks the directions."""

import pytest
import torch
from structure_checks import attached, check_definition, check_start, inputs, move, tensors, tiny, trained

import rankfold as rf
from rankfold.errors import TargetError
from rankfold.methods.ranks.lora_dash import directions
from rankfold.methods.structures.dash import Dash


class Launched(Dash):
    """With directions from the start, so that all of the definition is tried."""

    def tensors(self, site):
        from dataclasses import replace

        specs = super().tensors(site)
        return {n: replace(s, start=0.5 if n in ("U", "V") else s.start) for n, s in specs.items()}


def test_is_a_lora_and_a_diagonal_between_directions():
    weight = lambda W, t: W + 2.0 * t.B @ t.A + t.U @ torch.diag(t.d) @ t.V
    check_definition(Launched(rank=3, directions=2, alpha=6), weight, runs=("fused", "structured", "effective", "plain"))


def test_starts_at_the_base_with_the_parameters_of_a_lora_and_a_few():
    check_start(Dash(rank=4, directions=3))
    _, store = attached(Dash(rank=4, directions=3))
    assert sum(p.numel() for p in trained(store)) == 4 * (12 + 20 + 20 + 8) + 2 * 3
    with pytest.raises(TargetError, match="directions"):
        rf.adapt(tiny(), "dash", rank=4, directions=9)


def test_picks_the_directions_with_the_largest_relative_change():
    torch.manual_seed(0)
    W = torch.randn(9, 7, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    B, A = U[:, [5, 2]] * torch.tensor([0.3, 0.5]), Vh[[5, 2]]  # relative changes 0.3/σ_5 and 0.5/σ_2
    left, right = directions(W, B, A, 2)
    order = sorted([5, 2], key=lambda i: -float({5: 0.3, 2: 0.5}[i] / S[i]))
    for k, i in enumerate(order):
        torch.testing.assert_close((left[:, k] @ U[:, i]).abs(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(left[:, k : k + 1] @ right[k : k + 1], U[:, i : i + 1] @ Vh[i : i + 1])


def test_the_launch_keeps_the_function_and_starts_the_coordinates():
    model = tiny()
    a = rf.adapt(model, "lora-dash", rank=3, directions=2, after=3)
    optimizer = a.optimizer(lr=0.05, total_steps=6)
    filled, moved = [], []
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
        t = a.slots()[0].t(a.store)
        filled.append(bool(t.U.any()))
        moved.append(bool(t.d.any()))
    assert filled == [False, False, True, True, True]
    assert moved == [False, False, False, True, True]
    t = a.slots()[0].t(a.store)
    eye = torch.eye(2, dtype=t.U.dtype)
    torch.testing.assert_close(t.U.T @ t.U, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(t.V @ t.V.T, eye, rtol=0, atol=1e-5)


def test_without_the_launch_it_is_a_lora():
    model, store = attached(Dash(rank=3, directions=2))
    move(store)
    t = tensors(store)[0]
    assert not t.U.any()
    W = [m.weight + u.B @ u.A for m, u in zip((model[0], model[2]), tensors(store))]
    linear = torch.nn.functional.linear
    expected = linear(torch.tanh(linear(inputs(), W[0], model[0].bias)), W[1], model[2].bias)
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-10, atol=1e-10)

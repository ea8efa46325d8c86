"""Gate: a trained factor per site, row or component; over offsets a closed gate returns to the start."""

import pytest
import torch
from structure_checks import attached, check_definition, check_start, inputs, move, tensors

from rankfold.core import Offset
from rankfold.errors import CompositionError
from rankfold.methods.structures.gate import Gate
from rankfold.methods.structures.hira import HiRA
from rankfold.methods.structures.kron import Kron
from rankfold.methods.structures.lora import LoRA
from rankfold.methods.structures.magnitude import Magnitude

LORA = LoRA(rank=3, alpha=6)


@pytest.mark.parametrize(
    ("structure", "weight"),
    [
        (Gate(inner=LORA), lambda W, t: W + t.gate * 2 * t.B @ t.A),
        (Gate(per="row", inner=LORA), lambda W, t: W + torch.diag(t.gate) @ (2 * t.B @ t.A)),
        (Gate(per="rank", inner=LORA), lambda W, t: W + 2 * t.B @ torch.diag(t.gate) @ t.A),
        (Gate(per="site", inner=Kron(rank=9)), lambda W, t: W + t.gate * torch.kron(t.P, t.Q)),
        (Gate(per="row", inner=Kron(rank=9)), lambda W, t: W + torch.diag(t.gate) @ torch.kron(t.P, t.Q)),
        (Gate(per="rank", inner=HiRA(rank=3)), lambda W, t: W + W * (t.B @ torch.diag(t.gate) @ t.A)),
        (
            Gate(per="rank", inner=Offset(inner=LORA)),
            lambda W, t: W + 2 * (t.B @ torch.diag(t.gate) @ t.A - t.B0 @ torch.diag(t.gate) @ t.A0),
        ),
    ],
    ids=["site", "row", "rank", "site of kron", "row of kron", "rank of hira", "rank of an offset"],
)
def test_is_the_change_times_its_gate(structure, weight):
    hira = isinstance(structure.core, HiRA)
    check_definition(structure, weight, runs=("effective" if hira else "structured", "plain"))


@pytest.mark.parametrize("per", ["site", "row", "rank"])
def test_starts_at_the_base(per):
    check_start(Gate(per=per, inner=LORA))


def test_a_gate_of_zero_starts_at_the_base_whatever_the_factors_are():
    """AdaLoRA's start: both factors drawn."""
    model, store = attached(Gate(per="rank", start=0.0, inner=LORA))
    with torch.no_grad():
        for t in tensors(store):
            t.B.normal_(), t.A.normal_()
    with store.disabled():
        base = model(inputs())
    assert torch.equal(model(inputs()), base)
    t = tensors(store)[0]
    g = torch.autograd.grad(model(inputs()).square().sum(), [t.gate, t.B, t.A])
    assert g[0].abs().min() > 0
    assert g[1].abs().max() == g[2].abs().max() == 0


def test_a_component_that_is_switched_off_is_gone_or_back_at_its_start():
    for inner in (LORA, Offset(inner=LORA)):
        model, store = attached(Gate(per="rank", inner=inner))
        move(store)
        with torch.no_grad():
            for t in tensors(store):
                t.gate.fill_(1.0)
                t.gate[1] = 0.0
        off = model(inputs())
        with torch.no_grad():
            for t in tensors(store):
                t.gate[1] = 1.0
                t.B[:, 1] = getattr(t, "B0", torch.zeros_like(t.B))[:, 1]
                if hasattr(t, "A0"):
                    t.A[1] = t.A0[1]
        torch.testing.assert_close(model(inputs()), off, rtol=1e-12, atol=1e-12)


def test_over_magnitude_the_whole_change_is_gated():
    def weight(W, t):
        V = W + 2 * t.B @ t.A
        return W + t.gate * ((t.m / V.norm(dim=1).detach())[:, None] * V - W)

    check_definition(Gate(inner=Magnitude(inner=LORA)), weight, runs=("structured", "plain"))


def test_components_need_factors_of_roles_b_and_a():
    with pytest.raises(CompositionError, match="Kron has no factors of roles B and A"):
        attached(Gate(per="rank", inner=Kron(rank=2)))

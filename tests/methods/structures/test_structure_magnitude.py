"""Magnitude: DoRA over any structure; row norms, both gradient forms, peft."""

from dataclasses import dataclass, replace

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, inputs, move, same, slots, tensors, tiny

from rankfold.core import Offset
from rankfold.errors import CompositionError
from rankfold.linalg import difference, simplify
from rankfold.methods.structures.gate import Gate
from rankfold.methods.structures.hra import HRA
from rankfold.methods.structures.kron import Kron
from rankfold.methods.structures.lora import LoRA
from rankfold.methods.structures.magnitude import Magnitude
from rankfold.methods.structures.mixture import Mixture


def rows(V, m, detach=True):
    n = V.norm(dim=1)
    return (m / (n.detach() if detach else n))[:, None] * V


@pytest.mark.parametrize("detach", [True, False])
def test_scales_rows_to_m(detach):
    structure = Magnitude(inner=LoRA(rank=3, alpha=5), detach=detach)
    fused = ("fused",) if detach else ()
    check_definition(
        structure, lambda W, t: rows(W + 5 / 3 * t.B @ t.A, t.m, detach), runs=(*fused, "structured", "effective", "plain")
    )


def test_works_over_a_kronecker_product_and_over_a_rotation():
    check_definition(
        Magnitude(inner=Kron(rank=9)), lambda W, t: rows(W + torch.kron(t.P, t.Q), t.m), runs=("structured", "effective")
    )

    def rotated(W, t):
        for u in t.U.T:
            W = W - 2 * (W @ u)[:, None] * u / u.dot(u)
        return rows(W, t.m)

    check_definition(Magnitude(inner=HRA(rank=4)), rotated, runs=("structured", "effective"))


@pytest.mark.parametrize("inner", [LoRA(rank=4), HRA(rank=4), Offset(inner=LoRA(rank=4))], ids=lambda s: type(s).__name__)
def test_gain_is_exactly_one_at_the_start(inner):
    check_start(Magnitude(inner=inner), bias=False)  # with a bias the sum is rounded once more than nn.Linear rounds it
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model, store = attached(Magnitude(inner=inner), tiny(dtype))
        for slot in slots(store):
            gain = simplify(slot.weight(slot.t(store))).gain()
            assert torch.equal(gain, torch.ones_like(gain))
        x, base = inputs(dtype), tiny(dtype)
        assert (model(x) - base(x)).norm() <= 4 * torch.finfo(dtype).eps * base(x).norm()


def test_starts_where_a_structure_inside_starts_off_the_base():
    """The lengths are those of the inner weight, not those of W."""
    _, store = attached(Magnitude(inner=Gate(start=2.0, inner=Off(rank=2))))
    for slot in slots(store):
        t = slot.t(store)
        torch.testing.assert_close(t.m, (slot.base.W + 2.0 * t.B @ t.A).norm(dim=1), rtol=1e-12, atol=0)
        assert (t.m - slot.base.W.norm(dim=1)).abs().max() > 0.1


@dataclass(frozen=True, kw_only=True)
class Off(LoRA):
    """A LoRA that starts away from W."""

    def tensors(self, site):
        return {name: replace(spec, start=1.0) for name, spec in super().tensors(site).items()}


def test_row_norms_are_m_and_scaling_b_turns_only_directions():
    _model, store = attached(Magnitude(inner=LoRA(rank=3)))
    move(store)
    slot, t = slots(store)[0], tensors(store)[0]
    for factor in (1.0, 7.0):
        with torch.no_grad():
            t.B.mul_(factor)
        torch.testing.assert_close(slot.weight(t).dense().norm(dim=1), t.m.abs(), rtol=1e-12, atol=0)
    assert difference(slot.weight(t), slot.base).rank_bound() > 3


def test_bf16_keeps_gains_that_bf16_itself_cannot_hold():
    model, store = attached(Magnitude(inner=LoRA(rank=2)), tiny(torch.bfloat16, bias=False))
    t = tensors(store)[0]
    assert t.m.dtype == torch.float32
    with torch.no_grad():
        t.m.mul_(1.001)
    x = inputs(torch.bfloat16)
    W = slots(store)[0].weight(t).dense()
    ratio = W / model[0].weight.float()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.001), rtol=1e-5, atol=0)
    assert model(x).dtype == torch.bfloat16


def test_refuses_a_change_that_depends_on_the_input():
    with pytest.raises(CompositionError, match="depends on the input"):
        Magnitude(inner=Mixture(rank=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_peft(dtype):
    from peft import LoraConfig

    def pair(t, layer):
        m = layer.lora_magnitude_vector["default"].weight
        return [(t.A, layer.lora_A["default"].weight, same), (t.B, layer.lora_B["default"].weight, same), (t.m, m, same)]

    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0", "2"])
    tol = 1e-10 if dtype == torch.float64 else 1e-4
    check_against_peft(Magnitude(inner=LoRA(rank=4, alpha=6)), config, pair, dtype=dtype, tol=tol)

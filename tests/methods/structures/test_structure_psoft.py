"""PSOFT: a rotation and two scalings of the principal coordinates; exact start, small turns, peft."""

import pytest
import torch
from structure_checks import attached, check_against_peft, check_definition, check_start, same, tensors, tiny, trained

import rankfold as rf
from rankfold.linalg import difference
from rankfold.methods.structures.psoft import PSOFT


def rotation(q, rank):
    Q = q.new_zeros(rank, rank)
    rows, columns = torch.triu_indices(rank, rank, 1)
    Q = Q.index_put((rows, columns), q)
    Q = Q - Q.T
    eye = torch.eye(rank, dtype=q.dtype)
    return (eye + Q) @ torch.linalg.inv(eye - Q)


def weight(rank, scale=1.0):
    def changed(W, t):
        eye = torch.eye(rank, dtype=W.dtype)
        return W + scale * t.B @ (torch.diag(t.b) @ rotation(t.q, rank) @ torch.diag(t.a) - eye) @ t.A

    return changed


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_is_a_rotation_between_two_diagonals(rank):
    if rank == 1:  # no pair to turn: the scalings alone
        _, store = attached(PSOFT(rank=1))
        assert tensors(store)[0].q.shape == (0,)
        return
    check_definition(PSOFT(rank=rank, alpha=2 * rank), weight(rank, 2.0), runs=("fused", "structured", "effective", "plain"))


def test_starts_at_the_base_bitwise_with_any_basis():
    check_start(PSOFT(rank=4))


def test_its_own_init_is_the_spectrum_and_a_pure_rotation_keeps_the_principal_geometry():
    assert rf.method("psoft").init.name == "spectrum"
    assert rf.method("psoft").text == "psoft"
    assert rf.method("psoft+init:kaiming").text == "psoft+init:kaiming"
    assert rf.method(rf.method("psoft+init:kaiming").text).init.name == "kaiming"
    model = tiny()
    a = rf.adapt(model, "psoft", rank=4, scaled=False)
    assert a.parameter_count() == 2 * 6
    for p in a.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    for slot in a.slots():
        W, t = slot.base.dense(), slot.t(a.store)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(t.B @ t.A, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-5, atol=1e-6)
        new = slot.weight(t).dense()
        assert float((new - W).detach().norm()) > 0.1
        inside = (new - (W - t.B @ t.A)).detach()  # B R A: the rest of W stands apart
        turned = (t.B @ rotation(t.q, 4)).detach()
        torch.testing.assert_close(torch.linalg.svdvals(inside)[:4], torch.linalg.svdvals(turned), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inside @ Vh[4:].T, torch.zeros(len(W), len(Vh) - 4, dtype=W.dtype), rtol=0, atol=1e-5)


def test_a_small_turn_is_exact_relative_to_its_angle():
    _, store = attached(PSOFT(rank=4), tiny(torch.float32))
    slot = next(iter(store.members["a"].slots.values()))
    t = slot.t(store)
    with torch.no_grad():
        t.q.copy_(1e-5 * torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.25]))
    wide = {n: getattr(t, n).detach().double() for n in t._fields}
    truth = wide["B"] @ (rotation(wide["q"], 4) - torch.eye(4)) @ wide["A"]
    got = difference(slot.weight(t), slot.base).dense()
    assert float((got - truth).detach().norm()) < 1e-6 * float(truth.norm())


def test_agrees_with_peft():
    from peft import PsoftConfig

    def pair(t, layer):
        R = layer.psoft_R["default"]
        cached = [(t.B, layer._psoft_B_cache["default"], same), (t.A, layer._psoft_A_cache["default"], same)]
        return [*cached, (t.q, R.weight, same), (t.b, R.vector_b, same), (t.a, R.vector_a, same)]

    config = PsoftConfig(r=4, psoft_alpha=8, target_modules=["0", "2"])
    check_against_peft(PSOFT(rank=4, alpha=8), config, pair, tol=1e-5, dtype=torch.float32, size=0.2)
    _, store = attached(PSOFT(rank=4))
    assert sum(p.numel() for p in trained(store)) == 2 * (6 + 8)

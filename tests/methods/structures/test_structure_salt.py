"""SALT: scaled and shifted leading values, a product on the rest; every form of ρ, export, counts."""

import pytest
import torch
from structure_checks import attached, check_definition, check_start, slots, tensors, tiny, trained

import rankfold as rf
from rankfold.linalg import difference
from rankfold.methods.structures.salt import SALT


def core(t, p):
    """S' before ρ, entry by entry."""
    k = len(t.S)
    top = torch.diag(t.a * t.S[:p] + t.b)
    rest = torch.diag(t.S[p:]) + (t.X @ t.Y if hasattr(t, "X") else 0.0)
    return torch.cat([torch.cat([top, top.new_zeros(p, k - p)], 1), torch.cat([top.new_zeros(k - p, p), rest], 1)])


def weight(p, relu="off"):
    def changed(W, t):
        S = core(t, p)
        if relu == "full":
            S = S.clamp_min(0.0)
        if relu == "diagonal":
            S = S - torch.diag(S.diagonal()) + torch.diag(S.diagonal().clamp_min(0.0))
        return W + t.U @ (S - torch.diag(t.S)) @ t.V

    return changed


@pytest.mark.parametrize("relu", ["off", "diagonal", "full"])
@pytest.mark.parametrize(("p", "q"), [(3, 2), (1, 1), (6, 2)])
def test_is_the_changed_spectrum(relu, p, q):
    check_definition(SALT(rank=p, tail=q, relu=relu), weight(p, relu), size=0.8)


@pytest.mark.parametrize("relu", ["off", "diagonal", "full"])
def test_starts_at_the_base(relu):
    check_start(SALT(rank=3, tail=2, relu=relu))


def adapted(**options):
    model = tiny()
    return model, rf.adapt(model, "salt", **{"rank": 3, "tail": 2, **options})


def moved(a, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in a.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator).to(p) * 0.5)
    return [(s, s.t(a.store), s.base.dense()) for s in a.slots()]


def test_the_bases_are_the_svd_and_the_change_exports_at_rank_p_plus_q():
    _, a = adapted()
    assert a.parameter_count() == sum(2 * 3 + 2 * 2 * (min(s.site.shape) - 3) for s in a.slots())
    for slot, t, W in moved(a):
        S = torch.linalg.svdvals(W)
        torch.testing.assert_close(t.S, S.to(t.S.dtype), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(t.U * t.S @ t.V, W, rtol=1e-5, atol=1e-5)
        new = slot.weight(t).dense()
        torch.testing.assert_close(new, (t.U @ core(t, 3) @ t.V).to(W), rtol=1e-5, atol=1e-5)
        B, A, error = difference(slot.weight(t), slot.base).to_lowrank()
        assert (B.shape[1], error) == (5, 0.0)
        torch.testing.assert_close(W + B @ A, new, rtol=1e-6, atol=1e-6)


def test_without_a_tail_it_is_svfit_with_a_shift():
    a = rf.adapt(tiny(), "salt", targets=["0"], rank=12, tail=2)
    assert a.parameter_count() == 24
    for slot, t, _ in moved(a):
        assert not hasattr(t, "X")
        S = torch.linalg.svdvals(slot.weight(t).dense().detach())
        torch.testing.assert_close(S, (t.a * t.S + t.b).detach().abs().sort(descending=True).values.to(S), rtol=1e-5, atol=1e-5)


def test_full_relu_cuts_the_entries_of_the_product_and_off_does_not():
    _, store = attached(SALT(rank=3, tail=2))
    slot, t = slots(store)[0], tensors(store)[0]
    with torch.no_grad():
        t.X.fill_(1.0)
        t.Y.fill_(-1.0)
    changes = {
        relu: difference(SALT(rank=3, tail=2, relu=relu).weight(slot.base, t, slot.site), slot.base) for relu in ("off", "full")
    }
    core_off = t.X @ t.Y
    assert (core_off < 0).all()
    assert float((changes["off"].dense() - changes["full"].dense()).detach().norm()) > 1.0


def test_the_start_of_sam_is_elsewhere_and_said_so():
    assert rf.method("salt").starts == "base"
    assert rf.method("salt", start="sam").starts == "elsewhere"
    model, x = tiny(), torch.ones(2, 12, dtype=torch.float64)
    before = model(x)
    rf.adapt(model, "salt", rank=3, tail=2, start="sam")
    assert not torch.equal(model(x), before)


def test_the_penalty_is_the_size_of_the_change_and_has_a_gradient_at_zero():
    structure = SALT(rank=3, tail=2, penalty=0.5)
    _, store = attached(structure)
    t = {s.site.key: s.t(store) for s in slots(store)}
    sites = [s.site for s in slots(store)]
    loss = structure.objectives(t, sites)["salt"]
    gradients = torch.autograd.grad(loss, trained(store), allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in gradients)
    for p in trained(store):
        p.data.fill_(0.3)
    expected = 0.5 * sum(((s.a - 1) * s.S[:3] + s.b).norm() + (s.X @ s.Y).norm() for s in t.values())
    torch.testing.assert_close(structure.objectives(t, sites)["salt"], expected, rtol=1e-9, atol=1e-9)
    assert SALT(rank=3).objectives(t, sites) == {}


def test_reaches_a_target_of_its_form_that_a_lora_of_equal_size_cannot():
    """Rescaled leading values and a tail of rank two: within 1e-4, where rank one is bounded by more than a half."""
    torch.manual_seed(0)
    W = torch.randn(32, 32, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W)
    change = U[:, :8] * (S[:8] * torch.linspace(-0.5, 0.5, 8)) @ Vh[:8]
    change = change + U[:, 8:] @ torch.randn(24, 2, dtype=torch.float64) @ torch.randn(2, 24, dtype=torch.float64) @ Vh[8:] * 0.2
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)).double()
    model[0].weight.data.copy_(W)
    a = rf.adapt(model, "salt", rank=8, tail=2)
    x, optimizer = (
        torch.eye(32, dtype=torch.float64),
        torch.optim.LBFGS(a.parameters(), max_iter=300, line_search_fn="strong_wolfe"),
    )

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - (W + change).T).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach().sqrt() / change.norm()) < 1e-4
    assert float(torch.linalg.svdvals(change)[1:].norm() / change.norm()) > 0.5

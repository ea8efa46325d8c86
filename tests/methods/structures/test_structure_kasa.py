"""KaSA: the product in singular form, its two loss terms as the published code has them, and the truncation."""

import torch
from structure_checks import attached, check_definition, check_start, move, slots, tensors, tiny, trained

import rankfold as rf
from rankfold.methods.structures.kasa import KaSA, gap


def test_is_a_lora_with_a_diagonal():
    weight = lambda W, t: W + 1.5 * t.B @ torch.diag(t.d) @ t.A
    check_definition(KaSA(rank=4, alpha=6), weight, runs=("fused", "structured", "effective", "plain"))
    less = lambda W, t: W + t.B @ torch.diag(t.d) @ t.A - t.US @ t.V
    check_definition(KaSA(rank=4, truncate=True), less, runs=("fused", "structured", "effective", "plain"))


def test_starts_at_the_base_with_singular_values_of_width_one():
    check_start(KaSA(rank=4))
    _, store = attached(KaSA(rank=6))
    d = torch.cat([t.d.detach() for t in tensors(store)])
    assert 0.4 < float(d.std()) < 1.8
    assert sum(p.numel() for p in trained(store)) == sum(6 * (sum(s.site.shape) + 1) for s in slots(store))


def test_truncation_takes_the_smallest_components_out_and_says_that_it_starts_elsewhere():
    assert rf.method("kasa").starts == "base"
    assert rf.method("kasa", truncate=True).starts == "elsewhere"
    a = rf.adapt(tiny(), "kasa", rank=3, truncate=True)
    for slot in a.slots():
        W, k = slot.base.dense(), min(slot.site.shape) - 3
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(slot.weight(slot.t(a.store)).dense(), U[:, :k] * S[:k] @ Vh[:k], rtol=1e-5, atol=1e-5)


def test_the_loss_terms_are_those_of_the_published_code():
    structure = KaSA(rank=4, beta=0.3, gamma=0.7)
    _, store = attached(structure)
    move(store)
    t = {s.site.key: s.t(store) for s in slots(store)}
    terms = structure.objectives(t, [s.site for s in slots(store)])
    eye = lambda n: torch.eye(n, dtype=torch.float64)
    orthogonality = sum((s.A.T @ s.A - eye(s.A.shape[1])).norm() + (s.B @ s.B.T - eye(s.B.shape[0])).norm() for s in t.values())
    torch.testing.assert_close(terms["orthogonality"], 0.7 * orthogonality / 2)
    torch.testing.assert_close(terms["singular values"], 0.3 * sum(s.d.square().sum() for s in t.values()) / 2)
    assert KaSA(rank=4, beta=0, gamma=0).objectives(t, [s.site for s in slots(store)]) == {}


def test_the_gap_has_a_gradient_where_it_is_zero():
    A = torch.eye(3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(gap(A), [A])
    assert torch.isfinite(g).all()

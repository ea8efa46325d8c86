"""BMA: B M A with each choice of what stands between and what trains; the methods that are one of these."""

import itertools

import pytest
import torch
from structure_checks import attached, check_definition, check_start, gradients, inputs, slots, tensors, tiny, trained

import rankfold as rf
from rankfold.core import Site
from rankfold.errors import CompositionError, OptionError
from rankfold.linalg import LowRank, deviation, difference
from rankfold.methods.structures.bma import BMA

MIDDLES, TRAINS = ("identity", "diagonal", "square"), ("BMA", "BM", "MA", "BA", "B", "M", "A")
CASES = [case for case in itertools.product(MIDDLES, TRAINS) if case != ("identity", "M")]


def product(t, middle, scale=1.0):
    M = {"identity": lambda: torch.eye(t.B.shape[1]), "diagonal": lambda: torch.diag(t.M), "square": lambda: t.M}[middle]()
    return scale * t.B @ M.to(t.B.dtype) @ t.A


@pytest.mark.parametrize(("middle", "train"), CASES)
def test_is_the_product_of_its_factors(middle, train):
    structure = BMA(rank=3, middle=middle, train=train, alpha=6, start="orthogonal")
    weight = lambda W, t: W + product(t, middle, 2.0)
    check_definition(structure, weight, runs=("fused", "structured", "effective", "plain"))


@pytest.mark.parametrize(("middle", "train"), CASES)
def test_starts_at_the_base_and_some_gradient_is_not_zero(middle, train):
    structure = BMA(rank=4, middle=middle, train=train)
    check_start(structure)
    model, store = attached(structure)
    assert max(float(g.abs().max()) for g in gradients(model(inputs()), trained(store))) > 0
    letters = {name for slot in slots(store) for name, s in structure.tensors(slot.site).items() if s.trainable}
    assert letters == {c for c in train if c != "M" or middle != "identity"}


def test_starts_of_a_square_core():
    for start, gap in (("identity", 0.0), ("orthogonal", 1e-6)):
        for t in tensors(attached(BMA(rank=5, start=start), tiny(torch.float32))[1]):
            assert float((t.M.detach() @ t.M.detach().T - torch.eye(5)).abs().max()) <= gap
    M = tensors(attached(BMA(rank=8))[1])[0].M
    assert 0.2 < float(M.detach().abs().max()) <= 8**-0.5


def test_an_option_that_trains_nothing_or_has_no_scale_is_refused():
    with pytest.raises(OptionError, match="trains nothing"):
        BMA(middle="identity", train="M")
    with pytest.raises(OptionError, match="leave alpha out"):
        BMA(rank=None, alpha=3)


def test_a_gate_per_component_needs_components():
    with pytest.raises(CompositionError, match="BMA trains more than its factors: M"):
        rf.method("gate+bma", **{"gate.per": "rank"})
    rf.method("gate+bma", **{"gate.per": "rank", "middle": "diagonal"})


@pytest.mark.parametrize("moved", ["", "B", "M", "A", "BM", "MA", "BMA"])
@pytest.mark.parametrize("middle", ["square", "diagonal"])
def test_a_deviation_is_the_difference_of_two_products(middle, moved):
    """Every pattern of what moved, with what did not move as one tensor twice."""
    torch.manual_seed(0)
    shapes = {"B": (5, 3), "M": (3,) if middle == "diagonal" else (3, 3), "A": (3, 7)}
    then = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    now = {n: t + torch.randn_like(t) if n in moved else t for n, t in then.items()}
    name = {"square": "core", "diagonal": "diag"}[middle]
    make = lambda f: LowRank(f["B"], f["A"], scale=1.5, **{name: f["M"]})
    change = deviation(make(now), make(then))
    dense = lambda f: 1.5 * f["B"] @ (torch.diag(f["M"]) if middle == "diagonal" else f["M"]) @ f["A"]
    torch.testing.assert_close(change.dense(), dense(now) - dense(then), rtol=1e-12, atol=1e-12)
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(change.matmul(x), x @ (dense(now) - dense(then)).T, rtol=1e-11, atol=1e-11)
    if "A" not in moved:
        assert change.rank_bound() == 3


def test_a_deviation_with_a_core_is_zero_bitwise_where_nothing_moved():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        B, M, A = (torch.randn(s).to(dtype) for s in ((50, 8), (8, 8), (8, 70)))
        op = deviation(LowRank(B, A, core=M), LowRank(B.clone(), A.clone(), core=M.clone()))
        assert not op.dense().any()
        assert not op.matmul(torch.randn(3, 70).to(dtype)).any()


def adapted(name, **options):
    model = tiny()
    a = rf.adapt(model, name, **{"rank": 3, **options})
    return model, a, [slot.t(a.store) for slot in a.slots()], [slot.base.dense() for slot in a.slots()]


def weights(a):
    return [slot.weight(slot.t(a.store)).dense().detach() for slot in a.slots()]


def test_lora_fa_trains_b_alone_and_keeps_no_input():
    _, a, ts, _ = adapted("lora-fa")
    assert a.parameter_count() == 3 * (20 + 8)
    assert not any(t.A.requires_grad for t in ts)
    x, kept = torch.randn(64, 12), []
    model = torch.nn.Sequential(torch.nn.Linear(12, 20))
    rf.adapt(model, "lora-fa", rank=3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(x)
    assert (64, 3) in kept
    assert (64, 12) not in kept


def test_moslora_and_slora_differ_in_the_start_of_the_core():
    mixers = [adapted(name)[2][0].M for name in ("moslora", "slora")]
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(mixers[0] @ mixers[0].T, eye, atol=1e-6)
    assert not torch.allclose(mixers[1] @ mixers[1].T, eye, atol=0.1)


def test_lora_xs_gradient_is_the_projection_of_the_full_one():
    """∂L/∂M = Bᵀ G Aᵀ with the singular vectors of W, and r² parameters."""
    model, a, ts, W = adapted("lora-xs")
    assert a.parameter_count() == 2 * 9
    G = dense_gradients(model, W)
    for t, w, g, got in zip(ts, W, G, gradients(model(inputs()), [t.M for t in ts])):
        U, S, Vh = torch.linalg.svd(w)
        B, A = U[:, :3] * S[:3], Vh[:3]
        sign = (t.A * A).sum(1).sign()
        torch.testing.assert_close(t.A * sign[:, None], A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(t.B * sign, B, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, t.B.T @ g @ t.A.T, rtol=1e-10, atol=1e-12)
    assert not any(t.M.any() for t in ts)


def dense_gradients(model, W):
    """∂L/∂W at the base, by autograd through plain layers."""
    free = [w.clone().requires_grad_() for w in W]
    first = torch.nn.functional.linear(inputs(), free[0], model[0].bias)
    return gradients(torch.nn.functional.linear(torch.tanh(first), free[1], model[2].bias), free)


def test_at_full_rank_and_orthonormal_factors_the_core_follows_full_fine_tuning():
    """20 steps of gradient descent on M alone, with B = U and A = Vᵀ square, are those on W."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False)).double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    W = model[0].weight.detach().clone().requires_grad_()
    a = rf.adapt(model, "bma+init:spectrum", rank=6, train="M")
    (M,) = a.parameters()
    for _ in range(20):
        (g,) = torch.autograd.grad((x @ W.T - y).square().mean(), [W])
        (h,) = torch.autograd.grad((model(x) - y).square().mean(), [M])
        with torch.no_grad():
            W -= 0.1 * g
            M -= 0.1 * h
    torch.testing.assert_close(weights(a)[0], W, rtol=1e-6, atol=1e-6)  # the factors are orthonormal to float32


def test_svfit_trains_every_singular_value():
    """‖ΔW‖ = ‖σ − σ₀‖, the spectrum of W' is |σ|, ∂L/∂σ_i = u_iᵀ G v_i; a spectral target is reached."""
    model = tiny()
    a = rf.adapt(model, "svfit")
    assert a.parameter_count() == 12 + 8
    ts, W = [s.t(a.store) for s in a.slots()], [s.base.dense() for s in a.slots()]
    G = dense_gradients(model, W)
    for t, g, got in zip(ts, G, gradients(model(inputs()), [t.M for t in ts])):
        torch.testing.assert_close(got, torch.einsum("or,oi,ri->r", t.B, g, t.A), rtol=1e-10, atol=1e-12)
    targets = []
    for t in ts:
        with torch.no_grad():
            t.M.copy_(torch.linspace(-1, 2, len(t.M)))
        targets.append(t.M.detach())
    for w, new, t in zip(W, weights(a), ts):
        torch.testing.assert_close((new - w).norm(), (t.M - t.M0).norm(), rtol=1e-5, atol=0)
        S = torch.linalg.svdvals(new)
        torch.testing.assert_close(S, t.M.abs().sort(descending=True).values, rtol=1e-5, atol=1e-6)


def test_svfit_reaches_a_rescaled_spectrum_that_a_lora_of_rank_four_does_not():
    torch.manual_seed(0)
    W = torch.randn(16, 12, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    target = U * (S * torch.linspace(0.5, 1.5, 12)) @ Vh
    model = torch.nn.Sequential(torch.nn.Linear(12, 16, bias=False)).double()
    model[0].weight.data.copy_(W)
    a = rf.adapt(model, "svfit")
    (M,) = a.parameters()
    x = torch.eye(12, dtype=torch.float64)
    for _ in range(40):  # the loss is |σ − σ*|² / 2: half-steps of gradient descent
        (g,) = torch.autograd.grad(0.5 * (model(x) - target.T).square().sum(), [M])
        M.data -= 0.5 * g
    assert float((weights(a)[0] - target).norm() / (target - W).norm()) < 1e-5
    best_of_rank_four = torch.linalg.svdvals(target - W)[4:].norm() / (target - W).norm()
    assert best_of_rank_four > 0.2


def test_loldu_changes_by_the_moved_pivots():
    """ΔW = P L diag(z − z₀) U: r parameters, exact as a LoRA of rank r, ∂L/∂z_i = (P L)_iᵀ G U_i."""
    model, a, ts, W = adapted("loldu")
    assert a.parameter_count() == 2 * 3
    for t, g, got in zip(ts, dense_gradients(model, W), gradients(model(inputs()), [t.M for t in ts])):
        torch.testing.assert_close(got, torch.einsum("or,oi,ri->r", t.B, g, t.A), rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            t.M.add_(torch.tensor([0.5, -1.0, 2.0]))
    for w, t, new in zip(W, ts, weights(a)):
        P, L, U = torch.linalg.lu(w)
        d = U.diagonal()[:3]
        torch.testing.assert_close(t.M0, d, rtol=1e-5, atol=1e-6)
        change = (P @ L)[:, :3] @ torch.diag(t.M - d) @ (U[:3] / d[:, None])
        torch.testing.assert_close(new, w + change, rtol=1e-5, atol=1e-5)
    for slot in a.slots():
        B, A, error = difference(slot.weight(slot.t(a.store)), slot.base).to_lowrank()
        assert (B.shape[1], A.shape[0], error) == (3, 3, 0.0)


def test_inttune_trains_the_core_alone_and_nlora_all_three():
    model, a, ts, W = adapted("inttune")
    assert a.parameter_count() == 2 * 9
    for t, w in zip(ts, W):
        torch.testing.assert_close(t.B, w[:, :3].to(t.B.dtype))
        torch.testing.assert_close(t.A, w[:3].to(t.A.dtype))
    G = dense_gradients(model, W)
    for t, g, got in zip(ts, G, gradients(model(inputs()), [t.M for t in ts])):
        torch.testing.assert_close(got, t.B.T @ g @ t.A.T, rtol=1e-10, atol=1e-12)
    assert adapted("nlora")[1].parameter_count() == 2 * 9 + 3 * (20 + 12 + 8 + 20)


def test_lamda_freezes_a_and_starts_at_the_triplets():
    _, a, ts, W = adapted("lamda")
    assert a.parameter_count() == 2 * 9 + 3 * (20 + 8)
    for t, w in zip(ts, W):
        best = (lambda U, S, Vh: U[:, :3] * S[:3] @ Vh[:3])(*torch.linalg.svd(w, full_matrices=False))
        torch.testing.assert_close(t.B @ t.M @ t.A, best, rtol=1e-5, atol=1e-6)


def test_a_structure_s_own_init_is_left_out_of_its_name_and_others_are_not():
    assert rf.method("bma+init:spectrum").text == "bma+init:spectrum"
    assert rf.method("bma").text == "bma"
    assert BMA.init is None
    assert BMA(rank=3).fits(Site("a", (2, 8))) is not None

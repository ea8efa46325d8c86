"""Mixture: experts weighed per token or per sample; by a loop over experts, special cases, no fold."""

import pytest
import torch
from structure_checks import attached, gradients, inputs, move, tensors, tiny, trained
from torch.nn.functional import linear

from rankfold.core import PLANS, check_sites, find_sites, fold
from rankfold.errors import LayoutError, TargetError
from rankfold.methods.structures.lora import LoRA
from rankfold.methods.structures.mixture import Mixture


def layer(x, module, t, structure, weights=None):
    """One expert after the other, by its own dense matrix."""
    alpha = torch.softmax(x @ t.R.T, -1) if weights is None else weights
    y = linear(x, module.weight, module.bias)
    for k in range(structure.experts):
        own = slice(k * structure.rank, (k + 1) * structure.rank)
        y = y + structure.scale * alpha[..., k : k + 1] * (x @ (t.B[:, own] @ t.A[own]).T)
    return y


def both(x, model, store, structure, weights=None):
    first, second = tensors(store)
    return layer(torch.tanh(layer(x, model[0], first, structure, weights)), model[2], second, structure, weights)


@pytest.mark.parametrize("structure", [Mixture(rank=2, experts=3), Mixture(rank=3, experts=2, alpha=6)], ids=str)
def test_is_the_weighed_sum_of_experts_in_every_plan(structure):
    model, store = attached(structure)
    move(store)
    x = inputs()
    wanted = [x, *trained(store)]
    y = both(x, model, store, structure)
    truth = gradients(y, wanted)
    ran = []
    for plan in PLANS:
        for memory in ("keep", "recompute"):
            store.plan, store.memory = plan, memory
            try:
                got = model(x)
            except LayoutError:
                continue
            ran.append(plan)
            torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-10)
            for a, b in zip(gradients(got, wanted), truth):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert set(ran) == {"auto", "structured", "plain"}


def test_starts_at_the_base_with_equal_weights():
    from structure_checks import check_start

    check_start(Mixture(rank=2, experts=3))
    _, store = attached(Mixture(rank=2, experts=3))
    assert tensors(store)[0].R.abs().max() == 0


def test_weights_given_per_sample_take_the_place_of_the_router():
    structure = Mixture(rank=2, experts=3)
    model, store = attached(structure)
    move(store)
    x = inputs()
    given = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    store.context.weights = given
    torch.testing.assert_close(model(x), both(x, model, store, structure, given[:, None, :]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x)[2], tiny()(x)[2], rtol=1e-12, atol=1e-12)
    store.context.weights = given[1]
    torch.testing.assert_close(model(x), both(x, model, store, structure, given[1]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x[:, 0]), both(x[:, 0], model, store, structure, given[1]), rtol=1e-12, atol=1e-12)


def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch():
    model, store = attached(Mixture(rank=2, experts=3))
    move(store)
    x = inputs()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)


def test_one_expert_is_lora():
    model, store = attached(Mixture(rank=3, experts=1, alpha=6))
    move(store)
    lora, other = attached(LoRA(rank=3, alpha=6))
    with torch.no_grad():
        for t, o in zip(tensors(store), tensors(other)):
            o.B.copy_(t.B), o.A.copy_(t.A)
    torch.testing.assert_close(model(inputs()), lora(inputs()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2,)])
def test_weights_of_another_shape_are_refused(shape):
    model, store = attached(Mixture(rank=2, experts=3))
    store.context.weights = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(LayoutError, match=r"needs \(3, 3\)"):
        model(inputs())


def test_cannot_be_folded_nor_stand_on_an_embedding():
    _, store = attached(Mixture(rank=2))
    with pytest.raises(LayoutError, match="depends on the input"):
        fold(store)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    with pytest.raises(TargetError, match="token indices"):
        check_sites(model, Mixture(rank=2), find_sites(model, "all"), automatic=False)


def test_bf16_gates_are_formed_in_float32():
    model, store = attached(Mixture(rank=2, experts=3), tiny(torch.bfloat16))
    move(store)
    x = inputs(torch.bfloat16)
    fine, other = attached(Mixture(rank=2, experts=3), tiny(torch.bfloat16).float())
    move(other)
    y, truth = model(x), fine(x.float())
    assert y.dtype == torch.bfloat16
    assert (y.float() - truth).norm() < 2e-2 * truth.norm()

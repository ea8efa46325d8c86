"""LoRA-GA: the first step is the best of rank 2r; options against their definitions; the peft variant against peft."""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.core import Site
from rankfold.linalg import Dense
from rankfold.linalg.random import Random
from rankfold.methods.inits.lora_ga import LoRAGA
from rankfold.training.contracts import InitContext, Roles

OUT, IN, R = 14, 11, 3
G = Random("G").normal((OUT, IN), dtype=torch.float64)
W = Dense(Random("W").normal((OUT, IN), dtype=torch.float64))


def fill(G=G, rank=R, scale=1.0, **options):
    site = Site("site", tuple(G.shape))
    roles = Roles({"B": (G.shape[0], rank), "A": (rank, G.shape[1])}, rank, scale)
    init = LoRAGA(**options)
    statistic = init.collect(site, roles)
    statistic.observe(G)
    statistic.finish()
    return init.fill(site, W, roles, InitContext(Random(0), statistic))


def truncated(G, k):
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :k] * S[:k] @ Vh[:k]


def first_step(start, G=G):
    """The direction of the first step of gradient descent on A and B, as it changes W."""
    return G @ start["A"].mT @ start["A"] + start["B"] @ start["B"].mT @ G


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_first_step_is_the_best_of_rank_2r(direction):
    start = fill(direction=direction, scaling="unit")
    assert float((first_step(start) - truncated(G, 2 * R)).abs().max()) < 1e-10
    stable = fill(direction=direction)
    c2 = OUT**0.5 / 16
    assert float((first_step(stable) / c2 - truncated(G, 2 * R)).abs().max()) < 1e-10


def test_a_random_start_with_b_zero_is_strictly_worse():
    A = Random("A").haar(R, IN, torch.float64)
    start = {"A": A, "B": torch.zeros(OUT, R, dtype=torch.float64)}
    best = min(float((G - c * first_step(start)).norm()) for c in torch.linspace(0, 3, 301))
    assert best > 1.05 * float((G - truncated(G, 2 * R)).norm())


def test_scales():
    unit = fill(scaling="unit")
    of_w = (torch.linalg.svdvals(W.dense())[:R] / 2.0).sqrt().mean()
    for options, c in [({"scaling": "gd"}, 0.5), ({"scaling": "weight"}, of_w), ({"gamma": 4.0}, OUT**0.25 / 2)]:
        start = fill(scale=2.0, **options)
        for role in "BA":
            torch.testing.assert_close(start[role], c * unit[role], rtol=1e-12, atol=0)
            assert torch.equal(start[role], start[role + "0"])


def test_clipping_keeps_the_product_below_the_weight():
    start = fill(scale=50.0, clip=True)
    largest = float(W.dense().abs().max())
    assert float((50 * start["B"] @ start["A"]).abs().max()) == pytest.approx(largest, rel=1e-12)
    small = fill(scale=1e-3, clip=True)
    assert torch.equal(small["B"], fill(scale=1e-3)["B"])


@pytest.mark.parametrize("shape", [(5, 4), (3, 20), (1, 6), (2, 2)])
def test_a_matrix_with_fewer_than_2r_directions(shape):
    small = Random("small").normal(shape, dtype=torch.float64)
    rank = min(shape)
    start = fill(small, rank, scaling="unit")
    half = min(2 * rank, *shape) // 2
    assert start["A"].shape == (rank, shape[1])
    assert start["B"].shape == (shape[0], rank)
    assert start["B"][:, half:].abs().sum() == 0
    assert start["A"][half:].abs().min() > 0
    best = {role: start[role][:half] if role == "A" else start[role][:, :half] for role in "BA"}
    assert float((first_step(best, small) - truncated(small, 2 * half)).abs().max()) < 1e-10


def test_the_sketch_agrees_with_the_sum():
    low = truncated(G, 4) + 1e-9 * G
    exact, sketch = fill(low, 2), fill(low, 2, gradient="sketch")
    for role in "BA":
        torch.testing.assert_close(sketch[role].abs(), exact[role].abs(), rtol=0, atol=1e-6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


def mean_square(model, batch):
    return model(batch).square().mean()


BATCHES = [torch.randn(10, 16, generator=torch.Generator().manual_seed(k)) for k in range(4)]


@pytest.mark.parametrize("gradient", ["exact", "sketch"])
def test_in_a_model_it_starts_at_the_base_and_descends(gradient):
    model = net()
    before = model(BATCHES[0])
    handle = rf.adapt(model, "lora-ga", rank=2, batches=BATCHES, loss=mean_square, **{"init.gradient": gradient})
    assert torch.equal(model(BATCHES[0]), before)
    assert handle.tensors()["default/0/B"].abs().min() > 0
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    first = float(mean_square(model, torch.cat(BATCHES)).detach())
    mean_square(model, torch.cat(BATCHES)).backward()
    optimizer.step()
    assert float(mean_square(model, torch.cat(BATCHES)).detach()) < first


def test_the_mean_gradient_is_over_batches():
    model = net()
    model.requires_grad_(False)
    model[0].weight.requires_grad_(True)
    grads = [torch.autograd.grad(mean_square(model, b), model[0].weight)[0] for b in BATCHES]
    expected = fill(torch.stack(grads).mean(0), 2)
    handle = rf.adapt(net(), "lora-ga", rank=2, targets=["0"], batches=BATCHES, loss=mean_square)
    torch.testing.assert_close(handle.tensors()["default/0/A"].abs(), expected["A"].abs(), rtol=1e-4, atol=1e-6)


def test_the_peft_variant_is_peft_s():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga

    model = net()
    config = peft.LoraConfig(
        r=3, lora_alpha=3, target_modules=["0", "2"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )

    def train_step():
        for b in BATCHES:
            mean_square(model, b.clone().requires_grad_()).backward()

    preprocess_loraga(model, config, train_step)
    theirs = peft.get_peft_model(model, config)
    handle = rf.adapt(net(), "lora-ga", rank=3, batches=BATCHES, loss=mean_square, **{"init.variant": "peft"})
    for site in ("0", "2"):
        layer = theirs.base_model.model[int(site)]
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        torch.testing.assert_close(handle.tensors()[f"default/{site}/A"].abs(), A.abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(handle.tensors()[f"default/{site}/B"].abs(), B.abs(), rtol=2e-3, atol=1e-5)


def test_a_site_without_gradient_starts_plainly():
    start = LoRAGA().fill(Site("s", (4, 3)), W, Roles({}, 2, 1.0), InitContext(Random(0), None))
    assert start == {}

"""PiSSA: principal components as offset, against the dense SVD and against peft."""

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.core import Site
from rankfold.linalg import Dense
from rankfold.linalg.random import Random
from rankfold.methods.inits.pissa import PiSSA
from rankfold.training.contracts import InitContext, Roles


def fill(W, rank, scale=1.0, **options):
    out, in_ = W.shape
    roles = Roles({"B": (out, rank), "A": (rank, in_)}, rank, scale)
    return PiSSA(**options).fill(Site("site", (out, in_)), Dense(W), roles, InitContext(Random(0)))


def decaying(out, in_):
    k = min(out, in_)
    U, V = Random("U").haar(out, k, torch.float64), Random("V").haar(in_, k, torch.float64)
    return U * (10 * 0.7 ** torch.arange(k, dtype=torch.float64)) @ V.mT


@pytest.mark.parametrize(("out", "in_", "rank"), [(12, 7, 3), (7, 12, 3), (9, 9, 9), (9, 5, 1), (1, 6, 1)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_residual_has_the_rest_of_the_spectrum(out, in_, rank, scale):
    W = decaying(out, in_)
    start = fill(W, rank, scale)
    S = torch.linalg.svdvals(W)
    rest = torch.linalg.svdvals(W - scale * start["B"] @ start["A"])
    torch.testing.assert_close(rest[: len(S) - rank], S[rank:], rtol=1e-10, atol=1e-12)
    length = (S[:rank] / scale).sqrt()
    torch.testing.assert_close(start["B"].norm(dim=0), length)
    torch.testing.assert_close(start["A"].norm(dim=1), length)
    assert torch.equal(start["B"], start["B0"])
    assert torch.equal(start["A"], start["A0"])


def test_a_few_iterations_are_near_the_optimum_of_a_decaying_spectrum():
    W = decaying(80, 60)
    exact = (W - (s := fill(W, 8))["B"] @ s["A"]).norm()
    quick = (W - (s := fill(W, 8, iterations=4))["B"] @ s["A"]).norm()
    assert 0.999999 * exact < quick < 1.001 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_function_is_the_base_s_bitwise(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).to(dtype)
    x = torch.randn(9, 16, dtype=dtype)
    before = model(x)
    rf.adapt(model, "pissa", rank=4)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("alpha", [4, 8])
def test_factors_are_peft_s_up_to_sign(alpha):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20))
    W = model[0].weight.detach().clone()
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights="pissa", target_modules=["0"]))
    layer = theirs.base_model.model[0]
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    ours = fill(W, 4, alpha / 4)
    sign = (ours["A"] * A).sum(1).sign()
    torch.testing.assert_close(ours["A"] * sign[:, None], A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["B"] * sign, B, rtol=1e-4, atol=1e-5)

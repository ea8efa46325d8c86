"""Spectrum, NLoRA and LoLDU: what they fill with and without a core, and what the product is."""

import pytest
import torch

import rankfold as rf
from rankfold.core import Site
from rankfold.linalg import Dense
from rankfold.linalg.random import Random
from rankfold.methods.inits.loldu import LoLDU
from rankfold.methods.inits.nlora import NLoRA
from rankfold.methods.inits.spectrum import Spectrum
from rankfold.training.contracts import InitContext, Roles

SIZES = [(12, 7, 3), (7, 12, 3), (9, 9, 9), (9, 5, 1)]


def fill(init, W, rank, core=None, scale=1.0):
    out, in_ = W.shape
    shapes = {"B": (out, rank), "A": (rank, in_)}
    if core is not None:
        shapes["core"] = {"square": (rank, rank), "diagonal": (rank,)}[core]
    return init.fill(Site("site", (out, in_)), Dense(W), Roles(shapes, rank, scale), InitContext(Random(0)))


def product(start, scale=1.0):
    core = start.get("core")
    M = torch.eye(start["A"].shape[0]) if core is None else core if core.ndim == 2 else torch.diag(core)
    return scale * start["B"] @ M.to(start["B"].dtype) @ start["A"]


def draw(out, in_, seed=0):
    return torch.randn(out, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("out", "in_", "rank"), SIZES)
@pytest.mark.parametrize("core", [None, "diagonal", "square"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_spectrum_is_the_best_approximation(out, in_, rank, core, scale):
    W = draw(out, in_)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    start = fill(Spectrum(), W, rank, core, scale)
    torch.testing.assert_close(product(start, scale), U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(start["A"] @ start["A"].T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)


def test_spectrum_with_the_values_in_b_starts_the_core_at_zero():
    start = fill(Spectrum(values="B"), W := draw(8, 6), 3, "square")
    assert not start["core"].any()
    torch.testing.assert_close(start["B"].norm(dim=0), torch.linalg.svdvals(W)[:3])


@pytest.mark.parametrize(("out", "in_", "rank"), SIZES)
@pytest.mark.parametrize("core", [None, "diagonal", "square"])
def test_ldu_is_the_leading_part_of_the_factorisation(out, in_, rank, core):
    W = draw(out, in_)
    P, L, U = torch.linalg.lu(W)
    start = fill(LoLDU(), W, rank, core, 2.0)
    torch.testing.assert_close(product(start, 2.0), (P @ L)[:, :rank] @ U[:rank], rtol=1e-9, atol=1e-9)
    if rank == min(out, in_):
        torch.testing.assert_close(product(start, 2.0), W, rtol=1e-10, atol=1e-10)
    if core is not None:
        torch.testing.assert_close(start["A"].diagonal(), torch.ones(rank, dtype=torch.float64))


def test_ldu_takes_pivots_that_vanish_last():
    W = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0], [1.0, 2.0, 4.0]], dtype=torch.float64)  # the second pivot is zero
    start = fill(LoLDU(), W, 2, "diagonal")
    assert torch.isfinite(start["A"]).all()
    assert float(start["A"].abs().max()) < 10
    torch.testing.assert_close(product(fill(LoLDU(), W, 3, "diagonal")), W)
    assert (start["core"].abs() > 1e-6).all()


@pytest.mark.parametrize("core", [None, "diagonal", "square"])
@pytest.mark.parametrize("mode", ["pinv", "pivoted"])
def test_nystrom_gives_back_a_weight_of_its_rank(core, mode):
    W = draw(12, 3) @ draw(3, 7, seed=1)
    torch.testing.assert_close(product(fill(NLoRA(mode=mode, rcond=1e-12), W, 3, core, 2.0), 2.0), W, rtol=1e-8, atol=1e-8)


def test_nystrom_cuts_a_noisy_block_off_and_is_nearer_for_it():
    W = draw(40, 3) @ draw(3, 30, seed=1) + 1e-2 * draw(40, 30, seed=2)
    cut, raw = (product(fill(NLoRA(rcond=rcond), W, 8, "square")) for rcond in (1e-1, 1e-12))
    assert (W - cut).norm() < 0.2 * (W - raw).norm()


def test_nystrom_official_is_the_block_and_starts_elsewhere():
    W = draw(9, 7)
    start = fill(NLoRA(mode="official"), W, 3, "square", 2.0)
    assert torch.equal(start["B"], W[:, :3])
    assert torch.equal(start["core"], W[:3, :3])
    assert torch.equal(start["A"], W[:3])
    assert rf.method("nlora").starts == "base"
    official = rf.method("nlora", mode="official")
    assert official.starts == "elsewhere"
    model = torch.nn.Sequential(torch.nn.Linear(7, 9, bias=False)).double()
    model[0].weight.data.copy_(W)
    x = draw(4, 7, seed=3)
    rf.adapt(model, official, rank=3)
    torch.testing.assert_close(model(x), x @ (W + W[:, :3] @ W[:3, :3] @ W[:3]).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", ["spectrum", "loldu", "nlora"])
@pytest.mark.parametrize("method", ["lora", "bma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_function_is_the_base_s_at_the_start(init, method, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5)).to(dtype)
    x = torch.randn(9, 16, dtype=dtype)
    before = model(x)
    rf.adapt(model, f"{method}+init:{init}", rank=4)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("init", ["spectrum", "loldu", "nlora"])
def test_frozen_factors_are_filled_too(init):
    model = torch.nn.Sequential(torch.nn.Linear(16, 12)).double()
    a = rf.adapt(model, f"bma+init:{init}", rank=4, train="M")
    (t,) = [s.t(a.store) for s in a.slots()]
    want = fill({"spectrum": Spectrum(), "loldu": LoLDU(), "nlora": NLoRA()}[init], model[0].weight.detach(), 4, "square")
    for name, role in (("B", "B"), ("M", "core"), ("M0", "core"), ("A", "A")):
        torch.testing.assert_close(getattr(t, name), want[role].to(getattr(t, name).dtype))

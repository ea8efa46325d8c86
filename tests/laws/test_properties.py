"""Properties of the fused kernels over drawn shapes, ranks, scales and dtypes, against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.kernels import lowrank, lowrank_linear, magnitude, magnitude_linear
from rankfold.linalg import Dense

from .tolerances import TOLERANCES, distance

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
SIZES = st.integers(1, 9)


class Weight(Dense):
    """A frozen weight as the kernels know it: a fresh product with the bias inside, and rows."""

    def matmul(self, x, bias=None):
        return F.linear(x, self.W, None if bias is None else bias.to(x.dtype))


@st.composite
def problems(draw, with_magnitude=False):
    """Inputs of one call: dtypes of x and of the factors may differ; every optional part may be absent."""
    out, in_, tokens = draw(SIZES), draw(SIZES), draw(st.integers(0, 5))
    rank = draw(st.integers(1, 4))
    dtype = draw(DTYPES)
    master = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    lead = draw(st.sampled_from([(), (1,), (2,)]))
    made = {
        "x": normal(*lead, tokens, in_).to(dtype),
        "W": normal(out, in_).to(dtype),
        "bias": normal(out).to(dtype) if draw(st.booleans()) else None,
        "B": normal(out, rank).to(master),
        "A": normal(rank, in_).to(master),
        "scale": draw(st.floats(-4, 4, allow_nan=False)),
        "B0": None,
        "A0": None,
    }
    if draw(st.booleans()):
        made |= {"B0": normal(out, rank).to(master), "A0": normal(rank, in_).to(master)}
    if with_magnitude:
        made |= {"m": (normal(out).abs() + 0.2).to(master), "norm": (normal(out).abs() + 0.5).to(master)}
    return made


def defined(p, names):
    """(y, gradients) in float64 by the formula."""
    d = {k: v.double().detach().clone() if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    wanted = [d[n].requires_grad_() for n in names if d[n] is not None]
    change = d["B"] @ d["A"] - (0.0 if d["B0"] is None else d["B0"] @ d["A0"])
    y = d["x"] @ (d["W"] + d["scale"] * change).mT
    if "m" in d:
        y = y * (d["m"] / d["norm"])
    y = y if d["bias"] is None else y + d["bias"]
    cotangent = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    return y.detach(), torch.autograd.grad((y * cotangent).sum(), wanted), cotangent


def fused(p, names, cotangent):
    d = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    wanted = [d[n].requires_grad_() for n in names if d[n] is not None]
    rest = (d["B"], d["A"], d["scale"], d["B0"], d["A0"])
    if "m" in d:
        y = magnitude_linear(d["x"], Weight(d["W"]), d["bias"], d["m"], d["norm"], *rest)
    else:
        y = lowrank_linear(d["x"], Weight(d["W"]), d["bias"], *rest)
    return y.detach(), torch.autograd.grad((y * cotangent.to(y.dtype)).sum(), wanted), [t.dtype for t in wanted]


def check_kernel(p):
    names = ["x", "bias", *(["m"] if "m" in p else []), "B", "A"]
    y0, grads0, cotangent = defined(p, names)
    y, grads, dtypes = fused(p, names, cotangent)
    tolerance = TOLERANCES[p["x"].dtype]
    # sums of cancelling terms are judged by the size of the terms
    size = 1.0 + sum(float(t.double().norm()) for t in p.values() if isinstance(t, torch.Tensor)) ** 2
    assert y.dtype == p["x"].dtype
    assert y.shape == y0.shape
    assert (y.double() - y0).norm() <= tolerance.value * (y0.norm() + 0.1 * size)
    for g, g0, dtype in zip(grads, grads0, dtypes):
        assert g.dtype == dtype
        assert (g.double() - g0).norm() <= tolerance.grad * (g0.norm() + 0.1 * size)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems())
def test_the_lowrank_kernel_is_its_formula(p):
    check_kernel(p)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(with_magnitude=True))
def test_the_magnitude_kernel_is_its_formula(p):
    check_kernel(p)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_a_deviation_from_itself_is_zero_bitwise(p):
    p = {**p, "B0": p["B"].clone(), "A0": p["A"].clone()}
    base = Weight(p["W"]).matmul(p["x"], p["bias"])
    y = lowrank_linear(p["x"], Weight(p["W"]), p["bias"], p["B"], p["A"], p["scale"], p["B0"], p["A0"])
    assert torch.equal(y, base)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(with_magnitude=True))
def test_a_gain_of_one_is_the_identity_bitwise(p):
    plain = lowrank_linear(p["x"], Weight(p["W"]), None, p["B"], p["A"], p["scale"], p["B0"], p["A0"])
    y = magnitude_linear(p["x"], Weight(p["W"]), None, p["norm"].clone(), p["norm"], p["B"], p["A"], p["scale"], p["B0"], p["A0"])
    assert torch.equal(y, plain)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.floats(0.05, 0.9), st.integers(0, 2**62))
def test_dropout_in_front_of_the_factors_is_the_same_mask_forwards_and_backwards(p, share, seed):
    """y is linear in x for one mask: y(x) = y(0) + ⟨∂y, x⟩, which fails if backward draws another."""
    x = p["x"].double()
    args = [t.double() if isinstance(t, torch.Tensor) else t for t in (p["B"], p["A"], p["scale"], p["B0"], p["A0"])]
    f = lambda z: lowrank_linear(z, Weight(p["W"].double()), None, *args, (share, seed)).sum()
    z = x.clone().requires_grad_()
    y = f(z)
    (g,) = torch.autograd.grad(y, z)
    assert distance((g * x).sum(), y.detach()) < 1e-9 or abs(float((g * x).sum() - y)) < 1e-9


def wrong_scale(monkeypatch):
    native = lowrank.combine
    for module in (lowrank, magnitude):
        monkeypatch.setattr(module, "combine", lambda y, x, B, A, scale, p: native(y, x, B, A, scale + 1e-2, p))


def unscaled_gradient(monkeypatch):
    native = lowrank.gradients
    for module in (lowrank, magnitude):
        monkeypatch.setattr(module, "gradients", lambda g, gx, x, h, B, A, scale, r, p: native(g, gx, x, h, B, A, 1.0, r, p))


def dropped_offset(monkeypatch):
    for module in (lowrank, magnitude):
        monkeypatch.setattr(module, "stack_factors", lambda B, A, B0, A0, dtype: (B.to(dtype), A.to(dtype)))


@pytest.mark.parametrize("mutant", [wrong_scale, unscaled_gradient, dropped_offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize("law", [test_the_lowrank_kernel_is_its_formula, test_the_magnitude_kernel_is_its_formula])
def test_the_properties_reject(law, mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law()

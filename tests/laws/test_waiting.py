"""No step waits for an accelerator: forward and backward of every structure ask no tensor for a value.

On a CPU that plays a device which can't be asked; an experts' layer reads how many tokens each expert gets, which is let off.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rankfold as rf
from rankfold.linalg import Dense, LowRank, Sum, flags
from rankfold.linalg.operator import Operator

from .models import BLOCK, tiny
from .subjects import adapt, plain_structures, refused_by, shake, small, subjects

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")


class Waited(AssertionError):
    """Somebody asked."""


class Unasked(TorchDispatchMode):
    """Refuses every operator that gives a value, or a shape that depends on values, to the host. A seed (one whole number, which
    lives on the CPU on every machine) may be read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(w) for w in WAITS) and not (args[0].dtype == torch.int64 and args[0].ndim == 0):
            raise Waited(f"{name} of {args[0].dtype} {tuple(args[0].shape)}")
        if name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        ):
            raise Waited(f"{name} by a mask, whose size is read")
        return func(*args, **(kwargs or {}))


DECORATED = [f"magnitude+{name}" for name in plain_structures()]
METHODS = [*subjects(), *(m for m in [*DECORATED, "magnitude+dropout+lora", "magnitude+gate+lora"] if m not in subjects())]


def step(method: str, kind: str) -> bool:
    """One step that nobody waits in; whether there was one."""
    try:
        m = small(method)
    except ValueError:  # two parts that don't compose: another law's affair
        return False
    if refused_by(m, kind):
        return False
    case = tiny(BLOCK if m.is_side else kind, torch.float32)
    adaptation = adapt(case, m)
    shake(adaptation)
    case.model.train()
    case.output().square().sum().backward()  # what is found once per weight is found here
    with Unasked():
        case.output().square().sum().backward()
    return True


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "ASKED", frozenset())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing(method: str) -> None:
    if not step(method, "linear"):
        pytest.skip("refused by name")


@pytest.mark.parametrize("kind", ["conv1d", "embedding", "rows", "tied", "convolution", "multihead", "experts"])
@pytest.mark.parametrize("method", ["lora", "dora", "magnitude+kron"])
def test_a_step_at_another_kind_of_site_waits_for_nothing(method: str, kind: str) -> None:
    if not step(method, kind):
        pytest.skip("refused by name")


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_step_over_a_packed_weight_waits_for_nothing(format: str, method: str) -> None:
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[format])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))
    rf.quantise(model, format, targets=["0"])
    rf.adapt(model, method, rank=2, targets=["0"])
    x = torch.randn(3, 64)
    model(x).square().sum().backward()
    with Unasked():
        model(x).square().sum().backward()


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "stack"])
def test_rows_that_cancel_are_mended_without_asking(batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 16 rows, in any map of a stack, have the same norms as on a device that may be asked."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(*batch, 24, 5, generator=generator)
    A = torch.eye(5).expand(*batch, 5, 5)
    B = torch.zeros(*batch, 24, 5)
    B[..., 2:12, :] = -W[..., 2:12, :] * (1 - 1e-4)
    sum_ = Sum((Dense(W), LowRank(B, A)))
    with Unasked():
        found = sum_.row_sqnorm()
    expected = (W.double() + B.double() @ A.double()).square().sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)  # 1e-4 of a float32 difference is left
    monkeypatch.setattr(flags, "ASKED", frozenset({"cpu"}))
    torch.testing.assert_close(found, sum_.row_sqnorm(), rtol=1e-5, atol=0)


def test_rows_that_cancel_beyond_those_that_are_seen_to_stay_finite() -> None:
    W = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    found = Sum((Dense(W), LowRank(-W, torch.eye(5)))).row_sqnorm()
    assert found.isfinite().all()
    assert (found >= 0).all()


class Asking(Operator):
    def row_sqnorm(self) -> torch.Tensor:
        n = torch.ones(3)
        return n if n.any() else n + 1


def test_the_law_rejects_who_asks() -> None:
    with Unasked():
        with pytest.raises(Waited, match="_local_scalar_dense"):
            Asking().row_sqnorm()
        with pytest.raises(Waited, match="by a mask"):
            torch.ones(3)[torch.tensor([True, False, True])]

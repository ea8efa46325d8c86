"""A bank served by the segment product in Triton, by its interpreter, against models changed by hand and against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import rankfold as rf
from rankfold.kernels import paths

from banks import IDS, RANK, by_hand, entries, model

pytest.importorskip("triton")
from rankfold.kernels.triton import segments  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("not interpreted here: a bank on the GPU takes these kernels by itself", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the CPU a device with kernels; tokens per row of every segment product that ran."""
    seen: list[int] = []
    native = segments.add_runs

    def counted(y, x, A, B, parts, cut):  # type: ignore[no-untyped-def]
        seen.append(cut.tokens)
        return native(y, x, A, B, parts, cut)

    monkeypatch.setattr(paths, "COMPILED_FOR", frozenset({"cpu"}))
    monkeypatch.setattr(segments, "add_runs", counted)
    return seen


def served(distinct: int) -> tuple[nn.Module, rf.Bank, dict[str | None, rf.Adapter | None]]:
    """Mixed ranks, scales and gains in float32, some on the embedding too, and the base."""
    base = model().float()
    bank = rf.Bank(base, 12, targets="all")
    made: dict[str | None, rf.Adapter | None] = {None: None}
    for k in range(distinct):
        made[f"a{k}"] = entries(k, 1 + (5 * k) % 12, gain=k % 3 == 1, embed=k % 2 == 0, scale=0.1 * (k + 1))
        bank.add(f"a{k}", made[f"a{k}"])
    return base, bank, made


def expected(made: dict[str | None, rf.Adapter | None], names: list[str | None]) -> torch.Tensor:
    return torch.cat([by_hand(made[name], IDS[n : n + 1]) for n, name in enumerate(names)])


@pytest.mark.parametrize("distinct", [1, 4, 9])
def test_every_row_has_the_function_of_its_own_adapter(distinct: int, calls: list[int]) -> None:
    base, bank, made = served(distinct)
    names = [list(made)[n % (distinct + 1)] for n in range(14)]
    bank.select(names)
    with torch.no_grad():
        got = base(IDS[:14])
    assert calls == [3, 3]  # one for each linear site; 3 tokens in a row
    torch.testing.assert_close(got.double(), expected(made, names), rtol=1e-4, atol=1e-5)
    alone = torch.equal(got[names.index(None)], model().float()(IDS[:14])[names.index(None)])
    assert alone, "a row of the base"
    with torch.no_grad():  # one token of the same rows, as in decoding
        torch.testing.assert_close(base(IDS[:14, :1]), got[:, :1], rtol=1e-4, atol=1e-5)
    assert calls == [3, 3, 1, 1]


def test_one_adapter_and_a_changed_choice(calls: list[int]) -> None:
    base, bank, made = served(5)
    with torch.no_grad():
        for names in (["a1"] * 4, ["a4", None, "a2", "a2"], ["a4", "a3", "a2", "a2"]):
            bank.select(names)
            torch.testing.assert_close(base(IDS[:4]).double(), expected(made, names), rtol=1e-4, atol=1e-5)
        bank.replace("a3", entries(60, 12, gain=True))
        made["a3"] = entries(60, 12, gain=True)
        torch.testing.assert_close(base(IDS[:4]).double(), expected(made, names), rtol=1e-4, atol=1e-5)
    assert len(calls) == 6  # one adapter for all rows is two plain products


def test_gradients_pass_through_and_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for devices in (frozenset(), frozenset({"cpu"})):
        monkeypatch.setattr(paths, "COMPILED_FOR", devices)
        base, bank, _ = served(4)
        bank.select(["a0", None, "a1", "a3"])
        base(IDS[:4]).square().sum().backward()
        found.append([p.grad for p in base.parameters()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_graph_holds_the_operator_and_switches_without_compiling(calls: list[int]) -> None:
    base, bank, made = served(6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    for names in (["a0", "a2", "a4"], ["a1", None, "a3"], ["a5", "a5", "a0"]):
        bank.select(names)
        with torch.no_grad():
            got = compiled(IDS[:3]).double()
        torch.testing.assert_close(got, expected(made, names), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert "rankfold.gathered" in str(counter.graphs[0].graph)
    assert len(calls) == 6


def test_double_precision_is_the_reference_s(calls: list[int]) -> None:
    base = model()
    bank = rf.Bank(base, RANK)
    bank.add("a", entries(0, 3))
    bank.select(["a", None])
    torch.testing.assert_close(base(IDS[:1].expand(2, -1))[:1].detach(), by_hand(entries(0, 3), IDS[:1]), rtol=0, atol=1e-10)
    assert not calls

"""The bank against changed weights built by hand, row by row, in float64."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from banks import IDS, RANK, by_hand, by_hand_module, entries, model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import rankfold as rf
from rankfold.core.base import base_of
from rankfold.core.site import Site
from rankfold.errors import LayoutError, OptionError, TargetError, UnknownName


@pytest.mark.parametrize("distinct", [1, 2, 5, 9, 33])
def test_every_row_has_the_function_of_its_own_adapter(distinct: int) -> None:
    """Mixed ranks, scales and gains, the base among them; one, masked and gathered."""
    base = model()
    bank = rf.Bank(base, RANK, targets="all")
    adapters: dict[str | None, rf.Adapter | None] = {None: None} if distinct > 1 else {}
    for k in range(distinct - len(adapters)):
        made = entries(k, 1 + k % RANK, gain=k % 3 == 1, embed=k % 2 == 0, scale=0.1 * (k + 1))
        adapters[f"a{k}"] = made
        bank.add(f"a{k}", made)
    names = [list(adapters)[n % distinct] for n in range(len(IDS))]
    bank.select(names)
    got = base(IDS).detach()
    expected = torch.stack([by_hand(adapters[name], IDS[n : n + 1])[0] for n, name in enumerate(names)])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    if distinct > 1:
        assert torch.equal(got[names.index(None)], model()(IDS)[names.index(None)])


def test_structures_in_normal_form_serve_what_they_trained() -> None:
    """lora, a magnitude, a rotation and an offset of rank 2r, on one bank."""
    base = model()
    bank = rf.Bank(base, RANK)
    live = {}
    for method in ("lora", "dora", "hra", "pissa"):
        adaptation = rf.adapt(base, method, rank=2, name=method)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in adaptation.parameters(method):
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        live[method] = base(IDS[:1]).detach()
        adapter, errors = rf.normal_form(adaptation, method)
        assert max(errors.values()) < 1e-6
        bank.add(method, adapter)
        adaptation.use()
    bank.select(list(live))
    got = base(IDS[:1].expand(4, -1)).detach()
    for n, method in enumerate(live):
        torch.testing.assert_close(got[n], live[method][0], rtol=0, atol=1e-10)


def test_nothing_selected_is_the_base_bitwise_and_closing_leaves_no_trace() -> None:
    base, untouched = model(), model()
    bank = rf.Bank(base, RANK)
    bank.add("a", entries(0, 3))
    assert torch.equal(base(IDS), untouched(IDS))
    bank.select("a")
    assert not torch.equal(base(IDS), untouched(IDS))
    bank.select(None)
    assert torch.equal(base(IDS), untouched(IDS))
    bank.select("a")
    bank.close()
    assert torch.equal(base(IDS), untouched(IDS))
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), untouched.parameters()))
    assert not any(m._forward_hooks for m in base.modules())


def test_beams_and_flattened_tokens_follow_their_row() -> None:
    base = model()
    bank = rf.Bank(base, RANK)
    made = {"a": entries(0, 3), "b": entries(1, 2)}
    for name, adapter in made.items():
        bank.add(name, adapter)
    bank.select(["a", "b"])
    got = base(IDS[:6]).detach()
    expected = torch.cat([by_hand(made["a"], IDS[:3]), by_hand(made["b"], IDS[3:6])])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    with pytest.raises(LayoutError, match="a batch of 5 rows, 2 selected"):
        base(IDS[:5])


def test_packed_rows_and_outputs_written_in_place() -> None:
    """Without gradients the change goes into the module's own output; a row packed beforehand is the adapter."""
    base = model()
    bank, made = rf.Bank(base, RANK), entries(0, 3)
    bank.add("a", bank.pack(made))
    bank.select("a")
    with torch.no_grad():
        torch.testing.assert_close(base(IDS), by_hand(made, IDS), rtol=0, atol=1e-10)
        bank.replace("a", bank.pack(entries(1, 4, gain=True)))  # now rows are rescaled too
        torch.testing.assert_close(base(IDS), by_hand(entries(1, 4, gain=True), IDS), rtol=0, atol=1e-10)
    with pytest.raises(OptionError, match="packed for another bank"):
        rf.Bank(model(), 1).add("a", bank.pack(made))


@pytest.mark.parametrize("names", [["g", None], ["g", "g"]], ids=["rows", "one"])
def test_gains_without_a_change_of_rank(names: list[str | None]) -> None:
    base = model()
    bank, made = rf.Bank(base, RANK), entries(0, 0, gain=True)
    bank.add("g", made)
    bank.select(names)
    expected = torch.cat([by_hand(made if name else None, IDS[k : k + 1]) for k, name in enumerate(names)])
    torch.testing.assert_close(base(IDS[:2]).detach(), expected, rtol=0, atol=1e-10)
    with pytest.raises(OptionError, match="rescales rows of first, and this bank has gains=False"):
        rf.Bank(model(), RANK, gains=False).add("g", made)


def test_row_slices() -> None:
    fused = nn.Sequential(nn.Linear(5, 9)).double()
    before = copy.deepcopy(fused)
    bank = rf.Bank(fused, 2, targets=["0[q]", "0[v]"])
    B, A = torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
    bank.add("v", rf.Adapter.of([rf.Entry("0", B, A, rows=(6, 9), total_rows=9, gain=torch.full((3,), 2.0))]))
    bank.select("v")
    x = torch.randn(4, 5, dtype=torch.float64)
    y = before(x).detach()
    bias = before[0].bias.detach()[6:]
    expected = torch.cat([y[:, :6], 2 * (y[:, 6:] - bias + x.sum(1, keepdim=True)) + bias], 1)
    torch.testing.assert_close(fused(x).detach(), expected, rtol=0, atol=1e-10)


def test_u8_a_hot_swap_of_another_rank_and_scale_recompiles_nothing() -> None:
    base = model()
    bank = rf.Bank(base, RANK, slots=40)
    made = {f"a{k}": entries(k, 1 + k % 4) for k in range(8)}
    for name, adapter in made.items():
        bank.add(name, adapter)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    ids = IDS[:4]
    bank.select("a0")
    compiled(ids)
    assert counter.frame_count == 1
    for name, adapter in made.items():  # 8 adapters, one after another
        bank.select(name)
        torch.testing.assert_close(compiled(ids).detach(), by_hand(adapter, ids), rtol=0, atol=1e-10)
    bank.add("new", entries(50, 5))  # one more in the bucket
    bank.select("new")
    torch.testing.assert_close(compiled(ids).detach(), by_hand(entries(50, 5), ids), rtol=0, atol=1e-10)
    bank.replace("new", entries(51, 2, scale=-3.0))  # another rank and scale
    torch.testing.assert_close(compiled(ids).detach(), by_hand(entries(51, 2, scale=-3.0), ids), rtol=0, atol=1e-10)
    assert counter.frame_count == 1


def test_u8_a_model_compiled_in_place_takes_swaps_and_additions() -> None:
    torch._dynamo.reset()
    base = model()
    bank = rf.Bank(base, RANK)
    bank.add("a", entries(0, 2))
    bank.select("a")
    graphs: list[object] = []
    base.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        first = base(IDS)
        bank.add("b", entries(1, 4))
        bank.select("b")
        second = base(IDS)
    assert len(graphs) == 1
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, by_hand(entries(1, 4), IDS).to(second.dtype), rtol=1e-4, atol=1e-5)


def test_u8_rows_switch_without_compiling_anew() -> None:
    base = model()
    bank = rf.Bank(base, RANK, slots=40)
    for k in range(8):
        bank.add(f"a{k}", entries(k, 3))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    bank.select(["a0", "a1", "a2", "a0"])
    compiled(IDS[:4])
    for first in range(5):
        bank.select([f"a{first}", f"a{first + 1}", f"a{first + 2}", f"a{first + 3}"])
        expected = torch.cat([by_hand(entries(first + k, 3), IDS[k : k + 1]) for k in range(4)])
        torch.testing.assert_close(compiled(IDS[:4]).detach(), expected, rtol=0, atol=1e-10)
    assert counter.frame_count == 1


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.written += out.numel() if isinstance(out, torch.Tensor) and "view" not in str(func) else 0
        return out


def _work(resident: int) -> tuple[int, int]:
    bank = rf.Bank(model(), RANK, slots=2000)
    for k in range(resident):
        bank.add(f"a{k}", entries(k % 5, 2))
    with Counted() as adding:
        bank.add("one more", entries(7, 2))
    with Counted() as switching:
        bank.select(["one more", "a0"])
    return adding.written, switching.written


def test_u9_adding_and_switching_cost_the_same_beside_a_thousand_adapters() -> None:
    """Counted in numbers written, which no shared machine disturbs."""
    assert _work(4) == _work(1000)


def test_u10_removal_returns_memory() -> None:
    bank = rf.Bank(model(), RANK, slots=8)
    empty = bank.nbytes
    for k in range(64):
        bank.add(f"a{k}", entries(k, 3))
    full = bank.nbytes
    assert full >= 64 / 9 * empty
    for k in range(60):
        bank.remove(f"a{k}")
    assert bank.nbytes <= full / 4
    bank.select("a63")  # the others moved to other slots, and are what they were
    torch.testing.assert_close(bank.model(IDS).detach(), by_hand(entries(63, 3), IDS), rtol=0, atol=1e-10)
    for k in range(60, 63):
        bank.remove(f"a{k}")
    bank.select(None)
    bank.remove("a63")
    assert bank.nbytes == empty
    assert len(bank) == 0


def test_u10_the_old_arena_is_freed_and_shrinking_returns_what_is_left() -> None:
    bank = rf.Bank(model(), RANK, slots=8)
    for k in range(16):
        bank.add(f"a{k}", entries(k, 3))
    bank.select(["a0", "a15"])
    bank.model(IDS)
    old, kept = weakref.ref(bank.arena.factors.untyped_storage()), weakref.ref(bank._serving.copies.rows.untyped_storage())
    bank.select("a0")
    gc.collect()
    assert kept() is None  # the rows' own copies go with the choice
    for k in range(1, 15):
        bank.remove(f"a{k}")
    bank.shrink()
    gc.collect()
    assert old() is None
    assert bank.nbytes == 3 * (bank.arena.of(0).nbytes + bank.arena.gain1[0].nbytes)
    torch.testing.assert_close(bank.model(IDS).detach(), by_hand(entries(0, 3), IDS), rtol=0, atol=1e-10)
    bank.add("again", entries(20, 3))  # grows


def test_u8_gains_ranks_and_the_base_switch_within_one_graph() -> None:
    base = model()
    bank = rf.Bank(base, RANK, slots=40, targets="all")
    made: dict[str | None, rf.Adapter | None] = {None: None}
    for k in range(6):
        made[f"a{k}"] = entries(k, 1 + k, gain=k % 2 == 1, embed=k % 3 == 0)
        bank.add(f"a{k}", made[f"a{k}"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    for names in (["a0", "a2", "a4"], ["a1", None, "a3"], ["a5", "a5", "a0"]):
        bank.select(names)
        expected = torch.cat([by_hand(made[name], IDS[k : k + 1]) for k, name in enumerate(names)])
        torch.testing.assert_close(compiled(IDS[:3]).detach(), expected, rtol=0, atol=1e-10)
    assert counter.frame_count == 1


@pytest.mark.parametrize("names", ["a", ["a", "b", "a", "b"]], ids=["one", "rows"])
def test_gradients_pass_through_and_the_arena_gets_none(names: str | list[str]) -> None:
    base = model()
    bank = rf.Bank(base, RANK)
    made = {"a": entries(0, 3, gain=True), "b": entries(1, 2)}
    for name, adapter in made.items():
        bank.add(name, adapter)
    bank.select(names)
    base(IDS[:4]).square().sum().backward()
    for row in range(4):
        expected = by_hand_module(made["a" if isinstance(names, str) else names[row]])
        expected(IDS[row : row + 1]).square().sum().backward()
        for token in set(IDS[row].tolist()) - {t for r in range(4) if r != row for t in IDS[r].tolist()}:
            torch.testing.assert_close(base.embed.weight.grad[token], expected.embed.weight.grad[token], rtol=1e-9, atol=1e-9)
    assert not bank.arena.factors.requires_grad


def test_bfloat16_and_autocast_stay_within_rounding() -> None:
    made = {"a": entries(0, 3, gain=True), "b": entries(1, 5)}
    expected = torch.cat([by_hand(made[n], IDS[k : k + 1]) for k, n in enumerate("abba")])
    for base, cast in ((model().bfloat16(), False), (model().float(), True)):
        bank = rf.Bank(base, RANK)
        for name, adapter in made.items():
            bank.add(name, adapter)
        for names in ("a", list("abba")):
            bank.select(names)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                got = base(IDS[:4])
            assert got.dtype == torch.bfloat16
            rows = slice(0, 1) if names == "a" else slice(0, 4)
            error = (got.double()[rows] - expected[rows]).norm() / expected[rows].norm()
            assert error < 2e-2


def test_refusals() -> None:
    base = model()
    bank = rf.Bank(base, 2)
    bank.add("a", entries(0, 2))
    with pytest.raises(OptionError, match=r"rank 3 at first, above the bank's 2.*normal_form\(adaptation, rank=2\)"):
        bank.add("large", entries(0, 3))
    with pytest.raises(OptionError, match="there already"):
        bank.add("a", entries(0, 2))
    with pytest.raises(TargetError, match="changes embed, which this bank doesn't serve"):
        bank.add("more", entries(0, 1, embed=True))
    with pytest.raises(UnknownName, match="aa"):
        bank.select("aa")
    bank.select("a")
    with pytest.raises(LayoutError, match="'a' is selected"):
        bank.remove("a")
    with pytest.raises(OptionError, match="whole tensors"):
        bank.add("head", rf.Adapter.of([], {"head.weight": torch.ones(1)}))
    with pytest.raises(TargetError, match="0: a bank serves linear layers and embeddings; here a convolution"):
        rf.Bank(nn.Sequential(nn.Conv2d(2, 3, 3)), targets="0")
    rf.adapt(base, "lora", rank=1)
    with pytest.raises(LayoutError, match=r"default is switched on.*adaptation.use\(\)"):
        bank.select("a")


def test_only_what_an_earlier_choice_did_not_have_is_copied() -> None:
    base = model()
    bank = rf.Bank(base, RANK)
    for k in range(12):
        bank.add(f"a{k}", entries(k, 3))
    names: list[str | None] = [f"a{n % 8}" for n in range(16)]
    bank.select(names)
    copied = []
    more = [*names[:3], "a9", *names[4:]]
    for other in (names, more, more, names[::-1], ["a9" if name == "a3" else name for name in names]):
        bank.select(other)
        before = bank._serving.copies.rows.clone() if bank._serving.copies is not None else None
        with torch.no_grad():
            got = base(IDS[:16])
        expected = torch.cat([by_hand(entries(int(name[1:]), 3), IDS[n : n + 1]) for n, name in enumerate(other)])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        now = bank._serving.copies.rows
        copied.append(None if before is None or before.shape != now.shape else int((before != now).any(1).sum()))
    assert copied == [None, 1, 0, 0, 1]  # all; one more; the same again; one less, in other rows; one in the place of another
    bank.replace("a0", entries(40, 5))
    with torch.no_grad():
        torch.testing.assert_close(base(IDS[:16])[8:9], by_hand(entries(40, 5), IDS[8:9]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "bnb-int8"])
def test_a_bank_beside_a_packed_model(format: str) -> None:
    """The base's product is the library's; changes, gains and magnitudes are those of the dequantised weight."""
    pytest.importorskip("bitsandbytes" if "n" in format.replace("int", "") else "torchao")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 64)).eval()
    rf.quantise(base, format, targets=["0"])
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=g)
    made = {
        "a": [rf.Entry("0", draw(24, 3), draw(3, 64), 0.5), rf.Entry("2", draw(64, 2), draw(2, 24))],
        "gain": [rf.Entry("0", draw(24, 9), draw(9, 64), 0.5, gain=1 + draw(24))],
        "length": [rf.Entry("0", draw(24, 1), draw(1, 64), magnitude=1 + draw(24).abs())],
    }
    bank = rf.Bank(base, 12)
    for name, own in made.items():
        bank.add(name, rf.Adapter.of(own))
    x = torch.randn(5, 64, generator=g)
    names = ["a", None, "gain", "length", "a"]
    with torch.no_grad():
        u0, W0 = base[0](x), base_of(base[0], Site("0", (24, 64))).dense()
        bank.select(names)
        got = base(x)
        alone = []
        for name in names:
            bank.select(name)
            alone.append(base(x))
        bank.select(None)
    for n, name in enumerate(names):
        u, W2, b2 = u0[n] - base[0].bias, base[2].weight, base[2].bias
        for e in made.get(name, ()):
            if e.name == "2":
                W2 = W2 + e.scale * e.B @ e.A
                continue
            u = u + e.scale * e.B @ (e.A @ x[n])
            gain = e.gain
            if e.magnitude is not None:
                gain = e.magnitude / (W0 + e.scale * e.B @ e.A).norm(dim=1)
            u = u if gain is None else gain * u
        expected = W2 @ torch.tanh(u + base[0].bias) + b2
        torch.testing.assert_close(got[n], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone[n][n], expected, rtol=1e-4, atol=1e-4)


def test_what_inference_mode_made_serves_outside_it() -> None:
    """Copies, indices and a grown arena that were made under inference mode are changed and differentiated later."""
    base = model()
    bank = rf.Bank(base, 12, slots=1)
    made = {f"a{k}": entries(k, 1 + 3 * k, gain=k == 1) for k in range(4)}
    with torch.inference_mode():
        for name, adapter in made.items():
            bank.add(name, adapter)
        for names in ("a3", "a1", ["a0", "a1", None, "a3"]):
            bank.select(names)
            base(IDS[:4])
    bank.replace("a2", made["a2"])
    for names in (["a0", "a1", None, "a3"], ["a2", "a1", "a0", "a3"], ["a3"] * 4, ["a1"] * 4):
        bank.select(names)
        base.zero_grad()
        y = base(IDS[:4])
        y.square().sum().backward()
        assert base.embed.weight.grad is not None
        expected = torch.cat([by_hand(made[n] if n else None, IDS[k : k + 1]) for k, n in enumerate(names)])
        torch.testing.assert_close(y.detach(), expected, rtol=0, atol=1e-10)
    with torch.inference_mode():
        bank.select(["a0", "a1", None, "a3"])
        base(IDS[:4])
    base(IDS[:4]).sum().backward()  # the same choice, which inference mode prepared
    with torch.inference_mode():
        bank.select("a3")
        base(IDS[:4])
    base(IDS[:4]).sum().backward()

"""Packed weights under every structure of the registry, against dense float64 algebra over what the library says they hold.

The oracle dequantises by the library's own call (never by rankfold), and runs the model as it was with the dense W' in the place
of the packed weight. Sites have out ≠ in.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.core.base import base_of
from rankfold.core.bases import _quantised, is_packed
from rankfold.core.structure import Context, trait
from rankfold.core.targets import every_site
from rankfold.errors import FingerprintError, LayoutError, MissingExtra, OptionError, TargetError
from rankfold.linalg import Dense

from .checks import Checks
from .subjects import refused_by, shake, small, subjects
from .tolerances import distance

FORMATS = ("int8", "int4", "nf4", "bnb-int8")
LIBRARY = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes", "bnb-int8": "bitsandbytes"}
VALUE, GRAD = 1e-5, 1e-4  # float32 against float64, as in the laws; the quantised weight itself is the reference


class Two(nn.Module):
    """Two linear sites, [24, 64] with bias and [10, 24 + 40] without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 24), nn.Linear(64, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(torch.cat([h, x[..., :40]], -1))


def needs(format: str) -> None:
    pytest.importorskip(LIBRARY[format], reason=f'pip install "rankfold[quant]" brings {LIBRARY[format]}')


def dense_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Two()


def quantised(format: str, seed: int = 0) -> nn.Module:
    needs(format)
    model = dense_model(seed)
    rf.quantise(model, format, targets=["first", "second"])
    return model.train()  # in evaluation LLM.int8() rounds activations too


def inputs(*lead: int) -> Tensor:
    return torch.randn(*(lead or (3, 5)), 64, generator=torch.Generator().manual_seed(3))


def held(module: nn.Module) -> Tensor:
    """What the library says that the weight is, float64."""
    W = module.weight
    if hasattr(W, "quant_state") and W.quant_state is not None:
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(W.data, W.quant_state).double()
    if hasattr(W, "SCB"):
        scale = W.SCB if W.SCB is not None else module.state.SCB
        return W.data.double() * (scale.double() / 127)[:, None]
    return W.dequantize().double()


def packed_hash(model: nn.Module) -> str:
    """Of every byte that the packed layers consist of."""
    digest = hashlib.sha256()
    for name in ("first", "second"):
        module = getattr(model, name)
        for t in base_of(module, site(model, name)).storage():
            digest.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def site(model: nn.Module, name: str) -> rf.Site:
    return next(s for s in every_site(model) if s.name == name)


def plain_structures() -> list[str]:
    """Chains over the whole registry that differ in their structure, and offsets and updates once each."""
    return [s for s in subjects() if not rf.method(s).is_side and not rf.method(s).init.needs & {"activations", "gradients"}]


def definition(model: nn.Module, adaptation: rf.Adaptation, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(y, the adapter's tensors in float64, x in float64) by dense algebra over what the library says the weights are."""
    leaves = {}
    for key, t in adaptation.tensors().items():
        t = t.detach().clone()
        leaves[key] = t.double().requires_grad_(adaptation.store.tensor(key).requires_grad) if t.is_floating_point() else t
    x = x.detach().double().requires_grad_()
    slots = {s.site.name: s for s in adaptation.slots()}

    whole = {e.name: leaves[e.key] for s in slots.values() for e in s.member.extras.values()}  # of structures that own every bias

    def layer(name: str, z: Tensor) -> Tensor:
        W, slot = held(getattr(model, name)), slots[name]
        bias = whole.get(f"{name}.bias", getattr(model, name).bias)
        values = {}
        for f, (key, cut) in slot.binding.items():
            values[f] = leaves[key] if cut is None else leaves[key][cut]
        t = type(slot.t(adaptation.store))(**values)
        if trait(slot.structure, "input_dependent"):
            rows = [
                slot.structure.weight(Dense(W), t, slot.site, Context(x=token[None])).matmul(token[None])[0]
                for token in z.reshape(-1, z.shape[-1])
            ]
            y = torch.stack(rows).reshape(*z.shape[:-1], -1)
        else:
            y = z @ slot.structure.weight(Dense(W), t, slot.site, Context()).dense().mT
        return y if bias is None else y + bias.double()

    h = torch.tanh(layer("first", x))
    return layer("second", torch.cat([h, x[..., :40]], -1)), leaves, x


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("method", plain_structures())
def test_every_structure_equals_its_definition_over_a_packed_weight(method: str, format: str) -> None:
    """Laws 1, 2 and 3: same function at the start, forward and gradients after it, packed bytes as they were.

    Exempt: gates and dropout act in their own way in training (law 3 tries them on dense weights); here they run in evaluation,
    and so not over bnb-int8, whose product in evaluation rounds the activations.
    """
    model, made = quantised(format), small(method)
    if refused_by(made, "linear"):
        pytest.skip("no structure for a linear layer")
    stochastic = trait(made.structure, "stochastic")
    if stochastic and format == "bnb-int8":
        pytest.skip("evaluation rounds activations to 8 bits")
    model.train(not stochastic)
    before, x = packed_hash(model), inputs().requires_grad_()
    start = model(x).detach()
    adaptation = rf.adapt(model, made, targets=["first", "second"], seed=1)
    adaptation.store.watchers.clear()  # `shake` below is no optimizer of theirs
    with Checks(f"{method} over {format}") as check:
        with adaptation.disabled():
            check.bitwise(model(x).detach(), start, "disabled")
        if made.starts == "base":
            check.close(model(x).detach(), start, 2e-6, "start")
        shake(adaptation)
        y = model(x)
        expected, leaves, x64 = definition(model, adaptation, x)
        check.close(y.detach(), expected.detach(), VALUE, "forward")
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        mine = {k: adaptation.store.tensor(k) for k in leaves if leaves[k].requires_grad}
        found = torch.autograd.grad((y * probe).sum(), [x, *mine.values()], allow_unused=True)
        wanted = torch.autograd.grad((expected * probe.double()).sum(), [x64, *(leaves[k] for k in mine)], allow_unused=True)
        for name, a, b in zip(["x", *mine], found, wanted):
            check.close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, GRAD, f"gradient of {name}")
        check.that(packed_hash(model) == before, "the packed weight was written to")
        if not trait(made.structure, "input_dependent") and not trait(made.structure, "stochastic"):
            packed = model.first.weight
            errors = adaptation.fold()
            check.that(set(errors) == {"first", "second"} and max(errors.values()) < 1e-5, f"fold: {errors}")
            check.close(model(x).detach(), expected.detach(), VALUE, "folded")
            adaptation.unfold()
            check.that(model.first.weight is packed, "unfolding gives another tensor")
            check.bitwise(model(x).detach(), y.detach(), "unfolded")
        adaptation.remove()
        check.bitwise(model(x).detach(), start, "removed")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("plan", ["fused", "structured", "effective", "plain"])
def test_every_plan_gives_the_same(format: str, plan: str) -> None:
    model, x = quantised(format), inputs().requires_grad_()
    adaptation = rf.adapt(model, "dora", rank=2, targets=["first", "second"], plan=plan)
    shake(adaptation)
    y = model(x)
    expected, _, x64 = definition(model, adaptation, x)
    assert distance(y, expected) < VALUE
    gradient = torch.autograd.grad(y.square().sum(), x)[0]
    assert distance(gradient, torch.autograd.grad(expected.square().sum(), x64)[0]) < GRAD


@pytest.mark.parametrize("format", FORMATS)
def test_second_derivatives_through_the_plain_plan(format: str) -> None:
    model, x = quantised(format), inputs(2).requires_grad_()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["first", "second"], plan="plain")
    shake(adaptation)
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), x)
    expected, _, x64 = definition(model, adaptation, x)
    (e,) = torch.autograd.grad(expected.square().sum(), x64, create_graph=True)
    assert distance(gg, torch.autograd.grad(e.square().sum(), x64)[0]) < GRAD


@pytest.mark.parametrize("format", FORMATS)
def test_a_large_weight_is_read_in_blocks(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """rmatmul, dense and row norms with blocks of a few rows are those of the whole; no block is larger than asked."""
    model = quantised(format)
    W = held(model.first)
    base = base_of(model.first, site(model, "first"))
    monkeypatch.setattr(_quantised, "BLOCK_BYTES", 4 * 64 * 5)  # five rows of float32
    sizes = [len(part) for _, _, part in base.blocks(torch.float32)]
    assert len(sizes) >= 4, sizes
    assert max(sizes) <= 5, sizes
    assert sum(sizes) == 24, sizes
    g, index = torch.randn(7, 24), torch.tensor([23, 0, 11])
    assert distance(base.rmatmul(g), g.double() @ W) < 1e-6
    assert distance(base.dense(), W) < 1e-6
    assert distance(base.rows(index), W[index]) < 1e-6
    assert distance(base.columns(index), W.mT[index]) < 1e-6
    assert distance(base.row_sqnorm(), W.square().sum(-1)) < 1e-6
    sliced = base_of(model.first, rf.Site("first", (9, 64), rows=(7, 16)))
    assert distance(sliced.dense(), W[7:16]) < 1e-6
    assert distance(sliced.rmatmul(g[:, :9]), g[:, :9].double() @ W[7:16]) < 1e-6
    x = inputs(4)
    assert distance(sliced.matmul(x), x.double() @ W[7:16].mT) < 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_dora_dequantises_nothing_for_its_norms(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(format)
    rf.adapt(model, "dora", rank=2, targets=["first"])
    with torch.no_grad():
        model(inputs())
        calls: list[int] = []
        kind = type(base_of(model.first, site(model, "first")))
        read = kind.block
        monkeypatch.setattr(kind, "block", lambda *a: calls.append(1) or read(*a))
        model(inputs())
    assert not calls


@pytest.mark.parametrize("format", FORMATS)
def test_row_slices(format: str) -> None:
    model, x = quantised(format), inputs().requires_grad_()
    start = model(x).detach()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["first[q]", "first[v]"])
    assert distance(model(x), start) < 2e-6
    shake(adaptation)
    W = held(model.first)
    for slot in adaptation.slots():
        t = slot.t(adaptation.store)
        W[slice(*slot.site.rows)] += slot.structure.scale * (t.B @ t.A).detach().double()
    h = torch.tanh(x.detach().double() @ W.mT + model.first.bias.detach().double())
    expected = torch.cat([h, x.detach().double()[..., :40]], -1) @ held(model.second).mT
    y = model(x).detach()
    assert distance(y, expected) < VALUE
    errors = adaptation.fold()
    assert max(errors.values()) < 1e-5
    assert distance(model(x), expected) < VALUE
    adaptation.unfold()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("format", FORMATS)
def test_copies_dtypes_checkpointing_and_the_probe(format: str) -> None:
    """deepcopy, `.to`, autocast, gradient checkpointing and the probe change nothing, or what they say."""
    model, x = quantised(format), inputs().requires_grad_()
    loss = lambda m, batch: m(batch).square().mean()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["first", "second"], batches=[inputs()], loss=loss)
    assert not adaptation.dropped
    shake(adaptation)
    before, y = packed_hash(model), model(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    shake(rf.adaptation(twin), seed=11)
    assert torch.equal(model(x), y)
    assert not torch.equal(twin(x), y)
    assert torch.equal(model.to("cpu")(x), y)
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    assert torch.equal(again, y)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], g)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    assert distance(low, y) < 2e-2
    assert packed_hash(model) == before


@pytest.mark.parametrize("format", FORMATS)
def test_qlora_trains(format: str) -> None:
    """`lora` on a packed base, some steps: the loss falls, the base's bytes stay, nothing dense is kept for the backward pass."""
    model, x = quantised(format), inputs(63)
    target = torch.tanh(x @ torch.randn(64, 10, generator=torch.Generator().manual_seed(9)) / 4)
    adaptation = rf.adapt(model, "lora", rank=4, targets=["first", "second"])
    before, optimizer = packed_hash(model), adaptation.optimizer(lr=2e-2)
    losses, kept = [], []

    def seen(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    for _ in range(30):
        optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
            loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0], losses
    assert not {(24, 64), (10, 64), (64, 24), (64, 10)} & set(kept)
    assert packed_hash(model) == before


@pytest.mark.parametrize("format", FORMATS)
def test_u20_folding_into_a_quantised_base_says_its_error(format: str) -> None:
    """A merge into 4 or 8 bits changes the outputs: fold goes into a dequantised copy, exact to rounding and with its error said;
    what storing it in the format again would lose is said too; ten rounds of folding and unfolding leave every bit in place."""
    model, x = quantised(format), inputs()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["first", "second"])
    with torch.no_grad():
        for slot in adaptation.slots():
            t = slot.t(adaptation.store)
            t.B.normal_(std=0.01)
    y, before = model(x), packed_hash(model)
    W = {s.site.name: held(s.base.module) for s in adaptation.slots()}
    change = {}
    for slot in adaptation.slots():
        t = slot.t(adaptation.store)
        change[slot.site.name] = slot.structure.scale * (t.B.double() @ t.A.double()).detach()
    lost = adaptation.requantisation_errors()
    errors = adaptation.fold()
    for name, error in errors.items():
        gap = getattr(model, name).weight.double() - (W[name] + change[name])
        assert float(gap.norm() / change[name].norm()) == pytest.approx(error, abs=1e-5)
        assert error < 1e-4
    assert distance(model(x), y) < 1e-5
    adaptation.unfold()
    assert min(lost.values()) > 100 * max(*errors.values(), 1e-7), (lost, errors)  # the merge that others do is far worse
    if format in ("nf4", "int4"):
        assert min(lost.values()) > 0.3, lost  # most of such a change is below the rounding of 4 bits
    for _ in range(10):
        adaptation.fold()
        adaptation.unfold()
    assert packed_hash(model) == before
    assert torch.equal(model(x), y)


def test_what_requantising_loses_is_measured_against_the_library() -> None:
    model = quantised("nf4")
    adaptation = rf.adapt(model, "lora", rank=2, targets=["second"])
    shake(adaptation)
    t = adaptation.slots()[0].t(adaptation.store)
    change = adaptation.slots()[0].structure.scale * (t.B @ t.A).detach()
    W = (held(model.second) + change.double()).float()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    again = dequantize_4bit(*quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4"))
    expected = float((again - W).norm() / change.norm())
    assert adaptation.requantisation_errors()["second"] == pytest.approx(expected, rel=1e-3)
    dense = dense_model()
    adapted = rf.adapt(dense, "lora", rank=2, targets=["second"])
    with pytest.raises(LayoutError, match="quantised"):
        adapted.requantisation_errors()


@pytest.mark.parametrize("format", FORMATS)
def test_inits_that_look_at_data_see_a_packed_weight_as_its_dense_copy(format: str) -> None:
    """PiSSA (the weight), EVA (inputs) and LoRA-GA (gradients, which a packed weight has none of by itself)."""
    loss = lambda m, batch: m(batch).square().mean()
    for method in ("pissa", "eva", "lora-ga"):
        model, dense = quantised(format), dense_model().train()
        with torch.no_grad():
            for name in ("first", "second"):
                getattr(dense, name).weight.copy_(held(getattr(model, name)))
        options = {"targets": ["first", "second"], "batches": [inputs(40), inputs(40) + 1], "loss": loss, "seed": 1}
        found, expected = rf.adapt(model, small(method), **options), rf.adapt(dense, small(method), **options)
        near = 5e-2 if format == "bnb-int8" else 1e-3  # the pass runs in evaluation, where that product rounds activations
        assert [s.key for s in found.sites] == ["first", "second"]
        for a, b in zip(found.slots(), expected.slots()):
            mine, theirs = a.t(found.store), b.t(expected.store)
            assert distance(mine.A.mT @ mine.A, theirs.A.mT @ theirs.A) < near, (method, a.site.key)
            assert distance(mine.B @ mine.B.mT, theirs.B @ theirs.B.mT) < near, (method, a.site.key)


# adapters between storages of one source


@pytest.mark.parametrize(("made_on", "used_on"), list(itertools.permutations(("dense", "bf16", *FORMATS), 2)))
def test_an_adapter_moves_between_storages_of_one_source(made_on: str, used_on: str, tmp_path: object) -> None:
    def model_of(storage: str, seed: int = 0) -> nn.Module:
        if storage in FORMATS:
            return quantised(storage, seed)
        return dense_model(seed).to(torch.bfloat16 if storage == "bf16" else torch.float32)

    first = model_of(made_on)
    adaptation = rf.adapt(first, "lora", rank=2, targets=["first", "second"])
    shake(adaptation)
    adaptation.save(f"{tmp_path}/a")
    second = model_of(used_on)
    with pytest.warns(UserWarning, match=r"same source, other storage: largest relative distance [0-9.e-]+, at"):
        loaded = rf.load(second, f"{tmp_path}/a")
    for a, b in zip(adaptation.parameters(), loaded.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(FingerprintError, match="another base"):
        rf.load(model_of(used_on, seed=1), f"{tmp_path}/a")


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_storage_is_the_same_base(format: str, tmp_path: object) -> None:
    adaptation = rf.adapt(quantised(format), "lora", rank=2, targets=["first"])
    adaptation.save(f"{tmp_path}/a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rf.load(quantised(format), f"{tmp_path}/a")


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_model_carries_the_fingerprint_of_its_source(format: str) -> None:
    """The hash is the dense checkpoint's; a model that others quantised learns it from `record_source`; a weight that was written
    to since has its own again."""
    dense, model = dense_model(), quantised(format)
    names = ["first.weight", "second.weight"]
    source = rf.fingerprint(dense, names)
    assert rf.fingerprint(model, names) == source
    adaptation = rf.adapt(model, "lora", rank=2, targets=["first", "second"])
    adaptation.fold()
    assert rf.fingerprint(model, names) == source
    adaptation.unfold()
    adaptation.remove()
    for module in (model.first, model.second):
        del module.__dict__["_rankfold_source"]
    assert rf.fingerprint(model, names) != source
    with pytest.raises(FingerprintError, match="wasn't made from"):
        rf.record_source(model, dense_model(seed=1))
    assert "distance" in str(rf.record_source(model, dense))
    assert rf.fingerprint(model, names) == source
    base_of(model.first, site(model, "first")).storage()[0].add_(1)
    assert rf.fingerprint(model, ["first.weight"]) != rf.fingerprint(dense, ["first.weight"])


# refusals


def test_quantise_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="int8, int4, nf4"):
        rf.quantise(dense_model(), "int3")
    monkeypatch.setattr("rankfold.core.bases.quantise.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'bitsandbytes. Install: pip install "rankfold\[quant\]"'):
        rf.quantise(dense_model(), "nf4")


@pytest.mark.parametrize("format", FORMATS)
def test_quantise_says_where_it_cannot(format: str) -> None:
    needs(format)
    model = dense_model()
    with pytest.raises(LayoutError, match="float64"):
        rf.quantise(model.double(), format)
    with pytest.raises(TargetError, match="no linear layer"):
        rf.quantise(quantised(format), format)
    adapted = dense_model()
    rf.adapt(adapted, "lora", rank=2, targets=["first"])
    with pytest.raises(LayoutError, match="first, then"):
        rf.quantise(adapted, format)


@pytest.mark.parametrize(("format", "group"), [("int4", 32), ("nf4", 64)])
def test_rows_must_fill_whole_groups(format: str, group: int) -> None:
    needs(format)
    with pytest.raises(TargetError, match=f"{group} entries"):
        rf.quantise(nn.Sequential(nn.Linear(96 if group == 64 else 40, 8)), format)


def test_rows_that_bitsandbytes_misreads_on_a_cpu_are_refused() -> None:
    """0.50.2: rows of 96 in blocks of 64 are dequantised with the scales of other blocks, at an error of 0.37 in the place of
    0.09."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(96, 40, quant_type="nf4").to("cpu")
    with pytest.raises(TargetError, match="misreads rows of 96 in blocks of 64"):
        rf.adapt(nn.Sequential(layer), "lora", rank=2, targets=["0"])


def test_a_packed_weight_in_another_kind_of_layer_is_refused() -> None:
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 4))
    torchao.quantization.quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Embedding))
    assert is_packed(model[0])
    with pytest.raises(TargetError, match="Int8Tensor, which is read in linear layers only"):
        rf.adapt(model, "lora", rank=2, targets=["0"])


def test_a_layer_that_is_not_quantised_yet_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(TargetError, match="not quantised yet"):
        rf.adapt(nn.Sequential(bnb.nn.Linear4bit(32, 8)), "lora", rank=2)
    with pytest.raises(TargetError, match="no int8"):
        rf.adapt(nn.Sequential(bnb.nn.Linear8bitLt(32, 8)), "lora", rank=2)


# what the libraries do by themselves


def test_a_layout_that_cannot_be_dequantised_is_read_by_its_product() -> None:
    pytest.importorskip("torchao")
    opaque = pytest.importorskip("torchao.prototype.quantization.int4.int4_opaque_tensor")
    layer = nn.Linear(64, 32)
    packed = opaque.Int4OpaqueTensor.from_hp(layer.weight.detach(), [1, 32])
    layer.weight = nn.Parameter(packed, requires_grad=False)
    model, x = nn.Sequential(layer), torch.randn(5, 64, requires_grad=True)
    adaptation = rf.adapt(model, "dora", rank=2, targets=["0"])
    shake(adaptation)
    W = torch.stack([torch.nn.functional.linear(e[None], packed)[0] for e in torch.eye(64)], 1).double()
    slot = adaptation.slots()[0]
    t = slot.t(adaptation.store)
    V = W + slot.structure.core.scale * (t.B @ t.A).detach().double()
    V = V * (t.m.detach().double() / V.norm(dim=1))[:, None]
    y = model(x)
    assert distance(y, x.double() @ V.mT + layer.bias.double()) < VALUE
    g = torch.randn_like(y)
    assert distance(torch.autograd.grad(y, x, g)[0], g.double() @ V) < GRAD
    assert slot.base.format == "int4"
    with pytest.raises(LayoutError, match="can't write"):
        adaptation.requantisation_errors()


def test_a_weight_that_the_library_repacked_for_evaluation_still_trains() -> None:
    """On a CPU with AVX512-BF16 bitsandbytes repacks an NF4 weight at its first evaluation, and loses the gradient of its input
    from then on. Adapters read either packing; a model that `rf.quantise` made is never repacked."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer.to("cpu"))
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, copy.deepcopy(layer.weight.quant_state))
    unpacked = held(layer)
    layer.weight.data, layer.weight.quant_state = packed, state  # as its forward does there
    base = base_of(layer, site(model, "0"))
    assert distance(base.dense(), unpacked) < 4e-3  # scales rounded to bf16
    W = base.dense().double()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["0"])
    shake(adaptation)
    t = adaptation.slots()[0].t(adaptation.store)
    V = W + adaptation.slots()[0].structure.scale * (t.B @ t.A).detach().double()
    g = torch.randn(5, 32)
    assert distance(base.rmatmul(g), g.double() @ W) < 1e-6
    if bnb.functional.has_avx512bf16():
        x = torch.randn(5, 64, requires_grad=True)
        y = model(x)
        assert distance(y, x.double() @ V.mT + layer.bias.double()) < 2e-2  # the library's own product in bf16
        assert distance(torch.autograd.grad(y, x, g)[0], g.double() @ V) < GRAD


def test_quantise_keeps_the_library_from_repacking() -> None:
    model = quantised("nf4").eval()
    before = packed_hash(model)
    with torch.no_grad():
        model(inputs())
    assert packed_hash(model) == before


@pytest.mark.parametrize("format", ["nf4", "bnb-int8", "int8"])
def test_models_that_transformers_has_quantised(format: str, tmp_path: object) -> None:
    """BitsAndBytesConfig and TorchAoConfig: attached, trained, moved to the dense model, folded."""
    needs(format)
    import transformers as hf

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
    torch.manual_seed(0)
    dense = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2))
    dense.save_pretrained(f"{tmp_path}/m")
    if format == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = hf.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        four = format == "nf4"
        config = hf.BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4")
    model = hf.LlamaForCausalLM.from_pretrained(
        f"{tmp_path}/m", quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).train()
    ids = torch.arange(16).view(2, 8)
    adaptation = rf.adapt(model, "lora", rank=2, targets=["q_proj", "down_proj"])
    optimizer = adaptation.optimizer(lr=2e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses
    before = model(input_ids=ids).logits
    assert max(adaptation.fold().values()) < 1e-4
    assert distance(model(input_ids=ids).logits, before) < 1e-5
    adaptation.unfold()
    adaptation.save(f"{tmp_path}/a")
    with pytest.warns(UserWarning, match="same source, other storage"):
        rf.load(dense, f"{tmp_path}/a")

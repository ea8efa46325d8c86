"""One pass for all statistics: the right tensors arrive, nothing of the model changes, memory stays bounded."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.core import Site, find_sites
from rankfold.errors import BudgetError, DataError, InactiveError, NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.training.contracts import Statistic
from rankfold.training.statistics import collect, plan
from rankfold.training.streams import GradientSum, InputDirections


class Recorder(Statistic):
    """Keeps everything that it is shown; `enough` observations are all that it wants."""

    def __init__(self, source="input", enough=10**9, model=None):
        self.source, self.enough, self.seen, self.model, self.alive = source, enough, [], model, []

    def observe(self, value):
        self.seen.append(value.detach().clone())
        if self.model is not None:
            self.alive.append(sum(p.grad is not None for p in self.model.parameters()))

    @property
    def done(self):
        return len(self.seen) >= self.enough

    @property
    def nbytes(self):
        return 100


class Attention(nn.Module):
    """Words, three projections of one input, a stack of equal layers, a norm with running averages, and an output."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.layer = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(3)])
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 6)

    def forward(self, ids, attention_mask=None, labels=None):
        x = self.words(ids)
        x = (self.query(x) * self.key(x)).tanh() + self.value(x)
        for layer in self.layer:
            x = layer(x)  # what went in is free at once: the next layer's input may get its memory
        return self.out(self.drop(self.norm(x.mT).mT))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention().double()


@pytest.fixture
def batches():
    return [{"ids": Random("ids", k).integers((3, 5), 11)} for k in range(4)]


def loss(model, batch):
    return model(**batch).square().mean()


def wanted(model, make, names):
    return {s.key: (s, make(s)) for s in find_sites(model, list(names))}


def oracle_gradients(model, batches, name):
    """Mean over batches of ∂L/∂(stored weight), by autograd alone."""
    weight = model.get_submodule(name).weight
    model.eval()
    before = weight.requires_grad
    weight.requires_grad_(True)
    grads = [torch.autograd.grad(loss(model, b), weight)[0] for b in batches]
    weight.requires_grad_(before)
    return torch.stack(grads)


@pytest.mark.parametrize("name", ["query", "layer.1", "out", "words"])
def test_gradients_of_frozen_weights_are_autograd_s(model, batches, name):
    model.requires_grad_(False)
    found = collect(model, wanted(model, lambda s: Recorder("gradient"), [name]), batches, loss)
    expected = oracle_gradients(model, batches, name)
    expected = expected.mT if name == "words" else expected
    torch.testing.assert_close(torch.stack(found[name].seen), expected, rtol=0, atol=1e-14)


def test_gradients_of_row_slices_and_transposed_weights():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(12, 5), nn.Tanh()).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    sites = find_sites(model, ["0[q]", "0[8:12]"])
    mean = lambda m, b: m(b).square().mean()
    found = collect(model, {s.key: (s, Recorder("gradient")) for s in sites}, [x], mean)
    whole = torch.autograd.grad(mean(model, x), model[0].weight)[0].mT  # [out, in]
    torch.testing.assert_close(found["0[0:4]"].seen[0], whole[:4])
    torch.testing.assert_close(found["0[8:12]"].seen[0], whole[8:])


def test_the_model_is_as_it_was(model, batches):
    model.train()
    model.query.weight.requires_grad_(False)
    model.norm.eval()
    model.key.weight.grad = kept = torch.ones(6, 6, dtype=torch.float64)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    collect(model, wanted(model, lambda s: Recorder("gradient"), ["query", "out", "layer.0"]), batches, loss)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    assert [p.requires_grad for p in model.parameters()] == required
    assert model.key.weight.grad is kept
    assert all(p.grad is None for p in model.parameters() if p is not model.key.weight)
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_also_after_an_error(model, batches):
    required = [p.requires_grad for p in model.parameters()]
    broken = lambda m, b: m(**b).sum() * float("nan")
    with pytest.raises(NumericError, match="loss"):
        collect(model, wanted(model, lambda s: Recorder("gradient"), ["query"]), batches, broken)
    assert [p.requires_grad for p in model.parameters()] == required
    assert model.training
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_one_dense_gradient_at_a_time(model, batches):
    names = ["query", "key", "value", "layer.0", "layer.1", "layer.2", "out"]
    found = collect(model, wanted(model, lambda s: Recorder("gradient", model=model), names), batches, loss)
    assert sum(len(s.seen) for s in found.values()) == 7 * 4
    assert {n for s in found.values() for n in s.alive} == {0}  # beside the one that is being shown


def test_a_site_without_gradient_is_left_out(model, batches):
    found = collect(model, wanted(model, lambda s: Recorder("gradient"), ["query", "unused"]), batches, loss)
    assert list(found) == ["query"]


def test_inputs_are_what_the_module_reads(model, batches):
    model.eval()
    found = collect(model, wanted(model, lambda s: Recorder(), ["query"]), batches)
    for seen, batch in zip(found["query"].seen, batches):
        assert torch.equal(seen, model.words(batch["ids"]).reshape(-1, 6))


def test_sites_with_one_input_share_one_statistic(model, batches):
    names = ["query", "key", "value", "layer.0", "layer.1", "layer.2"]
    found = collect(model, wanted(model, lambda s: Recorder(), names), batches)
    assert found["query"] is found["key"] is found["value"]
    assert len(found["query"].seen) == len(batches)
    assert len({id(s) for s in found.values()}) == 4, "reused memory was taken for a shared input"


def test_a_module_called_twice_does_not_share_with_one_called_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.a(x)) + self.b(x)

    model = Twice()
    found = collect(model, wanted(model, lambda s: Recorder(), ["a", "b"]), [torch.ones(2, 4)])
    assert len(found["a"].seen) == 2
    assert len(found["b"].seen) == 1


def test_padding_is_dropped(model, batches):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    found = collect(model, wanted(model, lambda s: Recorder(), ["query"]), [{**batches[0], "attention_mask": mask}])
    expected = model.words(batches[0]["ids"])[mask.bool()]
    assert torch.equal(found["query"].seen[0], expected)


def test_the_mask_is_that_of_each_call_of_the_model(model, batches):
    """A loss that calls the model twice, as retrieval does: queries and documents have masks of their own."""
    masks = [torch.eye(3, 5, dtype=torch.long), 1 - torch.eye(3, 5, dtype=torch.long)]
    pair = lambda m, b: sum(m(x["ids"], attention_mask=k).sum() for x, k in zip(b, masks))
    found = collect(model, wanted(model, lambda s: Recorder(), ["query"]), [batches[:2]], pair)
    assert [len(x) for x in found["query"].seen] == [3, 12]


def test_tokens_without_label_are_dropped_when_asked(model, batches):
    labels = torch.full((3, 5), -100)
    labels[0, :2] = 1
    batch = {**batches[0], "labels": labels}
    assert len(collect(model, wanted(model, lambda s: Recorder(), ["query"]), [batch])["query"].seen[0]) == 15
    found = collect(model, wanted(model, lambda s: Recorder(), ["query"]), [batch], drop_unlabelled=True)
    assert len(found["query"].seen[0]) == 2


def test_it_stops_when_all_are_done(model, batches):
    taken = []
    stream = (taken.append(k) or b for k, b in enumerate(batches))
    found = collect(model, wanted(model, lambda s: Recorder(enough=2), ["query"]), stream)
    assert (len(found["query"].seen), len(taken)) == (2, 2)


def test_by_block_is_joint_with_less_memory(model, batches):
    names = ["query", "layer.0", "layer.1", "layer.2"]
    make = lambda s: GradientSum(s.shape, rank=6)
    joint = collect(model, wanted(model, make, names), batches, loss)
    lines = []
    blocks = collect(model, wanted(model, make, names), batches, loss, mode="by_block", progress=lines.append)
    for name in names:
        torch.testing.assert_close(joint[name].svd()[1], blocks[name].svd()[1], rtol=0, atol=1e-14)
    assert "4 passes" in lines[0]
    assert plan(wanted(model, make, names), "by_block").peak * 2.5 == plan(wanted(model, make, names)).peak
    with pytest.raises(DataError, match="list or a DataLoader"):
        collect(model, wanted(model, make, names), iter(batches), loss, mode="by_block")


def test_a_statistic_shared_across_blocks_sees_the_data_once(batches):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return self.layer[0](x) + self.layer[1](x)

    model = Cross()
    found = collect(model, wanted(model, lambda s: Recorder(), ["layer.0", "layer.1"]), [torch.ones(2, 4)], mode="by_block")
    assert found["layer.0"] is found["layer.1"]
    assert len(found["layer.0"].seen) == 1


def test_the_plan_counts_a_shared_statistic_once_and_is_refused_above_the_budget(model, batches):
    names = ["query", "key", "value", "layer.0"]
    make = lambda s: InputDirections(6, 2)
    lines = []
    collect(model, wanted(model, make, names), batches, progress=lines.append)
    size = make(None).nbytes
    assert f"{2 * size:,} bytes" in lines[0]
    big = {**wanted(model, make, names), "out": (find_sites(model, "out")[0], InputDirections(6, 6))}
    with pytest.raises(BudgetError, match=r"largest is (out|query)") as error:
        collect(model, big, batches, budget=10)
    assert "allowed are 10" in str(error.value)


def test_nan_names_the_site(model, batches):
    with torch.no_grad():
        model.layer[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"layer\.1.*input"):
        collect(model, wanted(model, lambda s: Recorder(), ["query", "layer.1"]), batches)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss": None}, OptionError, "give loss="),
        ({"batches": []}, DataError, "no batches"),
        ({"mode": "whole"}, OptionError, "joint, by_block"),
    ],
)
def test_bad_requests(model, batches, change, error, words):
    arguments = {"loss": loss, "batches": batches, "mode": "joint", **change}
    with pytest.raises(error, match=words):
        collect(model, wanted(model, lambda s: Recorder("gradient"), ["query"]), **arguments)


def test_a_module_that_is_never_called_is_named(model, batches):
    with pytest.raises(InactiveError, match="unused"):
        collect(model, wanted(model, lambda s: Recorder(), ["query", "unused"]), batches)


def test_other_adapters_are_off(model, batches):
    expected = collect(model, wanted(model, lambda s: Recorder(), ["out"]), batches)["out"].seen
    handle = rf.adapt(model, "lora", rank=2, targets=["query", "layer.0"])
    with torch.no_grad():
        for p in handle.parameters():
            p.fill_(1.0)
    found = collect(model, wanted(model, lambda s: Recorder(), ["out"]), batches)["out"].seen
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert handle.store.enabled


WORKER = """
import json, sys
import torch
from rankfold.core import Site
from rankfold.training.statistics import collect
from rankfold.training.streams import GradientSketch, GradientSum, InputDirections
rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
data = torch.randn(8, 20, 6, dtype=torch.float64) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2], dtype=torch.float64)
batches = list(data[rank::world])
sites = {"0": Site("0", (5, 6)), "2": Site("2", (3, 5))}
loss = lambda m, b: m(b).square().mean()
first = collect(model, {"0": (sites["0"], InputDirections(6, 3, tolerance=2.0))}, batches)
second = collect(model, {k: (s, GradientSum(s.shape, 2)) for k, s in sites.items()}, batches, loss)
third = collect(model, {"0": (sites["0"], GradientSketch((5, 6), 2, "0"))}, batches, loss)
print(json.dumps({
    "count": first["0"].svd.count,
    "inputs": first["0"].singular_values().tolist(),
    "explained": first["0"].explained().tolist(),
    "sums": [second[k].svd()[1].tolist() for k in second],
    "sketch": third["0"].svd()[1].tolist(),
}))
"""


def test_two_processes_are_one(tmp_path, monkeypatch, capsys):
    args = [[sys.executable, "-c", WORKER, str(k), "2", str(tmp_path / "store")] for k in range(2)]
    running = [subprocess.Popen(a, stdout=subprocess.PIPE, text=True) for a in args]
    monkeypatch.setattr(sys, "argv", ["worker", "0", "1", ""])
    exec(WORKER, {})
    alone = json.loads(capsys.readouterr().out)
    for process in running:
        together = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
        assert together["count"] == alone["count"] == 160
        for name in ("inputs", "explained", "sketch"):
            assert together[name] == pytest.approx(alone[name], rel=1e-5)
        assert [x for s in together["sums"] for x in s] == pytest.approx([x for s in alone["sums"] for x in s], rel=1e-9)


def test_a_weight_without_gradients_is_refused(model, batches):
    packed = nn.Module()
    packed.register_buffer("weight", torch.zeros(2, 2, dtype=torch.int8))
    from rankfold.errors import LayoutError
    from rankfold.training.statistics import _Pass

    looks = _Pass(model, loss, False, None)
    looks.modules = {"packed": packed}
    with pytest.raises(LayoutError, match="int8"):
        looks._gradient_hooks({"packed": (Site("packed", (2, 2)), Recorder("gradient"))}, set())

"""Hosted modules as users find them: copies, pickles, casts, writes through `.data`, and a model that keeps its shape."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import CompositionError, DataError, InactiveError, LayoutError, OptionError
from rankfold.methods.inits.pissa import PiSSA

METHODS = ["lora", "dora", "magnitude+hra", "lora+init:pissa"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))


@pytest.fixture
def x():
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def shake(adaptation):
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("method", METHODS)
def test_writes_through_data_are_seen(model, x, method):
    adaptation = rf.adapt(model, method, rank=2)
    model(x)  # whatever could be kept from this pass must not outlive the write
    shake(adaptation)
    live = model(x)
    adaptation.fold()
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_a_model_of_its_own(model, x, method):
    adaptation = rf.adapt(model, method, rank=2)
    shake(adaptation)
    twin = copy.deepcopy(model)
    before = model(x)
    assert torch.equal(twin(x), before)
    rf.adaptation(twin).parameters()[0].data.add_(1.0)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert rf.adaptation(twin).model is twin


def test_a_pickled_model_comes_back_hosted(model, x):
    shake(rf.adapt(model, "dora", rank=2))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    assert type(again[0]).__name__ == "Linear"
    assert isinstance(again[0], nn.Linear)


def test_the_model_keeps_its_shape(model, x):
    names, text = list(model.state_dict()), [type(m).__name__ for m in model]
    adaptation = rf.adapt(model, "lora", rank=2)
    assert list(model.state_dict()) == names
    assert [type(m).__name__ for m in model][: len(text)] == text
    assert inspect.signature(model[0].forward) is not None
    optimizer_sees = {id(p) for p in model.parameters() if p.requires_grad}
    assert optimizer_sees == {id(p) for p in adaptation.parameters()}
    adaptation.remove()
    assert type(model[0]) is nn.Linear
    assert not hasattr(model, "rankfold")
    assert all(p.requires_grad for p in model.parameters())


def test_casts_reach_the_adapter(model, x):
    shake(rf.adapt(model, "dora", rank=2))
    single = model(x)
    double = model.double()(x.double())
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.float()(x), single, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12)])
@pytest.mark.parametrize(
    ("method", "plan"),
    [("lora", "auto"), ("lora+init:pissa", "auto"), ("hira", "auto"), ("dora", "structured"), ("dora", "plain")],
)
def test_what_follows_a_layer_may_change_its_output_in_place(method, plan, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    gradients = []
    for inplace in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(inplace), nn.Linear(10, 8))
        adaptation = rf.adapt(model, method, rank=2, plan=plan)
        shake(adaptation)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in adaptation.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_the_gradient_of_a_magnitude_says_when_it_lost_the_output():
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(inplace=True), nn.Linear(10, 8))
    rf.adapt(model, "dora", rank=2)
    with pytest.raises(LayoutError, match="plan='structured'"):
        model(torch.ones(3, 12)).sum().backward()


@pytest.mark.parametrize("plan", ["fused", "effective"])
def test_a_plan_without_a_gradient_for_a_base_that_trains_is_refused(model, x, plan):
    rf.adapt(model, "lora", rank=2, plan=plan)
    model[0].weight.requires_grad_(True)
    with pytest.raises(LayoutError, match="the base weight trains too"):
        model(x)


def test_row_norms_of_a_compiled_model_follow_a_cast(model, x):
    rf.adapt(model, "dora", rank=2)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    model.double()
    assert torch.equal(compiled(x.double()), model(x.double()))


class TestAFailedAttachLeavesNothing:
    def fails(self, model, **options):
        with pytest.raises(DataError, match="its rank is 4"):
            rf.adapt(model, "eva", rank=4, batches=[torch.ones(2, 12)], **options)

    def test_no_trace_in_a_model_without_adapters(self, model):
        before = [(n, type(m), id(m)) for n, m in model.named_modules()]
        self.fails(model)
        assert [(n, type(m), id(m)) for n, m in model.named_modules()] == before
        assert all(p.requires_grad for p in model.parameters())

    def test_the_adapters_that_are_there_stay_as_they_are(self, model, x):
        shake(rf.adapt(model, "lora", rank=2, name="first"))
        y, keys = model(x), list(model.rankfold._parameters)
        self.fails(model, name="second")
        with pytest.raises(InactiveError, match="not called by the forward pass: 2"):
            rf.adapt(
                model, "lora", rank=2, name="second", targets=["0", "2"], batches=[x],
                loss=lambda m, batch: m[0](batch).sum(),
            )  # fmt: skip
        assert torch.equal(model(x), y)
        assert list(model.rankfold._parameters) == keys
        assert list(rf.adaptation(model).active) == ["first"]


def test_an_init_of_another_shape_is_refused(model, monkeypatch):
    monkeypatch.setattr(PiSSA, "fill", lambda self, site, W, roles, ctx: {"B": torch.zeros(1, 1), "A": torch.zeros(1, 1)})
    with pytest.raises(CompositionError, match=r"0: tensor 'B' has shape \(10, 2\); its init gave \(1, 1\)"):
        rf.adapt(model, "pissa", rank=2)


def test_an_adapter_that_is_gone_is_watched_no_longer(model, x):
    adaptation = rf.adapt(model, "lora", rank=2, targets=["0"], name="a")
    optimizer = adaptation.optimizer()
    rf.adapt(model, "lora", rank=2, targets=["2"], name="b")
    adaptation.remove("a")
    optimizer.step()  # of what is gone: nothing happens
    assert model(x).shape == (3, 8)


def test_the_encoder_gets_its_fast_path_back():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 1)
    adaptation = rf.adapt(model, "lora", rank=2, targets=["linear1"])
    assert type(model.layers[0]).forward is not nn.TransformerEncoderLayer.forward
    adaptation.remove()
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
    assert type(model) is nn.TransformerEncoder


@pytest.mark.parametrize("with_loss", [True, False])
def test_the_probe_leaves_no_trace(with_loss):
    model = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 8))
    model[1].eval()  # one layer in a mode of its own
    loss = (lambda m, batch: m(batch).square().mean()) if with_loss else None
    buffers, modes = [b.clone() for b in model.buffers()], [m.training for m in model.modules()]
    state = torch.get_rng_state()
    rf.adapt(model, "lora", rank=2, batches=[torch.randn(6, 12, generator=torch.Generator().manual_seed(0))], loss=loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
    assert [m.training for n, m in model.named_modules() if n != "rankfold"] == modes


def test_terms_of_one_name_add_up(model):
    adaptation = rf.adapt(model, "hra", rank=2, orthogonality=1.0, name="a")
    alone = adaptation.objectives()["orthogonality"]
    rf.adapt(model, "hra", rank=2, orthogonality=2.0, name="b")
    both = adaptation.use("a", "b").objectives()["orthogonality"]
    torch.testing.assert_close(both, 3.0 * alone)


def test_names_that_mean_nothing_are_refused_at_once(model):
    for wrong in ({"plan": "fussed"}, {"memory": "kepe"}):
        with pytest.raises(OptionError, match="allowed: auto"):
            rf.adapt(model, "lora", rank=2, **wrong)
    adaptation = rf.adapt(model, "lora", rank=2)
    with pytest.raises(OptionError, match="twice"):
        adaptation.use("default", "default", weight=[0.5, 0.5])


def test_parsed_targets_take_more_to_exclude(model):
    assert [s.key for s in rf.adapt(model, "lora", rank=2, targets=rf.Targets.of("all-linear"), exclude="2").sites] == ["0"]


def test_a_regular_expression_may_end_with_a_class_of_characters(model):
    assert [s.key for s in rf.adapt(model, "lora", rank=2, targets="re:[02]", regex=True).sites] == ["0", "2"]


def test_an_option_outside_its_bounds_is_named_as_one_types_it():
    with pytest.raises(OptionError, match=r"^lora-ga\.gamma: got -1"):
        rf.method("lora-ga", gamma=-1)


def test_each_adapter_keeps_its_plan(model, x):
    """A later adapt or load decides nothing for adapters that are there; who is on decides, and "auto" follows the others."""
    a = rf.adapt(model, "lora", rank=2, name="first", plan="plain", memory="recompute")
    store = a.store
    assert (store.plan, store.memory) == ("plain", "recompute")
    rf.adapt(model, "lora", rank=2, name="second")
    assert (store.plan, store.memory) == ("auto", "auto")
    a.use("first")
    assert (store.plan, store.memory) == ("plain", "recompute")
    a.use("second", "first")
    assert (store.plan, store.memory) == ("plain", "recompute")
    a.remove("first")
    assert (store.plan, store.memory, list(store.active)) == ("auto", "auto", ["second"])


def test_a_loaded_adapter_leaves_the_plans_of_others(model, x, tmp_path):
    a = rf.adapt(model, "lora", rank=2, name="first", plan="effective")
    a.save(tmp_path / "a")
    rf.load(model, tmp_path / "a", name="second", plan="plain")
    assert a.store.plan == "plain"
    a.use("first")
    assert a.store.plan == "effective"


def test_adapters_of_different_plans_are_not_on_together(model, x):
    a = rf.adapt(model, "lora", rank=2, name="first", plan="plain")
    rf.adapt(model, "lora", rank=2, name="second", plan="effective")
    before = a.store.plan
    with pytest.raises(OptionError, match=r"first plan='plain', second plan='effective'.*plan='auto'"):
        a.use("first", "second")
    assert (list(a.store.active), a.store.plan) == (["second"], before)
    model(x)


def test_why_a_structure_does_not_fit_has_a_type():
    """Another site or another option: not a text that has to be read."""
    from rankfold.core import Site, TooLarge, Unfit
    from rankfold.methods.structures.bone import Bone
    from rankfold.methods.structures.lora import LoRA

    site = Site("query", (12, 8))
    assert LoRA(rank=8).fits(site) is None
    assert LoRA(rank=9).fits(site) == TooLarge("rank 9 is larger than the matrix: min(out, in) = 8")
    assert type(Bone(rank=5).fits(site)) is Unfit

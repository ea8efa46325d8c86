"""The watch of the first forward passes: what is bypassed raises; what the model left out, or ran by itself, is no fault."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

import rankfold as rf
from rankfold.core import probing
from rankfold.errors import InactiveError


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


def whisper(**options):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=32, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
        suppress_tokens=None, **options,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


IDS = torch.arange(3, 11).view(2, 4)
SOUND = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
CALLS = {
    "t5": (t5, {"input_ids": IDS}, {"input_ids": IDS, "labels": IDS}),
    "whisper": (whisper, {"input_features": SOUND}, {"input_features": SOUND, "labels": IDS[:1]}),
}


def generated(model, inputs):
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("first", ["generate", "train"])
def test_an_encoder_that_generate_runs_by_itself_is_no_bypass(kind, first):
    made, asked, taught = CALLS[kind]
    model = made().eval()
    plain = generated(model, asked)
    adaptation = rf.adapt(model, "lora", rank=2)
    if first == "generate":
        assert torch.equal(generated(model, asked), plain)
        assert model.rankfold.watchers  # in train mode it still looks
    model.train()(**taught).loss.backward()
    assert all(p.grad is not None for p in adaptation.parameters())
    assert torch.equal(generated(model.eval(), asked), plain)
    assert not any(isinstance(w, probing.CallWatch) for w in model.rankfold.watchers)


class Seeing(nn.Module):
    """A tower for pictures beside a body; only some batches have pictures."""

    def __init__(self):
        super().__init__()
        self.tower, self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x, picture=None):
        return self.body(x if picture is None else x + self.tower(picture))


def test_a_tower_without_an_input_is_said_once_and_named_at_the_end():
    model, x = Seeing(), torch.randn(2, 8)
    adaptation = rf.adapt(model, "lora", rank=2)
    with pytest.warns(UserWarning, match=r"1 site\(s\) were not called so far.*tower\.0"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model.eval()(x, picture=x)
    optimizer = adaptation.optimizer(lr=0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(InactiveError, match=r"no gradient reached tower\.0"):
        adaptation.attached["default"].engine.check()


class Dropping(nn.Module):
    """LayerDrop: while training it leaves out the layers that `dropped` says."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
        self.dropped = [1]

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            if not (self.training and k in self.dropped):
                x = x + layer(x)
        return x


def test_a_layer_dropped_by_chance_stays_adapted():
    """With batches too: the pass in eval mode has called it, and nothing can be said of its gradient."""
    model, x = Dropping(), torch.randn(2, 8)
    adaptation = rf.adapt(model, "lora", rank=2, batches=[x], loss=lambda m, b: m(b).square().sum())
    assert len(adaptation.sites) == 3
    assert not adaptation.dropped
    adaptation.remove()
    rf.adapt(model, "lora", rank=2)
    model.eval()(x)
    model.train()(x)  # quiet: eval mode has called it


def test_whisper_with_layerdrop_trains_without_a_probe():
    model = whisper(encoder_layerdrop=1.0)
    rf.adapt(model, "lora", rank=2)
    with pytest.warns(UserWarning, match=r"were not called so far.*model\.encoder\.layers\.0"):
        model.train()(input_features=SOUND, labels=IDS[:1])


class Routed(nn.Module):
    """Experts under another name, in a list; the first token decides."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.ffns = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)])
        self.chosen = 2

    def forward(self, x):
        return x + self.router(x)[..., self.chosen, None] * self.ffns[self.chosen](x)


def test_an_expert_that_the_first_batch_does_not_reach():
    model, x = Routed(), torch.randn(2, 8)
    adaptation = rf.adapt(model, "lora", rank=2)
    with pytest.warns(UserWarning, match=r"4 site\(s\) were not called so far.*ffns\.0\.0, ffns\.0\.2, ffns\.1\.0, ffns\.1\.2"):
        model.train()(x)
    for model.chosen in range(3):
        model(x).square().sum().backward()
    assert all(p.grad is not None for n, p in adaptation.tensors().items() if "router" not in n)


class Reading(nn.Module):
    """One layer calls its first map and reads the weight of its second."""

    def __init__(self):
        super().__init__()
        self.layer = _Layer()

    def forward(self, x):
        return self.layer(x)


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)
        self.listed = nn.ModuleList([nn.Linear(8, 8)])
        self.skip = False

    def forward(self, x):
        if self.skip:
            raise RuntimeError("skipped")
        return F.linear(self.called(x), self.read.weight @ self.listed[0].weight)


@pytest.mark.parametrize("target", ["read", "listed.0"])
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_read_raises_in_either_mode(target, training):
    model, x = Reading().train(training), torch.randn(2, 8)
    rf.adapt(model, "lora", rank=2, targets=["layer.called", f"layer.{target}"])
    with pytest.raises(InactiveError, match=rf"1 site\(s\) were not called by the forward pass: layer\.{target}"):
        model(x)


def test_a_pass_that_raises_leaves_no_hook():
    model, x = Reading(), torch.randn(2, 8)
    rf.adapt(model, "lora", rank=2, targets=["layer.called"])
    model.layer.skip = True
    with pytest.raises(RuntimeError, match="skipped"):
        model(x)
    model.layer.skip = False
    for mode in (True, False):
        model.train(mode)(x)
    assert not model.layer._forward_pre_hooks
    assert not any(isinstance(w, probing.CallWatch) for w in model.rankfold.watchers)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_blocks_compiled_by_themselves_are_not_judged(how):
    """Within a compiled block nothing counts calls."""
    model, x = Reading(), torch.randn(2, 8)
    expected = model(x)
    adaptation = rf.adapt(model, "lora", rank=2, targets=["layer.called"])
    if how == "in place":
        model.layer.compile(backend="eager", fullgraph=True)
    else:
        model.layer = torch.compile(model.layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    for p in adaptation.parameters():
        p.data.normal_()
    assert not torch.allclose(model(x), expected)


# what the tests must reject


def test_the_rule_is_seen_to_fail(monkeypatch):
    """Without the holders every part that is left out is a bypass, as it once was."""
    monkeypatch.setattr(probing.Entries, "close", lambda self: set())
    model = t5().eval()
    rf.adapt(model, "lora", rank=2)
    with pytest.raises(InactiveError, match=r"encoder\.block\.0"):
        generated(model, {"input_ids": IDS})

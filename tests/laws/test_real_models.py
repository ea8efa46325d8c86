"""Laws 1 to 7 on models as people have them: tiny and random, of transformers' own configurations, with every kind of site."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rankfold as rf
from rankfold.core.structure import trait
from rankfold.errors import CompositionError, InactiveError
from rankfold.jobs.exchange import export
from rankfold.training.checkpoints import ADAPTER
from rankfold.training.loop import Interrupted, LoopSettings
from rankfold.training.loop import train as run_loop

from .checks import Checks
from .definition import Definition, gradients
from .subjects import shake, small
from .test_cost import declared
from .tolerances import TOLERANCES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft reads the old name
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # of peft, where a tied end is adapted
    pytest.mark.filterwarnings("ignore:fold. .* shared its weight"),
]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 3]])
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 8, "patch_size": 4}


@dataclass
class Real:
    """A model, what it is asked, which sites are adapted, and what it gives.

    Args:
        targets: patterns for every method.
        vocabulary: embeddings, for methods that don't transform the input.
        kinds: of the sites that must be among those adapted.
        output: field of the model's answer.
    """

    make: Callable[[], nn.Module]
    batch: Mapping[str, Tensor]
    targets: list[str]
    vocabulary: list[str]
    kinds: set[str]
    output: str = "logits"
    original: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.original = self.make().double().eval()
            for name, p in self.original.named_parameters():
                if p.ndim == 1 and not p.any():  # biases that start at zero hide a lost bias
                    nn.init.normal_(p, std=0.1)
                elif p.ndim > 1 and p.std() < 0.1 and "layer_scale" not in name:
                    nn.init.normal_(p, std=0.2)

    def pristine(self) -> nn.Module:
        return copy.deepcopy(self.original)

    def read(self, model: Any) -> Tensor:
        return getattr(model(**self.batch), self.output)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        y = getattr(model(**batch), self.output)
        return (y - torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape)).square().mean()


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def clip() -> nn.Module:
    text = {**WIDTHS, **TEXT, "eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**WIDTHS, **IMAGE}, projection_dim=12))


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(
        **WIDTHS, **TEXT, **ENDS, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, head_dim=8
    )
    config._experts_implementation = "eager"
    return hf.MixtralForCausalLM(config)


def whisper() -> nn.Module:
    heads = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("attention_heads",)}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0,
            num_mel_bins=4, max_source_positions=8, max_target_positions=8, decoder_start_token_id=3, **heads, **ENDS,
        )
    )  # fmt: skip


def encoder() -> nn.Module:
    class Encoder(nn.Module):
        """torch's own encoder under an embedding."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 5)
            layer = nn.TransformerEncoderLayer(8, 1, 12, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, input_ids: Tensor) -> Any:
            return hf.modeling_outputs.ModelOutput(logits=self.head(self.encoder(self.embed(input_ids))))

    return Encoder()


ROPE = {**WIDTHS, **TEXT, **ENDS, "num_key_value_heads": 1}
MODELS: dict[str, Callable[[], Real]] = {
    "llama": lambda: Real(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE)),
        {"input_ids": IDS}, ["*_proj", "lm_head"], ["embed_tokens"], {"linear", "embedding"},
    ),
    "gpt2": lambda: Real(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2,
                          attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        ),
        {"input_ids": IDS}, ["c_attn[q]", "c_attn[v]", "c_proj", "c_fc"], ["wpe"], {"conv1d", "embedding"},
    ),
    "bert": lambda: Real(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDTHS, **TEXT, **NO_DROPOUT, type_vocab_size=6, num_labels=3)),
        {"input_ids": IDS, "attention_mask": (IDS != 3).long()},
        ["query", "value", "dense", "classifier"], ["word_embeddings", "position_embeddings", "token_type_embeddings"],
        {"linear", "embedding"},
    ),
    "vit": lambda: Real(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**WIDTHS, **IMAGE, **NO_DROPOUT, num_labels=3)),
        {"pixel_values": floats(2, 3, 8, 8)}, ["*_proj", "fc1", "fc2", "projection", "classifier"], [],
        {"linear", "convolution"},
    ),
    "clip": lambda: Real(
        clip, {"input_ids": IDS, "pixel_values": floats(2, 3, 8, 8), "attention_mask": torch.ones_like(IDS)},
        ["*_proj", "fc1", "fc2", "*_projection", "patch_embedding"], ["token_embedding", "*.position_embedding"],
        {"linear", "convolution", "embedding"}, "logits_per_image",
    ),
    "t5": lambda: Real(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
                        decoder_start_token_id=0, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}, ["q", "k", "v", "o", "wi", "wo", "lm_head"],
        ["encoder.embed_tokens", "decoder.embed_tokens", "relative_attention_bias"], {"linear", "embedding"},
    ),
    "whisper": lambda: Real(
        whisper, {"input_features": floats(2, 4, 16), "decoder_input_ids": IDS},
        ["q_proj", "v_proj", "out_proj", "fc1", "fc2", "conv1", "conv2"], ["embed_tokens"],
        {"linear", "convolution", "embedding"},
    ),
    "mixtral": lambda: Real(
        mixtral, {"input_ids": IDS}, ["q_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"], ["embed_tokens"],
        {"linear", "experts", "embedding"},
    ),
    "convnext": lambda: Real(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, image_size=16, num_labels=3,
                              layer_scale_init_value=1.0)
        ),
        {"pixel_values": floats(2, 3, 16, 16)},
        ["pwconv1", "pwconv2", "patch_embeddings", "downsampling_layer.1", "classifier"], [],
        {"linear", "convolution"},
    ),
    "encoder": lambda: Real(
        encoder, {"input_ids": IDS},
        ["in_proj_weight[q]", "in_proj_weight[v]", "out_proj", "linear1", "linear2", "head"], ["embed"],
        {"linear", "multihead", "embedding"},
    ),
}  # fmt: skip
METHODS = ["lora", "dora", "hra", "full", "hadamard", "kron", "shira", "pissa", "lora-ga", "hira"]
EXTRAS = ["norms"]
PLANS = ("auto", "plain", "effective")


def adapted(real: Real, model: nn.Module, m: Any, **options: Any) -> rf.Adaptation:
    vocabulary = [] if trait(m.structure, "acts_on_input") else real.vocabulary
    return rf.adapt(model, m, targets=[*real.targets, *vocabulary], seed=1, **options)


def data(real: Real) -> dict[str, Any]:
    return {"batches": [real.batch], "loss": real.loss}


def check_model(name: str, method: str, folder: Any) -> None:
    real, m = MODELS[name](), small(method)
    with Checks(f"laws 1 to 7, {m}, {name}") as check:
        model = real.pristine().requires_grad_(False)
        y0 = real.read(model)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        a = adapted(real, model, m, extras=EXTRAS, **data(real))
        found = {s.kind for s in a.sites}
        missing = real.kinds - found - ({"embedding"} if trait(m.structure, "acts_on_input") else set())
        check.that(not missing, f"adapts {sorted(found)}, and no {sorted(missing)}")

        def unchanged(when: str) -> None:
            for key, value in model.state_dict().items():
                check.bitwise(value, state[key], f"law 1, {when}: {key}")
            with a.disabled():
                check.bitwise(real.read(model).detach(), y0, f"law 1, {when}: disabled")

        unchanged("after adapt")
        check.close(real.read(model).detach(), y0, TOLERANCES[torch.float64].start, "law 2: output at the start")
        shake(a, 0.2)
        y = check_definition(check, real, model, a)
        check_cost(check, model, a)
        a.save(folder / "adapter")
        loaded = rf.load(real.pristine().requires_grad_(False), folder / "adapter")
        check.bitwise(real.read(loaded.model).detach(), y, "law 4: output after loading")
        a.fold()
        check.close(real.read(model).detach(), y, TOLERANCES[torch.float64].value, "law 3: folded")
        a.unfold()
        unchanged("at the end")


def check_definition(check: Checks, real: Real, model: nn.Module, a: rf.Adaptation) -> Tensor:
    definition = Definition(real, a)  # type: ignore[arg-type]
    wanted = {k: t for k, t in definition.leaves.items() if t.requires_grad}
    out = torch.func.functional_call(definition.model, definition.weights(), (), dict(real.batch), tie_weights=False)
    expected = getattr(out, real.output)
    cotangent = torch.cos(torch.arange(expected.numel(), dtype=torch.float64)).view(expected.shape)
    grads0 = gradients(expected, cotangent, wanted)
    largest = max(g.norm().item() for g in grads0.values())
    for plan in PLANS:
        a.store.plan = plan
        y = real.read(model)
        check.close(y.detach(), expected.detach(), TOLERANCES[torch.float64].value, f"law 3, plan {plan}: output")
        for key, g in gradients(y, cotangent, {k: a.store.tensor(k) for k in wanted}).items():
            gap = (g.double() - grads0[key]).norm().item() / max(grads0[key].norm().item(), 1e-3 * largest)
            check.that(gap < TOLERANCES[torch.float64].grad, f"law 3, plan {plan}: gradient of {key} is off by {gap:.3g}")
    a.store.plan = "auto"
    check.that(any(g.any() for k, g in grads0.items() if "/extra/" in k), "law 6: no gradient reaches the extra tensors")
    for slot in a.slots():
        own = [grads0[k] for k, _ in slot.binding.values() if k in grads0]
        check.that(not own or any(g.any() for g in own), f"law 6: no gradient reaches {slot.site.key}")
    return real.read(model).detach()


def check_cost(check: Checks, model: nn.Module, a: rf.Adaptation) -> None:
    extras = sum(a.store.tensor(e.key).numel() for e in a._get(None).member.extras.values())
    trained = extras + sum(size for size, trains in declared(a).values() if trains)
    check.that(a.parameter_count() == trained, f"law 7: counts {a.parameter_count()}, declared are {trained}")
    registered = [p for n, p in model.named_parameters() if n.startswith("rankfold.") and p.requires_grad]
    check.that(sum(p.numel() for p in registered) == trained, "law 7: the model's own parameters say otherwise")


def check_resume(name: str, method: str, folder: Any) -> None:
    """One step, a checkpoint, a fresh model and a second step are two steps."""
    real, m = MODELS[name](), small(method)

    def run(a: rf.Adaptation, resume: bool = False, stop: int | None = None) -> Any:
        settings = LoopSettings(lr=0.01, max_steps=2, folder=folder, resume=resume, progress=False)
        pause = lambda record: record["step"] == stop and signal.raise_signal(signal.SIGINT)
        return run_loop(a.model, a, [real.batch, real.batch], real.loss, settings, on_step=pause)

    with Checks(f"law 4, {m}, {name}, resume") as check:
        whole = adapted(real, real.pristine(), m, extras=EXTRAS, **data(real))
        history = run(whole)
        with pytest.raises(Interrupted):
            run(adapted(real, real.pristine(), m, extras=EXTRAS, **data(real)), stop=1)
        resumed = rf.load(real.pristine(), folder / ADAPTER)
        check.that(run(resumed, resume=True).losses == history.losses, "other losses after the checkpoint")
        for key, tensor in whole.tensors().items():
            check.bitwise(resumed.tensors()[key].detach(), tensor.detach(), key)


UNLIKE = {"mixtral": "dora", "encoder": "dora", "gpt2": "dora"}
"""What peft has no form for: magnitudes over stacks, over attention, and of some rows of a weight."""


UNREADABLE = {"whisper": ["conv1", "conv2"]}
"""Whisper asks its convolutions for their stride, and peft's wrapper has none."""


def check_peft(name: str, method: str, folder: Any) -> None:
    """Law 5: peft computes what we exported; what it has no form for is refused by name."""
    import peft

    real, m = MODELS[name](), small(method)
    with Checks(f"law 5, {m}, {name}, peft") as check:
        a = adapted(real, real.pristine().float().requires_grad_(False), m, exclude=UNREADABLE.get(name, []))
        batch = {k: v.float() if v.is_floating_point() else v for k, v in real.batch.items()}
        shake(a, 0.2)
        expected = getattr(a.model(**batch), real.output).detach()
        if UNLIKE.get(name) == method:
            with pytest.raises(CompositionError, match=r"magnitude|DoRA|rescaled"):
                export(a.model, a, "peft", folder)
            check.that(True, "refused by name")
            return
        report = export(a.model, a, "peft", folder)
        check.that(report.largest == 0, f"said to be off by {report.largest:.3g} at {report.worst}")
        theirs = peft.PeftModel(real.pristine().float(), peft.PeftConfig.from_pretrained(folder)).eval()
        missing = theirs.load_adapter(folder, "default")
        check.that(not missing.unexpected_keys, f"peft does not know {missing.unexpected_keys[:3]}")
        check.close(getattr(theirs(**batch), real.output).detach(), expected, 2e-5, "what peft computes")
        back = rf.load(real.pristine().float().requires_grad_(False), folder)
        check.close(getattr(back.model(**batch), real.output).detach(), expected, 2e-5, "what we read back")


COVER = [(name, METHODS[(k + j) % len(METHODS)]) for j in (0, 3) for k, name in enumerate(MODELS)]
"""Every model twice and every method twice: the quick cells; all pairs are in `full`."""


@pytest.mark.parametrize(("name", "method"), COVER)
def test_laws_on_a_real_model(name, method, tmp_path):
    check_model(name, method, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_laws_on_every_real_model(name, method, tmp_path):
    check_model(name, method, tmp_path)


@pytest.mark.parametrize(("name", "method"), [(name, METHODS[k]) for k, name in enumerate(MODELS)])
def test_a_resumed_run_on_a_real_model(name, method, tmp_path):
    check_resume(name, method, tmp_path / "run")


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_we_export(name, tmp_path):
    check_peft(name, "lora", tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("method", ["dora", "hra", "pissa"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_we_export_of_others(name, method, tmp_path):
    check_peft(name, method, tmp_path)


# What the laws must reject


def forgets_the_output_projection(monkeypatch):
    """Attention without the change of the weight that it reads from a child."""
    from rankfold.core.kinds.multihead import Multihead

    native = Multihead.forward

    def forward(self, host, module, native_forward, groups, args, kwargs):
        groups = [g for g in groups if g[0].site.param != "out_proj.weight"] or groups
        return native(self, host, module, native_forward, groups, args, kwargs)

    monkeypatch.setattr(Multihead, "forward", forward)


def forgets_the_extras(monkeypatch):
    from rankfold.core.host import Host

    monkeypatch.setattr(Host, "own_values", lambda self, module, beside=(): {})


@pytest.mark.parametrize("mutant", [forgets_the_output_projection, forgets_the_extras], ids=lambda f: f.__name__)
def test_the_laws_reject(mutant, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises((AssertionError, InactiveError), match=r"law 3|law 6|no gradient reaches"):
        check_model("encoder", "lora", tmp_path)

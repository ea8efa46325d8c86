"""Ours read by peft and theirs read by us: the same logits, for LoRA and DoRA the same gradients. peft itself is the oracle."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import rankfold as rf
from rankfold.errors import FileError, FingerprintError
from rankfold.jobs.exchange import export

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.arange(1, 13).view(2, 6)


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    return hf.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_labels=3,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def move(parameters) -> None:
    """Another value for everything that trains, so that a wrong or missing tensor shows."""
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.data += 0.1 * torch.randn(p.shape, generator=generator)


def read_by_peft(base: nn.Module, folder) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft remarks on tied weights
        return peft.PeftModel.from_pretrained(base, folder).eval()


OURS = {
    "lora": (llama, "lora", {"rank": 3, "alpha": 5.0}, {}),
    "rslora": (llama, "rslora", {"rank": 3, "alpha": 5.0}, {}),
    "dora": (llama, "dora", {"rank": 3, "alpha": 5.0}, {}),
    "rotation": (llama, "hra", {"rank": 2}, {}),
    "magnitude over a rotation": (llama, "magnitude+hra", {"rank": 2}, {}),
    "offset, as rank 2r": (llama, "pissa", {"rank": 3}, {}),
    "no low rank at all": (llama, "hira", {"rank": 2}, {}),
    "embedding": (llama, "lora", {"rank": 3}, {"targets": ["embed_tokens", "q_proj"]}),
    "embedding with magnitude": (llama, "dora", {"rank": 3}, {"targets": ["embed_tokens"]}),
    "conv1d": (gpt2, "lora", {"rank": 3}, {}),
    "conv1d with magnitude": (gpt2, "dora", {"rank": 3}, {}),
    "row slices": (gpt2, "lora", {"rank": 3, "alpha": 2.0}, {"targets": ["c_attn[q]", "c_attn[v]"]}),
    "head": (bert, "lora", {"rank": 3}, {"extras": ["classifier"]}),
    "head and norms": (bert, "dora", {"rank": 3}, {"extras": ["classifier", "LayerNorm"]}),
    "untied head": (llama, "lora", {"rank": 3}, {"extras": ["lm_head"]}),
    "tied embedding": (lambda: llama(True), "lora", {"rank": 3}, {"targets": ["embed_tokens", "q_proj"]}),
    "tied head": (lambda: llama(True), "lora", {"rank": 3}, {"extras": ["lm_head"]}),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_read_by_peft_computes_the_same(case, tmp_path):
    make, method, options, where = OURS[case]
    model, base = make(), make()
    adaptation = rf.adapt(model, method, **where, **options)
    move(adaptation.parameters())
    report = export(model, adaptation, "peft", tmp_path / "out")
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), **CLOSE), "the adapter does nothing, so this test shows nothing"
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path / "out")), expected, **CLOSE)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert report.errors.keys() == {s.site.key for s in adaptation.slots()}
    assert report.largest < 1e-6


def test_an_offset_has_rank_2r_and_a_rotation_rank_r(tmp_path):
    model = llama()
    adaptation = rf.adapt(model, "pissa", rank=3)
    move(adaptation.parameters())
    assert set(export(model, adaptation, "peft", tmp_path / "a").ranks.values()) == {6}
    adaptation.remove()
    adaptation = rf.adapt(model, "hra", rank=2)
    assert set(export(model, adaptation, "peft", tmp_path / "b").ranks.values()) == {2}


def test_ranks_that_differ_by_site(tmp_path):
    model, base = llama(), llama()
    adaptation = rf.adapt(model, "lora", rank=2, alpha=3.0, targets=["q_proj"])
    rf.adapt(model, "lora", rank=4, alpha=1.0, targets=["up_proj"], name="second")
    move(adaptation.parameters("default") + adaptation.parameters("second"))
    adaptation.use("default", "second")
    expected = logits(model)
    for name in ("default", "second"):
        export(model, adaptation, "peft", tmp_path / name, name=name)
    both = read_by_peft(base, tmp_path / "default")
    both.load_adapter(tmp_path / "second", adapter_name="second")
    both.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(both), expected, **CLOSE)


COMMON = {"r": 3, "lora_alpha": 5}
THEIRS = {
    "lora": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "patterns": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    ),
    "rslora with patterns": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d with magnitude": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "head": (bert, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    "biases": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "untied head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied embedding": (lambda: llama(True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": (lambda: llama(True), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied both": (
        lambda: llama(True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
}


def trained_by_peft(make, settings, folder) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), peft.LoraConfig(**{**COMMON, **settings})).eval()
        move(p for p in model.parameters() if p.requires_grad)
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_read_by_us_computes_the_same(case, tmp_path):
    make, settings = THEIRS[case]
    theirs, model = trained_by_peft(make, settings, tmp_path), make()
    before = logits(model)
    adaptation = rf.load(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    assert not torch.allclose(logits(model), before, **CLOSE)
    assert "lora" in adaptation.method.text


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "patterns", "conv1d with magnitude"])
def test_theirs_read_by_us_has_the_same_gradients(case, tmp_path):
    make, settings = THEIRS[case]
    theirs, model = trained_by_peft(make, settings, tmp_path), make()
    adaptation = rf.load(model, tmp_path)
    logits(theirs).square().mean().backward()
    logits(model).square().mean().backward()
    found = 0
    for name, p in theirs.named_parameters():
        if not p.requires_grad:
            continue
        site, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        field = {"A": "A", "B": "B", "magnitude_vector": "m"}[part.partition(".")[0]]
        ours = adaptation.store.tensor(f"default/{site}/{field}").grad
        torch.testing.assert_close(ours, p.grad.reshape(ours.shape), rtol=1e-4, atol=1e-7)
        found += 1
    assert found == len(adaptation.parameters())


@pytest.mark.parametrize("case", ["lora", "rslora with patterns", "dora", "head", "embedding"])
def test_theirs_saved_by_us_is_the_same_again(case, tmp_path):
    make, settings = THEIRS[case]
    trained_by_peft(make, settings, tmp_path / "theirs")
    model = make()
    expected = logits(rf.load(model, tmp_path / "theirs").model)
    rf.adaptation(model).save(tmp_path / "ours")
    again = rf.load(make(), tmp_path / "ours").model
    assert torch.equal(logits(again), expected)
    export(again, rf.adaptation(again), "peft", tmp_path / "back")
    torch.testing.assert_close(logits(read_by_peft(make(), tmp_path / "back")), expected, **CLOSE)


def test_a_loaded_adapter_trains_on(tmp_path):
    trained_by_peft(*THEIRS["dora"], tmp_path)
    adaptation = rf.load(llama(), tmp_path)
    optimizer = adaptation.optimizer(lr=1e-2)
    before = copy.deepcopy(adaptation.parameters())
    logits(adaptation.model).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, adaptation.parameters()))


# what does not fit is said


def test_a_peft_folder_of_another_model_is_refused_by_name(tmp_path):
    trained_by_peft(*THEIRS["lora"], tmp_path)
    with pytest.raises(FileError, match=r"no site 'model.layers.0..*nearest: "):
        rf.load(gpt2(), tmp_path)


def test_another_width_is_refused_with_both_shapes(tmp_path):
    trained_by_peft(*THEIRS["lora"], tmp_path)
    config = llama().config
    config.intermediate_size = 48
    with pytest.raises(FileError, match=r"\(24, 40\).*\(24, 48\)"):
        rf.load(hf.LlamaForCausalLM(config), tmp_path)


def test_a_base_copy_that_is_not_this_base_is_refused(tmp_path):
    theirs = trained_by_peft(*THEIRS["embedding"], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    other = llama()
    other.model.embed_tokens.weight.data.mul_(1.5)
    with pytest.raises(FingerprintError, match="embed_tokens"):
        rf.load(other, tmp_path)
    rf.load(other, tmp_path, force=True)


def test_dropout_of_training_is_said_to_be_gone(tmp_path):
    make, settings = THEIRS["lora"]
    trained_by_peft(make, {**settings, "lora_dropout": 0.25}, tmp_path)
    with pytest.warns(UserWarning, match="dropout 0.25"):
        rf.load(llama(), tmp_path)


@pytest.mark.parametrize("alpha", [0, -4])
def test_a_scale_that_is_not_positive_is_refused(alpha, tmp_path):
    make, settings = THEIRS["lora"]
    trained_by_peft(make, {**settings, "lora_alpha": alpha}, tmp_path)
    with pytest.raises(FileError, match="scale"):
        rf.load(llama(), tmp_path)

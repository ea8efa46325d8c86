"""Adapters as single files, as a person types it."""

import json
from pathlib import Path

import pytest
import torch

import rankfold as rf
from rankfold.adapters.files import write_tensors
from rankfold.jobs.models import load_model


@pytest.fixture
def place(tmp_path):
    """With an adapter of tiny-llama in "ours"."""
    adaptation = rf.adapt(load_model("tiny-llama", "lm").model, "lora", rank=2, targets=["layers.0.self_attn.q_proj", "lm_head"])
    for p in adaptation.parameters():
        p.data += 0.1
    adaptation.save(tmp_path / "ours")
    return tmp_path


def test_from_a_folder_to_kohya_to_gguf(command, place):
    how = ("--model", "tiny-llama", "--task", "lm")
    code, out, err = command("export", place / "ours", "--to", "kohya", "--out", place / "lora.safetensors", *how)
    assert code == 0, err
    assert "kohya, 2 sites, float32: exact" in out
    code, out, err = command("export", place / "lora.safetensors", "--to", "gguf", "--out", place / "out", *how)
    assert code == 0, err
    assert "gguf, 2 sites, float32: exact" in out
    assert (place / "out" / "lora.gguf").read_bytes()[:4] == b"GGUF"
    code, out, err = command("inspect", place / "lora.safetensors")
    assert code == 0, err
    assert "kohya adapter" in out


A, B = torch.ones(2, 6), torch.ones(8, 2)
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}
FOREIGN = {  # what stands in the one file of a folder, the config beside it, and what inspect calls it
    "kohya": ({"lora_unet_q.lora_down.weight": A, "lora_unet_q.lora_up.weight": B}, None, "kohya adapter"),
    "lycoris": ({f"lora_unet_q.hada_w{k}_{x}": t for k in "12" for x, t in (("a", B), ("b", A))}, None, "hadamard"),
    "diffusers": ({"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B}, None, "diffusers adapter"),
    "torchtune": (
        {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B}, CONFIG, "torchtune adapter",
    ),
    "peft": ({"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}, CONFIG, "peft adapter"),
}  # fmt: skip


def folder(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, object] | None) -> Path:
    path.mkdir()
    write_tensors(path / "adapter_model.safetensors", tensors)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("form", FOREIGN)
def test_inspect_says_whose_file_it_is(form, command, tmp_path):
    tensors, config, said = FOREIGN[form]
    path = folder(tmp_path / "a", tensors, config)
    code, out, err = command("inspect", path if config else path / "adapter_model.safetensors")
    assert code == 0, err
    assert said in out
    assert "8 x 6" in out
    code, out, err = command("inspect", path, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["rank"], row["shape"]) == (2, [8, 6])


@pytest.mark.parametrize("form", ["torchtune", "peft"])
def test_a_hostile_number_is_one_line(form, command, tmp_path):
    tensors, config, _ = FOREIGN[form]
    path = folder(tmp_path / "a", tensors, {**config, "lora_alpha": 10**400})
    code, _, err = command("inspect", path)
    assert code == 2
    assert "lora_alpha 1000" in err
    assert "Traceback" not in err


def test_serving_prints_the_error_of_every_site(command, place):
    how = ("--model", "tiny-llama", "--task", "lm", "--dtype", "bfloat16")
    code, out, err = command("export", place / "ours", "--to", "serving", "--out", place / "out", *how)
    assert code == 0, err
    assert "relative error of the change" in out
    assert "serving, 2 sites, bfloat16: largest error" in out
    assert {p.name for p in (place / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    code, out, err = command("inspect", place / "out")
    assert code == 0, err
    assert "peft adapter" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "out/lora.gguf"), "does not read it"),
        (("export", "lora.safetensors", "--to", "peft", "--out", "p"), "name it: --model M"),
        (("export", "ours", "--to", "gguff", "--out", "p"), "nearest: gguf"),
        (("export", "ours", "--to", "koya", "--out", "p"), "nearest: kohya"),
        (("export", "ours", "--to", "serving", "--out", "p", "--dtype", "bfloat"), "nearest: bfloat16"),
        (("export", "lora.safetensors", "--to", "kohya", "--out", "p", "--model", "all-minilm-l6-v2"), "fits no module"),
    ],
)
def test_what_can_not_be_done_is_said(command, place, monkeypatch, arguments, said):
    monkeypatch.chdir(place)
    (place / "out").mkdir()
    (place / "out" / "lora.gguf").write_bytes(b"GGUF")
    command("export", "ours", "--to", "kohya", "--out", "lora.safetensors", "--model", "tiny-llama", "--task", "lm")
    code, _, err = command(*arguments)
    assert code == 2
    assert said in err
    assert not (place / "p").exists()


@pytest.fixture
def mixture(tmp_path):
    """A small Mixtral on the disk, with an adapter of its experts in "ours"."""
    import transformers as hf

    config = hf.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    model = hf.MixtralForCausalLM.from_pretrained(tmp_path / "model")
    adaptation = rf.adapt(model, "lora", rank=2, targets="*.experts.*")
    for p in adaptation.parameters():
        p.data += 0.1
    adaptation.save(tmp_path / "ours")
    return tmp_path


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("peft", None),
        ("folded", None),
        ("gguf", None),
        ("kohya", "is a stack of 3 maps (experts)"),
        ("serving", "has no place for"),
    ],
)
def test_adapters_of_experts_are_exported_or_refused_by_name(form, said, command, mixture):
    out_folder = mixture / ("out.safetensors" if form == "kohya" else "out")
    how = ("--model", mixture / "model", "--task", "lm")
    code, _, err = command("export", mixture / "ours", "--to", form, "--out", out_folder, *how)
    if said is None:
        assert code == 0, err
        assert out_folder.exists()
    else:
        assert code == 2
        assert said in err

"""Adapters as single files, as a person types it."""

import pytest

import rankfold as rf
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "out/lora.gguf"), "does not read it"),
        (("export", "lora.safetensors", "--to", "peft", "--out", "p"), "name it: --model M"),
        (("export", "ours", "--to", "gguff", "--out", "p"), "nearest: gguf"),
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

"""The serving form of mixed ranks, what inspect says of foreign files, and how files are told apart."""

import json

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rankfold as rf
from rankfold.adapters.files import write_tensors
from rankfold.adapters.formats.peft import read_peft
from rankfold.errors import FileError, OptionError
from rankfold.jobs.exchange import export, folder_format
from rankfold.jobs.inspect import inspect_folder

X = torch.linspace(-1, 1, 24).view(3, 8)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def mixed() -> dict[str, Tensor]:
    """Rank 3 and scale 1/3 at one site, rank 1 and scale 0.7 at the other."""
    tensors = {}
    generator = torch.Generator().manual_seed(1)
    for stem, rank, out, in_, alpha in (("lora_unet_0", 3, 6, 8, 1.0), ("lora_unet_2", 1, 4, 6, 0.7)):
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, in_, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_serving_pads_mixed_ranks_to_one_and_reports_the_rounding(dtype, tmp_path):
    model = plain()
    tensors = mixed()
    write_tensors(tmp_path / "a.safetensors", tensors)
    report = export(model, tmp_path / "a.safetensors", "serving", tmp_path / "out", dtype=dtype)
    read = read_peft(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert not config.get("rank_pattern")
    assert read.ranks == report.ranks == {"0": 3, "2": 3}
    for key, entry in read.entries.items():
        up, down = (tensors[f"lora_unet_{key}.lora_{side}.weight"].double() for side in ("up", "down"))
        exact = float(tensors[f"lora_unet_{key}.alpha"]) / up.shape[1] * up @ down
        error = float((entry.B.double() @ entry.A.double() - exact).norm() / exact.norm())
        assert (entry.scale, entry.B.dtype, entry.A.dtype) == (1.0, dtype, dtype)
        assert not entry.B[:, up.shape[1] :].any()
        assert not entry.A[up.shape[1] :].any()
        assert report.errors[key] == pytest.approx(error, rel=0.05, abs=1e-7)
        assert error > 0
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_a_foreign_file_is_exported_to_every_other_form(tmp_path):
    model = plain()
    write_tensors(tmp_path / "a.safetensors", mixed())
    loaded = plain()
    rf.load(loaded, tmp_path / "a.safetensors")
    expected = loaded(X)
    for to in ("peft", "kohya"):
        assert export(model, tmp_path / "a.safetensors", to, tmp_path / to).largest == 0.0
        again = plain()
        rf.load(again, tmp_path / to)
        torch.testing.assert_close(again(X), expected, rtol=1e-6, atol=1e-6)
    assert not [n for n in model.state_dict() if "rankfold" in n]


def test_inspect_knows_foreign_files_without_a_model(tmp_path):
    write_tensors(tmp_path / "a.safetensors", mixed())
    found = inspect_folder(tmp_path / "a.safetensors")
    assert (found.what, found.method) == ("kohya adapter", "lora")
    assert [(r.site, r.rank, r.shape) for r in found.rows] == [("lora_unet_0", 3, (6, 8)), ("lora_unet_2", 1, (4, 6))]
    assert found.trained["stored_dtype"] == "float32"
    named = inspect_folder(tmp_path / "a.safetensors", plain())
    assert [r.site for r in named.rows] == ["0", "2"]
    for with_base, row in zip(named.rows, found.rows, strict=True):
        assert row.stats.frobenius == pytest.approx(with_base.stats.frobenius, rel=1e-5)


def test_files_are_told_apart(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    with pytest.raises(FileError, match="by its keys; it holds: x"):
        folder_format(tmp_path / "a.safetensors")
    write_tensors(tmp_path / "b.safetensors", mixed())
    with pytest.raises(FileError, match=r"several .*files"):
        folder_format(tmp_path)
    assert folder_format(tmp_path / "b.safetensors") == "kohya"
    torch.save({"x": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(FileError, match="pickle"):
        folder_format(tmp_path / "c.pt")
    rf.adapt(model := plain(), "lora", rank=1)
    rf.adaptation(model).save(tmp_path / "ours")
    with pytest.raises(FileError, match="give the folder"):
        folder_format(tmp_path / "ours" / "adapter.safetensors")
    with pytest.raises(OptionError, match="which is for one model"):
        rf.load(plain(), tmp_path / "ours", part="unet")


@pytest.mark.parametrize("to", ["kohya", "gguf"])
def test_a_place_that_can_not_be_written_is_an_error_of_the_file(to, tmp_path):
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    (tmp_path / "file").write_text("here already")
    with pytest.raises(FileError, match="can't be written"):
        export(model, rf.adapt(model, "lora", rank=1), to, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "here already"

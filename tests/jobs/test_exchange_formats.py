"""The serving form of mixed ranks, what inspect says of foreign files, and how files are told apart."""

import json

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rankfold as rf
from rankfold.adapters.files import write_tensors
from rankfold.adapters.formats.peft import read_peft
from rankfold.errors import CompositionError, FileError, NumericError, OptionError
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
        assert report.errors[key] == pytest.approx(error, rel=1e-6)
        assert error > 0
    assert report.dtype == str(dtype).removeprefix("torch.")


def trained(model: nn.Module, name: str, **options) -> rf.Adaptation:
    """An adaptation whose tensors are moved from their start, as training would."""
    adaptation = rf.adapt(model, name, **options)
    for k, p in enumerate(adaptation.parameters()):
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    return adaptation


@pytest.mark.parametrize(("name", "rank"), [("lora", 2), ("pissa", 4), ("hra", 2)])
def test_serving_of_an_offset_is_of_twice_the_rank_and_of_a_rotation_of_the_same(name, rank, tmp_path):
    """The written product is the difference of the folded weight and the base's, to the rounding that is reported."""
    model = plain()
    base = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    adaptation = trained(model, name, rank=2)
    report = export(model, adaptation, "serving", tmp_path / "out", dtype=torch.float32)
    rounded = export(model, adaptation, "serving", tmp_path / "half")
    adaptation.fold()
    changes = {k: model.get_submodule(k).weight.detach().double() - base[f"{k}.weight"] for k in ("0", "2")}
    adaptation.unfold()
    assert set(report.ranks.values()) == {rank}
    for folder, told, tolerance in (("out", report, 2e-6), ("half", rounded, 1e-2)):
        read = read_peft(tmp_path / folder)
        assert set(read.ranks.values()) == {rank}
        for key, change in changes.items():
            written = read.entries[key].B.double() @ read.entries[key].A.double()
            error = float((written - change).norm() / change.norm())
            assert error < tolerance
            assert told.errors[key] == pytest.approx(error, rel=0.05, abs=2e-6)
    assert rounded.largest > 1e-4
    assert rounded.worst in changes


def test_serving_cut_to_a_rank_tells_the_cut_and_the_rounding(tmp_path):
    model = plain()
    adaptation = trained(model, "lora", rank=3)
    full = export(model, adaptation, "serving", tmp_path / "full", dtype=torch.float32)
    cut = export(model, adaptation, "serving", tmp_path / "cut", rank=2, dtype=torch.float32)
    whole, less = read_peft(tmp_path / "full"), read_peft(tmp_path / "cut")
    for key, e in whole.entries.items():
        D = e.B.double() @ e.A.double()
        S = torch.linalg.svdvals(D)
        written = less.entries[key].B.double() @ less.entries[key].A.double()
        error = float((written - D).norm() / D.norm())
        assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
        assert cut.errors[key] == pytest.approx(error, rel=1e-3)
        assert full.errors[key] < 1e-6
    assert set(less.ranks.values()) == {2}


def test_serving_refuses_what_engines_have_no_place_for(tmp_path):
    rescaled = plain()
    with pytest.raises(CompositionError, match=r"serving: 0 and 1 more sites rescale rows.*--to folded, or --to peft"):
        export(rescaled, trained(rescaled, "dora", rank=2), "serving", tmp_path / "out")
    config = hf.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    experts = hf.MixtralForCausalLM(config).eval()
    with pytest.raises(CompositionError, match=r"experts\.down_proj is of kind experts, .*use --to peft"):
        export(experts, trained(experts, "lora", rank=2, targets=["down_proj"]), "serving", tmp_path / "out")
    large = plain()
    adaptation = trained(large, "lora", rank=2)
    adaptation.parameters()[0].data[0, 0] = 1e6
    with pytest.raises(NumericError, match=r"serving: 0: holds 1e\+06, and float16 ends at 65504"):
        export(large, adaptation, "serving", tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


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


def test_a_small_file_of_a_huge_change_is_not_built_to_be_looked_at(tmp_path):
    side = torch.ones(300, 300)
    write_tensors(tmp_path / "a.safetensors", {"lora_unet_q.lokr_w1": side, "lora_unet_q.lokr_w2": side})
    (row,) = inspect_folder(tmp_path / "a.safetensors").rows
    assert (row.shape, row.stats) == ((90_000, 90_000), None)
    assert "too large to be measured" in row.note


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

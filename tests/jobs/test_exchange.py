"""Loading and exporting: what is exact is exact, what is not says by how much, what does not fit is refused by name."""

import json
import warnings

import pytest
import safetensors.torch
import torch
import transformers as hf
from torch import nn

import rankfold as rf
from rankfold.adapters.formats.peft import read_peft
from rankfold.errors import CompositionError, FileError, LayoutError, OptionError, UnknownName
from rankfold.jobs.exchange import export, folder_format


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def adapted(model: nn.Module, method: str = "lora", **options) -> rf.Adaptation:
    """With another value in everything that trains."""
    adaptation = rf.adapt(model, method, **{"rank": 2, **options})
    generator = torch.Generator().manual_seed(1)
    for p in adaptation.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return adaptation


X = torch.linspace(-1, 1, 24).view(3, 8)
IDS = torch.arange(1, 9).view(1, 8)


# folded


def test_a_folded_module_is_the_adapted_one_without_rankfold(tmp_path):
    model = plain()
    adaptation = adapted(model, "dora")
    expected, bytes_before = model(X), rf.fingerprint(model)
    report = export(model, adaptation, "folded", tmp_path / "out")
    fresh = plain()
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(fresh(X), expected, rtol=1e-6, atol=1e-6)
    assert report.errors.keys() == {"0", "2"}
    assert report.largest < 1e-5
    assert rf.fingerprint(model) == bytes_before
    assert torch.equal(model(X), expected), "the model is as before the export"


def test_folding_into_bfloat16_reports_the_rounding_that_it_does(tmp_path):
    model = plain()
    adaptation = adapted(model)
    report = export(model, adaptation, "folded", tmp_path / "out", dtype=torch.bfloat16)
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    W = model[0].weight.detach().double()
    t = adaptation.slots()[0].t(adaptation.store)
    change = (t.B.double() @ t.A.double()).detach()
    measured = (written["0.weight"].double() - (W + change)).norm() / change.norm()
    assert report.errors["0"] == pytest.approx(float(measured), rel=1e-3)
    assert 1e-4 < report.errors["0"] < 1
    assert report.worst in report.errors


def test_a_folded_transformers_model_loads_by_from_pretrained(tmp_path):
    model = tied_llama()
    adaptation = adapted(model)
    expected = model(input_ids=IDS).logits
    export(model, adaptation, "folded", tmp_path / "out")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not any("rankfold" in name for name in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("where", [{"targets": ["embed_tokens"]}, {"extras": ["lm_head"]}], ids=["tie broken", "tie kept"])
def test_a_folded_model_keeps_exactly_the_ties_that_its_weights_have(where, tmp_path):
    model = tied_llama()
    adaptation = adapted(model, **where)
    expected = model(input_ids=IDS).logits
    report = export(model, adaptation, "folded", tmp_path / "out")
    broken = "targets" in where
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not broken
    assert any("lm_head" in note for note in report.notes) is broken
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_of_a_local_model_comes_along(tmp_path):
    tied_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    export(model, adapted(model), "folded", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# serving


def test_serving_has_one_rank_and_no_scale_and_says_what_that_costs(tmp_path):
    model = plain()
    adaptation = adapted(model, alpha=3.0)
    report = export(model, adaptation, "serving", tmp_path / "out")
    read = read_peft(tmp_path / "out")
    for key, entry in read.entries.items():
        t = adaptation._get(None).member.slots[key].t(adaptation.store)
        exact = 1.5 * (t.B.double() @ t.A.double()).detach()
        error = (entry.delta().dense().double() - exact).norm() / exact.norm()
        assert report.errors[key] == pytest.approx(float(error), rel=0.05)
        assert entry.scale == 1.0
    assert 0 < report.largest < 1e-2
    assert export(model, adaptation, "serving", tmp_path / "exact", dtype=torch.float32).largest < 1e-6


def test_cutting_the_rank_for_serving_reports_the_cut_too(tmp_path):
    model = plain()
    adaptation = adapted(model, rank=4)
    report = export(model, adaptation, "serving", tmp_path / "out", rank=1, dtype=torch.float32)
    entry = read_peft(tmp_path / "out").entries["0"]
    t = adaptation.slots()[0].t(adaptation.store)
    exact = (t.B @ t.A).detach()
    assert entry.rank == 1
    assert float((entry.delta().dense() - exact).norm() / exact.norm()) == pytest.approx(report.errors["0"], rel=1e-3)
    assert report.largest > 0.1


def test_a_magnitude_is_refused_for_serving(tmp_path):
    model = plain()
    with pytest.raises(CompositionError, match="rescale rows"):
        export(model, adapted(model, "dora"), "serving", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# peft, cut


def test_a_cut_for_peft_is_the_best_and_its_error_is_reported(tmp_path):
    model = plain()
    adaptation = adapted(model, "hadamard")
    report = export(model, adaptation, "peft", tmp_path / "out", rank=1)
    slot = adaptation.slots()[0]
    t = slot.t(adaptation.store)
    change = slot.structure.delta(t, slot.site).dense().detach()
    S = torch.linalg.svdvals(change)
    best = float((S[1:].square().sum() / S.square().sum()).sqrt())
    assert report.errors["0"] == pytest.approx(best, rel=1e-4)
    assert best > 0.01


# from a folder, on a model that goes on living


def test_exporting_a_folder_leaves_the_model_as_it_was(tmp_path):
    model = plain()
    adapted(model).save(tmp_path / "adapter")
    fresh = plain()
    before = fresh(X)
    report = export(fresh, tmp_path / "adapter", "peft", tmp_path / "out")
    assert report.largest == 0.0
    assert report.worst is None
    assert torch.equal(fresh(X), before)
    assert type(fresh[0]) is nn.Linear
    assert "rankfold" not in dict(fresh.named_children())


def test_exporting_a_folder_leaves_other_adapters_on(tmp_path):
    model = plain()
    adapted(model).save(tmp_path / "adapter")
    other = plain()
    adaptation = adapted(other, "dora")
    before = other(X)
    export(other, tmp_path / "adapter", "peft", tmp_path / "out")
    assert torch.equal(other(X), before)
    assert list(adaptation.active) == ["default"]


# refusals


def test_a_side_module_is_no_weight(tmp_path):
    model = hf.LlamaForCausalLM(tied_llama().config)
    adaptation = adapted(model, "adaptertune")
    for to, error in (("peft", CompositionError), ("serving", CompositionError), ("folded", LayoutError)):
        with pytest.raises(error, match="side module"):
            export(model, adaptation, to, tmp_path / to)
        assert not (tmp_path / to).exists()


def test_a_change_that_depends_on_the_input_is_no_weight(tmp_path):
    model = plain()
    with pytest.raises(CompositionError, match="depends on the input"):
        export(model, adapted(model, "mixture"), "peft", tmp_path / "out")


def test_formats_and_options_are_checked(tmp_path):
    model = plain()
    adaptation = adapted(model)
    with pytest.raises(UnknownName, match="nearest: peft"):
        export(model, adaptation, "pfet", tmp_path / "out")
    with pytest.raises(OptionError, match="no rank"):
        export(model, adaptation, "folded", tmp_path / "out", rank=2)
    with pytest.raises(OptionError, match="dtype"):
        export(model, adaptation, "peft", tmp_path / "out", dtype=torch.bfloat16)


def test_folders_are_told_apart(tmp_path):
    model = plain()
    adaptation = adapted(model)
    adaptation.save(tmp_path / "ours")
    export(model, adaptation, "peft", tmp_path / "theirs")
    assert (folder_format(tmp_path / "ours"), folder_format(tmp_path / "theirs")) == ("rankfold", "peft")
    with pytest.raises(FileError, match="no such folder"):
        rf.load(plain(), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="it holds: nothing"):
        rf.load(plain(), tmp_path / "empty")
    with pytest.raises(FileError, match="give the folder"):
        rf.load(plain(), tmp_path / "ours" / "adapter.json")


def test_a_pickle_is_refused_and_not_read(tmp_path):
    model = plain()
    export(model, adapted(model), "peft", tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    (tmp_path / "out" / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(FileError, match="pickle"):
        rf.load(plain(), tmp_path / "out")


def test_alphas_that_differ_by_site_come_back(tmp_path):
    """Scales of a peft adapter need not follow one rule; a record of ours keeps each."""
    model = plain()
    first = adapted(model, rank=2, alpha=3.0, targets=["0"])
    export(model, first, "peft", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors |= {"base_model.model.2.lora_A.weight": torch.ones(3, 6), "base_model.model.2.lora_B.weight": torch.ones(4, 3)}
    config |= {"target_modules": ["0", "2"], "rank_pattern": {"2": 3}, "alpha_pattern": {"2": 0.75}}
    safetensors.torch.save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    adaptation = rf.load(plain(), tmp_path / "a")
    assert {s.site.key: s.structure.scale for s in adaptation.slots()} == {"0": 1.5, "2": 0.25}
    expected = adaptation.model(X)
    adaptation.save(tmp_path / "b")
    again = rf.load(plain(), tmp_path / "b")
    assert {s.site.key: s.structure.scale for s in again.slots()} == {"0": 1.5, "2": 0.25}
    assert torch.equal(again.model(X), expected)

"""A bank takes folders, peft's folders and the model's own adapters, and goes with `generate`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import CompositionError, OptionError
from rankfold.jobs.exchange import export


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)).double()


def trained(model: nn.Module, method: str, rank: int, name: str = "default") -> rf.Adaptation:
    adaptation = rf.adapt(model, method, rank=rank, name=name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adaptation.parameters(name):
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return adaptation


X = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("method", ["lora", "dora", "hra", "pissa"])
def test_folders_and_adaptations_serve_what_was_trained(method, tmp_path):
    source = network()
    adaptation = trained(source, method, 2)
    expected = source(X).detach()
    folder = adaptation.save(tmp_path / "ours")
    export(source, adaptation, "peft", tmp_path / "theirs")
    model = network()
    bank = rf.Bank(model, rank=4)
    assert bank.add("folder", folder) < 1e-6
    bank.add("peft", tmp_path / "theirs")
    assert not any("_rankfold" in m.__dict__ for m in model.modules())  # nothing stays attached
    bank.select(["folder", "peft"])
    torch.testing.assert_close(model(X).detach(), expected, rtol=1e-5, atol=1e-6)
    own = rf.Bank(source, rank=4)
    own.add("own", adaptation, of="default")
    adaptation.use()
    own.select("own")
    torch.testing.assert_close(source(X).detach(), expected, rtol=1e-6, atol=1e-7)


def test_what_has_no_exact_form_is_cut_if_that_is_allowed():
    model = network()
    adaptation = trained(model, "hadamard", 3)  # rank up to 9
    adaptation.use()
    before = copy.deepcopy(model)
    with pytest.raises(OptionError, match=r"rank 4 loses .*% of its change at [02]: .*tolerance="):
        rf.Bank(model, rank=4).add("h", adaptation)
    bank = rf.Bank(model, rank=4, tolerance=1.0)
    error = bank.add("h", adaptation)
    bank.select("h")
    adapter, _ = rf.normal_form(adaptation, "default")
    cut = copy.deepcopy(before)
    lost = []
    for key, e in adapter.entries.items():
        change = (e.scale * e.B @ e.A).double()
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        cut.get_submodule(key).weight.data += (U[:, :4] * S[:4]) @ Vh[:4]
        lost.append(float(S[4:].norm() / S.norm()))
    assert error == pytest.approx(max(lost), rel=1e-4)
    torch.testing.assert_close(model(X).detach(), cut(X).detach(), rtol=1e-5, atol=1e-5)


def test_another_models_adaptation_is_refused_and_replace_takes_sources_too(tmp_path):
    model = network()
    bank = rf.Bank(model, rank=4)
    other = network()
    adaptation = trained(other, "lora", 2)
    with pytest.raises(CompositionError, match="another model's adaptation; save it"):
        bank.add("a", adaptation)
    bank.add("a", adaptation.save(tmp_path / "a"))
    bank.select("a")
    with torch.no_grad():
        for p in adaptation.parameters():
            p.mul_(-2.0)
    bank.replace("a", adaptation.save(tmp_path / "b"))
    torch.testing.assert_close(model(X).detach(), other(X).detach(), rtol=1e-6, atol=1e-6)


def test_generate_with_beams_gives_each_prompt_its_adapter():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    bank = rf.Bank(model, rank=4)
    ids = torch.tensor([[3, 5, 7], [3, 5, 7]])
    made, alone = {}, {}
    for name, seed in (("a", 1), ("b", 2)):
        adaptation = rf.adapt(model, "lora", rank=2, name=name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in adaptation.parameters(name):
                p.add_(0.5 * torch.randn(p.shape, generator=generator))
        adaptation.use(name)
        made[name] = adaptation
        alone[name] = model.generate(ids[:1], max_new_tokens=6, num_beams=3, do_sample=False)
        bank.add(name, adaptation, of=name)
        adaptation.use()
    bank.select(["a", "b"])
    together = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False)
    assert together[:1].tolist() == alone["a"].tolist()
    assert together[1:].tolist() == alone["b"].tolist()
    assert alone["a"].tolist() != alone["b"].tolist()

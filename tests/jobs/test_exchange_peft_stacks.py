"""Experts and convolutions to peft and back: the same outputs and gradients. peft itself is the oracle."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold as rf
from rankfold.adapters.formats.peft import read_peft, write_peft
from rankfold.errors import CompositionError, FileError
from rankfold.jobs.exchange import export

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.arange(1, 25).view(2, 12)
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def moe(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, intermediate_size=12, num_local_experts=3)).eval()
    config = hf.GptOssConfig(
        **SMALL, intermediate_size=16, num_local_experts=3, head_dim=8, layer_types=["full_attention"]
    )  # fmt: skip
    return hf.GptOssForCausalLM(config).eval()


class Net(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups), nn.Conv2d(8, 6, (2, 1), bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def move(parameters):
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.data += 0.2 * torch.randn(p.shape, generator=generator)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft remarks on groups and on target_parameters
        yield


def outputs(model, x):
    y = model(input_ids=x).logits if not x.is_floating_point() else model(x)
    return y, (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum()


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_of_peft(kind, targets, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets)
    theirs = peft.get_peft_model(moe(kind), config).eval()
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = moe(kind)
    a = rf.load(ours, tmp_path)
    assert len(a.sites) == 1 + len(targets)
    expected, loss = outputs(theirs, IDS)
    found, own = outputs(ours, IDS)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.autograd.backward([loss, own])
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for site in a.sites:
        if site.kind == "linear":
            continue
        depth = "base_layer." if site.param == "gate_up_proj" and len(targets) == 2 else ""
        lead = f"base_model.model.{site.module}.{depth}"
        gA, gB = grads[f"{lead}lora_A.default.weight"], grads[f"{lead}lora_B.default.weight"]
        tensors = {n.rpartition("/")[2]: t for n, t in a.tensors().items() if f"/{site.key}/" in n}
        torch.testing.assert_close(tensors["A"].grad, gA.reshape(3, 2, -1), **CLOSE)
        torch.testing.assert_close(tensors["B"].grad, gB.reshape(-1, 2, 3).permute(2, 0, 1), **CLOSE)
    export(ours, a, "peft", tmp_path / "again")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_to_peft(kind, tmp_path):
    ours = moe(kind)
    a = rf.adapt(ours, "lora", rank=3, alpha=2, targets=["*experts*"])
    move(a.parameters())
    report = export(ours, a, "peft", tmp_path)
    assert report.largest == 0.0
    theirs = peft.PeftModel.from_pretrained(moe(kind), tmp_path).eval()
    torch.testing.assert_close(outputs(theirs, IDS)[0], outputs(ours, IDS)[0], **CLOSE)


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_of_peft(dora, tmp_path):
    x = torch.randn(2, 4, 7, 7)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["first", "second"], use_dora=dora)
    theirs = peft.get_peft_model(Net(), config).eval()
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = Net()
    a = rf.load(ours, tmp_path)
    expected, loss = outputs(theirs, x)
    found, own = outputs(ours, x)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.autograd.backward([loss, own])
    for name, p in theirs.named_parameters():
        if p.grad is None:
            continue
        site = "first" if ".first." in name else "second"
        role = "A" if "lora_A" in name else "B" if "lora_B" in name else "m"
        t = next(t for n, t in a.tensors().items() if n.endswith(f"/{site}/{role}"))
        torch.testing.assert_close(t.grad, p.grad.reshape(t.shape), **CLOSE)
    export(ours, a, "peft", tmp_path / "again")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(("method", "groups"), [("lora", 1), ("lora", 2), ("dora", 1), ("hra", 1)])
def test_convolutions_to_peft(method, groups, tmp_path):
    x = torch.randn(2, 4, 7, 7)
    ours = Net(groups)
    a = rf.adapt(ours, method, rank=2, targets=["first", "second"])
    move(a.parameters())
    assert export(ours, a, "peft", tmp_path).largest == 0.0
    theirs = peft.PeftModel.from_pretrained(Net(groups), tmp_path).eval()
    torch.testing.assert_close(outputs(theirs, x)[0], outputs(ours, x)[0], **CLOSE)
    again = Net(groups)
    rf.load(again, tmp_path)
    torch.testing.assert_close(outputs(again, x)[0], outputs(ours, x)[0], **CLOSE)


def test_what_peft_computes_otherwise_is_refused(tmp_path):
    """Over groups peft's A reads all channels; dilation and padding_mode it forgets."""
    theirs = peft.get_peft_model(Net(2), peft.LoraConfig(r=2, target_modules=["first"]))
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="all channels"):
        rf.load(Net(2), tmp_path)
    for options in ({"dilation": 2}, {"padding": 1, "padding_mode": "circular"}):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, **options))
        a = rf.adapt(model, "lora", rank=2, targets=["0"])
        with pytest.raises(CompositionError, match="dilation and padding_mode"):
            export(model, a, "peft", tmp_path / "out")
        write_peft(tmp_path / "forced", rf.normal_form(a)[0])
        with pytest.raises(FileError, match="dilation and padding_mode"):
            rf.load(nn.Sequential(nn.Conv2d(4, 8, 3, **options)), tmp_path / "forced")
    for model, targets in ((moe("mixtral"), ["*experts*"]), (Net(2), ["first"])):
        a = rf.adapt(model, "dora", rank=2, targets=targets)
        with pytest.raises(CompositionError, match="peft has DoRA for neither"):
            export(model, a, "peft", tmp_path / "out")


def test_damaged_stacks_are_refused(tmp_path):
    a = rf.adapt(model := moe("mixtral"), "lora", rank=2, targets=["*experts*"])
    export(model, a, "peft", tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    lost = {k: t for k, t in tensors.items() if "base_layer" in k}
    cut = {k: t[:5] if "lora_A" in k else t for k, t in tensors.items()}
    for wrong, reason in ((lost, "pairs of factors"), (cut, "no stack of rank")):
        save_file(copy.deepcopy(wrong), file)
        with pytest.raises(FileError, match=reason):
            read_peft(tmp_path)
    save_file(tensors, file)
    settings.write_text(json.dumps({**config, "target_parameters": "experts"}))
    with pytest.raises(FileError, match="no list of names"):
        read_peft(tmp_path)

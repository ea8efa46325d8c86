"""Every structure that peft has, at the seven linears of a tiny Llama with grouped heads: same loss and gradients in float32."""

import peft
import pytest
import torch
from structure_checks import move, same
from torch import nn

from rankfold.core import attach, find_sites, store_of
from rankfold.methods.structures.bone import Bone
from rankfold.methods.structures.hadamard import Hadamard
from rankfold.methods.structures.hira import HiRA
from rankfold.methods.structures.hra import HRA
from rankfold.methods.structures.kron import Kron
from rankfold.methods.structures.lora import LoRA
from rankfold.methods.structures.magnitude import Magnitude
from rankfold.methods.structures.miss import MiSS
from rankfold.methods.structures.shira import SHiRA
from rankfold.methods.structures.vera import VeRA

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads the old name

LORA = {"A": "lora_A", "B": "lora_B"}
CASES = {
    "lora": (LoRA(rank=4, alpha=8), peft.LoraConfig(r=4, lora_alpha=8), LORA),
    "rslora": (LoRA(rank=4, alpha=8, power=0.5), peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True), LORA),
    "dora": (
        Magnitude(inner=LoRA(rank=4, alpha=8)),
        peft.LoraConfig(r=4, lora_alpha=8, use_dora=True),
        {**LORA, "m": "lora_magnitude_vector"},
    ),
    "hira": (HiRA(rank=4), peft.HiraConfig(r=4), {"A": "hira_A", "B": "hira_B"}),
    "hra": (HRA(rank=4), peft.HRAConfig(r=4), {"U": "hra_u"}),
    "shira": (SHiRA(rank=2), peft.ShiraConfig(r=2), {"values": "shira_weight"}),
    "bone": (Bone(rank=8), peft.MissConfig(r=8, init_weights="bat"), {"C": "miss_block"}),
    "miss": (MiSS(rank=6), peft.MissConfig(r=6), {"D": "miss_block"}),
    "miss mini": (MiSS(rank=6, mini=8), peft.MissConfig(r=6, init_weights="mini", mini_r=8), {"D": "miss_block"}),
    "lokr": (Kron(rank=2, alpha=4), peft.LoKrConfig(r=2, alpha=4), {"P": "lokr_w1", "Q1": "lokr_w2_a", "Q2": "lokr_w2_b"}),
    "loha": (
        Hadamard(rank=4, alpha=8),
        peft.LoHaConfig(r=4, alpha=8),
        {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
    ),
    "vera": (VeRA(rank=6), peft.VeraConfig(r=6), {"b": "vera_lambda_b", "d": "vera_lambda_d"}),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        initializer_range=0.2,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def parameter(layer, name):
    entry = getattr(layer, name)["default"]
    return entry.weight if isinstance(entry, nn.Module) else entry


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_peft_on_a_llama(name):
    structure, config, names = CASES[name]
    config.target_modules = set(LINEARS)
    model, theirs = llama(), peft.get_peft_model(llama(), config)
    sites = find_sites(model)
    assert len(sites) == 14
    attach(model, "a", sites, {s.key: structure for s in sites})
    store = store_of(model)
    store.switch({"a": 1.0})
    move(store, 0.1)
    pairs = []
    transpose = name.startswith("miss")
    largest = {s.site.shape: s.t(store) for s in store.members["a"].slots.values()}
    for key, slot in store.members["a"].slots.items():
        layer, t = theirs.base_model.model.get_submodule(key), slot.t(store)
        if name == "shira":
            layer.shira_indices["default"] = torch.stack([t.index // slot.site.shape[1], t.index % slot.site.shape[1]])
        if name == "vera":
            layer.vera_A["default"].data = largest[(32, 48)].A.detach().clone()
            layer.vera_B["default"].data = largest[(48, 32)].B.detach().clone()
        for ours, other in names.items():
            p = parameter(layer, other)
            p.data = (getattr(t, ours).mT if transpose else getattr(t, ours)).detach().clone()
            pairs.append((getattr(t, ours), p))
    ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    with torch.sparse.check_sparse_tensor_invariants(name == "shira"):
        ours, other = (m(input_ids=ids, labels=ids) for m in (model, theirs))
        base = llama()(input_ids=ids).logits
        assert (other.logits - base).norm() > 1e-2 * base.norm()
        assert (ours.logits - other.logits).norm() < 1e-5 * base.norm()
        got = torch.autograd.grad(ours.loss, [p for p, _ in pairs])
        truth = torch.autograd.grad(other.loss, [p for _, p in pairs])
    assert len(pairs) == len([p for p in store.parameters() if p.requires_grad])
    for a, b in zip(got, truth):
        b = b.mT if transpose else same(b)
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-7

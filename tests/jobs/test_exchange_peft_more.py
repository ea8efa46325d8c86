"""peft's folders beyond linear layers: attention, new tokens, biases, whole modules, ties. peft is the oracle, both ways."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import rankfold as rf
from rankfold.errors import CompositionError, FileError
from rankfold.jobs.exchange import export, load

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
IDS = torch.tensor([[5, 60, 7, 3, 9, 10]])


def llama(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertModel(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.attn(x, x, x, need_weights=False)[0])


def attends():
    torch.manual_seed(0)
    model = Attends().eval()
    for p in (model.attn.in_proj_bias, model.attn.out_proj.bias):
        nn.init.normal_(p, std=0.3)
    return model


def output(model):
    y = model(IDS)
    if isinstance(y, torch.Tensor):
        return y
    return y.logits if hasattr(y, "logits") else y.last_hidden_state


def shake(parameters, std=0.3):
    for k, p in enumerate(parameters):
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)), alpha=std)


def gradients(model, parameters):
    """Norms of the gradients, rising: those of one function by other names. Tensors that nothing uses are left out."""
    y = output(model)
    probe = torch.cos(torch.arange(y.numel())).view(y.shape)
    grads = torch.autograd.grad((y * probe).sum(), list(parameters), allow_unused=True)
    return torch.stack(sorted(g.double().norm() for g in grads if g is not None and g.any()))


def trained(model):
    """peft's tensors that train, a tied copy once; without the A whose gradient it halves (see formats/peft_multihead.py)."""
    named = {id(p): (n, p) for n, p in model.named_parameters() if p.requires_grad}
    return [p for n, p in named.values() if "out_proj.lora_A" not in n]


CASES = {
    "attention": (attends, {"target_modules": ["attn"]}),
    "attention and more": (attends, {"target_modules": ["attn", "head"], "bias": "lora_only"}),
    "all biases": (attends, {"target_modules": ["attn"], "bias": "all"}),
    "bert, all biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "bert, biases of LoRA": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "norms": (bert, {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [60, 3]}}),
    "tokens by list": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60, 5]}),
    "tokens, untied": (
        lambda: llama(False),
        {"target_modules": ["q_proj"], "trainable_token_indices": {"model.embed_tokens": [3], "lm_head": [60, 3]}},
    ),
    "tied modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "embedding as target": (bert, {"target_modules": ["query", "word_embeddings", "position_embeddings"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_is_the_same_function_with_the_same_gradients(case, tmp_path):
    make, options = CASES[case]
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **copy.deepcopy(options)))
    shake([p for p in theirs.parameters() if p.requires_grad], 0.2)
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    a = load(make(), tmp_path)
    torch.testing.assert_close(output(a.model), output(theirs), rtol=1e-5, atol=1e-5)
    ours = [p for n, p in a.tensors().items() if p.requires_grad and not n.endswith("out_proj/A")]
    torch.testing.assert_close(gradients(a.model, ours), gradients(theirs, trained(theirs)), rtol=1e-5, atol=1e-6)
    again = export(a.model, a, "peft", tmp_path / "again")
    assert again.largest == 0
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "again").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=1e-5, atol=1e-5)


OURS = {
    "attention": (attends, {"targets": "all-linear"}),
    "its output alone": (attends, {"targets": ["attn.out_proj"], "extras": ["attn.out_proj.bias"]}),
    "its fused weight alone": (attends, {"targets": ["attn.in_proj_weight"]}),
    "one row slice": (attends, {"targets": ["in_proj_weight[v]", "head"]}),
    "biases": (bert, {"targets": ["query", "dense"], "extras": "biases"}),
    "all biases": (bert, {"targets": ["query"], "extras": "all-biases"}),
    "norms": (bert, {"targets": ["query"], "extras": ["norms"]}),
    "new tokens": (llama, {"targets": ["q_proj"], "extras": ["embed_tokens[60:64]", "embed_tokens[3]"]}),
    "new tokens by the head's name": (llama, {"targets": ["q_proj"], "extras": ["lm_head[60:64]"]}),
    "new tokens, untied": (lambda: llama(False), {"targets": ["q_proj"], "extras": ["embed_tokens[60:64]", "lm_head[3]"]}),
    "tied head": (llama, {"targets": ["q_proj"], "extras": ["lm_head"]}),
    "embeddings": (bert, {"targets": ["query", "word_embeddings", "position_embeddings", "token_type_embeddings"]}),
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_export_is_the_same_function_in_peft_and_back(case, tmp_path):
    make, options = OURS[case]
    model = make()
    a = rf.adapt(model, "lora", rank=2, alpha=3, **options)
    shake(a.parameters())
    expected = output(model).detach()
    report = export(model, a, "peft", tmp_path)
    assert report.largest == 0
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(output(theirs).detach(), expected, rtol=1e-5, atol=1e-5)
    back = load(make(), tmp_path)
    torch.testing.assert_close(output(back.model).detach(), expected, rtol=1e-5, atol=1e-5)
    assert {s.key for s in back.sites} == {s.key.partition("[")[0] for s in a.sites}


@pytest.mark.parametrize(
    ("make", "method", "options", "reason"),
    [
        (attends, "dora", {"targets": ["attn.*"]}, "no DoRA for nn.MultiheadAttention"),
        (attends, "lora", {"targets": ["attn.*"], "extras": ["attn.in_proj_bias"]}, "can't store this extra tensor"),
        (bert, "lora", {"targets": ["query"], "extras": ["query.weight"]}, "adapted too"),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_name(make, method, options, reason, tmp_path):
    model = make()
    a = rf.adapt(model, method, rank=2, **options)
    with pytest.raises(CompositionError, match=reason):
        export(model, a, "peft", tmp_path)


@pytest.mark.parametrize(
    "indices",
    [{"embed_tokens": [3, 3]}, {"embed_tokens": [3]}, {"other": [3, 60]}, [3, -1], "all", {"embed_tokens": [3, 2**40]}],
)
def test_hostile_token_indices_are_refused(indices, tmp_path):
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 60]})
    )
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "trainable_token_indices": indices}))
    with pytest.raises(FileError, match="embed_tokens"):
        load(llama(), tmp_path)


def test_tokens_that_the_model_does_not_have(tmp_path):
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 60]})
    )
    theirs.save_pretrained(tmp_path)
    small = llama()
    small.resize_token_embeddings(32)
    with pytest.raises(FileError, match="does not fit"):
        load(small, tmp_path)


def test_engines_have_no_place_for_attention(tmp_path):
    model = attends()
    with pytest.raises(CompositionError, match=r"attn\.in_proj_weight is of kind multihead"):
        export(model, rf.adapt(model, "lora", rank=2), "serving", tmp_path)

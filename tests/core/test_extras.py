"""What trains beside changes of weights: biases, norms, single parameters, and rows of embeddings and tied heads."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model, ViTConfig, ViTModel

import rankfold as rf
from rankfold.adapters.native import load_native, save_native
from rankfold.errors import FileError, InactiveError, OptionError, TargetError, UnknownName
from rankfold.jobs.exchange import export
from rankfold.linalg import Dense

IDS = torch.tensor([[5, 63, 7, 64, 9, 65]])


def llama(tied=True, vocabulary=64, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=tied, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def grown(**options):
    """A tied Llama with two new tokens, 64 and 65."""
    torch.manual_seed(0)
    model = llama(**options)
    model.resize_token_embeddings(66, mean_resizing=False)
    return model.eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return BertModel(config).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return ViTModel(config).eval()


def shake(adaptation, std=0.3):
    for k, p in enumerate(adaptation.parameters()):
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)), alpha=std)


def names(adaptation):
    return set(adaptation.attached["default"].member.extras)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["biases"], {"encoder.layer.0.attention.self.query.bias"}),
        (["all-biases"], {n for n, _ in bert().named_parameters() if n.endswith(".bias")}),
        (["norms"], {n for n, _ in bert().named_parameters() if "LayerNorm" in n}),
        (["*.output.LayerNorm.bias"], {n for n, _ in bert().named_parameters() if n.endswith("output.LayerNorm.bias")}),
        (["attention.output.LayerNorm"], {f"encoder.layer.0.attention.output.LayerNorm.{leaf}" for leaf in ("weight", "bias")}),
        (["token_type_embeddings"], {"embeddings.token_type_embeddings.weight"}),
        (["position_embeddings.weight[3:5]", "position_embeddings[7]"], {"embeddings.position_embeddings.weight[3:5,7]"}),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_patterns_mean(patterns, expected):
    model = bert()
    a = rf.adapt(model, "lora", rank=2, targets=["query"], extras=patterns)
    assert names(a) == expected
    ids = torch.arange(10)[None]
    model.train()(ids).last_hidden_state.square().sum().backward()
    used = [e for n, e in a.attached["default"].member.extras.items() if not n.startswith("pooler")]
    assert all(a.store.tensor(e.key).grad is not None for e in used)


def test_a_parameter_of_the_model_itself():
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model, x = ViTModel(config).eval(), torch.randn(1, 3, 8, 8)
    a = rf.adapt(model, "lora", rank=2, extras=["cls_token", "position_embeddings"])
    assert names(a) == {"embeddings.cls_token", "embeddings.position_embeddings"}
    y = model(x).last_hidden_state
    shake(a)
    assert not torch.allclose(model(x).last_hidden_state, y, atol=1e-3)
    live = model(x).last_hidden_state
    a.fold()
    torch.testing.assert_close(model(x).last_hidden_state, live, rtol=1e-5, atol=1e-5)


def test_positional_and_token_type_embeddings_are_ordinary_sites():
    model, ids = bert(), torch.arange(8)[None]
    y = model(ids).last_hidden_state
    a = rf.adapt(model, "lora", rank=2, targets=["position_embeddings", "token_type_embeddings"])
    assert [s.shape for s in a.sites] == [(16, 16), (16, 2)]
    assert torch.equal(model(ids).last_hidden_state, y)
    shake(a)
    live = model(ids, token_type_ids=ids % 2).last_hidden_state
    a.fold()
    torch.testing.assert_close(model(ids, token_type_ids=ids % 2).last_hidden_state, live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("extras", "error", "message"),
    [
        (["embed_tokns"], UnknownName, "nearest: embed_tokens"),
        (["embed_tokens[64:70]"], OptionError, "no range of its 64 rows"),
        (["embed_tokens[9:3]"], OptionError, "no range"),
        (["biases"], TargetError, "finds nothing"),
        (["mlp[3]"], TargetError, "has no weight"),
    ],
)
def test_what_cannot_be_meant(extras, error, message):
    model = llama()
    kept = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        rf.adapt(model, "lora", rank=2, extras=extras)
    assert "rankfold" not in model._modules
    assert [p.requires_grad for p in model.parameters()] == kept


class Positions(nn.Module):
    """Reads the weight of its positions without calling the module."""

    def __init__(self):
        super().__init__()
        self.read, self.positions = nn.Linear(6, 4), nn.Embedding(3, 6)

    def forward(self, x):
        return self.read(x + self.positions.weight)


def test_a_parameter_that_is_read_from_outside():
    """Said where it was named, warned of where we chose it."""
    x = torch.randn(2, 3, 6)
    with pytest.raises(InactiveError, match=r"positions\.weight"):
        rf.adapt(Positions(), "lora", rank=2, extras=["positions"], batches=[x])
    model = Positions()
    rf.adapt(model, "lora", rank=2, extras=["positions.weight[1]"])
    with pytest.raises(InactiveError, match=r"positions\.weight\[1\]"):
        model(x)
    model = Positions()
    a = rf.adapt(model, "full", targets=["read"])
    with pytest.warns(UserWarning, match=r"positions\.weight.*keep the base's value"):
        model(x)
    assert "positions.weight" in names(a)


# rows


def as_map(model, site):
    W = model.get_parameter(site.weight)
    return W.mT if site.kind == "embedding" else W


def whole(model, a):
    """A copy of the base, untied where the adapters untie it, with the rows and then the changes of weights written in."""
    plain = copy.deepcopy(model)
    rf.adaptation(plain).remove()
    with torch.no_grad():
        for e in a.attached["default"].member.extras.values():
            p = plain.get_parameter(e.name.partition("[")[0])
            p[list(e.rows)] = a.store.tensor(e.key).to(p.dtype)
        if {"lm_head"} <= {site.name for site in a.sites}:
            plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.clone())
        for slot in a.slots():
            W = slot.structure.weight(Dense(as_map(plain, slot.site)), slot.t(a.store), slot.site).dense()
            as_map(plain, slot.site).copy_(W)
    return plain


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens", "lm_head"]], ids=["beside", "adapted"])
def test_rows_are_the_definition_forward_and_backward(tied, targets):
    model = grown(tied=tied).double()
    extras = ["embed_tokens[64:66]"] if tied else ["embed_tokens[64:66]", "lm_head[64:66]"]
    before = model(IDS).logits.detach()
    a = rf.adapt(model, "lora", rank=2, targets=targets, extras=extras)
    assert torch.equal(model(IDS).logits, before)
    shake(a)
    plain = whole(model, a)
    y, y0 = model(IDS).logits, plain(IDS).logits
    torch.testing.assert_close(y, y0, rtol=1e-9, atol=1e-11)
    (y.square().sum()).backward()
    plain.requires_grad_(True)
    (plain(IDS).logits.square().sum()).backward()
    for e in a.attached["default"].member.extras.values():
        expected = plain.get_parameter(e.name.partition("[")[0]).grad[64:66]
        if tied and plain.lm_head.weight is not plain.model.embed_tokens.weight:
            expected = expected + plain.lm_head.weight.grad[64:66]
        torch.testing.assert_close(a.store.tensor(e.key).grad, expected, rtol=1e-8, atol=1e-10)
    with a.disabled():
        assert torch.equal(model(IDS).logits, before)


def test_rows_cost_rows():
    """No copy of the vocabulary: neither in the file, nor in what trains, nor in the gradient."""
    model = grown()
    a = rf.adapt(model, "lora", rank=2, targets=["q_proj"], extras=["embed_tokens[64:66]"])
    assert a.parameter_count() - sum(p.numel() for n, p in a.tensors().items() if "extra" not in n) == 2 * 16
    seen = []

    def note(x):
        seen.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model.train()(IDS).logits.square().sum().backward()
    weights = {(66, 16), (16, 66)}
    own = [s for s in seen if s in weights]
    rf.adaptation(model).remove()
    model.requires_grad_(False)
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.requires_grad_(True)
    seen.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(IDS).logits.square().sum().backward()
    assert own == [s for s in seen if s in weights]  # the head's own, which is the base's storage


def test_the_row_of_the_padding_never_trains():
    model = llama(tied=False)
    model.model.embed_tokens.padding_idx = 0
    a = rf.adapt(model, "lora", rank=2, extras=["embed_tokens[0,63]"])
    model(torch.tensor([[0, 63, 5]])).logits.sum().backward()
    g = a.store.tensor(next(iter(a.attached["default"].member.extras.values())).key).grad
    assert not g[0].any()
    assert g[1].any()


def test_rows_in_bf16_keep_float32_masters():
    model = grown().bfloat16()
    a = rf.adapt(model, "lora", rank=2, extras=["embed_tokens[64:66]"])
    model(IDS).logits.float().square().sum().backward()
    own = a.store.tensor(next(iter(a.attached["default"].member.extras.values())).key)
    assert own.dtype == own.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grown()(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("extras", [["embed_tokens[64:66]"], ["lm_head"], ["embed_tokens"]], ids=["rows", "head", "embedding"])
def test_u4_tied_head_stays_tied(extras, tmp_path):
    """A trained head, embedding or new rows of a tied storage: the tie holds in training, folded, saved, loaded and exported."""
    model = grown()
    a = rf.adapt(model, "lora", rank=2, extras=extras)
    assert len(names(a)) == 1  # one tensor for both users
    optimizer = a.optimizer(lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()
    y = model(IDS).logits
    with a.disabled():
        assert not torch.allclose(model(IDS).logits, y, atol=1e-2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = rf.load(grown(), a.save(tmp_path / "native"))
    assert torch.equal(again.model(IDS).logits, y)
    a.fold()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits, y, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "folded")
    folded = LlamaForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(folded(IDS).logits, y, rtol=1e-5, atol=1e-5)
    a.unfold()
    assert torch.equal(model(IDS).logits, y)
    export(model, a, "folded", tmp_path / "exported")
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "exported").eval()
    torch.testing.assert_close(exported(IDS).logits, y, rtol=1e-5, atol=1e-5)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight


def test_rows_and_norms_are_in_the_file(tmp_path):
    model = grown()
    a = rf.adapt(model, "lora", rank=2, extras=["embed_tokens[64:66]", "norms"])
    shake(a)
    twin = rf.load(grown(), a.save(tmp_path / "a"))
    assert torch.equal(twin.model(IDS).logits, model(IDS).logits)
    assert names(twin) == names(a)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight[64:70]", "model.nowhere.weight[3]", "model.embed_tokens.weight[0:9]"]
)
def test_rows_of_a_file_that_do_not_fit_are_refused(name, tmp_path):
    a = rf.adapt(grown(), "lora", rank=2, targets=["q_proj"], extras=["embed_tokens[64:66]"])
    record = load_native(a.save(tmp_path / "a"))
    extras = {name: record.extras["model.embed_tokens.weight[64:66]"]}
    save_native(tmp_path / "b", dataclasses.replace(record, extras=extras))
    with pytest.raises((FileError, UnknownName)):
        rf.load(grown(), tmp_path / "b")


# experts as a list of modules


class OldMixture(nn.Module):
    """Experts as a list; the router sends every token to the first."""

    def __init__(self, listed="experts"):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.add_module(listed, nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)]))
        self.listed, self.used = listed, [0]

    def forward(self, x):
        h = self.body(x)
        return h + sum(self.get_submodule(self.listed)[k](h) for k in self.used)


def test_experts_without_tokens_are_no_bypass():
    model, x = OldMixture(), torch.randn(2, 8)
    a = rf.adapt(model, "lora", rank=2)
    with pytest.warns(UserWarning, match=r"2 site\(s\) were not called so far.*experts\.1\.0"):
        model.train()(x)
    a.remove()
    with pytest.warns(UserWarning, match="experts"):
        a = rf.adapt(model, "lora", rank=2, batches=[x], loss=lambda m, b: m(b).square().sum())
    assert len(a.sites) == 4
    optimizer = a.optimizer(lr=0.1)
    for k in (0, 1):
        model.used = [k]
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    with pytest.raises(InactiveError, match=r"no gradient reached experts\.2\.0;"):  # still silent at the end of the run
        a.attached["default"].engine.check()


@pytest.mark.parametrize("listed", ["experts", "layers"])
def test_a_list_that_nobody_runs_is_one(listed):
    """The pass over a batch is strict: what it does not run would not train. The first forward without one warns."""
    model, x = OldMixture(listed), torch.randn(2, 8)
    model.used = [] if listed == "experts" else [0]
    with pytest.raises(InactiveError, match=f"{listed}.1.0"):
        rf.adapt(model, "lora", rank=2, batches=[x])
    rf.adapt(model, "lora", rank=2)
    with pytest.warns(UserWarning, match=rf"were not called so far.*{listed}\.1\.0"):
        model.train()(x)


@pytest.mark.parametrize("method", ["eva", "lora-ga"])
def test_an_expert_without_tokens_starts_without_data(method, tmp_path):
    """A data-driven init has nothing to show it: it starts by the structure's own law, with one warning that names it."""
    model, x = OldMixture(), torch.randn(8, 8)
    model.used = [0, 2]
    before = model(x)
    batches = [x, x + 1.0]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        a = rf.adapt(model, method, rank=2, batches=batches, loss=lambda m, b: m(b).square().sum(), targets=["*experts*", "body"])
    own = [str(w.message) for w in told if "start without data" in str(w.message)]
    assert len(own) == 1
    assert "1 site(s) of experts: experts.1.0" in own[0]
    assert len(a.sites) == 4
    torch.testing.assert_close(model(x), before)
    tensors = {name.partition("/")[2]: t for name, t in a.tensors().items()}
    assert (tensors["experts.1.0/B"] == 0).all()
    assert 0 < tensors["experts.1.0/A"].abs().max() <= 8**-0.5  # LoRA's own start
    model.used = [1]  # once a token comes it trains like the others
    a.optimizer(lr=0.1).zero_grad()
    model(x).square().sum().backward()
    assert tensors["experts.1.0/B"].grad.abs().max() > 0
    model.used = [0, 1, 2]
    y = model(x)
    again = OldMixture()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("rankfold")})
    again.used = [0, 1, 2]
    rf.load(again, a.save(tmp_path / "a"))
    assert torch.equal(again(x), y)


def test_a_whole_list_of_experts_without_data_is_an_error():
    model, x = OldMixture(), torch.randn(8, 8)
    model.used = []
    with pytest.raises(InactiveError, match=r"experts\.0\.0.*saw no input"):
        rf.adapt(model, "eva", rank=2, batches=[x], loss=lambda m, b: m(b).square().sum())


# gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_u18_checkpointing_never_loses_gradients(name, reentrant):
    """The gradients with checkpointing are those without, whoever forgot to ask for gradients of the inputs."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    if name == "bert":
        model, batch = bert(), {"input_ids": torch.arange(6)[None]}
    elif name == "vit":
        config = ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        model, batch = ViTModel(config), {"pixel_values": x}
    else:
        config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
        model, batch = T5Model(config), {"input_ids": torch.arange(6)[None], "decoder_input_ids": torch.arange(4)[None]}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = model.config.hidden_dropout_prob = 0.0
    a = rf.adapt(model, "lora", rank=2)
    shake(a)
    model.train()

    def gradients():
        for p in a.parameters():
            p.grad = None
        model(**batch).last_hidden_state.square().sum().backward()
        return {n: p.grad for n, p in a.tensors().items() if p.requires_grad}

    plain = {n: None if g is None else g.clone() for n, g in gradients().items()}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    for n, g in gradients().items():
        assert (g is None) == (plain[n] is None), n
        if g is not None:
            torch.testing.assert_close(g, plain[n], rtol=1e-4, atol=1e-5)

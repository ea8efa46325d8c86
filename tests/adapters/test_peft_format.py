"""peft's folder: ours loaded by peft, and peft's loaded by us, give the function that dense arithmetic gives."""

import copy
import json
import math
import warnings
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold.adapters import Adapter, Entry, compare, fingerprint
from rankfold.adapters.files import read_tensors, write_json, write_tensors
from rankfold.adapters.formats.peft import read_peft, write_peft
from rankfold.adapters.formats.serving import write_serving
from rankfold.errors import CompositionError, FileError, OptionError, RankfoldError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 0, 8, 11]])
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, tie_word_embeddings=tied, attention_bias=True,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=23, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    ).eval()


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def kind(module: nn.Module) -> str:
    return {"Conv1D": "conv1d", "Embedding": "embedding"}.get(type(module).__name__, "linear")


def by_hand(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the model with every weight changed by dense arithmetic in float64."""
    model = copy.deepcopy(model)
    for e in adapter.entries.values():
        module = model.get_submodule(e.name)
        turned = kind(module) != "linear"
        W = module.weight.detach().double()
        V = (W.T if turned else W) + e.scale * e.B.double() @ e.A.double()
        if e.magnitude is not None:
            V = e.magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True)
        module.weight = nn.Parameter((V.T if turned else V).float())  # a new one: a tied head keeps the old
    for name, t in adapter.extras.items():
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, nn.Parameter(t))
    return model


def load(model: nn.Module, path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of embeddings, Conv1D and missing hub access
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()


def draw(model: nn.Module, names: dict[str, tuple[int, float]], dora: bool = False, rows: bool = False) -> list[Entry]:
    generator = torch.Generator().manual_seed(1)
    entries = []
    for name, (rank, scale) in names.items():
        module = model.get_submodule(name)
        k = kind(module)
        W = module.weight.detach()
        out, in_ = W.shape if k == "linear" else W.shape[::-1]
        B, A = torch.randn(out, rank, generator=generator) * 0.3, torch.randn(rank, in_, generator=generator) * 0.3
        m = torch.rand(out, generator=generator) + 0.5 if dora else None
        entries.append(Entry(name, B, A, scale, k, magnitude=m))
    return entries


OURS = {
    "llama": {"model.layers.0.self_attn.q_proj": (2, 1.5), "model.layers.1.self_attn.q_proj": (3, 1.5),
              "model.layers.0.mlp.down_proj": (1, -0.7), "model.embed_tokens": (2, 0.5)},
    "bert": {"bert.encoder.layer.0.attention.self.query": (2, 2.0), "bert.encoder.layer.0.output.dense": (4, 1 / 3),
             "bert.embeddings.word_embeddings": (2, 1.0)},
    "gpt2": {"transformer.h.0.attn.c_attn": (2, 2.0), "transformer.h.0.mlp.c_proj": (3, 0.3)},
}  # fmt: skip


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_ours_loads_in_peft(tmp_path, name, dora):
    """Ranks and scales of their own at every site, linear, transposed and embedding."""
    model = MODELS[name]()
    extras = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)} if name == "bert" else {}
    adapter = Adapter.of(draw(model, OURS[name], dora), extras, {"task_type": "SEQ_CLS"} if name == "bert" else {})
    write_peft(tmp_path / "out", adapter)
    theirs, mine, base = logits(load(model, tmp_path / "out")), logits(by_hand(model, adapter)), logits(model)
    assert (mine - base).abs().max() > 1e-2, "the adapter does something"
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)

    again = read_peft(tmp_path / "out")
    assert again.entries.keys() == adapter.entries.keys()
    for k, e in adapter.entries.items():
        got = again.entries[k]
        assert torch.equal(got.B, e.B)
        assert torch.equal(got.A, e.A)
        assert got.scale == pytest.approx(e.scale, rel=1e-15)
        assert got.kind == e.kind
        assert (got.magnitude is None) == (not dora)
    assert all(torch.equal(again.extras[k], v) for k, v in extras.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_factors_bytes_stay(tmp_path, dtype):
    """Folding a scale of 5.66 into a bf16 B would cost 2e-3."""
    a = Adapter.of([Entry("q", torch.randn(6, 2).to(dtype), torch.randn(2, 5).to(dtype), 16 / math.sqrt(8))])
    write_peft(tmp_path, a)
    stored = read_tensors(tmp_path / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.q.lora_B.weight"], a.entries["q"].B)
    assert read_peft(tmp_path).entries["q"].scale == a.entries["q"].scale


CONFIGS = {
    "lora": {"r": 3, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 4, "rank_pattern": {"PROJ": 3}, "alpha_pattern": {"PROJ": 5}},
    "rslora patterns": {"r": 2, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"PROJ": 5}, "alpha_pattern": {"PROJ": 7}},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "dora patterns": {"r": 2, "lora_alpha": 3, "use_dora": True, "use_rslora": True, "rank_pattern": {"PROJ": 3}},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 2, "init_lora_weights": "orthogonal"},
    "biases": {"r": 2, "bias": "lora_only"},
    "all biases": {"r": 2, "bias": "all"},
    "modules": {"r": 2, "modules_to_save": ["HEAD"]},
    "embedding": {"r": 2, "target_modules": ["EMBED", "PROJ"]},
    "embedding dora": {"r": 2, "target_modules": ["EMBED", "PROJ"], "use_dora": True},
}
NAMES = {
    "llama": {"PROJ": "q_proj", "OTHER": "down_proj", "EMBED": "embed_tokens", "HEAD": "lm_head"},
    "bert": {"PROJ": "query", "OTHER": "value", "EMBED": "word_embeddings", "HEAD": "classifier"},
    "gpt2": {"PROJ": "c_attn", "OTHER": "c_fc", "EMBED": "wte", "HEAD": "ln_f"},
}


def named(value, names):
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [named(v, names) for v in value]
    return {named(k, names): v for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_theirs_is_read_exactly(tmp_path, name, config):
    options = {"target_modules": ["PROJ", "OTHER"], **CONFIGS[config]}
    options = {k: named(v, NAMES[name]) for k, v in options.items()}
    model = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path)
    assert adapter.entries
    assert {kind(model.get_submodule(e.name)) for e in adapter.entries.values()} == {e.kind for e in adapter.entries.values()}
    torch.testing.assert_close(logits(by_hand(model, adapter)), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(model)).abs().max() > 1e-3
    if "embedding" in config and name == "llama":  # peft knows this embedding by its name, and stores a copy of the base's
        copies = adapter.metadata["base_copies"]
        assert compare(copies, fingerprint(dict(model.named_parameters()))).verdict == "same"
    write_peft(tmp_path / "again", adapter)
    torch.testing.assert_close(logits(load(model, tmp_path / "again")), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("lm_head",), ("model.embed_tokens",), ("model.embed_tokens", "lm_head")])
def test_tied_heads(tmp_path, names):
    """Each of two modules that share a storage has a change of its own, or none."""
    model = llama(tied=True)
    adapter = Adapter.of(draw(model, dict.fromkeys(names, (2, 1.3))))
    write_peft(tmp_path, adapter)
    torch.testing.assert_close(logits(load(model, tmp_path)), logits(by_hand(model, adapter)), rtol=1e-5, atol=1e-5)
    assert set(read_peft(tmp_path).entries) == set(names)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"]])
def test_adapters_that_peft_ties(tmp_path, targets):
    """Both ends of a tie are in the file, so what is read is the whole function."""
    model = llama(tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True)
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path)
    assert {"lm_head", "model.embed_tokens"} <= set(adapter.entries)
    torch.testing.assert_close(logits(by_hand(model, adapter)), logits(theirs), rtol=1e-5, atol=1e-5)


def test_one_name_that_ends_another(tmp_path):
    """peft matches ends of names by regular expression: "q" must not take the rank of "a.q", nor "aXq" that of "a.q"."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.a = nn.ModuleDict({"q": nn.Linear(4, 4), "a": nn.ModuleDict({"q": nn.Linear(4, 4)})})
            self.aXq = nn.Linear(4, 4)

        def forward(self, x):
            return self.aXq(self.a["a"]["q"](self.a["q"](self.q(x))))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 4)
    for order in (["q", "a.q", "a.a.q", "aXq"], ["aXq", "a.a.q", "a.q", "q"]):
        adapter = Adapter.of(draw(model, {n: (r + 1, 0.5 + r) for r, n in enumerate(order)}))
        write_peft(tmp_path, adapter)
        torch.testing.assert_close(load(model, tmp_path)(x), by_hand(model, adapter)(x), rtol=1e-5, atol=1e-5)
        assert read_peft(tmp_path).ranks == adapter.ranks
        assert {k: e.scale for k, e in read_peft(tmp_path).entries.items()} == pytest.approx(
            {k: e.scale for k, e in adapter.entries.items()}
        )


def test_row_slices_are_joined(tmp_path):
    model = gpt2()
    q = Entry("transformer.h.0.attn.c_attn", torch.randn(16, 2), torch.randn(2, 16), 0.5, "conv1d", (0, 16), 48)
    v = Entry("transformer.h.0.attn.c_attn", torch.randn(16, 1), torch.randn(1, 16), 2.0, "conv1d", (32, 48), 48)
    write_peft(tmp_path, Adapter.of([q, v]))
    delta = torch.zeros(48, 16)
    delta[:16], delta[32:] = 0.5 * q.B @ q.A, 2.0 * v.B @ v.A
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.transformer.h[0].attn.c_attn.weight += delta.T
    torch.testing.assert_close(logits(load(model, tmp_path)), logits(changed), rtol=1e-5, atol=1e-5)


def test_what_peft_can_not_hold(tmp_path):
    plain, dora = (
        Entry("a", torch.ones(3, 1), torch.ones(1, 2)),
        Entry("b", torch.ones(3, 1), torch.ones(1, 2), magnitude=torch.ones(3)),
    )
    gain, empty = (
        Entry("c", torch.ones(3, 1), torch.ones(1, 2), gain=torch.ones(3)),
        Entry("d", torch.ones(3, 0), torch.ones(0, 2)),
    )
    for entries, extras, message in [
        ([plain, dora], {}, "one switch"),
        ([gain], {}, "gain"),
        ([empty], {}, "no weight"),
        ([], {}, "no weight"),
        ([plain], {"a.weight": torch.ones(3, 2)}, "its site is adapted too"),
        ([plain], {"scale": torch.ones(1)}, "no module"),
    ]:
        with pytest.raises(CompositionError, match=message):
            write_peft(tmp_path, Adapter.of(entries, extras))
    assert not list(tmp_path.iterdir()), "nothing was written"
    notes = write_peft(tmp_path, Adapter.of([plain, empty], {"head.weight": torch.ones(1, 3)}))
    assert any("d: rank 0" in n for n in notes)
    assert any("head" in n for n in notes)


def folder(path, tensors: dict | None = None, **change):
    """A small valid folder of peft's, with changes."""
    good = {"base_model.model.q.lora_A.weight": torch.ones(2, 5), "base_model.model.q.lora_B.weight": torch.ones(3, 2)}
    path.mkdir(exist_ok=True)
    write_tensors(path / "adapter_model.safetensors", good if tensors is None else tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **change}
    (path / "adapter_config.json").write_text(json.dumps(config))  # keeps the order of patterns
    return path


Q = "base_model.model.q."
A, B = Q + "lora_A.weight", Q + "lora_B.weight"
REFUSED = {
    "another method": ({"peft_type": "IA3"}, None, "peft_type 'IA3'"),
    "no type": ({"peft_type": None}, None, "peft_type"),
    "qalora": ({"use_qalora": True}, None, "use_qalora=True"),
    "lora_bias": ({"lora_bias": True}, None, "lora_bias"),
    "replication": ({"layer_replication": [[0, 4], [2, 5]]}, None, "layer_replication"),
    "parameters": ({"target_parameters": "experts.gate_up_proj"}, None, "target_parameters"),
    "arrow": ({"arrow_config": {"top_k": 2}}, None, "arrow_config"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, None, "alora_invocation_tokens"),
    "tokens": ({"trainable_token_indices": [1]}, None, "trainable_token_indices"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, None, "use_bdlora"),
    "kasa": ({"kasa_config": {"x": 1}}, None, "kasa_config"),
    "from the future": ({"use_something_new": True}, None, "use_something_new"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, None, "a base that peft has changed"),
    "olora": ({"init_lora_weights": "olora"}, None, "a base that peft has changed"),
    "corda": ({"init_lora_weights": "corda"}, None, "a base that peft has changed"),
    "loftq": ({"init_lora_weights": "loftq"}, None, "a base that peft has changed"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, None, "a base that peft has changed"),
    "regular expression": ({"alpha_pattern": {r"(a+)+$": 3}}, None, "regular expression"),
    "alpha of text": ({"alpha_pattern": {"q": "3"}}, None, "not a number"),
    "rank of text": ({"r": "2"}, None, "r '2'"),
    "other rank": ({"r": 8}, None, "is of rank 2, adapter_config.json says 8"),
    "other rank by pattern": ({"rank_pattern": {"q": 5}}, None, "rank 2"),
    "dora without magnitude": ({"use_dora": True}, None, "no magnitude"),
    "magnitude": ({}, {A: torch.ones(2, 5), B: torch.ones(3, 2), Q + "lora_magnitude_vector": torch.ones(3)}, "a magnitude"),
    "half a pair": ({}, {A: torch.ones(2, 5)}, "lacks lora_B.weight"),
    "inner widths": ({}, {A: torch.ones(2, 5), B: torch.ones(3, 4)}, "not \\[out, r\\]"),
    "convolution": ({}, {A: torch.ones(2, 5, 3, 3), B: torch.ones(3, 2)}, "not \\[out, r\\]"),
    "rank zero": ({}, {A: torch.ones(0, 5), B: torch.ones(3, 0)}, "r >= 1"),
    "integers": ({}, {A: torch.ones(2, 5).int(), B: torch.ones(3, 2)}, "floating point"),
    "foreign part": ({}, {A: torch.ones(2, 5), B: torch.ones(3, 2), Q + "lora_E": torch.ones(2)}, "lora_E"),
    "lora bias inside": ({}, {A: torch.ones(2, 5), B: torch.ones(3, 2), Q + "lora_B.bias": torch.ones(3)}, "lora_B"),
    "both kinds": ({}, {A: torch.ones(2, 5), B: torch.ones(3, 2), Q + "lora_embedding_A": torch.ones(2, 5)}, "lacks"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    change, tensors, message = REFUSED[name]
    with pytest.raises(FileError, match=message):
        read_peft(folder(tmp_path / "a", tensors, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(a+)+$"},  # never run
        {
            "target_modules": "all-linear",
            "exclude_modules": ["x"],
            "lora_dropout": 0.1,
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
        {
            "use_qalora": False,
            "lora_bias": False,
            "layer_replication": None,
            "target_parameters": [],
            "arrow_config": None,
            "peft_version": "0.99.0",
        },
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {r".*(q|k)": 2}},  # ranks are read from the tensors
        {"auto_mapping": {"x": "y"}, "revision": "main", "megatron_core": "megatron.core", "inference_mode": True},
    ],
)
def test_harmless_options(tmp_path, change):
    assert read_peft(folder(tmp_path / "a", **change)).entries["q"].scale == 2.0


def test_patterns_choose_as_peft_does(tmp_path):
    for pattern, alpha in [
        ({"q": 6}, 6),
        ({"^q": 6}, 6),
        ({"q$": 6}, 6),
        ({"x.q": 6}, 4),
        ({"^x": 6}, 4),
        ({"k": 8, "q": 6, "^q": 9}, 6),
        ({r"a\.q": 6}, 4),
    ]:
        assert read_peft(folder(tmp_path / "a", alpha_pattern=pattern)).entries["q"].scale == alpha / 2


def test_a_pickle_of_peft_is_refused(tmp_path):
    path = folder(tmp_path / "a")
    (path / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, path / "adapter_model.bin")
    with pytest.raises(FileError, match="pickle"):
        read_peft(path)


def test_serving_folds_and_reports(tmp_path):
    model = llama()
    adapter = Adapter.of(
        draw(model, {k: v for k, v in OURS["llama"].items() if "embed" not in k}), {"lm_head.weight": torch.ones(1)}
    )
    exact = write_serving(tmp_path / "fp32", adapter, torch.float32)
    assert exact.rank == 3
    assert exact.largest < 1e-6
    assert exact.left_out == ("lm_head.weight",)
    torch.testing.assert_close(
        logits(load(model, tmp_path / "fp32")), logits(by_hand(model, Adapter(adapter.entries))), rtol=1e-5, atol=1e-5
    )
    rounded = write_serving(tmp_path / "bf16", adapter, torch.bfloat16, rank=8)
    stored = read_peft(tmp_path / "bf16")
    assert set(stored.ranks.values()) == {8}
    for k, e in adapter.entries.items():
        want, got = e.scale * e.B.double() @ e.A.double(), stored.entries[k].B.double() @ stored.entries[k].A.double()
        assert stored.entries[k].scale == 1.0
        assert rounded.errors[k] == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-6)
        assert 1e-4 < rounded.errors[k] < 5e-3
    with pytest.raises(OptionError, match="rank 2"):
        write_serving(tmp_path / "x", adapter, rank=2)
    with pytest.raises(OptionError, match="dtype"):
        write_serving(tmp_path / "x", adapter, torch.int8)
    with pytest.raises(CompositionError, match="rescale"):
        write_serving(tmp_path / "x", Adapter.of(draw(model, OURS["llama"], dora=True)))
    with pytest.raises(CompositionError, match="no weight"):
        write_serving(tmp_path / "x", Adapter.of([]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=4), x, max_size=2),
    max_leaves=4,
)
KEYS = [
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "peft_type",
    "task_type",
    "x",
]
PARTS = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer.weight",
    "weight",
    "bias",
    "",
]


@fuzz
@given(
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
    st.dictionaries(
        st.tuples(st.sampled_from(["base_model.model.q.", "q.", "base_model.model.", "k."]), st.sampled_from(PARTS)),
        st.lists(st.integers(0, 3), max_size=3),
        max_size=5,
    ),
)
def test_fuzz(tmp_path, change, shapes):
    path = tmp_path / "a"
    path.mkdir(exist_ok=True)
    with suppress(RankfoldError):
        write_tensors(path / "adapter_model.safetensors", {"".join(k): torch.ones(s) for k, s in shapes.items()})
        write_json(path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **change})
        read_peft(path)

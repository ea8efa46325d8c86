"""torchtune's own names and its order of rows: what is read computes in transformers what it computes there."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import rankfold as rf
from rankfold.adapters.formats.foreign import Layout
from rankfold.adapters.formats.rotary import Heads, halves_of_pairs, pairs_of_halves
from rankfold.adapters.formats.torchtune import read_torchtune
from rankfold.errors import FileError, RankfoldError
from rankfold.jobs.exchange import folder_format

fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

HEADS, KEYS, SIZE, DIM = 4, 2, 6, 24


def llama(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    make = {"llama": (hf.LlamaConfig, hf.LlamaForCausalLM), "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM)}[kind]
    config = make[0](
        vocab_size=40, hidden_size=DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KEYS, max_position_embeddings=32, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return make[1](config).eval().double()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def folder(path: Path, tensors: dict[str, Tensor], **config) -> Path:
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path / "adapter_model.safetensors")
    written = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "peft_type": "LORA", **config}
    (path / "adapter_config.json").write_text(json.dumps(written))
    return path


def by_hand(rows: Tensor, heads: int) -> Tensor:
    """Row by row from torchtune to transformers: 2j + p of a head becomes p · half + j."""
    size = rows.shape[0] // heads
    out = torch.empty_like(rows)
    for h in range(heads):
        for j in range(size // 2):
            for p in range(2):
                out[h * size + p * (size // 2) + j] = rows[h * size + 2 * j + p]
    return out


@pytest.mark.parametrize("heads", [1, HEADS])
def test_rows_are_moved_one_by_one(heads):
    rows = draw(heads * SIZE, 3)
    assert torch.equal(halves_of_pairs(rows, heads), by_hand(rows, heads))
    assert torch.equal(pairs_of_halves(by_hand(rows, heads), heads), rows)


def test_both_orders_give_the_same_attention():
    """Meta's rotary embedding multiplies complex numbers made of rows beside each other; transformers turns halves."""
    x, Wq, Wk = draw(1, 5, DIM), draw(HEADS * SIZE, DIM), draw(HEADS * SIZE, DIM) + 1.0
    config = hf.LlamaConfig(hidden_size=DIM, num_attention_heads=HEADS, head_dim=SIZE, max_position_embeddings=32)
    cos, sin = (t.double() for t in LlamaRotaryEmbedding(config)(x, torch.arange(5)[None]))
    angle = torch.arange(5).double()[:, None] * 10000.0 ** (-torch.arange(0, SIZE, 2).double() / SIZE)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]  # [1, position, 1, half]

    def meta(W: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ W.T).view(1, 5, HEADS, SIZE // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(3).transpose(1, 2)

    q, k = ((x @ halves_of_pairs(W, HEADS).T).view(1, 5, HEADS, SIZE).transpose(1, 2) for W in (Wq, Wk))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(q @ k.mT, meta(Wq) @ meta(Wk).mT, rtol=1e-5, atol=1e-5)
    assert not torch.allclose((x @ Wq.T).view(1, 5, HEADS, SIZE).transpose(1, 2), q), "the order matters"


MODULES = {
    "layers.1.attn.q_proj": ("model.layers.1.self_attn.q_proj", (24, 24), HEADS),
    "layers.1.attn.k_proj": ("model.layers.1.self_attn.k_proj", (12, 24), KEYS),
    "layers.0.attn.v_proj": ("model.layers.0.self_attn.v_proj", (12, 24), None),
    "layers.0.attn.output_proj": ("model.layers.0.self_attn.o_proj", (24, 24), None),
    "layers.0.mlp.w1": ("model.layers.0.mlp.gate_proj", (32, 24), None),
    "layers.0.mlp.w2": ("model.layers.0.mlp.down_proj", (24, 32), None),
    "layers.0.mlp.w3": ("model.layers.0.mlp.up_proj", (32, 24), None),
    "output": ("lm_head", (40, 24), None),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_loaded_every_module_has_its_change(kind, dora, tmp_path):
    tensors, expected, ids = {}, llama(kind), torch.arange(1, 9)[None]
    for stem, (name, (out, in_), heads) in MODULES.items():
        a, b, m = draw(2, in_), draw(out, 2), draw(out).abs() + 0.5
        tensors |= {f"{stem}.lora_a.weight": a, f"{stem}.lora_b.weight": b}
        turned = heads is not None and kind == "llama"
        delta, m_here = (by_hand(t, heads) if turned else t for t in (1.5 * b @ a, m))
        with torch.no_grad():
            W = expected.get_submodule(name).weight
            W += delta
            if dora:
                tensors[f"{stem}.magnitude"] = m
                W.mul_((m_here / W.norm(dim=1))[:, None])
    model = llama(kind)
    base = model(input_ids=ids).logits
    rf.load(model, folder(tmp_path / "a", tensors))
    assert folder_format(tmp_path / "a") == "torchtune"
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(input_ids=ids).logits, base)


LAYOUT = Layout({name: shape for name, shape, _ in MODULES.values()})
LLAMA = Heads("llama", HEADS, KEYS)
Q = "layers.1.attn.q_proj"
GOOD = {f"{Q}.lora_a.weight": torch.ones(2, 24), f"{Q}.lora_b.weight": torch.ones(24, 2)}
REFUSED = {
    "an unknown key": ({**GOOD, f"{Q}.lora_c.weight": torch.ones(1)}, {}, "nearest ending: lora_[ab]"),
    "a module that there is not": ({k.replace("attn.q_proj", "moe.w1"): v for k, v in GOOD.items()}, {}, "fits no module"),
    "half a pair": ({f"{Q}.lora_a.weight": torch.ones(2, 24)}, {}, "lacks lora_up.weight"),
    "another rank": (GOOD, {"r": 4}, "is of rank 2, adapter_config.json says 4"),
    "another shape": ({**GOOD, f"{Q}.lora_b.weight": torch.ones(23, 2)}, {}, r"map \(23, 24\)"),
    "an option": (GOOD, {"use_rslora": True}, "use_rslora"),
    "alpha of text": (GOOD, {"lora_alpha": "3"}, "lora_alpha"),
    "an alpha beyond floats": (GOOD, {"lora_alpha": 10**400}, "lora_alpha"),
    "no alpha": (GOOD, {"lora_alpha": None}, "lora_alpha"),
    "rank of truth": (GOOD, {"r": True}, "r True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path):
    tensors, config, message = REFUSED[case]
    with pytest.raises(FileError, match=message):
        read_torchtune(folder(tmp_path / "a", tensors, **config), LAYOUT, LLAMA)


def test_without_the_config_or_the_order_of_rows_it_is_refused(tmp_path):
    path = folder(tmp_path / "a", GOOD)
    for heads in (None, Heads("phi3", HEADS, KEYS)):
        with pytest.raises(FileError, match="order of its rows in torchtune is known for gemma"):
            read_torchtune(path, LAYOUT, heads)
    with pytest.raises(FileError, match="24 rows are not 5 heads"):
        read_torchtune(path, LAYOUT, Heads("llama", 5, 5))
    (path / "adapter_config.json").unlink()
    with pytest.raises(FileError, match="alone says what alpha is"):
        read_torchtune(path, LAYOUT, LLAMA)


@fuzz
@given(
    st.dictionaries(
        st.tuples(
            st.sampled_from([Q, "layers.0.mlp.w1", "output", "layers.x.attn.q_proj", "layers.0"]),
            st.sampled_from(["lora_a.weight", "lora_b.weight", "magnitude", "x"]),
        ),
        st.lists(st.sampled_from([0, 1, 2, 12, 24, 32]), max_size=3),
        max_size=6,
    ),
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "target_modules", "x"]),
        st.none() | st.integers(-2, 3) | st.text(max_size=2),
        max_size=2,
    ),
)
def test_fuzz(tmp_path, shapes, config):
    with suppress(RankfoldError):
        path = folder(tmp_path / "a", {".".join(k): torch.ones(s) for k, s in shapes.items()}, **config)
        found = read_torchtune(path, LAYOUT, LLAMA)
        assert all(c.shape == LAYOUT.sites[c.name] for c in found.changes.values())

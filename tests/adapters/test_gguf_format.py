"""What is written, read by a reader of its own that follows the published layout; with `gguf` installed, by that library too."""

import mmap
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rankfold as rf
from rankfold.adapters import Adapter, Entry
from rankfold.adapters.formats.gguf import ARCHITECTURES, write_gguf
from rankfold.adapters.formats.rotary import Heads
from rankfold.errors import CompositionError, FileError, NumericError, OptionError
from rankfold.jobs.exchange import export, folder_format

LLAMA, QWEN = Heads("llama", 4, 2), Heads("qwen2", 4, 2)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Reader:
    """Field by field, in the order of the published layout."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self.data = bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.at = 0
        assert self.data[:4] == b"GGUF"
        self.at = 4
        self.version, count, pairs = self.take("I"), self.take("Q"), self.take("Q")
        self.metadata = {self.text(): self.value() for _ in range(pairs)}
        infos = [self.info() for _ in range(count)]
        start = -(-self.at // 32) * 32
        assert not any(self.data[self.at : start])
        self.tensors = {name: self.tensor(start + offset, sizes, kind) for name, sizes, kind, offset in infos}
        assert all(offset % 32 == 0 for *_, offset in infos)
        assert len(self.tensors) == count, "no name twice"
        assert len(self.data) % 32 == 0

    def take(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode("ascii")

    def value(self):
        kind = self.take("I")
        return self.text() if kind == 8 else self.take(NUMBERS[kind])

    def info(self):
        return self.text(), [self.take("Q") for _ in range(self.take("I"))], self.take("I"), self.take("Q")

    def tensor(self, start: int, sizes: list[int], kind: int) -> Tensor:
        """Sizes stand innermost first."""
        width = {0: 4, 1: 2, 30: 2}[kind]
        raw = self.data[start : start + width * int(np.prod(sizes))]
        if kind == 30:  # bfloat16 is the upper half of a float32
            words = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
            return torch.from_numpy(words.view(np.float32).reshape(sizes[::-1]).copy())
        return torch.from_numpy(np.frombuffer(raw, "<f4" if kind == 0 else "<f2").reshape(sizes[::-1]).copy())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def entry(leaf: str, out: int, in_: int, rank: int = 2, scale: float = 1.5, **options) -> Entry:
    return Entry(f"model.layers.3.{leaf}", draw(out, rank), draw(rank, in_, seed=9), scale, **options)


def stack(leaf: str, out: int, in_: int, kind: str = "experts") -> Entry:
    return Entry(f"model.layers.3.mlp.experts.{leaf}", draw(4, out, 2), draw(4, 2, in_, seed=9), 1.5, kind)


def meta_rows(W: Tensor, heads: int) -> Tensor:
    """Row by row as llama.cpp stores q and k: 2j + p of a head is p · half + j of transformers."""
    size = W.shape[0] // heads
    order = [h * size + p * (size // 2) + j for h in range(heads) for j in range(size // 2) for p in range(2)]
    return W[order]


def change(read: Reader, name: str) -> Tensor:
    """What llama.cpp adds to the weight: alpha / r · b a, with scale 1 for an alpha of 0."""
    a, b = read.tensors[f"{name}.lora_a"].double(), read.tensors[f"{name}.lora_b"].double()
    alpha = read.metadata["adapter.lora.alpha"]
    return (alpha / b.shape[1] if alpha else 1.0) * b @ a


def test_metadata_names_and_rows_of_a_llama(tmp_path):
    shapes = {
        "self_attn.q_proj": (24, 16), "self_attn.k_proj": (12, 16), "self_attn.v_proj": (12, 16), "self_attn.o_proj": (16, 24),
        "mlp.gate_proj": (20, 16), "mlp.up_proj": (20, 16), "mlp.down_proj": (16, 20),
    }  # fmt: skip
    entries = [entry(leaf, *shape) for leaf, shape in shapes.items()]
    errors = write_gguf(tmp_path / "a.gguf", Adapter.of(entries), LLAMA)
    read = Reader(tmp_path / "a.gguf")
    assert read.version == 3
    assert read.metadata == {
        "general.architecture": "llama", "general.type": "adapter", "general.file_type": 0, "adapter.type": "lora",
        "adapter.lora.alpha": 3.0,
    }  # fmt: skip
    short = dict(zip(shapes, ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]))
    for e, leaf in zip(entries, shapes):
        exact = e.scale * e.B.double() @ e.A.double()
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(leaf)
        expected = exact if heads is None else meta_rows(exact, heads)
        torch.testing.assert_close(change(read, f"blk.3.{short[leaf]}.weight"), expected, rtol=1e-12, atol=1e-12)
        assert read.tensors[f"blk.3.{short[leaf]}.weight.lora_a"].shape == (2, shapes[leaf][1])
    assert set(errors.values()) == {0.0}
    assert len(read.tensors) == 14


def test_other_architectures_keep_their_rows(tmp_path):
    e = entry("self_attn.q_proj", 24, 16)
    write_gguf(tmp_path / "a.gguf", Adapter.of([e]), QWEN)
    read = Reader(tmp_path / "a.gguf")
    assert read.metadata["general.architecture"] == "qwen2"
    assert torch.equal(read.tensors["blk.3.attn_q.weight.lora_b"], e.B)


def test_embedding_and_head(tmp_path):
    embedding = Entry("model.embed_tokens", draw(16, 2), draw(2, 40), 1.5, "embedding")
    head = Entry("lm_head", draw(40, 2), draw(2, 16), 1.5)
    write_gguf(tmp_path / "a.gguf", Adapter.of([embedding, head]), LLAMA)
    read = Reader(tmp_path / "a.gguf")
    rows, b = read.tensors["token_embd.weight.lora_a"], read.tensors["token_embd.weight.lora_b"]
    assert torch.equal(rows, embedding.A.T), "a row for each token"
    ids = torch.tensor([3, 0, 39])
    torch.testing.assert_close(1.5 * rows[ids] @ b.T, embedding.delta().dense().T[ids], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(change(read, "output.weight").float(), head.delta().dense(), rtol=1e-6, atol=1e-6)
    with pytest.raises(CompositionError, match="one weight in this model"):
        write_gguf(tmp_path / "b.gguf", Adapter.of([head]), LLAMA, tied=True)


def test_one_alpha_serves_sites_of_several_scales(tmp_path):
    """The commonest stays exact, the others take what is missing into b; the error is what the file holds."""
    entries = [entry("mlp.up_proj", 20, 16), entry("mlp.gate_proj", 20, 16), entry("mlp.down_proj", 16, 20, rank=3, scale=0.7)]
    errors = write_gguf(tmp_path / "a.gguf", Adapter.of(entries), LLAMA)
    read = Reader(tmp_path / "a.gguf")
    assert read.metadata["adapter.lora.alpha"] == 3.0
    for e, name in zip(entries, ["ffn_up", "ffn_gate", "ffn_down"]):
        exact = e.scale * e.B.double() @ e.A.double()
        error = float((change(read, f"blk.3.{name}.weight") - exact).norm() / exact.norm())
        assert errors[e.key] == pytest.approx(error, rel=1e-6, abs=1e-15)
    assert errors[entries[0].key] == 0.0
    assert 0 < errors[entries[2].key] < 1e-6


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 32)])
def test_dtypes(dtype, kind, tmp_path):
    e = entry("mlp.up_proj", 20, 16)
    errors = write_gguf(tmp_path / "a.gguf", Adapter.of([e]), LLAMA, dtype=dtype)
    read = Reader(tmp_path / "a.gguf")
    assert read.metadata["general.file_type"] == kind
    assert torch.equal(read.tensors["blk.3.ffn_up.weight.lora_b"].float(), e.B.to(dtype).float())
    exact = e.scale * e.B.double() @ e.A.double()
    error = float((change(read, "blk.3.ffn_up.weight") - exact).norm() / exact.norm())
    assert errors[e.key] == pytest.approx(error, rel=1e-9)
    assert (error == 0) == (dtype == torch.float32)
    half = Entry(e.name, e.B.half(), e.A.half(), e.scale)
    write_gguf(tmp_path / "b.gguf", Adapter.of([half]), LLAMA)
    assert Reader(tmp_path / "b.gguf").metadata["general.file_type"] == 1, "factors stay as they are"


def test_slices_of_a_fused_weight_are_joined(tmp_path):
    q = entry("self_attn.qkv_proj", 8, 16, rows=(0, 8), total_rows=24)
    v = entry("self_attn.qkv_proj", 8, 16, rows=(16, 24), total_rows=24)
    write_gguf(tmp_path / "a.gguf", Adapter.of([q, v]), Heads("phi3", 2, 2))
    got = change(Reader(tmp_path / "a.gguf"), "blk.3.attn_qkv.weight")
    torch.testing.assert_close(got[:8].float(), q.delta().dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[16:].float(), v.delta().dense(), rtol=1e-5, atol=1e-5)
    assert not got[8:16].any()


EXPERTS = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_stacks_of_gate_up_and_down(kind, tmp_path):
    """By the formulas of the model: gate and up are the halves of what gate_up_proj gives, every other number in GPT-OSS."""
    transposed = "experts-transposed" if kind == "gpt_oss" else "experts"
    gate_up, down = stack("gate_up_proj", 24, 16, transposed), stack("down_proj", 16, 12, transposed)
    errors = write_gguf(tmp_path / "a.gguf", Adapter.of([gate_up, down]), Heads(kind, 4, 2))
    assert set(errors.values()) == {0.0}
    read = Reader(tmp_path / "a.gguf")
    assert read.metadata["general.architecture"] == EXPERTS[kind]
    both = 1.5 * gate_up.B.double() @ gate_up.A.double()  # [expert, gate and up, in]
    gate, up = (both[:, ::2], both[:, 1::2]) if kind == "gpt_oss" else both.chunk(2, dim=1)
    expected = {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": 1.5 * down.B.double() @ down.A.double()}
    assert len(read.tensors) == 6
    for name, change_of_all in expected.items():
        weight = f"blk.3.{name}.weight"
        assert read.tensors[f"{weight}.lora_a"].shape == (4, 2, change_of_all.shape[2])
        assert read.tensors[f"{weight}.lora_b"].shape == (4, change_of_all.shape[1], 2)
        for k in range(4):  # what mul_mat_id does for expert k
            a, b = read.tensors[f"{weight}.lora_a"][k].double(), read.tensors[f"{weight}.lora_b"][k].double()
            torch.testing.assert_close(read.metadata["adapter.lora.alpha"] / 2 * b @ a, change_of_all[k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_of_a_model_as_gguf_are_what_folding_adds(kind, tmp_path):
    torch.manual_seed(0)
    config = {"mixtral": hf.MixtralConfig, "gpt_oss": hf.GptOssConfig}[kind](
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, head_dim=4, max_position_embeddings=16, pad_token_id=0, layer_types=["full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["gate_up_proj", "down_proj"])
    for k, p in enumerate(adaptation.parameters()):
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = export(model, adaptation, "gguf", tmp_path / "a.gguf")
    assert (len(report.errors), report.largest) == (2, 0.0)
    read = Reader(tmp_path / "a.gguf")
    adaptation.fold()
    experts = "model.layers.0.mlp.experts"
    both, down = (
        (model.get_submodule(experts).get_parameter(leaf) - base[f"{experts}.{leaf}"]).detach()
        for leaf in ("gate_up_proj", "down_proj")
    )
    if kind == "gpt_oss":  # [expert, in, out], gate and up in turn
        expected = {"ffn_gate_exps": both.mT[:, ::2], "ffn_up_exps": both.mT[:, 1::2], "ffn_down_exps": down.mT}
    else:
        expected = {"ffn_gate_exps": both[:, :24], "ffn_up_exps": both[:, 24:], "ffn_down_exps": down}
    for name, change in expected.items():
        a, b = (read.tensors[f"blk.0.{name}.weight.lora_{x}"] for x in "ab")
        scale = read.metadata["adapter.lora.alpha"] / b.shape[-1]
        torch.testing.assert_close(scale * b @ a, change, rtol=1e-4, atol=1e-5)


def test_beside_experts_q_and_k_of_mixtral_are_those_of_llama(tmp_path):
    e = entry("self_attn.k_proj", 12, 16)
    for kind, paired in (("mixtral", True), ("qwen3_moe", False)):
        write_gguf(tmp_path / "a.gguf", Adapter.of([e]), Heads(kind, 4, 2))
        exact = e.scale * e.B.double() @ e.A.double()
        got = change(Reader(tmp_path / "a.gguf"), "blk.3.attn_k.weight")
        torch.testing.assert_close(got, meta_rows(exact, 2) if paired else exact, rtol=1e-12, atol=1e-12)


def test_shared_experts_of_qwen2(tmp_path):
    shapes = {"gate_proj": (20, 16), "up_proj": (20, 16), "down_proj": (16, 20)}
    entries = [entry(f"mlp.shared_expert.{leaf}", *shape) for leaf, shape in shapes.items()]
    entries.append(entry("mlp.shared_expert_gate", 1, 16))
    write_gguf(tmp_path / "a.gguf", Adapter.of(entries), Heads("qwen2_moe", 4, 2))
    read = Reader(tmp_path / "a.gguf")
    for e, name in zip(entries, ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp"], strict=True):
        exact = e.scale * e.B.double() @ e.A.double()
        torch.testing.assert_close(change(read, f"blk.3.{name}.weight"), exact, rtol=1e-12, atol=1e-12)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False
    )
    return hf.GPT2LMHeadModel(config).eval()


def test_gpt2_changes_the_transpose_of_what_it_stores(tmp_path):
    """llama.cpp stores the weights of a Conv1D transposed, [out, in], and checks that lora_a has `in` columns."""
    model = gpt2()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["c_attn", "c_proj", "c_fc"])
    for p in adaptation.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = export(model, adaptation, "gguf", tmp_path / "a.gguf")
    assert report.largest == 0.0
    adaptation.fold()
    read = Reader(tmp_path / "a.gguf")
    assert read.metadata["general.architecture"] == "gpt2"
    short = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    assert len(read.tensors) == 2 * 2 * len(short)
    for leaf, name in short.items():
        stored = model.get_submodule(f"transformer.h.1.{leaf}").weight - before[f"transformer.h.1.{leaf}.weight"]  # [in, out]
        weight = f"blk.1.{name}.weight"
        assert read.tensors[f"{weight}.lora_a"].shape == (2, stored.shape[0])
        torch.testing.assert_close(change(read, weight).float(), stored.detach().T, rtol=1e-4, atol=1e-5)


def test_a_number_that_float16_can_not_hold_is_refused(tmp_path):
    e = entry("mlp.up_proj", 20, 16)
    e.B[0, 0] = 1e6
    with pytest.raises(NumericError, match=r"model\.layers\.3\.mlp\.up_proj: holds 1e\+06, and float16 ends at 65504"):
        write_gguf(tmp_path / "a.gguf", Adapter.of([e]), LLAMA, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_what_the_format_can_not_hold(tmp_path):
    good = entry("mlp.up_proj", 20, 16)
    for entries, heads, message in [
        ([good], Heads("bloom", 2, 2), "type 'bloom'"),
        ([entry("mlp.up_prj", 20, 16)], LLAMA, r"no name for it \(linear\) in a model of type llama; nearest: mlp\.up_proj"),
        ([Entry("encoder.x", good.B, good.A)], LLAMA, "no name for it"),
        ([entry("mlp.up_proj", 20, 16, magnitude=torch.ones(20))], LLAMA, "rescales rows"),
        ([entry("mlp.up_proj", 20, 16, kind="embedding")], LLAMA, r"\(embedding\)"),
        ([stack("gate_up_proj", 24, 16)], LLAMA, r"\(experts\)"),
        ([stack("gate_proj", 12, 16)], Heads("mixtral", 4, 2), r"nearest: mlp\.experts\.gate_up_proj"),
        ([stack("gate_up_proj", 25, 16)], Heads("mixtral", 4, 2), "25 rows do not split"),
        ([Entry("transformer.wpe", draw(16, 2), draw(2, 8), kind="embedding")], Heads("gpt2", 2, 2), "no LoRA to positions"),
        ([entry("mlp.up_proj", 20, 16, scale=0.0)], LLAMA, "scaled by 0"),
        ([entry("self_attn.q_proj", 22, 16)], LLAMA, "22 rows are not 4 heads"),
        ([], LLAMA, "no weight"),
    ]:
        with pytest.raises(CompositionError, match=message):
            write_gguf(tmp_path / "a.gguf", Adapter.of(entries), heads)
    with pytest.raises(OptionError, match="dtype"):
        write_gguf(tmp_path / "a.gguf", Adapter.of([good]), LLAMA, dtype=torch.float64)
    assert not list(tmp_path.iterdir())


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=16, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def test_exported_from_a_model(tmp_path):
    model = llama()
    adaptation = rf.adapt(model, "pissa", rank=2)
    for p in adaptation.parameters():
        p.data += 0.1
    report = export(model, adaptation, "gguf", tmp_path / "out")
    assert report.path == tmp_path / "out" / "lora.gguf"
    assert (report.dtype, report.largest < 1e-6, set(report.ranks.values())) == ("float32", True, {4})
    read = Reader(report.path)
    slot = next(s for s in adaptation.slots() if s.site.name.endswith("k_proj"))
    base = slot.base.dense().detach()
    adaptation.fold()
    exact = (model.get_submodule(slot.site.name).weight - base).detach()
    adaptation.unfold()
    torch.testing.assert_close(change(read, "blk.0.attn_k.weight").float(), meta_rows(exact, 2), rtol=1e-4, atol=1e-6)
    with pytest.raises(FileError, match="does not read it"):
        folder_format(report.path)


def test_a_refused_export_leaves_nothing(tmp_path):
    model = llama(tied=True)
    with pytest.raises(CompositionError, match="one weight in this model"):
        export(model, rf.adapt(model, "lora", rank=2, targets=["embed_tokens"]), "gguf", tmp_path / "out")
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CompositionError, match="config of transformers"):
        export(plain, rf.adapt(plain, "lora", rank=2), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_library_reads_the_same(tmp_path):
    gguf = pytest.importorskip("gguf")
    e = entry("self_attn.q_proj", 24, 16)
    write_gguf(tmp_path / "a.gguf", Adapter.of([e]), LLAMA)
    library, own = gguf.GGUFReader(tmp_path / "a.gguf"), Reader(tmp_path / "a.gguf")
    assert {t.name for t in library.tensors} == set(own.tensors)
    for t in library.tensors:
        assert np.array_equal(t.data, own.tensors[t.name].numpy())
    assert library.get_field("adapter.lora.alpha").contents() == 3.0
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for naming in ARCHITECTURES.values():
        names = gguf.get_tensor_name_map(numbers[naming.architecture], 4)
        block = "transformer.h.3." if naming.architecture == "gpt2" else "model.layers.3."
        assert all(names.get_name(name) in (short, None) for name, short in naming.ends.items())
        for leaf, short in naming.modules.items():
            assert names.get_name(block + leaf) in (f"blk.3.{short}", None)
        for leaf, shorts in naming.stacks.items():
            apart = [leaf] if len(shorts) == 1 else [leaf.replace("gate_up", k) for k in ("gate", "up")]
            known = numbers["qwen3moe"]  # Mixtral's converter has names of its own for the same weights
            assert [gguf.get_tensor_name_map(known, 4).get_name(block + n) for n in apart] == [f"blk.3.{s}" for s in shorts]

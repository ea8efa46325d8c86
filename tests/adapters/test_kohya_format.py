"""Files by hand in the layout of sd-scripts and LyCORIS: the change is what dense arithmetic in float64 says."""

from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold as rf
from rankfold.adapters import Adapter, Entry
from rankfold.adapters.files import Limits, write_tensors
from rankfold.adapters.formats.foreign import Change, Layout
from rankfold.adapters.formats.kohya import read_kohya, write_kohya
from rankfold.errors import CompositionError, FileError, RankfoldError, UnknownName
from rankfold.jobs.exchange import export, folder_format

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Net(nn.Module):
    """A block of a U-Net in small: a projection, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(12, 8), "conv1": nn.Conv2d(4, 6, 3, padding=1)})])
        self.norm_out = nn.LayerNorm(8)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        block = self.down_blocks[0]
        return self.norm_out(block["to_q"](x)), block["conv1"](image)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


X, IMAGE = torch.linspace(-1, 1, 24).double().view(2, 12), torch.linspace(-2, 1, 200).double().view(2, 4, 5, 5)
Q, CONV = "lora_unet_down_blocks_0_to_q", "lora_unet_down_blocks_0_conv1"
LAYOUT = Layout(
    {"down_blocks.0.to_q": (8, 12), "down_blocks.0.conv1": (6, 36)},
    {
        "down_blocks.0.to_q.weight": (8, 12), "down_blocks.0.to_q.bias": (8,), "down_blocks.0.conv1.weight": (6, 4, 3, 3),
        "norm_out.weight": (8,), "norm_out.bias": (8,),
    },
)  # fmt: skip


def draw(**shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Entry by entry: ΔW[o, i, k] = Σ_m Σ_n up[o, m] core[m, n, k] down[n, i]."""
    out = torch.zeros(up.shape[0], down.shape[1], *core.shape[2:], dtype=torch.float64)
    for m in range(core.shape[0]):
        for n in range(core.shape[1]):
            out += torch.einsum("o,i,hw->oihw", up[:, m], down[n], core[m, n])
    return out


def cases() -> dict[str, tuple[str, dict[str, Tensor], Tensor]]:
    """name -> (module of the file, its tensors, the change by hand in the weight's own shape)."""
    t = draw(
        up=(8, 2), down=(2, 12), cup=(6, 2, 1, 1), cdown=(2, 4, 3, 3), mid=(2, 2, 3, 3), pdown=(2, 4, 1, 1),
        a1=(8, 2), b1=(2, 12), a2=(8, 2), b2=(2, 12), ca1=(6, 2), cb1=(2, 36), ca2=(6, 2), cb2=(2, 36),
        t1=(2, 2, 3, 3), t2=(2, 2, 3, 3), ta1=(2, 6), tb1=(2, 4), ta2=(2, 6), tb2=(2, 4),
        w1=(2, 3), w2=(4, 4), w2a=(4, 1), w2b=(1, 4), cw1=(2, 2), cw2=(3, 2, 3, 3),
    )  # fmt: skip
    alpha = torch.tensor(3.0)
    kron_conv = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    for a in range(2):
        for c in range(2):
            kron_conv[3 * a : 3 * a + 3, 2 * c : 2 * c + 2] = t["cw1"][a, c] * t["cw2"]
    return {
        "lora": (Q, {"lora_up.weight": t["up"], "lora_down.weight": t["down"], "alpha": alpha}, 1.5 * t["up"] @ t["down"]),
        "lora without alpha": (Q, {"lora_up.weight": t["up"], "lora_down.weight": t["down"]}, t["up"] @ t["down"]),
        "locon": (
            CONV,
            {"lora_up.weight": t["cup"], "lora_down.weight": t["cdown"], "alpha": alpha},
            1.5 * torch.einsum("or,rihw->oihw", t["cup"][:, :, 0, 0], t["cdown"]),
        ),
        "locon with a core": (
            CONV,
            {"lora_up.weight": t["cup"], "lora_down.weight": t["pdown"], "lora_mid.weight": t["mid"], "alpha": alpha},
            1.5 * tucker(t["mid"], t["cup"][:, :, 0, 0], t["pdown"][:, :, 0, 0]),
        ),
        "loha": (
            Q,
            {"hada_w1_a": t["a1"], "hada_w1_b": t["b1"], "hada_w2_a": t["a2"], "hada_w2_b": t["b2"], "alpha": alpha},
            1.5 * (t["a1"] @ t["b1"]) * (t["a2"] @ t["b2"]),
        ),
        "loha of a convolution": (
            CONV,
            {"hada_w1_a": t["ca1"], "hada_w1_b": t["cb1"], "hada_w2_a": t["ca2"], "hada_w2_b": t["cb2"], "alpha": alpha},
            1.5 * ((t["ca1"] @ t["cb1"]) * (t["ca2"] @ t["cb2"])).view(6, 4, 3, 3),
        ),
        "loha with cores": (
            CONV,
            {"hada_w1_a": t["ta1"], "hada_w1_b": t["tb1"], "hada_w2_a": t["ta2"], "hada_w2_b": t["tb2"],
             "hada_t1": t["t1"], "hada_t2": t["t2"], "alpha": alpha},
            1.5 * tucker(t["t1"], t["ta1"].T, t["tb1"]) * tucker(t["t2"], t["ta2"].T, t["tb2"]),
        ),
        "lokr, both whole: no alpha": (
            Q,
            {"lokr_w1": t["w1"], "lokr_w2": t["w2"], "alpha": alpha},
            torch.kron(t["w1"], t["w2"]),
        ),
        "lokr": (
            Q,
            {"lokr_w1": t["w1"], "lokr_w2_a": t["w2a"], "lokr_w2_b": t["w2b"], "alpha": alpha},
            3.0 * torch.kron(t["w1"], t["w2a"] @ t["w2b"]),
        ),
        "lokr of a convolution": (CONV, {"lokr_w1": t["cw1"], "lokr_w2": t["cw2"]}, kron_conv),
    }  # fmt: skip


CASES = cases()


def file(path: Path, stem: str, own: dict[str, Tensor]) -> Path:
    write_tensors(path / "a.safetensors", {f"{stem}.{k}": v for k, v in own.items()})
    return path / "a.safetensors"


def merged(name: str, change: Tensor) -> Net:
    model = net()
    with torch.no_grad():
        model.get_submodule(name).weight += change.view_as(model.get_submodule(name).weight)
    return model


@pytest.mark.parametrize("case", CASES)
def test_read_against_the_change_by_hand(case, tmp_path):
    stem, own, change = CASES[case]
    (found,) = read_kohya(file(tmp_path, stem, own), LAYOUT).changes.values()
    torch.testing.assert_close(found.operator().dense().double(), change.flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_loaded_it_is_the_base_with_that_change(case, tmp_path):
    stem, own, change = CASES[case]
    model = net()
    before = model(X, IMAGE)
    rf.load(model, file(tmp_path, stem, own))
    name = "down_blocks.0.to_q" if stem == Q else "down_blocks.0.conv1"
    for got, want in zip(model(X, IMAGE), merged(name, change)(X, IMAGE)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(X, IMAGE)[stem == CONV], before[stem == CONV])


@pytest.mark.parametrize("case", ["lora", "locon", "loha", "lokr"])
def test_dora_scale_is_the_length_of_the_rows(case, tmp_path):
    stem, own, change = CASES[case]
    name = "down_blocks.0.to_q" if stem == Q else "down_blocks.0.conv1"
    model = net()
    W = model.get_submodule(name).weight.detach()
    m = torch.linspace(0.5, 2, W.shape[0]).double()
    shaped = m.reshape(-1, *[1] * (W.ndim - 1))
    changed = W + change.view_as(W)
    lengths = changed.flatten(1).norm(dim=1).reshape(shaped.shape)
    expected = merged(name, shaped * changed / lengths - W)
    rf.load(model, file(tmp_path, stem, {**own, "dora_scale": shaped}))
    for got, want in zip(model(X, IMAGE), expected(X, IMAGE)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_differences_of_whole_weights_biases_and_norms(tmp_path):
    model, expected = net(), net()
    t = draw(q=(8, 12), conv=(6, 4, 3, 3), b=(8,), w=(8,), nb=(8,))
    with torch.no_grad():
        expected.down_blocks[0]["to_q"].weight += t["q"]
        expected.down_blocks[0]["to_q"].bias += t["b"]
        expected.down_blocks[0]["conv1"].weight += t["conv"]
        expected.norm_out.weight += t["w"]
        expected.norm_out.bias += t["nb"]
    path = tmp_path / "a.safetensors"
    write_tensors(path, {
        f"{Q}.diff": t["q"], f"{Q}.diff_b": t["b"], f"{CONV}.diff": t["conv"],
        "lora_unet_norm_out.w_norm": t["w"], "lora_unet_norm_out.b_norm": t["nb"],
    })  # fmt: skip
    adaptation = rf.load(model, path)
    assert adaptation.slots()[0].structure.__class__.__name__ == "Full"
    for got, want in zip(model(X, IMAGE), expected(X, IMAGE)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_difference_beside_a_lora(tmp_path):
    stem, own, change = CASES["lora"]
    t = draw(b=(8,))
    model, expected = net(), merged("down_blocks.0.to_q", change)
    with torch.no_grad():
        expected.down_blocks[0]["to_q"].bias += t["b"]
    rf.load(model, file(tmp_path, stem, {**own, "diff_b": t["b"]}))
    torch.testing.assert_close(model(X, IMAGE)[0], expected(X, IMAGE)[0], rtol=1e-9, atol=1e-9)


# names


def test_underscores_are_resolved_by_the_model(tmp_path):
    t = draw(u=(3, 1), d=(1, 2))
    own = {"lora_up.weight": t["u"], "lora_down.weight": t["d"]}
    path = file(tmp_path, "lora_unet_a_b_c", own)
    assert list(read_kohya(path, Layout({"a_b.c": (3, 2), "a": (3, 2)})).changes) == ["a_b.c"]
    with pytest.raises(FileError, match=r"may be a\.b_c or a_b\.c of this model"):
        read_kohya(path, Layout({"a_b.c": (3, 2), "a.b_c": (3, 2)}))
    with pytest.raises(FileError, match=r"fits no module of this model; nearest: a\.b\.d"):
        read_kohya(path, Layout({"a.b.d": (3, 2), "x.y.z": (3, 2)}))


def test_a_pipeline_and_one_model_of_it(tmp_path):
    t = draw(u=(3, 1), d=(1, 2))
    tensors = {}
    for stem in ("lora_unet_mid_to_q", "lora_te1_text_model_q", "lora_te2_text_model_q"):
        tensors |= {f"{stem}.lora_up.weight": t["u"], f"{stem}.lora_down.weight": t["d"]}
    write_tensors(path := tmp_path / "a.safetensors", tensors)
    whole = Layout(dict.fromkeys(["unet.mid.to_q", "text_encoder.text_model.q", "text_encoder_2.q"], (3, 2)))
    assert set(read_kohya(path, whole).changes) == set(whole.sites)
    encoder = Layout({"text_model.q": (3, 2)})
    assert list(read_kohya(path, encoder, "text_encoder_2").changes) == ["text_model.q"]
    with pytest.raises(FileError, match="part="):
        read_kohya(path, encoder)
    with pytest.raises(UnknownName, match="text_encoder"):
        read_kohya(path, encoder, "text_encodr")
    with pytest.raises(FileError, match="nothing for the transformer"):
        read_kohya(path, encoder, "transformer")


ATTENTION = "transformer_blocks.0.attn1.to_q"
SDXL = {  # as the U-Net of Stable Diffusion XL is published, and what diffusers calls the same module
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": f"down_blocks.1.attentions.0.{ATTENTION}",
    "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks_7_1_transformer_blocks_0_attn1_to_q": f"down_blocks.2.attentions.0.{ATTENTION}",
    "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_1_transformer_blocks_0_attn1_to_q": f"mid_block.attentions.0.{ATTENTION}",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "output_blocks_2_0_out_layers_3": "up_blocks.0.resnets.2.conv2",
    "output_blocks_2_1_transformer_blocks_0_attn1_to_q": f"up_blocks.0.attentions.2.{ATTENTION}",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_1_proj_out": "up_blocks.1.attentions.0.proj_out",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_6_0_in_layers_2": "up_blocks.2.resnets.0.conv1",
    "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


def kohya_file(path: Path, stems) -> Path:
    """A LoRA of its own numbers at each module."""
    tensors = {}
    for k, stem in enumerate(stems):
        tensors |= {f"{stem}.lora_up.weight": torch.full((3, 1), k + 1.0), f"{stem}.lora_down.weight": torch.ones(1, 2)}
    write_tensors(path / "a.safetensors", tensors)
    return path / "a.safetensors"


@pytest.mark.parametrize("root", ["", "unet."])
def test_names_of_the_original_code_of_sdxl(root, tmp_path):
    path = kohya_file(tmp_path, [f"lora_unet_{stem}" for stem in SDXL])
    found = read_kohya(path, Layout(dict.fromkeys([root + name for name in SDXL.values()], (3, 2)))).changes
    assert len(found) == len(SDXL)
    for k, name in enumerate(SDXL.values()):
        assert found[root + name].operator().dense()[0, 0] == k + 1


def test_names_of_diffusers_and_of_the_original_model_are_read_too(tmp_path):
    layout = Layout(dict.fromkeys(SDXL.values(), (3, 2)))
    flat = [f"lora_unet_{name.replace('.', '_')}" for name in SDXL.values()]
    assert set(read_kohya(kohya_file(tmp_path, flat), layout).changes) == set(SDXL.values())
    own = Layout({"input_blocks.4.1.transformer_blocks.0.attn1.to_q": (3, 2)})
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert set(read_kohya(kohya_file(tmp_path, [stem]), own).changes) == set(own.sites)
    both = [stem, f"lora_unet_down_blocks_1_attentions_0_{ATTENTION.replace('.', '_')}"]
    with pytest.raises(FileError, match="both change down_blocks"):
        read_kohya(kohya_file(tmp_path, both), layout)


def test_in_a_block_without_attention_the_upsampler_comes_second(tmp_path):
    """The first of Stable Diffusion 1 and 2, which have three layers per block on the way up too."""
    known = [f"down_blocks.0.resnets.{j}.conv1" for j in range(2)] + [f"up_blocks.0.resnets.{j}.conv1" for j in range(3)]
    known += ["up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv", "up_blocks.1.attentions.2.proj_in"]
    path = kohya_file(tmp_path, ["lora_unet_output_blocks_2_1_conv", "lora_unet_output_blocks_5_2_conv"])
    found = read_kohya(path, Layout(dict.fromkeys(known, (3, 2)))).changes
    assert set(found) == {"up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv"}


def test_a_block_that_the_model_has_not_and_one_that_is_fused_are_refused_with_the_reason(tmp_path):
    layout = Layout(dict.fromkeys(SDXL.values(), (3, 2)))
    with pytest.raises(FileError, match="input_blocks_11_0_in_layers_2' fits no module"):
        read_kohya(kohya_file(tmp_path, ["lora_unet_input_blocks_11_0_in_layers_2"]), layout)
    with pytest.raises(FileError, match=r"original code of FLUX or HunyuanImage, whose q, k and v are one weight"):
        read_kohya(kohya_file(tmp_path, ["lora_unet_double_blocks_0_img_attn_qkv"]), Layout({"x": (3, 2)}))


def test_a_text_encoder_is_written_with_the_level_that_kohya_knows(tmp_path):
    """transformers 5 dropped "text_model" from CLIPTextModel; the files of sd-scripts have it."""
    module = "encoder.layers.0.self_attn.q_proj"
    flat = "text_model_encoder_layers_0_self_attn_q_proj"
    names = {
        (module,): ("lora_te",),
        (f"text_model.{module}",): ("lora_te",),
        (f"text_encoder.{module}",): ("lora_te",),
        (f"text_encoder.{module}", f"text_encoder_2.text_model.{module}"): ("lora_te1", "lora_te2"),
    }
    for modules, prefixes in names.items():
        entries = [Entry(name, torch.ones(3, 1), torch.ones(1, 2)) for name in modules]
        write_kohya(tmp_path / "a.safetensors", Adapter.of(entries))
        keys = {k.partition(".")[0] for k in safetensors.torch.load_file(tmp_path / "a.safetensors")}
        assert keys == {f"{prefix}_{flat}" for prefix in prefixes}
        assert set(read_kohya(tmp_path / "a.safetensors", Layout(dict.fromkeys(modules, (3, 2)))).changes) == set(modules)


def test_two_keys_for_one_module_are_refused(tmp_path):
    t = draw(u=(3, 1), d=(1, 2))
    tensors = {}
    for stem in ("lora_te1_q", "lora_te2_q"):
        tensors |= {f"{stem}.lora_up.weight": t["u"], f"{stem}.lora_down.weight": t["d"]}
    write_tensors(path := tmp_path / "a.safetensors", tensors)
    with pytest.raises(FileError, match="both change q"):
        read_kohya(path, Layout({"q": (3, 2)}))


# refusals

UP, DOWN = torch.ones(8, 2), torch.ones(2, 12)
LORA = {"lora_up.weight": UP, "lora_down.weight": DOWN}
REFUSED = {
    "an unknown key": ({**LORA, "lora_upp.weight": UP}, r"'lora_upp.weight'.*nearest: lora_up.weight"),
    "a rotation": ({"oft_blocks": torch.ones(2, 4, 4)}, "oft_blocks"),
    "half a pair": ({"lora_up.weight": UP}, "lacks lora_down.weight"),
    "two kinds": ({**LORA, "lokr_w1": UP}, "not the tensors of one change"),
    "inner widths": ({"lora_up.weight": torch.ones(8, 3), "lora_down.weight": DOWN}, "inner widths"),
    "another shape": ({"lora_up.weight": torch.ones(9, 2), "lora_down.weight": DOWN}, r"map \(9, 12\); .* is \(8, 12\)"),
    "rank zero": ({"lora_up.weight": torch.ones(8, 0), "lora_down.weight": torch.ones(0, 12)}, "rank 0"),
    "alpha zero": ({**LORA, "alpha": torch.tensor(0.0)}, "alpha is 0"),
    "several alphas": ({**LORA, "alpha": torch.ones(2)}, "not one number"),
    "lengths of columns": ({**LORA, "dora_scale": torch.ones(1, 12)}, "length per row"),
    "no infinities": ({**LORA, "alpha": torch.tensor(float("inf"))}, "NaN or Inf"),
    "integers": ({"lora_up.weight": UP.int(), "lora_down.weight": DOWN}, "I32"),
    "a core of another rank": ({**LORA, "lora_mid.weight": torch.ones(3, 3, 3, 3)}, "lora_mid.weight"),
    "two ranks": (
        {"lokr_w1_a": UP[:2, :1], "lokr_w1_b": UP[:1, :1].expand(1, 3), "lokr_w2_a": UP[:4], "lokr_w2_b": DOWN[:, :4]},
        "alpha fits one only",
    ),
    "two changes of one weight": ({**LORA, "diff": torch.ones(8, 12)}, "two changes"),
    "a difference of another shape": ({"diff": torch.ones(8, 11)}, r"\[8, 11\]; in this model"),
    "nothing but a scale": ({"alpha": torch.tensor(1.0)}, "not the tensors of one change"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path):
    own, message = REFUSED[case]
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{Q}.{k}": v.clone() for k, v in own.items()}, path)  # ours would refuse infinities
    with pytest.raises(FileError, match=message):
        read_kohya(path, LAYOUT)


def test_lengths_of_columns_of_a_square_map_are_not_taken_for_rows(tmp_path):
    square = {"lora_up.weight": torch.ones(6, 1), "lora_down.weight": torch.ones(1, 6), "dora_scale": torch.ones(1, 6)}
    with pytest.raises(FileError, match="wd_on_out=False"):
        read_kohya(file(tmp_path, "lora_unet_q", square), Layout({"q": (6, 6)}))


def test_a_foreign_prefix_and_a_huge_core_are_refused(tmp_path):
    with pytest.raises(FileError, match="begins with none of"):
        read_kohya(file(tmp_path, "x_down_blocks_0_to_q", LORA), LAYOUT)
    huge = {
        "lora_up.weight": torch.ones(6, 2, 1, 1),
        "lora_down.weight": torch.ones(2, 4, 1, 1),
        "lora_mid.weight": torch.ones(2, 2, 3, 3),
    }
    path = file(tmp_path, CONV, huge)
    with pytest.raises(FileError, match="its factors would take"):
        read_kohya(path, LAYOUT, limits=Limits(total_bytes=300))


def test_kinds_that_differ_by_module_become_one_lora_exactly(tmp_path):
    path, model = tmp_path / "a.safetensors", net()
    expected = merged("down_blocks.0.to_q", CASES["loha"][2])
    with torch.no_grad():
        expected.down_blocks[0]["conv1"].weight += CASES["lokr of a convolution"][2]
    tensors = {f"{stem}.{k}": v for stem, own, _ in (CASES["loha"], CASES["lokr of a convolution"]) for k, v in own.items()}
    write_tensors(path, tensors)
    with pytest.warns(UserWarning, match=r"hadamard, kron.* read as LoRA, exactly, of rank up to 6"):
        adaptation = rf.load(model, path)
    assert adaptation.attached["default"].method.text == "lora"
    for got, want in zip(model(X, IMAGE), expected(X, IMAGE)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shapes",
    [
        {"P": (4, 2), "Q": (4, 36)},
        {"P": (2, 5), "Q1": (6, 1), "Q2": (1, 3)},
        {"P1": (6, 1), "P2": (1, 2), "Q": (3, 2)},
        {"B1": (9, 2), "A1": (2, 7), "B2": (9, 2), "A2": (2, 7)},
        {"B1": (9, 3), "A1": (3, 7), "B2": (9, 3), "A2": (3, 7)},
    ],
    ids=str,
)
def test_multiplied_out_it_is_the_same_map_of_no_larger_rank_than_needed(shapes):
    method = "hadamard" if "B1" in shapes else "kron"
    change = Change("q", method, draw(**shapes), 0.7, 2)
    product = change.product()
    torch.testing.assert_close(product.operator().dense(), change.operator().dense(), rtol=1e-12, atol=1e-12)
    assert product.rank == torch.linalg.matrix_rank(change.operator().dense())


# writing


def test_written_and_read_is_the_same_to_the_bit(tmp_path):
    t = draw(B=(8, 3), A=(3, 12), cB=(6, 2), cA=(2, 36))
    entries = [
        Entry("down_blocks.0.to_q", t["B"], t["A"], 16 / 3**0.5, magnitude=torch.linspace(1, 2, 8).double()),
        Entry("down_blocks.0.conv1", t["cB"].float(), t["cA"].float(), 0.5, "convolution", kernel=(3, 3)),
    ]
    errors = write_kohya(path := tmp_path / "a.safetensors", Adapter.of(entries))
    assert set(errors.values()) == {0.0}
    stored = safetensors.torch.load_file(path)
    assert stored[f"{CONV}.lora_down.weight"].shape == (2, 4, 3, 3)
    assert stored[f"{CONV}.lora_up.weight"].shape == (6, 2, 1, 1)
    assert stored[f"{Q}.dora_scale"].shape == (8, 1)
    assert float(stored[f"{CONV}.alpha"]) == 1.0
    read = read_kohya(path, LAYOUT).adapter()
    for e in entries:
        got = read.entries[e.key]
        assert torch.equal(got.B, e.B)
        assert torch.equal(got.A, e.A)
        assert got.scale == pytest.approx(e.scale, rel=1e-15)
        assert (got.kind, got.kernel) == (e.kind, e.kernel)
    assert torch.equal(read.entries["down_blocks.0.to_q"].magnitude, entries[0].magnitude)


def test_names_of_a_pipeline_get_their_prefix(tmp_path):
    names = ["unet.to_q", "text_encoder.fc1", "text_encoder_2.fc1"]
    adapter = Adapter.of([Entry(n, torch.ones(3, 1), torch.ones(1, 2)) for n in names])
    write_kohya(path := tmp_path / "a.safetensors", adapter)
    assert {k.partition(".")[0] for k in safetensors.torch.load_file(path)} == {"lora_unet_to_q", "lora_te1_fc1", "lora_te2_fc1"}
    assert set(read_kohya(path, Layout(dict.fromkeys(names, (3, 2)))).changes) == set(names)


def test_what_the_format_can_not_hold(tmp_path):
    B, A = torch.ones(3, 1), torch.ones(1, 2)
    for entries, message in [
        ([Entry("a.b_c", B, A), Entry("a_b.c", B, A)], "a.b_c and a_b.c would both be called lora_unet_a_b_c"),
        ([Entry("a", B, A, kind="embedding")], "embedding"),
        ([Entry("a", B, A, kind="conv1d")], "conv1d"),
        ([Entry("a", B, A, gain=torch.ones(3))], "gain"),
        ([Entry("a", B, A, kind="convolution")], "how large its kernel is"),
        ([Entry("a", B.expand(2, 3, 1), A.expand(2, 1, 2), kind="convolution", kernel=(1,))], "a stack of 2 maps"),
        ([], "no weight"),
    ]:
        with pytest.raises(CompositionError, match=message):
            write_kohya(tmp_path / "a.safetensors", Adapter.of(entries))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["lora", "dora", "hadamard"])
def test_exported_and_loaded_is_the_same_function(method, tmp_path):
    model = net()
    adaptation = rf.adapt(model, method, rank=2, targets=["to_q", "conv1"])
    for p in adaptation.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    expected = model(X, IMAGE)
    report = export(model, adaptation, "kohya", tmp_path / "out")
    assert report.path == tmp_path / "out" / "lora.safetensors"
    assert folder_format(tmp_path / "out") == folder_format(report.path) == "kohya"
    again = net()
    rf.load(again, tmp_path / "out")
    for got, want in zip(again(X, IMAGE), expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert report.largest < 1e-6


def test_casting_reports_what_it_costs(tmp_path):
    model = net()
    adaptation = rf.adapt(model, "lora", rank=2, targets=["to_q"])
    for p in adaptation.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    report = export(model, adaptation, "kohya", tmp_path / "a.safetensors", dtype=torch.bfloat16)
    (change,) = read_kohya(report.path, LAYOUT).changes.values()
    t = adaptation.slots()[0].t(adaptation.store)
    exact = (t.B.double() @ t.A.double()).detach()
    got = change.scale * change.tensors["B"].double() @ change.tensors["A"].double()
    assert report.largest == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-9)
    assert 1e-4 < report.largest < 1e-2
    assert report.dtype == "bfloat16"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_u15_a_half_precision_file_trains_in_float32_and_says_what_it_was(stored, tmp_path):
    stem, own, _ = CASES["lora"]
    path = file(tmp_path, stem, {k: v.to(stored) for k, v in own.items()})
    model = net().float()
    adaptation = rf.load(model, path)
    assert {p.dtype for p in adaptation.parameters()} == {torch.float32}
    name = str(stored).removeprefix("torch.")
    assert adaptation.attached["default"].trained == {"read_from": "kohya", "stored_dtype": name}
    masters = [p.detach().clone() for p in adaptation.parameters()]
    optimizer = adaptation.optimizer(lr=1e-6)
    model(X.float(), IMAGE.float())[0].square().sum().backward()
    optimizer.step()
    moved = [(p - m).abs().max() for p, m in zip(adaptation.parameters(), masters)]
    assert all(m > 0 for m in moved), "a step below the resolution of the stored dtype is kept"
    saved = adaptation.save(tmp_path / "ours")
    again = rf.load(net().float(), saved)
    assert again.attached["default"].trained["stored_dtype"] == name
    assert {t.dtype for t in safetensors.torch.load_file(saved / "adapter.safetensors").values()} >= {torch.float32}
    assert export(model, adaptation, "kohya", tmp_path / "out").dtype == "float32"
    assert export(model, adaptation, "kohya", tmp_path / "half", dtype=stored).dtype == name


# fuzzing

LEAVES = [
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "diff", "diff_b", "w_norm", "x",
]  # fmt: skip


@fuzz
@given(
    st.dictionaries(
        st.tuples(st.sampled_from([Q, CONV, "lora_unet_norm_out", "lycoris_", "lora_te_"]), st.sampled_from(LEAVES)),
        st.lists(st.sampled_from([0, 1, 2, 3, 6, 8, 12]), max_size=4),
        max_size=7,
    )
)
def test_fuzz_shapes_and_keys(tmp_path, shapes):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({".".join(k): torch.ones(s) for k, s in shapes.items()}, path)
    with suppress(RankfoldError):
        found = read_kohya(path, LAYOUT)
        assert all(c.shape == LAYOUT.sites[c.name] for c in found.changes.values())
    with suppress(RankfoldError):
        rf.load(net(), path)


@fuzz
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 10_000))
def test_fuzz_a_valid_file_with_bytes_changed(tmp_path, changes, cut):
    good = bytearray(safetensors.torch.save({f"{Q}.{k}": v for k, v in LORA.items()}))
    for place, value in changes:
        good[place % len(good)] = value
    (tmp_path / "a.safetensors").write_bytes(bytes(good[: cut % (2 * len(good)) or None]))
    with suppress(RankfoldError):
        read_kohya(tmp_path / "a.safetensors", LAYOUT)

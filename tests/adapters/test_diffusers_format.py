"""Files by hand in every spelling that diffusers had: the module and the scale that each means."""

import json
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold as rf
from rankfold.adapters.files import write_tensors
from rankfold.adapters.formats.diffusers import read_diffusers
from rankfold.adapters.formats.foreign import Layout
from rankfold.errors import FileError, RankfoldError, UnknownName
from rankfold.jobs.exchange import folder_format

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

UNET = Layout(dict.fromkeys(["mid.attn1.to_q", "mid.attn1.to_out.0", "mid.ff.proj"], (8, 6)) | {"mid.conv1": (8, 54)})
TEXT = Layout(dict.fromkeys(["text_model.layers.0.self_attn.q_proj", "text_model.layers.0.self_attn.out_proj"], (8, 6)))
NEW = Layout(dict.fromkeys(["layers.0.self_attn.q_proj"], (8, 6)))
TRANSFORMER = Layout({"blocks.0.attn.to_q": (8, 6)})
WHOLE = Layout({"unet.mid.attn1.to_q": (8, 6), "text_encoder.layers.0.self_attn.q_proj": (8, 6)})

SPELLINGS = {  # key without the side -> (layout, module)
    "unet.mid.attn1.processor.to_q_lora.{down,up}.weight": (UNET, "mid.attn1.to_q"),
    "unet.mid.attn1.processor.to_out_lora.{down,up}.weight": (UNET, "mid.attn1.to_out.0"),
    "mid.attn1.processor.to_q_lora.{down,up}.weight": (UNET, "mid.attn1.to_q"),
    "unet.mid.attn1.to_q.lora.{down,up}.weight": (UNET, "mid.attn1.to_q"),
    "unet.mid.attn1.to_out.0.lora_{A,B}.weight": (UNET, "mid.attn1.to_out.0"),
    "unet.mid.ff.proj.lora_{A,B}.weight": (UNET, "mid.ff.proj"),
    "base_model.model.mid.ff.proj.lora_{A,B}.weight": (UNET, "mid.ff.proj"),
    "text_encoder.text_model.layers.0.self_attn.to_q_lora.{down,up}.weight": (TEXT, "text_model.layers.0.self_attn.q_proj"),
    "text_encoder.text_model.layers.0.self_attn.to_out_lora.{down,up}.weight": (TEXT, "text_model.layers.0.self_attn.out_proj"),
    "text_encoder.text_model.layers.0.self_attn.q_proj.lora_linear_layer.{down,up}.weight": (
        TEXT,
        "text_model.layers.0.self_attn.q_proj",
    ),
    "text_encoder_2.text_model.layers.0.self_attn.q_proj.lora_{A,B}.weight": (NEW, "layers.0.self_attn.q_proj"),
    "transformer.blocks.0.attn.to_q.lora_{A,B}.weight": (TRANSFORMER, "blocks.0.attn.to_q"),
    "text_encoder.text_model.layers.0.self_attn.q_proj.lora_{A,B}.weight": (WHOLE, "text_encoder.layers.0.self_attn.q_proj"),
}

generator = torch.Generator().manual_seed(3)
DOWN, UP = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 6), (8, 2)))


def pair(spelling: str, down: Tensor = DOWN, up: Tensor = UP) -> dict[str, Tensor]:
    head, _, rest = spelling.partition("{")
    sides, _, tail = rest.partition("}")
    first, second = sides.split(",")
    return {head + first + tail: down, head + second + tail: up}


def file(path: Path, tensors: dict[str, Tensor], config: object = None) -> Path:
    metadata = {} if config is None else {"lora_adapter_metadata": config if isinstance(config, str) else json.dumps(config)}
    write_tensors(path / "pytorch_lora_weights.safetensors", tensors, metadata)
    return path / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_means_its_module(spelling, tmp_path):
    layout, module = SPELLINGS[spelling]
    found = read_diffusers(file(tmp_path, pair(spelling)), layout)
    assert list(found.changes) == [module]
    assert folder_format(tmp_path) == "diffusers"
    torch.testing.assert_close(found.changes[module].operator().dense(), UP @ DOWN, rtol=1e-14, atol=1e-14)


Q = "unet.mid.attn1.to_q.lora_{A,B}.weight"


def test_alpha_stands_beside_the_factors_or_in_the_header(tmp_path):
    beside = file(tmp_path, {**pair(Q), "unet.mid.attn1.to_q.alpha": torch.tensor(3.0)})
    assert read_diffusers(beside, UNET).changes["mid.attn1.to_q"].scale == 1.5
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 5,
        "unet.alpha_pattern": {"mid.ff.proj": 8},
        "unet.target_modules": ["to_q", "proj"],
    }
    tensors = {**pair(Q), **pair("unet.mid.ff.proj.lora_{A,B}.weight")}
    scales = {k: c.scale for k, c in read_diffusers(file(tmp_path, tensors, config), UNET).changes.items()}
    assert scales == {"mid.attn1.to_q": 2.5, "mid.ff.proj": 4.0}
    scaled = read_diffusers(file(tmp_path, pair(Q), {"unet.r": 2, "unet.lora_alpha": 5, "unet.use_rslora": True}), UNET)
    assert scaled.changes["mid.attn1.to_q"].scale == pytest.approx(5 / 2**0.5, rel=1e-15)


def test_a_convolution_is_flattened(tmp_path):
    t = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    up = torch.randn(8, 2, 1, 1, dtype=torch.float64)
    (change,) = read_diffusers(file(tmp_path, pair("unet.mid.conv1.lora_{A,B}.weight", t, up)), UNET).changes.values()
    expected = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], t).flatten(1)
    torch.testing.assert_close(change.operator().dense(), expected, rtol=1e-14, atol=1e-14)
    assert change.kernel == (3, 3)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (1, 8, 1, 1)])
def test_dora_is_lengths_of_rows(shape, tmp_path):
    m = torch.linspace(1, 2, 8).double()
    tensors = {**pair(Q), "unet.mid.attn1.to_q.lora_magnitude_vector": m.reshape(shape)}
    (change,) = read_diffusers(file(tmp_path, tensors), UNET).changes.values()
    assert torch.equal(change.magnitude, m)


def test_one_model_of_a_pipeline_is_read_by_its_name(tmp_path):
    spelling = "text_encoder.text_model.layers.0.self_attn.q_proj.lora_{A,B}.weight"
    path = file(tmp_path, {**pair(Q), **pair(spelling)})
    assert list(read_diffusers(path, UNET, "unet").changes) == ["mid.attn1.to_q"]
    assert set(read_diffusers(path, WHOLE).changes) == set(WHOLE.sites)
    with pytest.raises(FileError, match="part='text_encoder'"):
        read_diffusers(path, UNET)
    with pytest.raises(FileError, match="nothing for the transformer"):
        read_diffusers(path, UNET, "transformer")
    with pytest.raises(UnknownName, match="nearest: unet"):
        read_diffusers(path, UNET, "uned")


def test_loaded_it_is_the_base_with_that_change(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"unet": nn.ModuleDict({"to_q": nn.Linear(6, 8)})}).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model["unet"]["to_q"](x) + x @ (1.5 * UP @ DOWN).T
    rf.load(model, file(tmp_path, {**pair("unet.to_q.lora.{down,up}.weight"), "unet.to_q.alpha": torch.tensor(3.0)}))
    torch.testing.assert_close(model["unet"]["to_q"](x), expected, rtol=1e-12, atol=1e-12)


WIDE = {"unet.mid.ff.proj.lora_A.weight": torch.ones(3, 6), "unet.mid.ff.proj.lora_B.weight": torch.ones(8, 3)}
A, B = "unet.mid.attn1.to_q.lora_A.weight", "unet.mid.attn1.to_q.lora_B.weight"
REFUSED = {
    "an unknown key": (
        {**pair(Q), "unet.mid.attn1.to_q.lora_C.weight": UP},
        None,
        r"nearest ending: lora_[AB]\.weight",
    ),
    "a bias": ({**pair(Q), "unet.mid.attn1.to_q.lora_B.bias": UP[:, 0]}, None, r"lora_B\.bias"),
    "half a pair": ({A: DOWN}, None, "lacks lora_up.weight"),
    "another shape": ({A: torch.ones(2, 5), B: UP}, None, r"map \(8, 5\); in this model"),
    "no such module": (
        pair("unet.mid.attn9.to_q.lora_{A,B}.weight"),
        None,
        r"fits no module of this model; nearest: mid\.attn1\.to_q",
    ),
    "one tensor twice": ({**pair(Q), "unet.mid.attn1.to_q.lora.down.weight": DOWN}, None, "in two spellings"),
    "columns": ({**pair(Q), "unet.mid.attn1.to_q.lora_magnitude_vector": torch.ones(1, 6)}, None, "length per row"),
    "alpha zero": ({**pair(Q), "unet.mid.attn1.to_q.alpha": torch.tensor(0.0)}, None, "alpha is 0"),
    "no JSON": (pair(Q), "{", "not valid JSON"),
    "no object": (pair(Q), [1], "not an object"),
    "no model of a pipeline": (pair(Q), {"lora_alpha": 2}, "'lora_alpha'"),
    "an unknown option": (pair(Q), {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_something": True}, "use_something"),
    "an alpha beyond floats": (pair(Q), {"unet.lora_alpha": 10**400}, "not a number that could be meant"),
    "a pattern beyond floats": (pair(Q), {"unet.alpha_pattern": {"to_q": 10**400}}, "not a number that could be meant"),
    "no number at all": (pair(Q), '{"unet.lora_alpha": NaN}', "NaN is not a JSON number"),
    "a regular expression": (pair(Q), {"unet.alpha_pattern": {"(a+)+$": 2}}, "regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path):
    tensors, config, message = REFUSED[case]
    with pytest.raises(FileError, match=message):
        read_diffusers(file(tmp_path, tensors, config), UNET)


def test_several_ranks_without_alpha_are_of_scale_one_and_said(tmp_path):
    path = file(tmp_path, {**pair(Q), **WIDE})
    with pytest.warns(UserWarning, match="ranks 2, 3 and no alpha: read at scale 1"):
        found = read_diffusers(path, UNET).changes
    assert {c.rank: c.scale for c in found.values()} == {2: 1.0, 3: 1.0}
    path = file(tmp_path, {**pair(Q), **WIDE}, {"unet.r": 2, "unet.rank_pattern": {"mid.ff.proj": 3}, "unet.lora_alpha": 6})
    assert {c.rank: c.scale for c in read_diffusers(path, UNET).changes.values()} == {2: 3.0, 3: 2.0}


def test_a_name_that_fits_two_modules_is_refused(tmp_path):
    both = Layout({"mid.attn1.to_q": (8, 6), "mid.attn1.q_proj": (8, 6)})
    with pytest.raises(FileError, match=r"may be mid\.attn1\.to_q or mid\.attn1\.q_proj"):
        read_diffusers(file(tmp_path, pair("unet.mid.attn1.processor.to_q_lora.{down,up}.weight")), both)


ENDS = [
    "lora_A.weight",
    "lora_B.weight",
    "lora.down.weight",
    "lora.up.weight",
    "alpha",
    "lora_magnitude_vector",
    "lora_B.bias",
    "",
]
OWNERS = ["unet.mid.attn1.to_q", "unet.mid.conv1", "mid.ff.proj", "text_encoder.x", "unet.mid.attn1.processor.to_q_lora"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=4), x, max_size=2),
    max_leaves=4,
)


@fuzz
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(OWNERS), st.sampled_from(ENDS)),
        st.lists(st.sampled_from([0, 1, 2, 3, 6, 8]), max_size=4),
        max_size=6,
    ),
    st.none()
    | st.text(max_size=8)
    | st.dictionaries(
        st.sampled_from(["unet.r", "unet.lora_alpha", "unet.alpha_pattern", "x", "unet.bias"]), json_values, max_size=3
    ),
)
def test_fuzz(tmp_path, shapes, config):
    path = tmp_path / "a.safetensors"
    metadata = None if config is None else {"lora_adapter_metadata": config if isinstance(config, str) else json.dumps(config)}
    safetensors.torch.save_file({".".join(k): torch.ones(s) for k, s in shapes.items()}, path, metadata)
    with suppress(RankfoldError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_diffusers(path, UNET)
        assert all(c.shape == UNET.sites[c.name] for c in found.changes.values())


@fuzz
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 10_000))
def test_fuzz_a_valid_file_with_bytes_changed(tmp_path, changes, cut):
    good = bytearray(safetensors.torch.save(pair(Q)))
    for place, value in changes:
        good[place % len(good)] = value
    (tmp_path / "a.safetensors").write_bytes(bytes(good[: cut % (2 * len(good)) or None]))
    with suppress(RankfoldError):
        read_diffusers(tmp_path / "a.safetensors", UNET)

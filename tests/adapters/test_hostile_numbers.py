"""Whatever stands where a file of another tool has a number: a finite scale comes of it, or a FileError. Never a traceback."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold as rf
from rankfold.adapters.formats.diffusers import read_diffusers
from rankfold.adapters.formats.foreign import Layout
from rankfold.adapters.formats.kohya import read_kohya
from rankfold.adapters.formats.peft import read_peft
from rankfold.adapters.formats.rotary import Heads
from rankfold.adapters.formats.torchtune import read_torchtune
from rankfold.errors import FileError, RankfoldError

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "1e-999", "-0.0", "1.0"]
"""Tokens of JSON, or of what Python takes for JSON, that no value in Python is written as."""
VALUES = [
    10**400, -(10**400), 2**63, 2**64, 10**30, 10**31, 1e308, 5e-324, 0, -1, -4, 2, 0.5, True, False, None, "", "2", "1e400",
    "NaN", [], [2], {}, {"q": 2}, [[]],
]  # fmt: skip
tokens = st.sampled_from(RAW) | st.sampled_from([json.dumps(v) for v in VALUES]) | st.floats().map(json.dumps)

A, B = torch.ones(2, 6), torch.ones(8, 2)
LAYOUT = Layout({"q": (8, 6)})


def written(options: dict[str, str]) -> str:
    """A JSON object of raw tokens."""
    return "{" + ", ".join(f"{json.dumps(k)}: {v}" for k, v in options.items()) + "}"


def peft_folder(path: Path, options: dict[str, str], experts: bool = False) -> Path:
    path.mkdir(exist_ok=True)
    owner = "base_model.model.experts" if experts else "base_model.model.q"
    safetensors.torch.save_file({f"{owner}.lora_A.weight": A, f"{owner}.lora_B.weight": B}, path / "adapter_model.safetensors")
    good = {"peft_type": '"LORA"', "r": "2", "lora_alpha": "4"}
    targets = {"target_parameters": '["experts.up_proj"]', "r": "1"} if experts else {}
    (path / "adapter_config.json").write_text(written({**good, **targets, **options}))
    return path


def read_from_peft(path: Path, options: dict[str, str]) -> list[float]:
    return [e.scale for e in read_peft(peft_folder(path, options)).entries.values()]


def read_experts_from_peft(path: Path, options: dict[str, str]) -> list[float]:
    return [e.scale for e in read_peft(peft_folder(path, options, experts=True)).entries.values()]


def read_from_torchtune(path: Path, options: dict[str, str]) -> list[float]:
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file({"layers.0.mlp.w1.lora_a.weight": A, "layers.0.mlp.w1.lora_b.weight": B}, path / "a.safetensors")
    (path / "adapter_config.json").write_text(written({"r": "2", "lora_alpha": "4", **options}))
    found = read_torchtune(path, Layout({"model.layers.0.mlp.gate_proj": (8, 6)}), Heads("llama", 2, 2))
    return [c.scale for c in found.changes.values()]


def read_from_diffusers(path: Path, options: dict[str, str]) -> list[float]:
    path.mkdir(exist_ok=True)
    about = {"lora_adapter_metadata": written({f"unet.{k}": v for k, v in options.items()})}
    safetensors.torch.save_file({"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B}, path / "a.safetensors", about)
    return [c.scale for c in read_diffusers(path / "a.safetensors", LAYOUT).changes.values()]


READERS: dict[str, tuple[Callable[[Path, dict[str, str]], list[float]], list[str]]] = {
    "peft": (read_from_peft, ["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "trainable_token_indices"]),
    "peft's experts": (read_experts_from_peft, ["r", "lora_alpha", "rank_pattern", "target_parameters", "use_rslora"]),
    "torchtune": (read_from_torchtune, ["r", "lora_alpha", "target_modules"]),
    "diffusers": (read_from_diffusers, ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"]),
}


def finite_or_refused(read: Callable[[], list[float]]) -> None:
    with suppress(FileError):
        scales = read()
        assert scales
        assert all(math.isfinite(s) and abs(s) <= 1e30 for s in scales)


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("token", [*RAW, *map(json.dumps, VALUES)], ids=lambda t: t[:20])
def test_each_hostile_value_in_each_place(form, token, tmp_path):
    read, options = READERS[form]
    for option in options:
        finite_or_refused(lambda option=option: read(tmp_path / "a", {option: token}))
        for name in ("q", "experts.up_proj") if option.endswith("pattern") else ():
            finite_or_refused(lambda option=option, name=name: read(tmp_path / "a", {option: written({name: token})}))


@pytest.mark.parametrize("form", READERS)
def test_fuzz_numbers(form, tmp_path):
    read, options = READERS[form]

    @fuzz
    @given(st.dictionaries(st.sampled_from(options), tokens | tokens.map(lambda t: written({"q": t})), max_size=3))
    @example({"lora_alpha": "1" + "0" * 400})
    def check(change: dict[str, str]) -> None:
        finite_or_refused(lambda: read(tmp_path / "a", change))

    check()


@pytest.mark.parametrize(
    ("option", "token", "said"),
    [
        ("r", "-2", "r -2 is not a rank"),
        ("r", "true", "r True is not a rank"),
        ("r", "2.0", "r 2.0 is not a rank"),
        ("r", "1e999", "r inf is not a rank"),
        ("lora_alpha", "1" + "0" * 400, "lora_alpha 1000000000"),
        ("lora_alpha", "-1e999", "lora_alpha -inf is not a number that could be meant"),
        ("lora_alpha", "NaN", "NaN is not a JSON number"),
        ("lora_alpha", '"8"', "lora_alpha '8' is not a number"),
        ("lora_alpha", "false", "lora_alpha False is not a number"),
    ],
)
def test_the_message_names_the_number(option, token, said, tmp_path):
    for read in (read_from_peft, read_from_torchtune, read_from_diffusers):
        with pytest.raises(FileError, match=said):
            read(tmp_path / read.__name__, {option: token})


def test_a_rank_by_pattern_is_checked_before_experts_are_split(tmp_path):
    for token in ("-1", '"1"', "0.5", "[1]"):
        with pytest.raises(FileError, match=r"rank_pattern 'experts\.up_proj'"):
            read_experts_from_peft(tmp_path / "a", {"rank_pattern": written({"experts.up_proj": token})})
    assert read_experts_from_peft(tmp_path / "a", {"rank_pattern": written({"experts.up_proj": "2"})}) == [2.0]


ALPHAS = {
    "float16": torch.tensor(8.0, dtype=torch.float16),
    "one in a list": torch.tensor([8.0]),
    "a whole number": torch.tensor(8),
    "a small whole number": torch.tensor(8, dtype=torch.int32),
}
NO_ALPHAS = {
    "infinite": torch.tensor(math.inf),
    "no number": torch.tensor(math.nan),
    "beyond float32": torch.tensor(1e300, dtype=torch.float64),
    "at the end of float32": torch.tensor(3e38),
    "zero": torch.tensor(0.0),
    "a whole zero": torch.tensor(0),
    "two": torch.tensor([8.0, 8.0]),
    "none": torch.zeros(0),
    "truth": torch.tensor(True),
    "a byte": torch.tensor(8, dtype=torch.uint8),
}


def alpha_file(path: Path, alpha: Tensor, diffusers: bool) -> Path:
    keys = ("unet.q.lora_A.weight", "unet.q.lora_B.weight", "unet.q.alpha") if diffusers else (
        "lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", "lora_unet_q.alpha"
    )  # fmt: skip
    safetensors.torch.save_file(dict(zip(keys, (A, B, alpha))), path / "a.safetensors")
    return path / "a.safetensors"


@pytest.mark.parametrize("reads", [read_kohya, read_diffusers])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_alpha_may_be_stored_as_any_number(alpha, reads, tmp_path):
    path = alpha_file(tmp_path, ALPHAS[alpha], reads is read_diffusers)
    assert reads(path, LAYOUT).changes["q"].scale == 4.0


@pytest.mark.parametrize("reads", [read_kohya, read_diffusers])
@pytest.mark.parametrize("alpha", NO_ALPHAS)
def test_what_is_no_alpha_is_refused(alpha, reads, tmp_path):
    path = alpha_file(tmp_path, NO_ALPHAS[alpha], reads is read_diffusers)
    with pytest.raises(FileError):
        reads(path, LAYOUT)


@fuzz
@given(st.floats(width=64), st.booleans())
def test_fuzz_alphas_as_tensors(tmp_path, alpha, diffusers):
    reads = read_diffusers if diffusers else read_kohya
    path = alpha_file(tmp_path, torch.tensor(alpha, dtype=torch.float64), diffusers)
    finite_or_refused(lambda: [c.scale for c in reads(path, LAYOUT).changes.values()])
    model = nn.ModuleDict({"q": nn.Linear(6, 8)})
    with suppress(RankfoldError):
        rf.load(model, path)
        assert torch.isfinite(model["q"](torch.ones(1, 6))).all()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value inside a JSON document, by the keys that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


@pytest.mark.parametrize(
    "token", ["1e999", "-1", "1" + "0" * 400, "0.5", "true", "null", '"1"', "[2]", "NaN"], ids=lambda t: t[:6]
)
def test_every_place_of_our_own_record(token, tmp_path):
    """An error that is not ours would be a traceback in the command line."""
    folder = rf.adapt(small(), "magnitude+lora", rank=2).save(tmp_path / "a")
    good = (folder / "adapter.json").read_text()
    found = list(places(json.loads(good)))
    assert {("trained", "seed"), ("sites", 0, "rank"), ("sites", 0, "shape", 0)} <= set(found)
    for place in found:
        document = json.loads(good)
        owner = document
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = "@"
        (folder / "adapter.json").write_text(json.dumps(document).replace('"@"', token))
        with suppress(RankfoldError):
            rf.load(small(), folder)

"""rankfold's own folder: what goes in comes out; what does not belong is refused; the first version stays readable."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.adapters import NativeAdapter, SiteRecord, compare, fingerprint, load_native, save_native
from rankfold.adapters.files import write_json, write_tensors
from rankfold.errors import FileError, NumericError, RankfoldError

FROZEN = Path(__file__).parent / "frozen" / "schema-1"
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def record() -> NativeAdapter:
    """Small whole numbers, so that the frozen file needs no random generator."""
    W = torch.arange(12.0).view(3, 4)
    return NativeAdapter(
        method="magnitude+lora",
        options={"lora": {"rank": 2, "alpha": 4.0}},
        sites=(
            SiteRecord("layers.0.q", "linear", (3, 4), rank=2, group="layers.0", alpha=8.0),
            SiteRecord("h.0.c_attn", "conv1d", (3, 4), rows=(3, 6), rank=1),
            SiteRecord("embed", "embedding", (4, 9), rank=1, tied="embed"),
        ),
        tensors={
            "layers.0.q": {"B": torch.ones(3, 2), "A": torch.arange(8.0).view(2, 4), "m": torch.tensor([1.0, 2.0, 3.0])},
            "h.0.c_attn[3:6]": {"B": torch.ones(3, 1).bfloat16(), "A": torch.full((1, 4), 0.5).bfloat16()},
            "embed": {"B": torch.ones(4, 1), "A": torch.ones(1, 9)},
        },
        shared={"vera.A": torch.ones(2, 2)},
        extras={"classifier.weight": torch.eye(2), "classifier.bias": torch.zeros(2)},
        labels=("no", "yes"),
        base=fingerprint({"layers.0.q.weight": W, "embed.weight": W.T.contiguous()}),
        trained={"steps": 10, "metrics": {"accuracy": 0.5}, "seed": 0},
    )


def equal(a: NativeAdapter, b: NativeAdapter) -> None:
    assert (a.method, a.options, a.sites, a.labels, a.trained) == (b.method, b.options, b.sites, b.labels, b.trained)
    assert a.base == b.base
    for x, y in ((a.shared, b.shared), (a.extras, b.extras), *((a.tensors[k], b.tensors[k]) for k in a.tensors)):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
    assert a.tensors.keys() == b.tensors.keys()


def test_round_trip(tmp_path):
    save_native(tmp_path / "a", record())
    got = load_native(tmp_path / "a")
    equal(got, record())
    assert compare(got.base, record().base).verdict == "same"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]
    plain = NativeAdapter("lora", {}, (), {})
    save_native(tmp_path / "b", plain)
    equal(load_native(tmp_path / "b"), plain)


def test_the_frozen_file_of_schema_1():
    """Written once by schema 1 (`save_native(FROZEN, record())`); every later version must read it to the same values."""
    equal(load_native(FROZEN), record())


def test_a_folder_with_other_files(tmp_path):
    save_native(tmp_path / "a", record())
    (tmp_path / "a" / "report.html").write_text("mine")
    save_native(tmp_path / "a", NativeAdapter("lora", {}, (), {}))
    assert (tmp_path / "a" / "report.html").read_text() == "mine"
    assert load_native(tmp_path / "a").method == "lora"


def test_nan_is_not_saved(tmp_path):
    save_native(tmp_path / "a", record())
    bad = NativeAdapter("lora", {}, (SiteRecord("q", "linear", (3, 4)),), {"q": {"B": torch.tensor([float("nan")])}})
    with pytest.raises(NumericError, match="site:q:B"):
        save_native(tmp_path / "a", bad)
    equal(load_native(tmp_path / "a"), record())


def edit(**change):
    def apply(folder: Path) -> None:
        document = json.loads((folder / "adapter.json").read_text())
        write_json(folder / "adapter.json", {**document, **change})

    return apply


def tensors(**change):
    def apply(folder: Path) -> None:
        write_tensors(folder / "adapter.safetensors", change)

    return apply


ONE = torch.ones(1)
BROKEN = {
    "newer": (edit(schema=2), "reads up to 1"),
    "unknown key": (edit(weights="x"), "unknown keys: weights"),
    "wrong type": (edit(method=3), "method must be text"),
    "labels of numbers": (edit(labels=[1]), "labels"),
    "site of text": (edit(sites=["q"]), "a site must be an object"),
    "site with more": (edit(sites=[{"name": "q", "kind": "linear", "shape": [1, 2], "code": "x"}]), "unknown keys: code"),
    "site without shape": (edit(sites=[{"name": "q", "kind": "linear"}]), "lacks: shape"),
    "negative shape": (edit(sites=[{"name": "q", "kind": "linear", "shape": [-1, 2]}]), "not a list of 2 sizes"),
    "one size": (edit(sites=[{"name": "q", "kind": "linear", "shape": [1]}]), "not a list of 2 sizes"),
    "site twice": (edit(sites=[{"name": "q", "kind": "linear", "shape": [1, 2]}] * 2), "two sites"),
    "no such site": (edit(sites=[]), "belongs to no site"),
    "other base": (edit(base={}), "different weights"),
    "base without samples": (edit(base=None), "does not name"),
    "print with less": (edit(base={"a": {"shape": [1]}, "b": {}}), "different weights"),
    "unknown tensor": (tensors(**{"evil:x": ONE}), "unknown tensor"),
    "no tensors": (lambda folder: (folder / "adapter.safetensors").unlink(), "no such file"),
    "no json": (lambda folder: (folder / "adapter.json").unlink(), "no such file"),
    "cut": (lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-3]), "truncated"),
    "cut json": (lambda f: (f / "adapter.json").write_bytes((f / "adapter.json").read_bytes()[:-30]), "not valid JSON"),
    "pickle": (lambda f: torch.save({"x": ONE}, f / "adapter.safetensors"), "pickle"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(tmp_path, name):
    breaking, message = BROKEN[name]
    save_native(tmp_path / "a", record())
    breaking(tmp_path / "a")
    with pytest.raises(FileError, match=message):
        load_native(tmp_path / "a")


def test_no_folder(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        load_native(tmp_path / "nowhere")


@fuzz
@given(
    st.sampled_from(["adapter.json", "adapter.safetensors"]),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=5),
)
def test_fuzz_changed_bytes(tmp_path, name, changes):
    folder = tmp_path / "a"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(FROZEN, folder)
    data = bytearray((folder / name).read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    (folder / name).write_bytes(bytes(data))
    with suppress(RankfoldError):
        load_native(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda x: st.lists(x, max_size=3), max_leaves=6
)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["schema", "method", "options", "sites", "labels", "base", "trained", "x"]),
        json_values | st.dictionaries(st.text(max_size=3), json_values, max_size=2),
    )
)
def test_fuzz_documents(tmp_path, change):
    folder = tmp_path / "a"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(FROZEN, folder)
    edit(**change)(folder)
    with suppress(RankfoldError):
        load_native(folder)

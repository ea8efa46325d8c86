"""Jobs over a base in few bits: what the screen counts, and predicting with the base that was trained on."""

import importlib.util
import json

import numpy as np
import pytest

from rankfold.errors import OptionError
from rankfold.jobs.adapt import AdaptSettings, PredictSettings, adapt_job, predict_job
from rankfold.jobs.adapt import outcome as outcome_module
from rankfold.jobs.adapt.memory import size_of
from rankfold.jobs.models import load_model

FORMATS = [
    pytest.param(f, marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}"))
    for f, library in (("int8", "torchao"), ("nf4", "bitsandbytes"))
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": f"find {k}", "document": f"the {k}th"}) + "\n" for k in range(16)))
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_predict_reads_the_base_as_it_was_in_training(format, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outcome_module, "write_report", lambda *a: None)
    common = {"model": "tiny-llama", "data": str(pairs), "task": "embed", "device": "cpu"}
    made = adapt_job(
        AdaptSettings.of(
            **common, out=tmp_path / "run", rank=2, quantise=format, max_length=16, batch_size=8, max_steps=2, lr=0.05
        )
    )
    dense = load_model("tiny-llama", "embed").model
    numbers, stored = size_of(dense)
    screen = capsys.readouterr().out
    assert f"{numbers:,} parameters in" in screen
    assert f"float32 and {format}" in screen
    figures = made.metrics["parameters"]
    assert figures["base"] == numbers == sum(p.numel() for p in dense.parameters())
    assert figures["base_bytes"] < stored
    assert figures["share"] == figures["trained"] / numbers

    def vectors(name, **more):
        path = tmp_path / f"{name}.npy"
        predict_job(PredictSettings.of(**common, adapter=tmp_path / "run", out=path, quiet=True, **more))
        return np.load(path)

    as_trained, named = vectors("a"), vectors("b", quantise=format)
    with pytest.warns(UserWarning, match="same source, other storage"):
        whole = vectors("c", quantise="none")
    assert np.array_equal(as_trained, named)
    assert np.abs(as_trained - whole).max() > 1e-5  # of the dense base, which has the same fingerprint
    assert np.abs(as_trained - whole).max() < 0.5
    with pytest.raises(OptionError, match="quantise"):
        vectors("d", quantise="int3")


def test_a_dry_run_counts_numbers_and_bytes(pairs, tmp_path):
    common = {"model": "tiny-llama", "data": str(pairs), "task": "embed", "device": "cpu", "quiet": True, "dry_run": True}
    plans = [
        adapt_job(AdaptSettings.of(**common, out=tmp_path / "run", rank=2, batch_size=8, max_length=16, **more)).metrics
        for more in ({}, {"quantise": "int8"})
    ]
    assert plans[0]["parameters"] == plans[1]["parameters"]
    assert plans[1]["memory"]["base"] < plans[0]["memory"]["base"]

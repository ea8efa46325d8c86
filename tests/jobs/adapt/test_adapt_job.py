"""The main job from files to results: every task on a tiny model, and whatever a user may get wrong."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch

import rankfold as rf
from rankfold.errors import DataError, FileError, InactiveError, OptionError, TargetError, UnknownName
from rankfold.jobs.adapt import AdaptSettings, PredictSettings, adapt_job, inputs, predict_job
from rankfold.jobs.adapt import run as job
from rankfold.jobs.data import Table
from rankfold.jobs.models import load_model
from rankfold.training.checkpoints import has_checkpoint
from rankfold.training.loop import Interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files of every task."""
    here = tmp_path_factory.mktemp("data")
    words = ["red", "green", "blue", "gold"]
    with open(here / "colours.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([[f"{words[k % 4]} thing {k}", "warm" if k % 4 in (0, 3) else "cold"] for k in range(40)])
    with open(here / "pairs.jsonl", "w") as file:
        file.writelines(
            json.dumps({"query": f"find {words[k % 4]} {k}", "document": f"def f{k}(): return '{words[k % 4]}'"}) + "\n"
            for k in range(24)
        )
    with open(here / "answers.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"{k} + 1?", "completion": str(k + 1)}) + "\n" for k in range(24))
    (here / "book.txt").write_text("It was a dark and stormy night.\n" * 30)
    return here


@pytest.fixture(autouse=True)
def _page(request, monkeypatch):
    """Drawing takes longer than training here: only the tests that look at the page draw it."""
    if "every_task" not in request.node.name:
        monkeypatch.setattr("rankfold.jobs.adapt.outcome.write_report", lambda *a: None)


def settings(folder, task, out, **more):
    data = {"classify": "colours.csv", "embed": "pairs.jsonl", "sft": "answers.jsonl", "lm": "book.txt"}[task]
    values = {
        "model": "tiny-llama", "data": str(folder / data), "task": task, "out": out, "rank": 2, "device": "cpu", "quiet": True,
        "max_length": 48, "batch_size": 8, "epochs": 1.0, "valid": 0.25,
    }  # fmt: skip
    return AdaptSettings.of(**{**values, **more})


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


NAMES = {
    "classify": {"accuracy", "f1", "loss"},
    "embed": {"recall@1", "recall@5", "mrr", "ndcg@10"},
    "lm": {"perplexity", "loss"},
    "sft": {"perplexity", "loss"},
}


@pytest.mark.parametrize("task", NAMES)
def test_every_task_from_file_to_predictions(folder, tmp_path, task):
    data = settings(folder, task, tmp_path / "run").data
    result = adapt_job(settings(folder, task, tmp_path / "run", test=data))
    files = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert files == ["adapter.json", "adapter.safetensors", "metrics.json", "report.html"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["test"]) == set(metrics["valid"]) == NAMES[task]
    assert metrics["parameters"]["trained"] == result.adaptation.parameter_count()
    assert metrics["peak_memory"] > 10e6
    assert metrics["seconds"] > 0
    assert metrics["settings"]["rank"] == 2
    assert (
        metrics["versions"]["torch"] == torch.__version__.partition("+")[0] or metrics["versions"]["torch"] == torch.__version__
    )
    assert len(metrics["history"]["train"]) == metrics["steps"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "Training loss" in page

    # the adapter in the folder is the adapter that was measured
    loaded = load_model("tiny-llama", task, labels=result.adaptation.attached["default"].labels, device="cpu")
    again = rf.load(loaded.model, tmp_path / "run")
    for a, b in zip(again.tensors().values(), result.adaptation.tensors().values()):
        assert torch.equal(a, b)

    suffix = {"embed": "npy", "classify": "csv"}.get(task, "jsonl")
    out = tmp_path / f"predictions.{suffix}"
    path = predict_job(
        PredictSettings.of(
            model="tiny-llama", adapter=tmp_path / "run", data=data, out=out, device="cpu", quiet=True, max_new_tokens=2
        )
    )
    assert path == out
    if task == "embed":
        vectors = np.load(out)
        assert vectors.shape == (24, 64)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    elif task == "classify":
        rows = table(out)
        assert [r["text"] for r in rows][:2] == ["red thing 0", "green thing 1"]
        right = sum(r["label"] == g["label"] for r, g in zip(rows, table(data)))
        assert right / len(rows) == metrics["test"]["accuracy"]
        assert float(rows[0]["p(cold)"]) + float(rows[0]["p(warm)"]) == pytest.approx(1)
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == (24 if task == "sft" else 1)
        assert set(rows[0]) == {"prompt", "text"}


def test_classify_learns_something(folder, tmp_path):
    result = adapt_job(settings(folder, "classify", tmp_path, epochs=6.0, lr=0.02, test=str(folder / "colours.csv")))
    assert result.metrics["test"]["accuracy"] > 0.9
    assert result.metrics["parameters"]["trained"] > 128  # the head is counted
    names = {e.name for e in result.adaptation.attached["default"].member.extras.values()}
    assert names == {"score.weight"}


def test_the_same_settings_give_the_same_adapter(folder, tmp_path):
    made = [adapt_job(settings(folder, "classify", tmp_path / str(k), method="dropout+lora", valid=0.0)) for k in range(2)]
    for a, b in zip(made[0].adaptation.tensors().values(), made[1].adaptation.tensors().values()):
        assert torch.equal(a, b)
    other = adapt_job(settings(folder, "classify", tmp_path / "3", method="dropout+lora", valid=0.0, seed=1))
    assert not all(torch.equal(a, b) for a, b in zip(made[0].adaptation.tensors().values(), other.adaptation.tensors().values()))


def test_interrupted_and_resumed_is_the_run_that_was_never_stopped(folder, tmp_path, monkeypatch):
    whole = adapt_job(settings(folder, "classify", tmp_path / "whole", epochs=2.0))
    fit = job.fit

    def stopped(*arguments):
        return fit(*arguments, lambda record: os.kill(os.getpid(), signal.SIGINT) if record["step"] == 3 else None)

    monkeypatch.setattr(job, "fit", stopped)
    with pytest.raises(Interrupted, match="--resume"):
        adapt_job(settings(folder, "classify", tmp_path / "parts", epochs=2.0))
    assert has_checkpoint(tmp_path / "parts" / "checkpoint")
    assert not (tmp_path / "parts" / "adapter.json").exists()
    monkeypatch.setattr(job, "fit", fit)
    resumed = adapt_job(settings(folder, "classify", tmp_path / "parts", epochs=2.0, resume=True))
    for a, b in zip(whole.adaptation.tensors().values(), resumed.adaptation.tensors().values()):
        assert torch.equal(a, b)
    assert resumed.metrics["test"] == whole.metrics["test"]
    assert resumed.metrics["steps"] == whole.metrics["steps"]
    assert not has_checkpoint(tmp_path / "parts" / "checkpoint")


def test_a_stopped_run_goes_on_with_its_own_data_and_method_only(folder, tmp_path, monkeypatch):
    values = {"checkpoint_minutes": 1e-9, "max_steps": 2}
    monkeypatch.setattr(job, "measured", lambda *a: pytest.fail("the figures broke"))
    with pytest.raises(pytest.fail.Exception):
        adapt_job(settings(folder, "classify", tmp_path, **values))
    assert (tmp_path / "adapter.json").exists()  # what was trained is there all the same
    with pytest.raises(OptionError, match="options"):
        adapt_job(settings(folder, "classify", tmp_path, **values, resume=True, set=["alpha=3"]))
    with pytest.raises(OptionError, match="data"):
        adapt_job(settings(folder, "classify", tmp_path, **values, resume=True, max_length=4))


def test_labels_in_a_text_file_are_not_read_as_text(folder, tmp_path):
    adapt_job(settings(folder, "classify", tmp_path / "run", max_steps=1))
    (tmp_path / "with.txt").write_text("warm red thing\ncold blue thing\n")
    (tmp_path / "without.txt").write_text("red thing\nblue thing\n")
    found = {}
    for name in ("with", "without"):
        out = tmp_path / f"{name}.csv"
        data = str(tmp_path / f"{name}.txt")
        predict_job(
            PredictSettings.of(model="tiny-llama", adapter=tmp_path / "run", data=data, out=out, quiet=True, device="cpu")
        )
        found[name] = table(out)
    assert found["with"] == found["without"]
    assert [row["text"] for row in found["with"]] == ["red thing", "blue thing"]


@pytest.mark.parametrize("method", ["dora", "lora+init:pissa", "eva", "lora-ga", "adalora", "full", "mixture", "adaptertune"])
def test_other_methods_on_the_job(folder, tmp_path, method):
    more = {"rank": None} if method in ("full",) else {}
    result = adapt_job(settings(folder, "classify", tmp_path, method=method, max_steps=3, **more))
    assert (tmp_path / "adapter.json").exists()
    assert result.metrics["steps"] == 3


def test_a_dry_run_shows_the_sites_and_writes_nothing(folder, tmp_path, capsys):
    result = adapt_job(settings(folder, "classify", tmp_path / "run", dry_run=True, quiet=False))
    shown = capsys.readouterr().out
    assert "layers.0.self_attn.q_proj" in shown
    assert "64 × 64" in shown
    assert "score.weight" in shown
    assert "memory" in shown
    assert not (tmp_path / "run").exists()
    sites = result.metrics["sites"]
    assert sum(row["parameters"] for row in sites) == result.metrics["parameters"]["trained"]
    assert result.metrics["memory"]["adapter"] == sum(row["bytes"] for row in sites)
    assert result.metrics["memory"]["activations"] > 0
    assert result.metrics["plans"] == [{"plan": "fused", "memory": "keep", "sites": len(sites) - 1}]


def test_a_dry_run_says_what_recomputing_saves(folder, tmp_path, capsys):
    """Fewer bytes of activations, and the plan line that says why."""
    kept, less = (
        adapt_job(settings(folder, "classify", tmp_path / "run", dry_run=True, quiet=False, memory=memory)).metrics
        for memory in ("keep", "recompute")
    )
    assert less["memory"]["activations"] < kept["memory"]["activations"]
    assert [row["memory"] for row in less["plans"]] == ["recompute"]
    assert "fused, recompute" in capsys.readouterr().out


def test_the_screen_says_what_happened(folder, tmp_path, capsys):
    adapt_job(settings(folder, "embed", tmp_path, quiet=False, test=str(folder / "pairs.jsonl"), max_length=20))
    shown = capsys.readouterr().out
    for label in ("data", "model", "method", "sites", "start", "train", "valid", "test", "saved", "next"):
        assert f"\n{label:<9}" in "\n" + shown, label
    assert "longer than 20 tokens" in shown
    assert "largest output change 0.0e+00" in shown
    assert "→" in shown


def test_early_stopping_and_the_best_state(folder, tmp_path):
    result = adapt_job(settings(folder, "classify", tmp_path, epochs=30.0, lr=0.02, patience=1))
    metrics = result.metrics
    assert metrics["stopped"] == "early"
    best = max(e["accuracy"] for e in metrics["history"]["valid"][1:])
    assert metrics["valid"]["accuracy"] == best
    assert metrics["best_step"] < metrics["steps"]


def test_valid_from_a_file_and_none_at_all(folder, tmp_path):
    own = adapt_job(settings(folder, "classify", tmp_path / "a", valid=str(folder / "colours.csv"), max_steps=1))
    assert own.metrics["rows"]["valid"] == 40
    assert own.metrics["rows"]["train"] == 40
    none = adapt_job(settings(folder, "classify", tmp_path / "b", valid=0, max_steps=1))
    assert none.metrics["valid"] == {}
    assert none.metrics["rows"]["train"] == 40


# what a user may get wrong


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"targets": "q_prj"}, TargetError, "nearest"),
        ({"rank": 100}, TargetError, "rank"),
        ({"method": "lorra"}, UnknownName, "lora"),
        ({"method": "lora+init:pisa"}, UnknownName, "pissa"),
        ({"set": ["alhpa=3"]}, UnknownName, "alpha"),
        ({"set": ["alpha=much"]}, OptionError, "alpha"),
        ({"columns": "label=colour"}, UnknownName, "columns there: text, label"),
        ({"data": "colors.csv"}, UnknownName, "colors.csv"),
        ({"test": "nowhere.csv"}, UnknownName, "nowhere.csv"),
        ({"method": "hra+loraplus"}, Exception, "loraplus"),
    ],
)
def test_mistakes_are_named_before_anything_trains(folder, tmp_path, monkeypatch, more, error, words):
    monkeypatch.setattr(job, "fit", lambda *a: pytest.fail("trained"))
    with pytest.raises(error, match=words):
        adapt_job(settings(folder, "classify", tmp_path, **more))


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"lr": -1}, OptionError, "lr: got -1"),
        ({"epochs": "many"}, OptionError, "epochs"),
        ({"task": "sing"}, OptionError, "task"),
        ({"batch": 3}, UnknownName, "nearest: batch_size"),
        ({"set": ["alpha"]}, OptionError, "option=value"),
        ({"data": None}, OptionError, "data"),
    ],
)
def test_settings_outside_their_bounds(folder, tmp_path, values, error, words):
    with pytest.raises(error, match=words):
        AdaptSettings.of(**{"model": "tiny-llama", "data": "x.csv", "task": "classify", "out": tmp_path, **values})


def test_a_missing_setting_is_named():
    with pytest.raises(OptionError, match="model: must be given"):
        AdaptSettings.of(data="x", task="lm", out="y")


def test_one_class_an_empty_file_and_a_new_label(folder, tmp_path):
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    with pytest.raises(DataError, match="1 class only"):
        adapt_job(settings(folder, "classify", tmp_path / "run", data=str(tmp_path / "one.csv")))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError):
        adapt_job(settings(folder, "classify", tmp_path / "run", data=str(tmp_path / "empty.csv")))
    (tmp_path / "new.csv").write_text("text,label\na,lukewarm\n")
    with pytest.raises(DataError, match="lukewarm"):
        adapt_job(settings(folder, "classify", tmp_path / "run", test=str(tmp_path / "new.csv")))


def test_an_out_that_is_a_file(folder, tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(FileError, match="choose another --out"):
        adapt_job(settings(folder, "classify", tmp_path / "taken"))
    assert (tmp_path / "taken").read_text() == "x"


def test_targets_that_get_no_gradient_by_name(folder, tmp_path):
    with pytest.raises(InactiveError, match=r"pooler\.dense"):
        adapt_job(settings(folder, "embed", tmp_path, model="minilm", targets="pooler.dense", max_length=8))


def test_predictions_need_a_form_that_fits(folder, tmp_path):
    common = {"model": "tiny-llama", "data": str(folder / "colours.csv"), "quiet": True, "device": "cpu"}
    with pytest.raises(UnknownName, match="written here"):
        predict_job(PredictSettings.of(**common, task="classify", out=tmp_path / "p.docx"))
    with pytest.raises(OptionError, match="embeddings"):
        predict_job(PredictSettings.of(**common, task="classify", out=tmp_path / "p.npy"))
    with pytest.raises(OptionError, match="--task"):
        predict_job(PredictSettings.of(**common, out=tmp_path / "p.csv"))
    with pytest.raises(FileError, match="no adapter here"):
        predict_job(PredictSettings.of(**common, adapter=folder, out=tmp_path / "p.csv"))


def test_the_base_alone_can_embed(folder, tmp_path):
    out = tmp_path / "v.jsonl"
    data = str(folder / "pairs.jsonl")
    predict_job(PredictSettings.of(model="tiny-llama", data=data, task="embed", out=out, quiet=True, device="cpu"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["text"].startswith("find")
    assert len(rows[0]["embedding"]) == 64


def test_minilm_with_a_head(folder, tmp_path):
    result = adapt_job(settings(folder, "classify", tmp_path, model="minilm", max_length=8, dry_run=True))
    assert len(result.metrics["sites"]) == 37 + 2
    assert result.metrics["dropped"] == []


def test_a_built_in_set_brings_its_own_test(monkeypatch, tmp_path):
    asked = []

    def read(source, task, columns, **options):
        asked.append((source, options.get("split")))
        return Table({"text": tuple("abcdefghij" * 4), "label": tuple("xy" * 20)}, source)

    monkeypatch.setattr(inputs, "read", read)
    found = inputs.read_inputs(AdaptSettings.of(model="m", data="stdlib-docs", task="classify", out=tmp_path))
    assert asked == [("stdlib-docs", None), ("stdlib-docs", "test")]
    assert found.test is not None
    assert found.labels == ("x", "y")

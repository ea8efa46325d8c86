"""The demo: its worker on a tiny model, its table and page from made-up results, and (in the full run) all of it."""

import json
import re

import pytest

from rankfold.errors import RankfoldError
from rankfold.jobs import demo as module
from rankfold.jobs.data import Table
from rankfold.jobs.demo_worker import run_one
from rankfold.linalg.random import Random


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": f"number {k}", "document": f"def f(): return {k}"} for k in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def request(pairs, out, **more):
    settings = {
        "model": "tiny-llama", "data": str(pairs), "test": str(pairs), "task": "embed", "out": str(out), "valid": 0.2,
        "max_length": 16, "batch_size": 8, "evaluations": 2, "device": "cpu", "quiet": True, **more,
    }  # fmt: skip
    return {"settings": settings, "train": "method" in more, "rows": 10, "threads": 1}


def test_the_worker_ranks_without_training(pairs, tmp_path):
    told = []
    result = run_one(request(pairs, tmp_path / "run"), lambda done, of: told.append((done, of)))
    assert len(result["ranks"]) == 10
    assert result["parameters"] == 0
    assert result["peak_memory"] > 10e6
    assert told[-1] == (10, 10)
    for i, rank in enumerate(result["ranks"]):
        first = result["found"][str(i)]
        assert len(first) == 3
        if rank <= 3:
            assert first[rank - 1][0] == i
        assert result["own"][i] <= first[0][1] + 1e-6


def test_the_worker_trains_saves_and_tells(pairs, tmp_path):
    told = []
    result = run_one(request(pairs, tmp_path / "run", method="lora", rank=2), lambda done, of: told.append((done, of)))
    assert told[0] == (1, 4 + 10)
    assert told[-1] == (14, 14)
    assert result["parameters"] > 0
    assert result["seconds"] > 0
    assert len(result["history"]["train"]) == 4
    assert [e["step"] for e in result["history"]["valid"]] == [0, 2, 4]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "metrics.json",
        "report.html",
    ]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["mrr"] == pytest.approx(sum(1 / r for r in result["ranks"]) / 10)
    json.dumps(result)


def made_up(name, count):
    ranks = [1 + r for r in Random("ranks", name).integers((count,), 9).tolist()]
    found = {str(i): [[(i + k) % count, 0.9 - k / 10] for k in range(3)] for i in range(count)}
    history = {"train": [{"step": k, "loss": 1 / k} for k in (1, 2)], "valid": [{"step": k, "mrr": k / 9} for k in (0, 2)]}
    trained = name != "frozen"
    return {
        "ranks": ranks, "found": found, "own": [0.5] * count, "peak_memory": 5e8, "parameters": 1000 * trained,
        "seconds": 2.0 * trained, "history": history if trained else {"train": [], "valid": []},
        "changes": {"layer.0.query": 0.1, "layer.1.query": 0.2},
    }  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    table = Table(
        {
            "query": tuple(f"query {i}" for i in range(20)),
            "document": tuple(f"def f{i}(): <b>" for i in range(20)),
            "module": ("os",) * 20,
        },
        "made up",
    )
    monkeypatch.setattr("rankfold.jobs.data.load", lambda *a, **k: table)
    asked = []

    def in_process(request, contender, threads):
        asked.append(request)
        return made_up(contender.name, 20)

    monkeypatch.setattr(module, "_in_process", in_process)
    return asked


def test_table_page_and_metrics(quick, tmp_path, capsys):
    metrics = module.demo(tmp_path / "demo", seed=3, threads=1, scale=0.01)
    shown = capsys.readouterr().out
    for title in ("frozen", "LoRA, rank 8", "DoRA, rank 8", "full fine-tuning"):
        assert title in shown
    assert re.search(r"LoRA, rank 8 +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", shown)
    assert shown.count("query    query") == 3
    assert shown.count("before   os") == shown.count("after    os") == 3
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "(): &lt;b&gt;" in page
    saved = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert set(saved["methods"]) == {"frozen", "lora", "dora", "full"}
    lora = saved["methods"]["lora"]
    assert lora["R@1"]["low"] <= lora["R@1"]["estimate"] <= lora["R@1"]["high"]
    assert lora["MRR"]["estimate"] == pytest.approx(sum(1 / r for r in lora["ranks"]) / 20)
    assert metrics["seed"] == 3


def test_every_method_sees_the_same_pairs(quick, tmp_path):
    module.demo(tmp_path / "demo", scale=0.01)
    same = ("data", "test", "valid", "epochs", "batch_size", "max_length", "seed", "model")
    assert len({json.dumps({k: r["settings"][k] for k in same}) for r in quick}) == 1
    assert [r["train"] for r in quick] == [False, True, True, True]


def test_shown_queries_do_not_flatter():
    before, after = [9, 1, 5, 4], [1, 8, 2, 4]
    assert module.interesting(before, after) == [0, 2, 1]
    assert module.interesting([1, 2], [1, 2]) == [0, 1] or module.interesting([1, 2], [1, 2]) == [1, 0]


def test_a_worker_that_fails_is_reported(monkeypatch, tmp_path):
    bad = {"settings": {"model": "tiny-llama"}, "train": False, "rows": 1, "threads": 1}
    with pytest.raises(RankfoldError, match=r"demo: frozen failed in its process(.|\n)*must be given"):
        module._in_process(bad, module.METHODS[0], 1)


@pytest.mark.full
def test_the_whole_demo_small(tmp_path):
    metrics = module.demo(tmp_path / "demo", threads=1, scale=0.03)
    assert set(metrics["methods"]) == {"frozen", "lora", "dora", "full"}
    assert (tmp_path / "demo" / "lora" / "adapter.json").exists()

"""One method of the demo in a process of its own, so that its time and memory are its own. Run by `demo`.

Reads its settings as JSON from standard input; writes one JSON object a line: {"done", "of"} as it goes, then {"result"}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from rankfold.training.machine import peak_memory

__all__ = ["main", "run_one"]

Tell = Callable[[int, int], None]


def run_one(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Train by the method of the request (none for the frozen encoder) and rank the test documents.

    Args:
        request: {"settings": of `AdaptSettings`, "train": whether to, "rows": test rows, "queries": their places, "threads"}.
        tell: called with (done, of): steps and test rows count alike.
    """
    from rankfold.jobs.adapt.embed import Embed
    from rankfold.jobs.adapt.run import attached, finish, fit, prepare
    from rankfold.jobs.adapt.screen import Screen
    from rankfold.jobs.adapt.settings import AdaptSettings

    torch.set_num_threads(request["threads"])
    settings = AdaptSettings.of(**request["settings"]).filled()
    silent = Screen(quiet=True)
    ready = prepare(settings, silent)
    task = ready.task
    assert isinstance(task, Embed)
    tests = ready.rows["test"][: request["rows"]]
    model = ready.loaded.model
    began = time.monotonic()
    steps = len(ready.batches) if request["train"] else 0
    total = steps + len(tests)
    result: dict[str, Any] = {"parameters": 0, "seconds": 0.0, "history": {"train": [], "valid": []}}
    if request["train"]:
        handle = attached(ready)
        history = fit(ready, handle, settings.out / "checkpoint", lambda record: tell(int(record["step"]), total))
        result |= {
            "parameters": handle.parameter_count(),
            "seconds": history.seconds - history.evaluation_seconds,
            "history": {"train": history.steps, "valid": history.evaluations},
        }
    ranks, similarity = task.ranks(model, tests, 2 * (settings.batch_size or 1), lambda n: tell(steps + n, total))
    best = similarity.topk(3, dim=1)
    result |= {
        "ranks": ranks.tolist(),
        "found": {str(i): [[int(d), float(x)] for d, x in zip(best.indices[i], best.values[i])] for i in range(len(tests))},
        "own": [float(similarity[i, i]) for i in range(len(tests))],
        "peak_memory": max(peak_memory(torch.device("cpu")), history.peak_memory if request["train"] else 0),
        "whole_seconds": time.monotonic() - began,
    }
    if request["train"]:
        from rankfold.measure import mrr, ndcg_at, recall_at

        figures = {
            "recall@1": recall_at(ranks, 1),
            "recall@5": recall_at(ranks, 5),
            "mrr": mrr(ranks),
            "ndcg@10": ndcg_at(ranks, 10),
        }
        kept = {k: v for k, v in history.evaluations[-1].items() if k != "step"}
        made = finish(ready, handle, history, {"valid": kept, "test": figures, "base": {}}, silent)
        result["changes"] = made.metrics["changes"]
        result["rank"] = settings.rank
    return result


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    told = 0.0

    def tell(done: int, of: int) -> None:
        nonlocal told
        if time.monotonic() - told > 0.2:
            told = time.monotonic()
            print(json.dumps({"done": done, "of": of}), flush=True)

    print(json.dumps({"result": run_one(request, tell)}), flush=True)


if __name__ == "__main__":
    main()

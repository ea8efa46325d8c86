"""The demo: search over a code base made better, with a real encoder on real data, offline.

A docstring's first sentence is to find its function's code among Python's own library functions. The frozen encoder, LoRA,
DoRA and full fine-tuning see the same pairs once, each in a process of its own; train and test share no module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError

__all__ = ["METHODS", "Contender", "demo", "interesting"]


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method of `rankfold methods`, or None for the encoder as it comes, and its options."""

    name: str
    title: str
    method: str | None
    options: Mapping[str, Any]


METHODS = (
    Contender("frozen", "frozen", None, {}),
    Contender("lora", "LoRA, rank 8", "lora", {"rank": 8, "lr": 4e-3}),
    Contender("dora", "DoRA, rank 8", "dora", {"rank": 8, "lr": 4e-3}),
    Contender("full", "full fine-tuning", "full", {"lr": 1.5e-4}),
)
"""Learning rates from benchmarks/results/defaults.json: other seed, no test rows."""

PAIRS, VALID, TESTS = 1152, 100, 800
SHOWN = 3  # queries whose results are printed
ROOM = 130  # columns of the screen that the whole table takes


def demo(out: str | Path = "runs/demo", *, seed: int = 0, threads: int = 2, scale: float = 1.0) -> dict[str, Any]:
    """Run the demo, print its table, and write adapters, metrics.json and report.html into `out`.

    Args:
        seed: of order and starts.
        threads: of each process.
        scale: share of the pairs and test rows, for a quick look.

    Raises:
        MissingExtra: the encoder's package is not installed. FileError: `out` can't be written.
    """
    from rankfold.jobs.adapt.outcome import versions, write_metrics
    from rankfold.jobs.adapt.run import check_out
    from rankfold.jobs.data import load
    from rankfold.jobs.models import minilm_folder

    out = Path(out)
    check_out(out)
    minilm_folder()
    pairs, valid, tests = (max(16, round(n * scale)) for n in (PAIRS, VALID, TESTS))
    table = load("stdlib-code", "test", limit=tests)
    learnt = load("stdlib-code", "train", limit=pairs + valid)
    print(f"Search over Python's standard library: {pairs:,} pairs to learn from, {len(table):,} unseen functions to find.")
    print("The encoder is all-MiniLM-L6-v2; each method sees the pairs once, in a process of its own.\n", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as files:  # read once here: taking the library apart costs seconds
        data = {"data": _write_pairs(Path(files, "train.jsonl"), learnt), "test": _write_pairs(Path(files, "test.jsonl"), table)}
        for contender in METHODS:
            settings = {
                **data, "model": "minilm", "task": "embed", "out": str(out / contender.name), "seed": seed, "evaluations": 3,
                "valid": valid / (pairs + valid), "keep_best": False, "epochs": 1.0, "batch_size": 32, "max_length": 96,
                "device": "cpu", "quiet": True, **({"method": contender.method} if contender.method else {}), **contender.options,
            }  # fmt: skip
            request = {"settings": settings, "train": contender.method is not None, "rows": len(table), "threads": threads}
            results[contender.name] = _in_process(request, contender, threads)
    rows = table_rows(results)
    print_table(rows)
    shown = interesting(results["frozen"]["ranks"], results["lora"]["ranks"])
    print_queries(table, results, shown)
    metrics = {
        "schema": 1, "seed": seed, "threads": threads, "pairs": pairs, "tests": len(table), "versions": versions(),
        "methods": {name: _figures(row, results[name]) for name, row in zip(results, rows)},
    }  # fmt: skip
    write_metrics(out / "metrics.json", metrics)
    write_report(out / "report.html", rows, results, table, shown, metrics)
    print(f"saved    {out}/report.html, metrics.json; the adapters: {out}/lora, {out}/dora, {out}/full")
    print(f"next     rankfold inspect {out}/lora      rankfold export {out}/lora --to peft --out DIR")
    return metrics


def _write_pairs(path: Path, table: Any) -> str:
    rows = zip(table["query"], table["document"])
    path.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in rows), encoding="utf-8")
    return str(path)


def _in_process(request: Mapping[str, Any], contender: Contender, threads: int) -> dict[str, Any]:
    """The worker's result; its progress on the screen meanwhile.

    Raises:
        RankfoldError: the worker failed, with its last words.
    """
    from rankfold.training.progress import Progress

    # threads that wait spinning cost a factor of eight as soon as something else wants the core
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "rankfold.jobs.demo_worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    result: dict[str, Any] = {}
    errors: list[str] = []
    began = time.monotonic()
    with subprocess.Popen(command, env=environment, **pipes) as worker, Progress(contender.title, 1) as bar:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stderr is not None
        reader = threading.Thread(target=lambda stream: errors.extend(stream), args=(worker.stderr,), daemon=True)
        reader.start()
        worker.stdin.write(json.dumps(request))
        worker.stdin.close()
        try:
            for line in worker.stdout:
                message = json.loads(line)
                result = message.get("result", result)
                if "done" in message:
                    bar.total = message["of"]
                    bar.at(message["done"])
        except BaseException:
            worker.terminate()
            raise
        reader.join(5)
    if worker.returncode or not result:
        last = "".join(errors[-5:]).strip() or f"exit code {worker.returncode}"
        raise RankfoldError(f"demo: {contender.title} failed in its process: {last}")
    print(f"  {contender.title:<18} done in {time.monotonic() - began:.0f} s", flush=True)
    return result


# figures


def table_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: R@1, R@5 and MRR with 95 % bootstrap intervals over the queries, and what it cost."""
    from rankfold.measure import bootstrap_interval

    rows = []
    for contender in METHODS:
        found = results[contender.name]
        ranks = found["ranks"]
        rows.append(
            {
                "method": contender.title,
                "R@1": bootstrap_interval([r <= 1 for r in ranks]),
                "R@5": bootstrap_interval([r <= 5 for r in ranks]),
                "MRR": bootstrap_interval([1 / r for r in ranks]),
                "parameters": found["parameters"],
                "seconds": found["seconds"] or None,
                "memory": found["peak_memory"],
            }
        )
    return rows


def _figures(row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    interval = {k: {"estimate": row[k].estimate, "low": row[k].low, "high": row[k].high} for k in ("R@1", "R@5", "MRR")}
    return {
        **interval, "parameters": row["parameters"], "seconds": row["seconds"], "peak_memory": row["memory"],
        "ranks": found["ranks"], "history": found["history"], "changes": found.get("changes", {}),
    }  # fmt: skip


def interesting(before: Sequence[int], after: Sequence[int], count: int = SHOWN) -> list[int]:
    """Queries to show: the largest gain, a gain of middle size, and the largest loss, so that the page does not flatter.

    >>> interesting([50, 3, 2, 1, 9], [1, 1, 2, 40, 4])
    [0, 1, 3]
    """
    gain = {i: 1 / a - 1 / b for i, (b, a) in enumerate(zip(before, after))}
    order = sorted(gain, key=lambda i: (-gain[i], -before[i]))
    better = [i for i in order if gain[i] > 0]
    chosen = [better[0], better[len(better) // 2], order[-1]] if better else order
    return list(dict.fromkeys(chosen))[:count]


# the screen


def _columns() -> list[Any]:
    from rankfold.report import Column

    return [
        Column("method"),
        *(Column(key, format=".3f", better="higher") for key in ("R@1", "R@5", "MRR")),
        Column("parameters", "trained", format="count"),
        Column("seconds", "training", format="seconds"),
        Column("memory", "peak memory", format="bytes"),
    ]


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table on the screen; quality and cost apart where it is too narrow, since intervals cut in two can't be read."""
    from rich.console import Console

    from rankfold.report import console_table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=ROOM)
    columns = _columns()
    parts = [columns] if console.width >= ROOM else [columns[:4], [columns[0], *columns[4:]]]
    print()
    for part in parts:
        console.print(console_table(rows, part))
    print("R@k: share of queries whose function is among the first k. Brackets: 95 % bootstrap over the queries.\n")


def print_queries(table: Any, results: Mapping[str, Mapping[str, Any]], shown: Sequence[int]) -> None:
    """Each query with what stood first before and after, and where its own function stood."""
    for i in shown:
        print(f"query    {table['query'][i]}")
        for label, name in (("before", "frozen"), ("after", "lora")):
            first = results[name]["found"][str(i)][0][0]
            mark = "right" if first == i else f"its own function at rank {results[name]['ranks'][i]}"
            print(f"{label:<9}{table['module'][first]}: {_line(table['document'][first])}   ({mark})")
        print()


def _line(code: str, width: int = 70) -> str:
    text = " ".join(code.split())
    return text if len(text) <= width else text[: width - 1] + "…"


# the page


def write_report(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    table: Any,
    shown: Sequence[int],
    metrics: Mapping[str, Any],
) -> None:
    """report.html: table, learning curves, quality against parameters, size of the change per site, queries."""
    from rankfold.report import Point, Report, change_per_site, learning_curves, quality_vs_parameters

    by_name = dict(zip(results, rows))
    frozen, lora = by_name["frozen"]["MRR"], by_name["lora"]["MRR"]
    report = Report(
        "Search over a code base",
        subtitle=f"all-MiniLM-L6-v2 · {metrics['pairs']:,} pairs of Python's standard library, seen once",
        lead=f"MRR `{frozen.estimate:.3f}` frozen, `{lora.estimate:.3f}` with LoRA, over {metrics['tests']:,} unseen functions.",
        footer={**metrics["versions"], "seed": metrics["seed"], "threads": metrics["threads"]},
    )
    section = report.section("Results")
    section.table(
        rows, _columns(), "Each method in a process of its own; brackets are 95 % bootstrap intervals over the queries."
    )
    points = [Point(row["method"], row["parameters"], row["MRR"]) for row in rows]
    section.figure(quality_vs_parameters(points, metric="MRR"), "Quality against the number of trained parameters")
    section = report.section("Training")
    trained = [c for c in METHODS if c.method is not None]
    losses = {c.title: [(r["step"], r["loss"]) for r in results[c.name]["history"]["train"]] for c in trained}
    section.figure(learning_curves(losses, metric="loss", better="lower"), "Training loss")
    curves = {c.title: [(e["step"], e["mrr"]) for e in results[c.name]["history"]["valid"]] for c in trained}
    section.figure(learning_curves(curves, metric="MRR", better="higher"), "MRR among held-out training pairs")
    section = report.section("What changed")
    for c in trained:
        section.figure(change_per_site(results[c.name]["changes"]), f"{c.title}: size of the change at each site")
    report.section("Queries").examples([_example(table, results, i) for i in shown], before="frozen", after="LoRA")
    report.write(path)


def _example(table: Any, results: Mapping[str, Mapping[str, Any]], i: int) -> Any:
    from rankfold.report import Example, Hit

    def hits(name: str) -> list[Any]:
        found = results[name]
        rows = [
            Hit(n, table["module"][d], _line(table["document"][d], 90), score, d == i)
            for n, (d, score) in enumerate(found["found"][str(i)], 1)
        ]
        if not any(hit.relevant for hit in rows):
            rows.append(Hit(found["ranks"][i], table["module"][i], _line(table["document"][i], 90), found["own"][i], True))
        return rows

    return Example(table["query"][i], hits("frozen"), hits("lora"))

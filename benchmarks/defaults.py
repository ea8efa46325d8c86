"""The sweep behind the main job's defaults: learning rate x rank on small parts of three data sets, with MiniLM.

    python -m benchmarks.defaults --sst2 DIR --trec DIR [--only stdlib-code]

DIR holds train.txt and dev.txt or test.txt, lines of `label text`. SST-2 and TREC: 640 training rows, three passes, measured on
300 rows of dev (SST-2) and of held-out training rows (TREC); stdlib-code: 960 pairs, one pass, measured on 300 held-out pairs.
The test parts are never read. Seed 1, which nothing else here uses; one thread; bfloat16 autocast, for the sake of time. Every
cell is written to benchmarks/results/defaults.json as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import torch

from rankfold.adapters.files import write_json
from rankfold.jobs.adapt.outcome import versions
from rankfold.jobs.adapt.run import attached, fit, prepare
from rankfold.jobs.adapt.screen import Screen
from rankfold.jobs.adapt.settings import AdaptSettings

__all__ = ["cells", "main", "measure"]

RESULTS = Path(__file__).parent / "results" / "defaults.json"
SEED = 1


def cells(sst2: Path | None, trec: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(data set, settings) of every cell."""
    text = {"task": "classify", "epochs": 3.0, "limit": 940, "encoding": "iso-8859-1", "valid": 300 / 940}
    for name, folder in (("sst2", sst2), ("trec", trec)):
        for lr in (3e-4, 1e-3, 2e-3, 3e-3, 1e-2) if folder is not None else ():
            for rank in (8, 16):
                yield name, {**text, "data": str(folder / "train.txt"), "method": "lora", "rank": rank, "lr": lr}  # type: ignore[operator]
    code = {"task": "embed", "epochs": 1.0, "data": "stdlib-code", "limit": 1260, "valid": 300 / 1260, "max_length": 96}
    rates = {
        ("lora", 8): (1e-3, 2e-3, 4e-3, 8e-3),
        ("lora", 16): (3e-3,),
        ("dora", 8): (1e-3, 2e-3, 4e-3, 8e-3),
        ("full", None): (5e-5, 1.5e-4, 4e-4),
    }
    for (method, width), values in rates.items():
        for lr in values:
            yield "stdlib-code", {**code, "method": method, **({} if width is None else {"rank": width}), "lr": lr}


def measure(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """The last evaluation of one run, and its cost."""
    s = AdaptSettings.of(
        model="minilm",
        out=out,
        seed=SEED,
        bf16=True,
        quiet=True,
        keep_best=False,
        evaluations=1,
        checkpoint_minutes=0,
        **settings,
    ).filled()
    ready = prepare(s, Screen(quiet=True))
    began = time.process_time()
    history = fit(ready, attached(ready), out / "checkpoint")
    return {
        "valid": {k: v for k, v in history.evaluations[-1].items() if k != "step"},
        "start": history.evaluations[0],
        "steps": len(history.steps),
        "loss": history.losses[-1],
        "processor_seconds": time.process_time() - began,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--trec", type=Path)
    parser.add_argument("--only", help="one data set")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = found.get("cells", [])
    for name, settings in cells(options.sst2, options.trec):
        key: dict[str, Any] = {"data": name, **{k: settings[k] for k in ("method", "rank", "lr", "epochs") if k in settings}}
        if options.only not in (None, name) or any(row["cell"] == key for row in rows):
            continue
        rows.append({"cell": key, **measure(settings, RESULTS.parent / "unused")})
        print(key, rows[-1]["valid"], flush=True)
        how = " ".join((__doc__ or "").split())
        write_json(RESULTS, {"schema": 1, "how": how, "seed": SEED, "versions": versions(), "cells": rows})


if __name__ == "__main__":
    main()

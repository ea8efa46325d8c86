"""QLoRA end to end: `lora` on a Llama whose linear layers are dense, int8, int4 or NF4; bytes, loss and error of each.

    python -m benchmarks.qlora [--toy]

Two cells: a small model with many tokens, where activations weigh most, and a wide one with few, where the base does. Each
storage runs in a process of its own. `training_peak_bytes` is its largest resident memory (VmHWM, Linux) from when the adapted
model stands until after the last step: the dense weights that a quantised base is made from are gone by then. `library_bytes` is
what is resident with the libraries at work on a tiny model. Blocks up to 32 MiB that are freed stay in the C library's heap, so
that the peak may be that of its fragments; MALLOC_MMAP_THRESHOLD_=1048576 in the environment gives them back at once. Random
weights: bytes do not depend on them; the loss (memorising a few sequences) says that every storage trains.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import rankfold as rf
from rankfold.core.base import stored_tensors

from .models import llama
from .protocol import conditions, kept_bytes

__all__ = ["CELLS", "STORAGES", "Cell", "run"]

STORAGES = ("dense", "dense-bf16", "int8", "int4", "nf4", "bnb-int8")
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"
RESULT = Path(__file__).parent / "results" / "qlora.json"


@dataclass(frozen=True)
class Cell:
    """A Llama and what it is trained on."""

    layers: int
    hidden: int
    mlp: int
    vocab: int
    heads: int
    rows: int
    tokens: int
    steps: int
    rank: int = 16


CELLS = {
    "toy": Cell(2, 64, 128, 96, 4, rows=4, tokens=16, steps=30, rank=4),
    "small": Cell(4, 512, 1408, 4096, 8, rows=4, tokens=256, steps=30),
    "wide": Cell(8, 2048, 5504, 2048, 16, rows=1, tokens=64, steps=6),
}


def _status(field: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def _start_of_peak() -> None:
    """Give freed memory back to the system and let VmHWM start anew."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run(storage: str, name: str) -> dict[str, Any]:
    """One storage: bytes of the base, bytes that autograd keeps, resident memory, loss before and after, error of the quantised
    weights."""
    cell, dense = CELLS[name], storage.startswith("dense")
    library = 0 if name == "toy" else run(storage, "toy")["resident_bytes"]
    model = llama(cell.layers, cell.hidden, cell.mlp, cell.vocab, cell.heads)
    if storage == "dense-bf16":
        model.bfloat16()
    errors = {} if dense else rf.quantise(model, storage)
    ids = torch.randint(cell.vocab, (cell.rows, cell.tokens), generator=torch.Generator().manual_seed(1))
    adaptation = rf.adapt(model, "lora", rank=cell.rank)
    optimizer = adaptation.optimizer()
    base = stored_tensors(model)
    bases: list[Any] = [slot.base for slot in adaptation.slots()]
    linear = [t for b in bases for t in ((b.W,) if dense else b.storage())]
    known = {t.untyped_storage().data_ptr() for t in [*base, *adaptation.tensors().values()]}
    kept = kept_bytes(lambda: model(input_ids=ids, labels=ids).loss, known)
    _start_of_peak()
    resident, losses = _status("VmRSS"), []
    for _ in range(cell.steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    peak = _status("VmHWM")
    folded = adaptation.fold()
    adaptation.unfold()
    return {
        "storage": storage,
        "linear_bytes": sum(t.nbytes for t in linear),
        "base_bytes": sum(t.nbytes for t in base),
        "kept_bytes": kept,
        "adapter_bytes": sum(t.nbytes for t in adaptation.tensors().values()),
        "library_bytes": library,
        "resident_bytes": resident,
        "training_peak_bytes": peak,
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "quantisation_error": round(max(errors.values()), 4) if errors else 0.0,
        "fold_error": float(f"{max(folded.values()):.2g}"),
    }


def main() -> None:
    if "--one" in sys.argv:
        torch.set_num_threads(1)
        print(json.dumps(run(*sys.argv[sys.argv.index("--one") + 1 :])))
        return
    toy = "--toy" in sys.argv
    cells = []
    for name in ["toy"] if toy else ["small", "wide"]:
        rows = []
        for storage in STORAGES:
            command = [sys.executable, "-m", "benchmarks.qlora", "--one", storage, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(name, rows[-1], flush=True)
        cells.append({"cell": {"name": name, **asdict(CELLS[name])}, "rows": rows})
    if not toy:
        found = {"conditions": {**conditions(), "allocator": os.environ.get(ALLOCATOR, "as it comes")}, "cells": cells}
        RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

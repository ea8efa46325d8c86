"""QLoRA end to end: `lora` on a Llama whose linear layers are dense, int8, int4 or NF4; bytes, loss and error of each.

    python -m benchmarks.qlora [--toy]

Each storage runs in a process of its own, so that its peak of resident memory is its own. Random weights: bytes do not depend on
them; the loss (memorising a few sequences) says that every storage trains.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import rankfold as rf
from rankfold.core.base import stored_tensors

from .models import llama
from .protocol import conditions, kept_bytes

__all__ = ["STORAGES", "run"]

STORAGES = ("dense", "int8", "int4", "nf4", "bnb-int8")
RESULT = Path(__file__).parent / "results" / "qlora.json"
STEPS, RANK, TOKENS, ROWS = 30, 16, 256, 4


def run(storage: str, toy: bool = False) -> dict[str, Any]:
    """One storage: bytes of the base, bytes that autograd keeps, loss before and after, error of the quantised weights."""
    torch.manual_seed(0)
    model = llama(layers=2, hidden=64, mlp=128, vocab=96, heads=4) if toy else llama()
    errors = rf.quantise(model, storage) if storage != "dense" else {}
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (ROWS, 16 if toy else TOKENS), generator=generator)
    adaptation = rf.adapt(model, "lora", rank=4 if toy else RANK)
    optimizer = adaptation.optimizer()
    base = stored_tensors(model)
    bases: list[Any] = [slot.base for slot in adaptation.slots()]
    linear = [t for b in bases for t in (b.storage() if storage != "dense" else (b.W,))]
    known = {t.untyped_storage().data_ptr() for t in [*base, *adaptation.tensors().values()]}
    kept = kept_bytes(lambda: model(input_ids=ids, labels=ids).loss, known)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    folded = adaptation.fold()
    adaptation.unfold()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "storage": storage,
        "linear_bytes": sum(t.nbytes for t in linear),
        "base_bytes": sum(t.nbytes for t in base),
        "kept_bytes": kept,
        "adapter_bytes": sum(t.nbytes for t in adaptation.tensors().values()),
        "peak_rss_bytes": peak,
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "quantisation_error": round(max(errors.values()), 4) if errors else 0.0,
        "fold_error": float(f"{max(folded.values()):.2g}"),
    }


def main() -> None:
    toy = "--toy" in sys.argv
    if "--one" in sys.argv:
        torch.set_num_threads(1)
        print(json.dumps(run(sys.argv[sys.argv.index("--one") + 1], toy)))
        return
    rows = []
    for storage in STORAGES:
        command = [sys.executable, "-m", "benchmarks.qlora", "--one", storage, *(["--toy"] if toy else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1])
    if not toy:
        cell = {"layers": 4, "hidden": 512, "rank": RANK, "rows": ROWS, "tokens": TOKENS, "steps": STEPS, "dtype": "float32"}
        found = {"conditions": conditions(), "cell": cell, "rows": rows}
        RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

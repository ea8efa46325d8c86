"""B9, one large GPU: `python -m benchmarks.b9_gpu --out FOLDER` measures Llama's 1B and 8B shapes in bf16 and prints the table.

Random weights, 8 x 2048 tokens, one whole step (forward, backward) of the frozen model, of peft as it comes, of peft without its
float32 adapters, and of ours; compilation off and on. All of them stand on one base in turn, the floor around them (eager: before
and after each; compiled: before the first and after the last, since it is compiled anew), as several models of 8B do not fit
beside each other. What fails, for want of memory or in compilation, is a row that says so.

Every row is written when it is there. `--minutes 9` begins none that would not end in time; the same command and folder
go on with what is missing. `--toy` tries every line on a CPU. Needs torch, transformers, peft and triton, and no network.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch is loaded: models of 8B leave little room

import torch
from torch import Tensor, nn

import rankfold as rf

from .protocol import conditions, peak_bytes
from .results import Results

__all__ = ["SHAPES", "Bench", "Cell", "cells", "main", "measure", "table"]


def _shape(hidden: int, mlp: int, layers: int, heads: int, key_heads: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "vocab_size": vocab,
    }  # fmt: skip


SHAPES = {
    "1B": _shape(2048, 8192, 16, 32, 8, 128256),
    "8B": _shape(4096, 14336, 32, 32, 8, 128256),
    "toy": _shape(32, 48, 2, 4, 2, 64),
}
CHECKPOINTED = frozenset({"8B"})
"""Shapes whose activations do not fit: every competitor recomputes its blocks there, the floor too."""
CONTENDERS = ("peft", "peft, no autocast", "ours")
GUESS = {False: 40.0, True: 150.0}
"""Seconds that a row may take, eager and compiled, before one is there to tell."""


@dataclass(frozen=True)
class Cell:
    """One table: a shape and a change, with or without torch.compile."""

    shape: str
    method: str
    rank: int
    compiled: bool
    sequences: int = 8
    tokens: int = 2048

    @property
    def key(self) -> str:
        return f"{self.shape}-{self.method}{self.rank}-{'compiled' if self.compiled else 'eager'}"


def cells(toy: bool = False) -> Iterator[Cell]:
    """Every cell, the quick ones first; of the toy, those that run a line which no other does."""
    if toy:
        yield Cell("toy", "lora", 4, False, 2, 8)
        yield Cell("toy", "dora", 12, False, 2, 8)
        yield Cell("toy", "lora", 4, True, 2, 8)
        return
    for compiled in (False, True):
        for shape in ("1B", "8B"):
            for method, rank in (("lora", 16), ("dora", 384), ("dora", 16)):
                yield Cell(shape, method, rank, compiled)


def base(cell: Cell, device: torch.device) -> nn.Module:
    """The frozen model, made on the device in bf16 (float32 on a CPU, where the toy is compared)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = SHAPES[cell.shape]
    config = LlamaConfig(**shape, max_position_embeddings=cell.tokens, attn_implementation="sdpa", use_cache=False)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if cell.shape in CHECKPOINTED:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train().requires_grad_(False)


@contextmanager
def contender(name: str, model: nn.Module, cell: Cell) -> Iterator[nn.Module]:
    """The base as `name` changes it; afterwards it is the base again."""
    if name == "floor":
        yield model
        return
    if name == "ours":
        adaptation = rf.adapt(model, cell.method, rank=cell.rank, alpha=16)
        try:
            yield model
        finally:
            adaptation.remove("default")
        return
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=cell.rank, lora_alpha=16, use_dora=cell.method == "dora", target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(model, config, autocast_adapter_dtype=name == "peft")
    try:
        yield theirs
    finally:
        theirs.unload()


def step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward and backward; the input asks for its gradient, so that the floor runs a whole backward pass."""
    trainable = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for p in (x, *trainable):
            p.grad = None
        model(inputs_embeds=x, labels=labels).loss.backward()

    return run


def timed(run: Callable[[], None], device: torch.device, rounds: int, budget: float = 12.0) -> dict[str, float]:
    """Median wall seconds of a step, each waited for, and the largest bytes held during one, with the model.

    Steps are measured until there are `rounds` of them, or `budget` seconds are over and there are three.
    """
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    run()  # compiles, and finds what is found once
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait()
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = peak_bytes(run)
    times: list[float] = []
    while len(times) < rounds and (len(times) < 3 or sum(times) < budget):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "rounds": len(times), "peak GB": held / 1e9}


class Bench:
    """One shape's base with its input, on which contenders stand in turn."""

    def __init__(self, cell: Cell, device: torch.device, rounds: int) -> None:
        self.device, self.rounds, self.shape = device, rounds, cell.shape
        self.model = base(cell, device)
        torch.manual_seed(1)
        shape = (cell.sequences, cell.tokens)
        dtype = next(self.model.parameters()).dtype
        self.x = torch.randn(*shape, SHAPES[cell.shape]["hidden_size"], device=device, dtype=dtype).requires_grad_()
        self.labels = torch.randint(SHAPES[cell.shape]["vocab_size"], shape, device=device)

    def row(self, name: str, cell: Cell) -> dict[str, Any]:
        """{seconds, tokens/s, peak GB, took}, or {failed}: a competitor that fails is a row of the table, not the end of it."""
        began = time.monotonic()
        try:
            with contender(name, self.model, cell) as changed:
                torch.compiler.reset()
                found = timed(
                    step(torch.compile(changed) if cell.compiled else changed, self.x, self.labels), self.device, self.rounds
                )
            found["tokens/s"] = self.x.shape[0] * self.x.shape[1] / found["seconds"]
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
        self.x.grad = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {**found, "took": round(time.monotonic() - began, 1)}


def measure(
    cell: Cell, bench: Bench, found: dict[str, Any] | None, put: Callable[[dict[str, Any]], object], deadline: float
) -> bool:
    """The rows of a cell that are missing, each given to `put` with those before it; says whether all are there now.

    No row is begun that would end after `deadline` (of time.monotonic), if it takes as long as the longest so far.
    """
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    rows: dict[str, dict[str, Any]] = {} if found is None else dict(found["rows"])
    missing = [n for n in CONTENDERS if n not in rows]
    longest = max((r["took"] for r in rows.values()), default=GUESS[cell.compiled])
    floors: list[float] = []

    def run(contender: str) -> bool:
        nonlocal longest
        if time.monotonic() + longest > deadline:
            return False
        row = bench.row(contender, cell)
        longest = max(longest, row["took"])
        if contender == "floor" and "seconds" in row:
            floors.append(row["seconds"])
        if contender != "floor" or "floor" not in rows:
            rows[contender] = row
        put({"cell": asdict(cell), "rows": rows, "device": name, "checkpointed": cell.shape in CHECKPOINTED})
        return True

    def compare(done: Sequence[str]) -> None:
        for n in done:
            if "seconds" in rows[n] and floors:
                rows[n]["x floor"] = rows[n]["seconds"] / statistics.mean(floors[-2:])
        put({"cell": asdict(cell), "rows": rows, "device": name, "checkpointed": cell.shape in CHECKPOINTED})

    if not missing:
        return True
    if not run("floor"):
        return False
    for k, n in enumerate(missing):
        if not run(n):
            compare(missing[:k])
            return False
        if not cell.compiled:
            run("floor")
            compare([n])
    if cell.compiled:
        run("floor")
        compare(missing)
    return True


def table(found: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown, under the date and the machine."""
    lines = []
    for key, row in found.items():
        here = row["conditions"]
        recomputed = ", blocks recomputed" if row["checkpointed"] else ""
        lines += [
            f"### {key}: {row['cell']['sequences']} x {row['cell']['tokens']} tokens{recomputed}",
            f"{row['device']} · {here['date']} · {', '.join(f'{p} {here[p]}' for p in ('torch', 'peft', 'transformers'))} · "
            f"median of {min((r['rounds'] for r in row['rows'].values() if 'rounds' in r), default=0)} or more steps",
            "",
            "| | tokens/s | x floor | peak GB |",
            "|---|---|---|---|",
        ]
        for name, r in row["rows"].items():
            if "failed" in r:
                lines.append(f"| {name} | {r['failed']} | | |")
            else:
                share = "1.000" if name == "floor" else f"{r['x floor']:.3f}" if "x floor" in r else ""
                lines.append(f"| {name} | {r['tokens/s']:.0f} | {share} | {r['peak GB']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def _whole(found: dict[str, Any] | None) -> bool:
    return found is not None and all(name in found["rows"] for name in CONTENDERS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.b9_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of b9.json; cells that are there already are kept")
    parser.add_argument("--cell", action="append", default=[], help="only cells whose key holds this text (may be repeated)")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on a CPU if need be: does it run at all?")
    parser.add_argument("--rounds", type=int, default=10, help="steps to measure, fewer where they are slow")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing that would not end within so many minutes")
    options = parser.parse_args(arguments)
    if not (options.toy or torch.cuda.is_available()):
        parser.error("no GPU here; --toy tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(", ".join(f"{k} {v}" for k, v in conditions().items()), flush=True)
    results = Results("B9", options.out, resume=True)
    deadline = time.monotonic() + 60 * options.minutes
    bench: Bench | None = None
    for cell in cells(options.toy):
        found = results.standing(cell.key)
        if (options.cell and not any(part in cell.key for part in options.cell)) or _whole(found):
            continue
        if bench is None or bench.shape != cell.shape:
            bench = None  # the other shape's base makes way first
            gc.collect()
            bench = Bench(cell, device, options.rounds)
        if not measure(cell, bench, found, lambda row, key=cell.key: results.put(key, row), deadline):
            print(f"{cell.key}: time is up; the same command goes on from here", flush=True)
            break
        print(f"{cell.key}: done", flush=True)
    print(table(results.cells))


if __name__ == "__main__":
    main()

"""B9, one large GPU: `python -m benchmarks.b9_gpu --out FOLDER` measures Llama's 1B and 8B shapes in bf16 and prints the table.

Random weights, 8 x 2048 tokens, one whole step (forward, backward) of the frozen model, of peft as it comes, of peft without its
float32 adapters, and of ours; compilation off and on. All of them stand on one base in turn, the floor before and after each,
since several models of 8B do not fit beside each other. `--toy` tries every line on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf

from .protocol import conditions, peak_bytes
from .results import Results

__all__ = ["SHAPES", "Cell", "cells", "main", "measure", "table"]


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
    """Every cell; of the toy, those that run a line which no other does."""
    if toy:
        yield Cell("toy", "lora", 4, False, 2, 8)
        yield Cell("toy", "dora", 12, False, 2, 8)
        yield Cell("toy", "lora", 4, True, 2, 8)
        return
    for shape in ("1B", "8B"):
        for method, rank in (("lora", 16), ("dora", 16), ("dora", 384)):
            for compiled in (False, True):
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


def seconds(run: Callable[[], None], device: torch.device, rounds: int, warm_up: int = 3) -> float:
    """Median wall seconds of a step, each waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for k in range(warm_up + rounds):
        wait()
        start = time.perf_counter()
        run()
        wait()
        if k >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak(run: Callable[[], None], device: torch.device) -> int:
    """Largest bytes held during a step, with the model."""
    if device.type != "cuda":
        return peak_bytes(run)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device)


def measure(cell: Cell, device: torch.device, rounds: int) -> dict[str, Any]:
    """{contender: tokens/s, x floor, peak GB}; what does not fit, or does not compile, says so in its row."""
    model = base(cell, device)
    torch.manual_seed(1)
    shape = (cell.sequences, cell.tokens)
    x = torch.randn(*shape, SHAPES[cell.shape]["hidden_size"], device=device, dtype=next(model.parameters()).dtype)
    labels = torch.randint(SHAPES[cell.shape]["vocab_size"], shape, device=device)
    x.requires_grad_()

    def timed(name: str) -> dict[str, float]:
        with contender(name, model, cell) as changed:
            torch.compiler.reset()
            run = step(torch.compile(changed) if cell.compiled else changed, x, labels)
            took = seconds(run, device, rounds)
            return {"seconds": took, "tokens/s": x.shape[0] * x.shape[1] / took, "peak GB": peak(run, device) / 1e9}

    rows: dict[str, dict[str, Any]] = {"floor": timed("floor")}
    before = rows["floor"]["seconds"]
    for name in CONTENDERS:
        try:
            rows[name] = timed(name)
        except Exception as error:  # a competitor that fails is a row of the table, not the end of it
            rows[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        after = timed("floor")["seconds"]
        if "seconds" in rows[name]:
            rows[name]["x floor"] = rows[name]["seconds"] / ((before + after) / 2)
        before = after
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"cell": asdict(cell), "rows": rows, "rounds": rounds, "device": name, "checkpointed": cell.shape in CHECKPOINTED}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown, under the date and the machine."""
    lines = []
    for key, row in found.items():
        here = row["conditions"]
        recomputed = ", blocks recomputed" if row["checkpointed"] else ""
        lines += [
            f"### {key}: {row['cell']['sequences']} x {row['cell']['tokens']} tokens{recomputed}",
            f"{row['device']} · {here['date']} · {', '.join(f'{p} {here[p]}' for p in ('torch', 'peft', 'transformers'))} · "
            f"median of {row['rounds']} steps",
            "",
            "| | tokens/s | x floor | peak GB |",
            "|---|---|---|---|",
        ]
        for name, r in row["rows"].items():
            if "failed" in r:
                lines.append(f"| {name} | {r['failed']} | | |")
            else:
                lines.append(f"| {name} | {r['tokens/s']:.0f} | {r.get('x floor', 1.0):.3f} | {r['peak GB']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.b9_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of b9.json; cells that are there already are kept")
    parser.add_argument("--cell", action="append", default=[], help="only cells whose key holds this text (may be repeated)")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on a CPU if need be: does it run at all?")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    if not (options.toy or torch.cuda.is_available()):
        parser.error("no GPU here; --toy tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(", ".join(f"{k} {v}" for k, v in conditions().items()), flush=True)
    results = Results("B9", options.out, resume=True)
    for cell in cells(options.toy):
        if not options.cell or any(part in cell.key for part in options.cell):
            results.measure(cell.key, lambda cell=cell: measure(cell, device, options.rounds))
    print(table(results.cells))


if __name__ == "__main__":
    main()

"""B5: a decode batch over many adapters, beside peft's loop; adding and switching with many resident."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .models import llama, tiny_llama
from .protocol import interleave, relative
from .results import Results

__all__ = ["decode", "handling", "run"]

ROWS = 32
RANKS = (4, 8, 16)


def _drawn(module: Any, rank: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    out, in_ = module.weight.shape
    return 0.02 * torch.randn(out, rank, generator=generator), torch.randn(rank, in_, generator=generator) / in_**0.5


def _linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}


def _adapter(model: Any, k: int, rank: int) -> Any:
    import rankfold as rf

    return rf.Adapter.of([rf.Entry(n, *_drawn(m, rank, 1000 * k + j), 2.0) for j, (n, m) in enumerate(_linears(model).items())])


def _peft(model: Any, adapters: int, ranks: Sequence[int]) -> Any:
    """The same adapters in peft."""
    from peft import LoraConfig, get_peft_model

    sites = list(_linears(model))
    theirs = None
    for k in range(adapters):
        config = LoraConfig(r=ranks[k % len(ranks)], lora_alpha=2 * ranks[k % len(ranks)], target_modules=sites)
        theirs = get_peft_model(model, config, f"a{k}") if theirs is None else theirs
        if k:
            theirs.add_adapter(f"a{k}", config)
    assert theirs is not None
    with torch.no_grad():
        for k in range(adapters):
            for j, name in enumerate(sites):
                layer = theirs.get_submodule(f"base_model.model.{name}")
                B, A = _drawn(layer, ranks[k % len(ranks)], 1000 * k + j)
                layer.lora_B[f"a{k}"].weight.copy_(B)
                layer.lora_A[f"a{k}"].weight.copy_(A)
    return theirs.eval()


def _model(size: str) -> Any:
    return (tiny_llama() if size == "toy" else llama(hidden=256, mlp=704, vocab=1024, heads=4)).eval()


def decode(distinct: int, size: str) -> dict[str, Any]:
    """One token for each of 32 rows that choose among `distinct` adapters of mixed ranks.

    Raises:
        AssertionError: the competitors compute different functions.
    """
    import rankfold as rf

    model, base, other = _model(size), _model(size), _model(size)
    bank = rf.Bank(model, rank=max(RANKS), slots=2 * distinct)
    for k in range(2 * distinct):
        bank.add(f"a{k}", _adapter(model, k, RANKS[k % len(RANKS)]))
    names = [f"a{n % distinct}" for n in range(ROWS)]
    bank.select(names[0] if distinct == 1 else names)
    theirs = _peft(other, distinct, RANKS)
    ids = torch.arange(ROWS)[:, None] % 90
    with torch.no_grad():
        error = relative(model(ids).logits, theirs(input_ids=ids, adapter_names=names).logits)
        assert error < 1e-4, f"ours and peft's logits differ by {error:.1e}"
        steps: dict[str, Callable[[], Any]] = {
            "base": lambda: base(ids),
            "ours": lambda: model(ids),
            "peft": lambda: theirs(input_ids=ids, adapter_names=names),
        }
        if distinct > 1:
            steps["one anew"] = _changing(bank, steps["ours"], distinct, 1)
            steps["all anew"] = _changing(bank, steps["ours"], distinct, distinct)
        timing = interleave(steps, rounds=3 if size == "toy" else 30)
    ratios = {n: list(timing.ratio(n, "base")) for n in steps if n != "base"}
    ms = {n: timing.ms(n) for n in steps}
    read = sum(
        t.nbytes for k in range(distinct) for e in _adapter(model, k, RANKS[k % len(RANKS)]).entries.values() for t in (e.A, e.B)
    )
    bound = 1 + 1e3 * read / _bytes_per_second() / ms["base"]
    return {
        "adapters": distinct,
        "rows": ROWS,
        "ms": ms,
        "over base": ratios,
        "error": error,
        "read MB": read / 1e6,
        "bound": bound,
    }


def _changing(bank: Any, run: Callable[[], Any], distinct: int, adapters: int) -> Callable[[], Any]:
    """A step before which so many of the batch's adapters make way for others, at all of their rows: requests come and go."""
    turn = 0

    def step() -> None:
        nonlocal turn
        gone = {k % distinct for k in range(turn, turn + adapters)}
        turn += adapters
        bank.select(
            [f"a{(int(name[1:]) + distinct * (n % distinct in gone)) % (2 * distinct)}" for n, name in enumerate(bank.selected)]
        )
        run()

    return step


def _bytes_per_second() -> float:
    """How fast this machine reads memory: 256 MB, the median of five."""
    much = torch.ones(64 << 20)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        much.sum()
        seconds.append(time.perf_counter() - start)
    return much.nbytes / statistics.median(seconds[1:])


def handling(resident: int, size: str) -> dict[str, Any]:
    """Milliseconds to add one adapter and to switch, with so many resident; peft's at 64, where it takes long enough."""
    import rankfold as rf

    model = _model(size)
    bank = rf.Bank(model, rank=max(RANKS), slots=resident + 40)
    made = _adapter(model, 0, 8)
    for k in range(resident):
        bank.add(f"a{k}", made)
    add, switch, copied = [], [], []
    packed = bank.pack(made)
    for k in range(30):
        start = time.perf_counter()
        bank.add(f"new{k}", packed)
        add.append(time.perf_counter() - start)
        start = time.perf_counter()
        bank.select([f"a{(n + k) % resident}" for n in range(ROWS)])
        switch.append(time.perf_counter() - start)
        start = time.perf_counter()
        bank.arena.of(1).copy_(bank.arena.of(2))
        copied.append(time.perf_counter() - start)
    theirs_count = 2 if size == "toy" else 64
    theirs = _peft(_model(size), theirs_count, (8,))
    from peft import LoraConfig

    config = LoraConfig(r=8, target_modules=list(_linears(_model(size))))
    start = time.perf_counter()
    theirs.add_adapter("one-more", config)
    peft_add = time.perf_counter() - start
    start = time.perf_counter()
    theirs.set_adapter("a1")
    peft_switch = time.perf_counter() - start
    ms = {n: round(1e3 * statistics.median(v), 4) for n, v in (("add", add), ("switch", switch), ("row copy", copied))}
    theirs_ms = {"resident": theirs_count, "add": round(1e3 * peft_add, 3), "switch": round(1e3 * peft_switch, 3)}
    return {"resident": resident, "ms": ms, "peft ms": theirs_ms, "arena MB": round(bank.nbytes / 1e6, 1)}


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    for distinct in (1, 2) if size == "toy" else (1, 8, 32):
        key = f"decode {distinct}"
        if only and not any(part in key for part in only):
            continue
        row = results.measure(key, lambda distinct=distinct: decode(distinct, size))
        ours, theirs = row["over base"]["ours"], row["over base"]["peft"]
        print(f"B5 {distinct:2} adapters in {ROWS} rows: ours {ours[0]:.3f}, peft {theirs[0]:.3f} x base", flush=True)
    key = "handling"
    if not only or any(part in key for part in only):
        row = results.measure(key, lambda: handling(4 if size == "toy" else 1000, size))
        print(f"B5 {row['resident']} resident: {row['ms']} ms; peft {row['peft ms']}", flush=True)

"""One step of LoRA on stacked experts over the floor: grouped products of rank r, the same by a loop over experts, and peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf

from .contenders import TOLERANCE, Contenders
from .models import embeddings
from .protocol import interleave
from .results import Results

__all__ = ["Cell", "cells", "contenders", "measure", "run"]

PAIRS = (("ours", "floor"), ("loop", "floor"), ("peft", "floor"), ("ours", "peft"))
PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Cell:
    """Experts of one shape, `chosen` of them for each token, beside two layers of attention that nobody adapts."""

    model: str
    experts: int
    chosen: int
    hidden: int
    inner: int
    rank: int
    dtype: str
    tokens: int

    @property
    def key(self) -> str:
        return f"{self.model}-{self.experts}x{self.hidden}x{self.inner}-lora{self.rank}-{self.dtype}-{self.tokens}"

    def build(self) -> nn.Module:
        """The frozen model, with the implementation of experts that the library chooses."""
        import transformers as hf

        torch.manual_seed(0)
        common = {
            "vocab_size": 256, "hidden_size": self.hidden, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_experts_per_tok": self.chosen, "use_cache": False,
        }  # fmt: skip
        if self.model == "mixtral":
            mixtral = hf.MixtralConfig(**common, intermediate_size=self.inner, num_local_experts=self.experts)
            model: nn.Module = hf.MixtralForCausalLM(mixtral)
        else:
            qwen = hf.Qwen3MoeConfig(
                **common, intermediate_size=self.inner, moe_intermediate_size=self.inner, num_experts=self.experts,
                head_dim=self.hidden // 4,
            )  # fmt: skip
            model = hf.Qwen3MoeForCausalLM(qwen)
        return model.to(getattr(torch, self.dtype)).requires_grad_(False).train()


def cells(size: str = "short") -> Iterator[Cell]:
    """8 experts of which each token takes 2, and 64 of which it takes 8; "all" has 2048 tokens too; or "toy"."""
    if size == "toy":
        yield Cell("qwen3-moe", 4, 2, 16, 8, 4, "float32", 12)
        return
    for tokens in (512, 2048) if size == "all" else (512,):
        for dtype in ("float32", "bfloat16"):
            yield Cell("mixtral", 8, 2, 256, 896, 8, dtype, tokens)
            yield Cell("qwen3-moe", 64, 8, 256, 96, 8, dtype, tokens)


def contenders(cell: Cell) -> Contenders:
    """The frozen model, peft's, ours, and ours once more to run by the loop, all holding the same tensors."""
    from peft import LoraConfig, get_peft_model

    base = cell.build()
    ours = copy.deepcopy(base)
    adaptation = rf.adapt(ours, "lora", rank=cell.rank, alpha=16, targets=["*experts*"])
    config = LoraConfig(
        r=cell.rank, lora_alpha=16, lora_dropout=0.0, target_modules=[], target_parameters=[f"experts.{p}" for p in PARAMETERS]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), config)
    pairs = _same_tensors(theirs, adaptation)
    models = {"floor": base, "peft": theirs, "ours": ours, "loop": copy.deepcopy(ours)}
    return Contenders(models, embeddings(base, cell.tokens, getattr(torch, cell.dtype)), pairs)


@dataclass(frozen=True)
class Stacked:
    """A matrix of peft, which holds the ranks of all experts side by side, read as our stack."""

    matrix: Tensor
    arrange: Callable[[Tensor], Tensor]

    @property
    def stack(self) -> Tensor:
        return self.arrange(self.matrix)

    @property
    def grad(self) -> Tensor | None:
        return None if self.matrix.grad is None else self.arrange(self.matrix.grad)


def _same_tensors(theirs: nn.Module, adaptation: rf.Adaptation) -> list[tuple[Any, Tensor]]:
    torch.manual_seed(2)
    pairs = []
    for slot in adaptation.slots():
        site, mine = slot.site, slot.t(adaptation.store)._asdict()
        inside = "base_layer." * (site.param == PARAMETERS[0])
        layer = theirs.get_submodule(f"base_model.model.{site.module}.{inside}".rstrip("."))
        rank, experts = mine["A"].shape[1], site.batch
        A = Stacked(layer.lora_A["default"].weight, lambda t, e=experts, r=rank: t.view(e, r, -1))
        B = Stacked(layer.lora_B["default"].weight, lambda t, e=experts, r=rank: t.view(-1, r, e).permute(2, 0, 1))
        with torch.no_grad():
            B.matrix.normal_(std=0.1)
            mine["A"].copy_(A.stack)
            mine["B"].copy_(B.stack)
        pairs += [(A, mine["A"]), (B, mine["B"])]
    return pairs


@contextmanager
def looped() -> Iterator[None]:
    """Products of experts by a loop, as where torch has no grouped product."""
    from rankfold.core.kinds import experts
    from rankfold.kernels.grouped import looped_outer, looped_product

    native = experts.grouped_product, experts.grouped_outer
    experts.grouped_product, experts.grouped_outer = looped_product, looped_outer
    try:
        yield
    finally:
        experts.grouped_product, experts.grouped_outer = native


def _by_loop(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with looped():
            step()

    return run


def measure(cell: Cell, rounds: int) -> dict[str, Any]:
    """Times and their paired ratios; fails where ours and peft do not compute the same function."""
    four = contenders(cell)
    errors = four.check(TOLERANCE[cell.dtype])
    steps = {name: four.step(name) for name in ("floor", "peft", "ours", "loop")}
    timing = interleave({**steps, "loop": _by_loop(steps["loop"])}, rounds)
    ratios = {f"{a}/{b}": {clock: timing.ratio(a, b, clock) for clock in ("cpu", "wall")} for a, b in PAIRS}
    ms = {clock: {name: timing.ms(name, clock) for name in steps} for clock in ("cpu", "wall")}
    return {"cell": asdict(cell), "ms": ms, "ratios": ratios, "rounds": rounds, "errors": errors}


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    """Measure every cell whose key holds one of `only` (all where it is empty)."""
    for cell in cells(size):
        if only and not any(part in cell.key for part in only):
            continue
        rounds = 2 if size == "toy" else 16 if cell.tokens <= 512 else 7
        row = results.measure(cell.key, lambda cell=cell, rounds=rounds: measure(cell, rounds))
        ours, loop, theirs = (row["ratios"][f"{name}/floor"]["cpu"][0] for name in ("ours", "loop", "peft"))
        print(f"experts {cell.key:42} ours {ours:.3f} x floor   loop {loop:.3f}   peft {theirs:.3f}", flush=True)

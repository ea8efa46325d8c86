"""B3: one training step of every structure that peft also has, with peft's default options, over the floor and over peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rankfold as rf

from .b1_step import PAIRS
from .contenders import TOLERANCE, Cell, Contenders
from .models import MODELS, embeddings
from .protocol import interleave
from .results import Results

__all__ = ["STRUCTURES", "Structure", "cells", "measure", "run"]

Read = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Structure:
    """How one structure is called here and in peft.

    Args:
        config: peft's class, with `options` where its defaults are not what is compared.
        ours: our options, the values that peft's defaults mean.
        tensors: our tensor by name, from peft's layer; None where a layer has no such tensor.
    """

    method: str
    config: str
    ours: dict[str, Any]
    tensors: dict[str, Read]
    options: dict[str, Any] = field(default_factory=dict)


def of(name: str) -> Read:
    return lambda layer: found["default"] if "default" in (found := getattr(layer, name, {})) else None


def weight_of(name: str) -> Read:
    return lambda layer: getattr(layer, name)["default"].weight


def positions(layer: Any) -> Tensor:
    """SHiRA's, as row · in + column; put in order at peft as well, so that the values correspond."""
    rows, columns = layer.shira_indices["default"].long()
    flat = rows * layer.in_features + columns
    order = flat.argsort()
    layer.shira_indices["default"] = layer.shira_indices["default"][:, order]
    return flat[order]


LORA: dict[str, Read] = {"B": weight_of("lora_B"), "A": weight_of("lora_A")}
STRUCTURES = {
    s.method: s
    for s in (
        Structure("lora", "LoraConfig", {"rank": 8, "alpha": 8}, LORA),
        Structure(
            "magnitude+lora", "LoraConfig", {"rank": 8, "alpha": 8},
            {**LORA, "m": weight_of("lora_magnitude_vector")}, {"use_dora": True},
        ),
        Structure(
            "kron", "LoKrConfig", {"rank": 8, "alpha": 8},
            {"P": of("lokr_w1"), "Q": of("lokr_w2"), "Q1": of("lokr_w2_a"), "Q2": of("lokr_w2_b")},
        ),
        Structure(
            "hadamard", "LoHaConfig", {"rank": 8, "alpha": 8},
            {"B1": of("hada_w1_a"), "A1": of("hada_w1_b"), "B2": of("hada_w2_a"), "A2": of("hada_w2_b")},
        ),
        Structure("hira", "HiraConfig", {"rank": 32}, {"B": of("hira_B"), "A": of("hira_A")}),
        Structure("hra", "HRAConfig", {"rank": 8}, {"U": of("hra_u")}),
        Structure("shira", "ShiraConfig", {"rank": 32}, {"index": positions, "values": of("shira_weight")}),
        Structure("miss", "MissConfig", {"rank": 64}, {"D": of("miss_block")}),
        Structure("bone", "MissConfig", {"rank": 64}, {"C": of("miss_block")}, {"init_weights": "bat"}),
        Structure(
            "vera", "VeraConfig", {"rank": 256},
            {"A": of("vera_A"), "B": of("vera_B"), "b": of("vera_lambda_b"), "d": of("vera_lambda_d")},
        ),
    )
}  # fmt: skip


def cells(size: str = "short") -> Iterator[Cell]:
    """Every structure at 256 tokens in float32; "all" adds bf16 and 2048 tokens; "toy" two on the tiny model."""
    if size == "toy":
        yield from (Cell("tiny", method, 8, "float32", 8) for method in ("lora", "kron"))
        return
    conditions = [("float32", 256)] + ([("bfloat16", 256), ("float32", 2048), ("bfloat16", 2048)] if size == "all" else [])
    for dtype, tokens in conditions:
        for s in STRUCTURES.values():
            yield Cell("llama", s.method, s.ours["rank"], dtype, tokens)


def contenders(cell: Cell) -> Contenders:
    """The three over equal base weights, with peft's tensors, moved from their start, copied into ours."""
    import peft

    s = STRUCTURES[cell.method]
    base = MODELS[cell.model]().to(cell.torch_dtype).requires_grad_(False)
    ours = copy.deepcopy(base)
    adaptation = rf.adapt(ours, s.method, **s.ours)
    names = [site.name for site in adaptation.sites]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, s.config)(target_modules=names, **s.options))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    pairs: list[tuple[Tensor, Tensor]] = []
    for slot in adaptation.slots():
        layer = theirs.get_submodule("base_model.model." + slot.site.name)
        mine = slot.t(adaptation.store)._asdict()
        for name, value in mine.items():
            value_there = s.tensors[name](layer)
            assert value_there is not None, f"{s.method}: peft has no {name} at {slot.site.name}"
            with torch.no_grad():
                value.copy_(fitted(value_there, value.shape))
            if value.requires_grad:
                pairs.append((value_there, value))
    models = {"floor": base, "peft": theirs, "ours": ours}
    return Contenders(models, embeddings(base, cell.tokens, cell.torch_dtype), pairs)


def fitted(value: Tensor, shape: torch.Size) -> Tensor:
    """peft's tensor in our shape: itself, its transpose, or the leading part of one that all sites share."""
    if value.shape == shape:
        return value
    return value.mT if value.shape == shape[::-1] else value[tuple(slice(n) for n in shape)]


def measure(cell: Cell, rounds: int) -> dict[str, Any]:
    """Times and their paired ratios, and the trainable parameters of both; fails where the two compute different functions."""
    trio = contenders(cell)
    errors = trio.check(TOLERANCE[cell.dtype])
    parameters = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in trio.models.items() if n != "floor"}
    timing = interleave({name: trio.step(name) for name in ("floor", "peft", "ours")}, rounds)
    ratios = {f"{a}/{b}": {clock: timing.ratio(a, b, clock) for clock in ("cpu", "wall")} for a, b in PAIRS}
    ms = {clock: {name: timing.ms(name, clock) for name in trio.models} for clock in ("cpu", "wall")}
    return {"cell": cell.record(), "ms": ms, "ratios": ratios, "rounds": rounds, "errors": errors, "parameters": parameters}


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    for cell in cells(size):
        if only and not any(part in cell.key for part in only):
            continue
        rounds = 2 if size == "toy" else 8 if cell.tokens <= 256 else 3
        row = results.measure(cell.key, lambda cell=cell, rounds=rounds: measure(cell, rounds))
        ours, theirs, between = (row["ratios"][name]["cpu"][0] for name in ("ours/floor", "peft/floor", "ours/peft"))
        print(f"B3 {cell.key:42} ours {ours:.3f} x floor   peft {theirs:.3f}   ours / peft {between:.3f}", flush=True)

"""Bone: block-affine changes, and their row form, against LoRA with as many parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .beds.characters import tune
from .protocol import Check, Claim

ARMS: dict[str, tuple[str, int]] = {"bone": ("bone", 16), "row": ("miss", 16), "lora": ("lora", 8), "pissa": ("pissa", 8)}


def run(arm: str, seed: int, settings: Mapping[str, Any]) -> dict[str, float]:
    method, rank = ARMS[arm]
    sizes = {name: settings[name] for name in ("steps", "pretraining", "size")}
    return tune(seed, method, settings["lr"], rank=rank, **sizes)


def ratio(over: str, under: str, metric: str = "loss") -> Any:
    return lambda arms: arms[over][metric] / arms[under][metric]


CLAIM = Claim(
    row=26,
    title="Bone: blocks of the weight changed by affine maps",
    statement=(
        "A character transformer trained on docstrings is tuned to code. Bone (blocks of 16) and its row form (miss, rank 16) "
        "reach the loss that LoRA of rank 8, with exactly as many parameters, has on code of unseen modules, to 2 %; Bone ends "
        "below PiSSA."
    ),
    not_tested="Llama-2-7B on MetaMathQA: GSM8K 49.36, MATH 8.8, which is 5.84 and 1.96 above PiSSA",
    arms=tuple(ARMS),
    run=run,
    checks=(
        Check(
            name="same-parameters",
            says="Bone and LoRA train equally many numbers: how far their ratio is from 1",
            value=lambda arms: abs(arms["bone"]["parameters"] / arms["lora"]["parameters"] - 1),
            direction="below",
            margin=1e-9,
            kind="identity",
        ),
        Check(
            name="bone-reaches-lora",
            says="Bone's loss is at most 1.02 of LoRA's",
            value=ratio("bone", "lora"),
            direction="below",
            margin=1.02,
            format=".4f",
        ),
        Check(
            name="row-reaches-lora",
            says="the row form's loss is at most 1.02 of LoRA's",
            value=ratio("row", "lora"),
            direction="below",
            margin=1.02,
            format=".4f",
        ),
        Check(
            name="bone-below-pissa",
            says="Bone's loss is below PiSSA's, as in the headline",
            value=ratio("bone", "pissa"),
            direction="below",
            margin=1.0,
            format=".4f",
        ),
    ),
    seeds=tuple(range(1060, 1070)),
    budget={"steps": 150, "pretraining": 500, "size": 300_000},
    toy={"steps": 2, "pretraining": 2, "size": 5_000},
    grid=(1e-3, 3e-3, 1e-2, 3e-2),
    tuned=tuple(ARMS),
    tuning_seeds=(560, 561),
    tune_by="loss",
)

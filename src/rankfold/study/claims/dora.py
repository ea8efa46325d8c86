"""DoRA represents rows that are rescaled beside a change of low rank; LoRA of the same or a higher rank can't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankfold.linalg.random import Random

from .beds.matrix import base_weight, best_error, fit
from .protocol import Check, Claim

SIZE = 64
ARMS = {"dora-2": ("dora", 2), "lora-2": ("lora", 2), "lora-3": ("lora", 3)}


def run(arm: str, seed: int, settings: Mapping[str, Any]) -> dict[str, float]:
    method, rank = ARMS[arm]
    W0 = base_weight(seed, SIZE)
    random = Random(seed, "claims", "dora")
    rows = random.child("rows").uniform((SIZE, 1), 0.5, 1.5)
    low = random.child("B").normal((SIZE, 2)) @ random.child("A").normal((2, SIZE))
    target = rows * (W0 + low * (W0.norm() / low.norm()))
    error = fit(W0, target, method, seed, settings["lr"], settings["steps"], rank=rank)
    return {"error": error, "bound": best_error(target - W0, rank)}


CLAIM = Claim(
    row=None,
    title="DoRA: lengths of rows trained apart from their directions",
    statement=(
        "diag(d) (W₀ + B A) with d between 0.5 and 1.5 and B A of rank 2 is reached by DoRA of rank 2. LoRA of rank 3, which "
        "has more parameters (384 against 320), can't come nearer than the best rank-3 approximation, and ends far away."
    ),
    not_tested="the paper's results on LLaMA-7B and 13B, LLaVA-1.5-7B and VL-BART",
    arms=tuple(ARMS),
    run=run,
    checks=(
        Check(
            name="reaches",
            says="DoRA, rank 2: ‖W' − target‖ / ‖target − W₀‖ is below 1e-3",
            value=lambda arms: arms["dora-2"]["error"],
            direction="below",
            margin=1e-3,
            format=".1e",
        ),
        Check(
            name="lora-is-bounded",
            says="LoRA, rank 2, against the bound of Eckart and Young: its error over the bound is not below 1",
            value=lambda arms: arms["lora-2"]["error"] / arms["lora-2"]["bound"],
            direction="above",
            margin=0.9999,
            format=".4f",
        ),
        Check(
            name="beats-more-parameters",
            says="LoRA, rank 3, is left with an error at least 0.05 above DoRA's of rank 2",
            value=lambda arms: arms["lora-3"]["error"] - arms["dora-2"]["error"],
            direction="above",
            margin=0.05,
        ),
    ),
    seeds=tuple(range(1010, 1020)),
    budget={"steps": 3000},
    toy={"steps": 20},
    grid=(3e-3, 1e-2, 3e-2),
    tuned=tuple(ARMS),
    tuning_seeds=(510, 511, 512),
    tune_by="error",
)

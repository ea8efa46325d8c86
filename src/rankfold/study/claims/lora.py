"""LoRA reaches a target of its rank, and below that rank the best that any matrix of its rank could."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankfold.linalg.random import Random

from .beds.matrix import base_weight, best_error, fit
from .protocol import Check, Claim

SIZE, RANK = 64, 4


def run(arm: str, seed: int, settings: Mapping[str, Any]) -> dict[str, float]:
    rank = int(arm.removeprefix("rank-"))
    W0 = base_weight(seed, SIZE)
    random = Random(seed, "claims", "lora")
    change = random.child("B").normal((SIZE, RANK)) @ random.child("A").normal((RANK, SIZE))
    change = change * (W0.norm() / change.norm())
    error = fit(W0, W0 + change, "lora", seed, settings["lr"], settings["steps"], rank=rank)
    return {"error": error, "bound": best_error(change, rank)}


CLAIM = Claim(
    row=None,
    title="LoRA: a change of low rank is found where there is one, and is bounded where there is not",
    statement="W₀ + Δ with Δ of rank 4 is reached by LoRA of rank 4; LoRA of rank 2 ends at the best rank-2 approximation of Δ.",
    not_tested="the paper's results on GPT-3 175B and on GLUE",
    arms=("rank-4", "rank-2"),
    run=run,
    checks=(
        Check(
            name="reaches",
            says="rank 4: ‖W' − target‖ / ‖Δ‖ is below 1e-3",
            value=lambda arms: arms["rank-4"]["error"],
            direction="below",
            margin=1e-3,
            format=".1e",
        ),
        Check(
            name="plateaus",
            says="rank 2: that error is at most 2 % above the bound of Eckart and Young",
            value=lambda arms: arms["rank-2"]["error"] / arms["rank-2"]["bound"],
            direction="below",
            margin=1.02,
            format=".4f",
        ),
    ),
    seeds=tuple(range(1000, 1010)),
    budget={"steps": 3000},
    toy={"steps": 20},
    grid=(3e-3, 1e-2, 3e-2),
    tuned=("rank-4", "rank-2"),
    tuning_seeds=(500, 501, 502),
    tune_by="error",
)

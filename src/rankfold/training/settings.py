"""What a run of the loop is told, and what it gives: data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from rankfold.core.options import Options
from rankfold.errors import OptionError

__all__ = ["History", "LoopSettings"]


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Options):
    """How long, how fast, how carefully.

    Args:
        lr, weight_decay: of the method's update; a method may give some tensors a multiple of lr.
        epochs: passes over the data; parts of one are fine.
        max_steps: at most so many steps, whatever `epochs` says.
        grad_accum: batches of one step; their gradients are joined as those of one large batch.
        clip: largest norm of the gradient over all tensors; 0 is no limit.
        schedule, warmup: see `rate_factor`.
        bf16: compute under autocast in bfloat16; what trains stays as it is.
        fp16: the same in float16. The loss is scaled so that small gradients stay, and they are scaled back before anything looks
            at them. A step whose gradients overflow is done again at half the scale.
        gradient_checkpointing: recompute activations in the backward pass, in the form that never loses gradients.
        evaluations: so many over the run, evenly; 0 is one an epoch. The last step is always followed by one.
        evaluate_first: evaluate before the first step too.
        metric, better: the figure of `evaluate` by which the best state is known, and its direction.
        keep_best: end with the state of the best evaluation.
        patience: stop after so many evaluations without a new best; None is never.
        seed: of the order of the data and of every draw within a step.
        folder: where checkpoints go; None is nowhere.
        checkpoint_minutes: between checkpoints; 0 is only when interrupted.
        resume: go on from the checkpoint in `folder`, where there is one.
        progress: show a bar.
    """

    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.0
    epochs: Annotated[float, Gt(0)] = 1.0
    max_steps: Annotated[int, Ge(1)] | None = None
    grad_accum: Annotated[int, Ge(1)] = 1
    clip: Annotated[float, Ge(0)] = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    evaluations: Annotated[int, Ge(0)] = 0
    evaluate_first: bool = True
    metric: str = "loss"
    better: Literal["higher", "lower"] = "lower"
    keep_best: bool = True
    patience: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0)] = 0
    folder: Path | None = None
    checkpoint_minutes: Annotated[float, Ge(0)] = 10.0
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 and self.fp16:
            raise OptionError("bf16 and fp16: choose one; bfloat16 where the device has it, since nothing overflows there")


@dataclass
class History:
    """What a run did.

    Attributes:
        steps: one record a step: step (from 1), epoch, loss, lr, norm (of the gradient before clipping).
        evaluations: one record each: step, and the figures of `evaluate`.
        total: steps that were planned; stopped: "finished" or "early".
        best_step: of the evaluation whose state the run ended with; None where there was none.
        seconds: of training and evaluation, over all parts of a resumed run; evaluation_seconds: of that, evaluation.
        peak_memory: in bytes.
        repeats: times that a step was done again since its gradients overflowed float16.
        changes: what the method's policy did: {"ranks": [(step, {site: rank})], "touched": {kind of edit: tensors}}.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    total: int = 0
    stopped: str = "finished"
    best_step: int | None = None
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    peak_memory: int = 0
    repeats: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.steps]

"""The training loop: the reference for every job. Short enough to read; what it calls has a file of its own.

    history = train(model, adaptation, batches, loss, LoopSettings(epochs=3, lr=1e-3), evaluate=evaluate)

One step: forward and backward over its batches, clip, optimizer; the method's policy acts at the five points in between.
Every random draw of a step is keyed by (seed, step), and the data by (seed, epoch): stopped anywhere and resumed in a new
process, a run gives what it would have given uninterrupted.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rankfold.core.sharding import is_sharded
from rankfold.errors import FileError, InactiveError, LayoutError, NumericError, OptionError
from rankfold.linalg.random import Random

from .activations import recomputing
from .adaptation import Adaptation
from .batches import Source, as_source, to_device
from .bucket import Bucket
from .checkpoints import RunState, has_checkpoint, load_checkpoint, restore, save_checkpoint
from .evaluation import Evaluation, Evaluations
from .finding import first_bad_place
from .interruption import Interrupted, Signals
from .machine import mark_memory, peak_memory
from .prints import fingerprint
from .processes import leave_at_exit, process_count, require_same
from .progress import Progress
from .schedules import rate_factor
from .settings import History, LoopSettings

__all__ = ["History", "Interrupted", "LoopSettings", "train"]

LossFunction = Callable[[nn.Module, Any], Tensor]


def _refuse_foreign_sharding(kind: str) -> None:
    """Accelerate's own ways of cutting a model over processes act when it wraps the model, which this loop leaves alone."""
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise LayoutError(
            f"accelerate is set to {kind}, which this loop doesn't use. Start with torchrun, or accelerate without it. To cut "
            f"the base over processes call rf.shard(model): torch's FSDP2"
        )


def train(
    model: nn.Module,
    adaptation: Adaptation,
    batches: Source | Sequence[Any],
    loss: LossFunction,
    settings: LoopSettings | None = None,
    *,
    evaluate: Evaluation | None = None,
    weigh: Callable[[Any], float] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
    identity: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> History:
    """Train one adapter of a model; the model ends in the mode that it came in, with the best state or the last.

    Args:
        batches: a `Batches`, or a list of batches.
        loss: loss(model, batch) -> scalar, the mean over the batch's terms. The method's own terms are added.
        evaluate: model -> {name: figure}; runs at the times that the settings say.
        weigh: how many terms the mean of `loss` is over, so that batches of one step are joined rightly; equal by default.
        on_step: called with the record of each step.
        identity: numbers and texts that say what this run is; a checkpoint in which one differs is refused.
        name: of the adapter; the first that is on by default.

    Raises:
        InactiveError: no gradient reached the adapter, or a site, or the policy did nothing.
        NumericError: the loss or the gradient is NaN or Inf; names where it appeared first. The state before that step is saved.
        Interrupted: Ctrl-C; saved, and says how to go on.

    >>> import rankfold as rf
    >>> model = nn.Sequential(nn.Linear(4, 1))
    >>> adaptation = rf.adapt(model, "lora", rank=1)
    >>> x = torch.eye(4)
    >>> batches = [(x, x.sum(-1, keepdim=True) * 2)]
    >>> def loss(model, batch):
    ...     return (model(batch[0]) - batch[1]).square().mean()
    >>> history = train(model, adaptation, batches, loss, LoopSettings(epochs=50, lr=0.1))
    >>> history.losses[-1] < 0.1 * history.losses[0]
    True
    """
    settings = settings or LoopSettings()
    run = _Run(model, adaptation, as_source(batches, settings.seed), loss, settings, evaluate, weigh, identity, name)
    mode = model.training
    with run.prepared(), Signals() as signals, Progress("train", run.total, run.settings.progress) as bar:
        try:
            run.begin()
            while run.step < run.total and run.history.stopped != "early":
                record = run.one_step()
                bar.at(run.step, f"loss {record['loss']:.4g}")
                if on_step is not None:
                    on_step(record)
                if run.evaluations.due(run.step, run.total, run.epoch_steps):
                    run.evaluate()
                asked, due = run.agreed(signals.asked, run.checkpoint_is_due())
                if asked:
                    raise run.interrupted()
                if due:
                    run.checkpoint()
            run.end()
        finally:
            model.train(mode)
    return run.history


class _Run:
    """One run: its state, and the parts of a step."""

    def __init__(
        self,
        model: nn.Module,
        adaptation: Adaptation,
        source: Source,
        loss: LossFunction,
        settings: LoopSettings,
        evaluate: Evaluation | None,
        weigh: Callable[[Any], float] | None,
        identity: Mapping[str, Any] | None,
        name: str | None,
    ) -> None:
        self.said = dict(identity or {})
        self.model, self.adaptation, self.source, self.settings, self.name = model, adaptation, source, settings, name
        self.loss_function, self.weigh = loss, weigh or (lambda batch: 1.0)
        self.evaluations = Evaluations(evaluate, settings, adaptation, name)
        self.attached = adaptation._get(name)
        self.device = adaptation.parameters(name)[0].device if adaptation.parameters(name) else torch.device("cpu")
        # several processes on processors must be asked for; alone, the state that all Accelerators share stays as it is
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.accelerator = Accelerator(cpu=True) if many and self.device.type == "cpu" else Accelerator()
        _refuse_foreign_sharding(str(self.accelerator.distributed_type.value))
        if is_sharded(model) and process_count() != self.accelerator.num_processes:
            raise LayoutError(
                f"the model is cut over {process_count()} processes, but accelerate sees {self.accelerator.num_processes}: start "
                f"with torchrun or accelerate launch"
            )
        if many:
            leave_at_exit()
        per_step = settings.grad_accum * self.accelerator.num_processes
        self.epoch_steps = -(-len(source) // per_step)
        planned = max(1, math.ceil(settings.epochs * self.epoch_steps))
        self.total = min(planned, settings.max_steps or planned)
        self.step = 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.fp16)
        self.history = History(total=self.total)
        self.began = self.saved_at = time.monotonic()

    # before and after

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Random states as they were afterwards; checkpointing of activations only within."""
        states = (random.getstate(), np.random.get_state())
        mark_memory(self.device)
        activations = recomputing(self.model) if self.settings.gradient_checkpointing else nullcontext()
        with activations, torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            try:
                yield
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])

    def begin(self) -> None:
        """A fresh start, or where the checkpoint is; then the optimizer."""
        folder = self.settings.folder
        saved = load_checkpoint(folder) if self.settings.resume and folder is not None and has_checkpoint(folder) else None
        if saved is not None:
            assert folder is not None
            self._check_identity(saved)
            restore(folder, self.adaptation, saved, self.name)
        s = self.settings
        self.optimizer = self.adaptation.optimizer(s.lr, s.weight_decay, name=self.name, total_steps=self.total)
        self.engine = self.attached.engine
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.engine.averages = False  # this loop does it, before it clips
        if self.accelerator.num_processes > 1:
            if not is_sharded(self.model):
                require_same("base models", fingerprint(self.model).hash)
            Bucket(list(self.adaptation.tensors(self.name).values())).broadcast()
        if saved is not None:
            self._take_over(saved)
        elif self.evaluations.function is not None and s.evaluate_first:
            self.evaluate(counts=False)
        self.first_step, self.start = self.step, [(p, p._version) for p in self._parameters()]

    def end(self) -> None:
        """The policy's last word, the best state, and whether everything that was asked for took part (law 6)."""
        self.engine.check()
        if self.step > self.first_step and all(p._version == version for p, version in self.start):
            raise InactiveError(f"{self.step} steps moved no tensor of adapter {self.attached.member.name!r}")
        seen = self.history.evaluations[-1:]
        if self.evaluations.function is not None and seen and seen[0]["step"] != self.step:
            self.evaluate()
        self.evaluations.put_back_best(self.history, self.step)
        self.engine.finalise(self.optimizer)
        self._clock()
        self.history.changes = {"ranks": self.engine.history, "touched": self.engine.touched}

    # one step

    def one_step(self) -> dict[str, float]:
        """Forward and backward over the step's batches, clip, optimizer; gives the step's record."""
        t, s = self.step + 1, self.settings
        epoch, places = self._places()
        batches = [self.source.batch(epoch, place) for place in places]
        weights = [self.weigh(batch) for batch in batches]
        whole = self._sum(sum(weights)) or 1.0
        self.model.train()
        self.optimizer.zero_grad()
        self.engine.run("before_forward", t, self.total, self.optimizer)
        mean, norm = self._gradients(batches, weights, whole)
        while not math.isfinite(norm):  # before the policy looks at the gradients: its memory stays clean
            if self.scaler.get_scale() <= 1 or not s.fp16:
                raise self._not_finite("gradient", norm, batches[-1], len(batches) - 1)
            self.scaler.update()
            self.history.repeats += 1
            mean, norm = self._gradients(batches, weights, whole)
        self.engine.run("after_backward", t, self.total, self.optimizer)
        if s.clip:
            torch.nn.utils.clip_grad_norm_(self._parameters(), s.clip)
        self.engine.run("after_clip", t, self.total, self.optimizer)
        factor = rate_factor(self.step, self.total, s.schedule, s.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.step()  # the engine's hooks are around it: after_step, between_steps, the next before_forward
        self.scaler.update()
        self.step = t
        record = {
            "step": t,
            "epoch": t / self.epoch_steps,
            "loss": self._sum(mean) / self.accelerator.num_processes,
            "lr": s.lr * factor,
            "norm": norm,
        }
        self.history.steps.append(record)
        return record

    def _gradients(self, batches: list[Any], weights: list[float], whole: float) -> tuple[float, float]:
        """Forward and backward over the step's batches: (this process's share of the loss, norm of all gradients)."""
        self.optimizer.zero_grad()
        mean = 0.0
        for k, (batch, weight) in enumerate(zip(batches, weights)):
            self._seed(k)
            share = weight / whole * self.accelerator.num_processes
            value = self.loss(batch, self.model) * share
            if not torch.isfinite(value) and self.accelerator.num_processes == 1:  # several agree on it by the gradient
                raise self._not_finite("loss", float(value.detach()), batch, k)
            if value.requires_grad:
                self.scaler.scale(value).backward()
            mean += float(value.detach())
        if self.accelerator.num_processes > 1:
            self.adaptation.bucket(self.name).all_reduce()
        self.scaler.unscale_(self.optimizer)
        return mean, float(torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None]))

    def loss(self, batch: Any, model: nn.Module) -> Tensor:
        """The user's loss and the method's own terms."""
        with self._autocast():
            value = self.loss_function(model, to_device(batch, self.device))
        for term in self.adaptation.objectives().values():
            value = value + term
        return value

    def _autocast(self) -> Any:
        dtype = torch.bfloat16 if self.settings.bf16 else torch.float16 if self.settings.fp16 else None
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _places(self) -> tuple[int, list[int]]:
        """(epoch, places of this process's batches) of the coming step."""
        epoch, position = divmod(self.step, self.epoch_steps)
        per_step = self.settings.grad_accum * self.accelerator.num_processes
        places = list(range(position * per_step, min((position + 1) * per_step, len(self.source))))
        mine = places[self.accelerator.process_index :: self.accelerator.num_processes]
        return epoch, mine or places[-1:]  # every process takes part in every step

    def _seed(self, k: int) -> None:
        """Draws for a batch depend on (seed, step, its place in the step) alone, whichever process runs it."""
        place = self.accelerator.process_index + k * self.accelerator.num_processes
        seed = Random(self.settings.seed, "step", self.step, place, 0).randint(0, 2**31)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]  # edits may have replaced some

    def _sum(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def evaluate(self, counts: bool = True) -> None:
        """Evaluate, and stop where patience is at its end."""
        self.evaluations.run(self.history, self.step, self._autocast(), counts)
        if self.evaluations.enough:
            self.history.stopped = "early"

    # files

    def checkpoint_is_due(self) -> bool:
        """Every so many minutes."""
        minutes = self.settings.checkpoint_minutes
        return self.settings.folder is not None and bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes

    def agreed(self, *wishes: bool) -> list[bool]:
        """Of each wish, whether any process has it: they stop and save together."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        counts = self.accelerator.reduce(torch.tensor(wishes, dtype=torch.float32, device=self.device))
        return [count > 0 for count in counts.tolist()]

    def checkpoint(self) -> None:
        """Write the run as it stands after `step` steps; every process takes part, the first one writes."""
        folder = self.settings.folder
        assert folder is not None
        self._clock()
        state = RunState(
            self.step, self._identity(), self.optimizer.state_dict(), self.engine.state_dict(), self.evaluations.best,
            vars(self.history), self.scaler.state_dict(),
        )  # fmt: skip
        save_checkpoint(folder, self.adaptation, state, self.name, write=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()  # whoever goes on from it finds it whole
        self.saved_at = time.monotonic()

    def interrupted(self) -> Interrupted:
        """The exception for a run that was asked to stop, after saving it."""
        if self.settings.folder is None:
            return Interrupted(f"interrupted after step {self.step} of {self.total}; no folder was given, so nothing was saved")
        self.checkpoint()
        return Interrupted(
            f"interrupted after step {self.step} of {self.total}; saved in {self.settings.folder}\n"
            f"  to go on: the same command with --resume (in Python: LoopSettings(resume=True))"
        )

    def _identity(self) -> dict[str, Any]:
        """What a run can't change without becoming another: the order of its data and of its draws."""
        s = self.settings
        return {
            **self.said,
            "seed": s.seed,
            "batches": len(self.source),
            "batches_per_step": s.grad_accum * self.accelerator.num_processes,  # of two processes, or of one that accumulates
        }

    def _check_identity(self, saved: RunState) -> None:
        here = self._identity()
        for key, value in saved.identity.items():
            if here.get(key) != value:
                raise OptionError(
                    f"resume: the saved run had {key} = {value}, this one has {here.get(key)}: it would be another run.\n"
                    f"  use the same settings and data, or start anew without --resume"
                )

    def _take_over(self, saved: RunState) -> None:
        state = dict(saved.optimizer)
        # rates and decay are those of the settings; what else an optimizer keeps in its groups is the run's
        kept = ("lr", "initial_lr", "weight_decay", "deviation_decay", "params")
        fresh = self.optimizer.state_dict()["param_groups"]
        state["param_groups"] = [
            {**old, **{k: new[k] for k in kept if k in new}} for old, new in zip(state["param_groups"], fresh)
        ]
        self.optimizer.load_state_dict(state)
        self.step, self.evaluations.best = saved.step, saved.best
        self.scaler.load_state_dict(saved.scaler or self.scaler.state_dict())
        if not saved.history.keys() <= vars(self.history).keys():
            raise FileError(
                f"the saved run's history has unknown parts: {sorted(saved.history.keys() - vars(self.history).keys())}"
            )
        self.history = History(**saved.history)
        self.history.total = self.total
        self.began -= self.history.seconds

    def _clock(self) -> None:
        self.history.seconds = time.monotonic() - self.began
        self.history.peak_memory = max(self.history.peak_memory, peak_memory(self.device))

    def _not_finite(self, what: str, value: float, batch: Any, k: int) -> NumericError:
        self.optimizer.zero_grad()
        self._seed(k)
        place = first_bad_place(self.adaptation, batch, lambda: self.loss(batch, self.model), self.name)
        text = f"the {what} became {value} at step {self.step + 1} of {self.total}; first in {place}"
        if self.settings.folder is not None and self.step and not place.startswith("tensor"):
            self.checkpoint()
            text += f"\n  the state before that step is saved in {self.settings.folder}: --resume goes on from there"
        return NumericError(f"{text}\n  often cured by a lower learning rate (now {self.settings.lr:g}), clipping, or float32")

"""`adapt_job`: from settings to an adapter, its figures and a report.

out/adapter.json, out/adapter.safetensors    the adapter, with its head and its labels
out/metrics.json                             every figure, setting and version
out/report.html                              the same to look at
out/checkpoint/                              only while a run is under way, or was stopped
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.bases.quantise import quantise
from rankfold.core.targets import find_sites
from rankfold.errors import FileError, OptionError
from rankfold.jobs.data import Table
from rankfold.jobs.models import Loaded, load_model
from rankfold.training.adaptation import Adaptation
from rankfold.training.adapting import adapt
from rankfold.training.batches import Batches, to_device
from rankfold.training.checkpoints import ADAPTER, has_checkpoint
from rankfold.training.loop import History, LoopSettings, train
from rankfold.training.method import Method, method
from rankfold.training.processes import is_first, take_device
from rankfold.training.progress import Progress
from rankfold.training.saving import load as load_adapter

from .inputs import Inputs, read_inputs
from .memory import size_of
from .screen import Screen, megabytes
from .settings import AdaptSettings
from .task import Row, Task, task_for

__all__ = ["Result", "adapt_job"]

LOOKED_AT = 32  # batches that a data-driven start may look at


@dataclass(frozen=True)
class Result:
    """What a run gave: the folder (None after a dry run), what is in metrics.json, and the model with its adapter on."""

    out: Path | None
    metrics: dict[str, Any] = field(default_factory=dict)
    adaptation: Adaptation | None = None


@dataclass
class Prepared:
    """Everything that a run needs, ready."""

    settings: AdaptSettings
    inputs: Inputs
    loaded: Loaded
    task: Task
    method: Method
    rows: dict[str, list[Row]]
    batches: Batches


def adapt_job(settings: AdaptSettings) -> Result:
    """Fit a model to data: read, attach, train, measure, save, report.

    Raises:
        RankfoldError: with what to type next, for whatever a user can mend.
        Interrupted: Ctrl-C; the run is saved and can go on with `resume`.
    """
    s = settings.filled()
    take_device()
    if not is_first():
        s = s.model_copy(update={"quiet": True})
    screen = Screen(s.quiet)
    if not s.dry_run and is_first():
        check_out(s.out)
    ready = prepare(s, screen)
    if s.dry_run:
        from .dry import dry_run

        return Result(None, dry_run(ready, attached(ready), screen))
    checkpoint = s.out / "checkpoint"
    if not s.resume and has_checkpoint(checkpoint):
        screen.say("note", f"{checkpoint} holds a run that was stopped; without --resume it is replaced by this one")
    resuming = s.resume and has_checkpoint(checkpoint)
    if s.resume and not resuming:
        screen.say("note", f"{checkpoint} holds no stopped run: this one starts from the beginning")
    handle = load_adapter(ready.loaded.model, checkpoint / ADAPTER) if resuming else attached(ready)
    describe(ready, handle, screen, resuming)
    before = {} if resuming or not ready.rows["test"] or s.task == "classify" else base_figures(ready, handle)
    history = fit(ready, handle, checkpoint)
    describe_in_file(ready, handle, history)
    if is_first():
        handle.save(s.out)  # before the last figures: whatever happens to them, the training is not lost
    figures = measured(ready, handle, history, before)
    return finish(ready, handle, history, figures, screen)


def check_out(out: Path) -> None:
    """Whether results can be written there, before hours go by.

    Raises:
        FileError: a file of that name, or a place that can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise FileError(f"{out}: results can't be written there ({error.strerror or error}); choose another --out") from None


def prepare(s: AdaptSettings, screen: Screen) -> Prepared:
    """Data, method, model and tokenised rows; whatever is wrong with a setting shows here."""
    chosen = method(s.method, **({"rank": s.rank} if s.rank is not None else {}), **s.set)
    inputs = read_inputs(s)
    screen.say("data", "\n".join(inputs.describe()))
    loaded = load_model(s.model, s.task, labels=inputs.labels, tokenizer=s.tokenizer, dtype=s.dtype, device=s.device, seed=s.seed)
    if s.quantise is not None:
        pack(loaded.model, s.quantise, screen)
    assert s.max_length is not None
    assert s.batch_size is not None
    task = task_for(s.task, loaded, s.max_length, s.temperature)
    if s.max_length > task.max_length:
        screen.say("note", f"{s.model} reads {task.max_length} tokens at most; max_length {s.max_length} was lowered to that")
    rows = {}
    tables: dict[str, Table | None] = {"train": inputs.train, "valid": inputs.valid, "test": inputs.test}
    for part, table in tables.items():
        cut = task.cut
        rows[part] = task.rows(table) if table is not None else []
        if task.cut > cut and table is not None:
            longer = f"{task.cut - cut:,} of {len(table):,} {part} texts"
            screen.say("note", f"{longer} are longer than {task.max_length} tokens: cut to that (--max-length)")
    if s.task == "embed" and min(s.batch_size, len(rows["train"])) < 2:
        raise OptionError(
            "embed: each row's wrong answers are the other rows of its batch: give a batch size and data of at least 2"
        )
    batches = Batches(
        rows["train"],
        task.collate,
        s.batch_size,
        s.seed,
        drop_last=s.task == "embed",
        length=None if s.task == "embed" else task.length,
    )
    return Prepared(s, inputs, loaded, task, chosen, rows, batches)


def pack(model: nn.Module, format: str, screen: Screen) -> None:
    """Quantise the linear layers, and say how far they are from what they were."""
    errors = quantise(model, format)
    worst = max(errors, key=lambda name: errors[name])
    screen.say("note", f"{len(errors)} linear layers in {format}, largest ‖W − Q(W)‖ / ‖W‖ {errors[worst]:.2g} at {worst}")
    whole = {s.module for s in find_sites(model, "all") if s.kind != "linear"}
    kept = sum(p.numel() * p.element_size() for name in whole for p in model.get_submodule(name).parameters(recurse=False))
    if kept:
        screen.say("note", f"not packed: embeddings, experts and other kinds, {kept / 2**20:.1f} MiB")


def attached(ready: Prepared) -> Adaptation:
    """The adapter at its start; data-driven starts look at training batches."""
    s, model = ready.settings, ready.loaded.model
    count = LOOKED_AT if ready.method.init.needs & {"activations", "gradients"} else 1
    device = next(model.parameters()).device
    seen = [to_device(ready.batches.batch(0, i), device) for i in range(min(count, len(ready.batches)))]
    with Progress("look at data", len(seen), not s.quiet) as bar:
        done = iter(range(1, 10**9))
        return adapt(
            model, ready.method, targets=list(s.targets), exclude=list(s.exclude), extras=[*ready.loaded.heads, *s.extras],
            batches=seen, loss=ready.task.loss, seed=s.seed, plan=s.plan, memory=s.memory, regex=s.regex,
            progress=lambda text: bar.at(next(done)),
        )  # fmt: skip


def describe(ready: Prepared, handle: Adaptation, screen: Screen, resuming: bool) -> None:
    """Model, method, sites and start, on the screen."""
    s, model = ready.settings, ready.loaded.model
    base, stored = size_of(model)
    kind = s.dtype if s.quantise is None else f"{s.dtype} and {s.quantise}"
    screen.say("model", f"{s.model}   {base:,} parameters in {megabytes(stored)}, {kind}, base {handle.fingerprint().hash[:12]}")
    screen.say("method", ready.method.describe())
    trained = handle.parameter_count()
    left = "; ".join(f"{key}: {reason}" for key, reason in handle.dropped[:3])
    more = f", and {len(handle.dropped) - 3} more" if len(handle.dropped) > 3 else ""
    size = megabytes(t.nbytes for t in handle.tensors().values())
    sites = f"{len(handle.sites)}" + (f" of {len(handle.sites) + len(handle.dropped)} (left out: {left}{more})" if left else "")
    screen.say("sites", f"{sites}   {trained:,} trainable ({100 * trained / base:.2f} %), {size}")
    if not resuming and ready.method.starts == "base":
        screen.say("start", f"largest output change {start_change(ready, handle):.1e}")


def start_change(ready: Prepared, handle: Adaptation) -> float:
    """Largest difference of the model's outputs on one batch between the adapter's start and the base."""
    model = ready.loaded.model
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output[0].detach().float()))
    mode = model.training
    try:
        model.eval()
        batch = to_device(ready.batches.batch(0, 0), next(model.parameters()).device)
        with torch.no_grad():
            ready.task.loss(model, batch)
            with handle.disabled():
                ready.task.loss(model, batch)
    finally:
        hook.remove()
        model.train(mode)
    half = len(outputs) // 2
    return max(float((a - b).abs().max()) for a, b in zip(outputs[:half], outputs[half:]))


def figures_of(ready: Prepared, part: str) -> dict[str, float]:
    """The task's metrics over one part of the data, as the model is now."""
    rows = ready.rows[part]
    assert ready.settings.batch_size is not None
    with Progress(part, len(rows), not ready.settings.quiet) as bar:
        return ready.task.evaluate(ready.loaded.model, rows, 2 * ready.settings.batch_size, bar.at)


def base_figures(ready: Prepared, handle: Adaptation) -> dict[str, float]:
    """The test figures of the base, without the adapter."""
    with handle.disabled():
        return figures_of(ready, "test")


def fit(
    ready: Prepared, handle: Adaptation, checkpoint: Path, on_step: Callable[[dict[str, float]], None] | None = None
) -> History:
    """Train; `on_step` is called with the record of each step."""
    s, task = ready.settings, ready.task
    filled = {name: getattr(s, name) for name in ("lr", "epochs", "schedule", "warmup")}
    settings = LoopSettings(
        **filled, weight_decay=s.weight_decay, max_steps=s.max_steps, grad_accum=s.grad_accum, clip=s.clip, bf16=s.bf16,
        gradient_checkpointing=s.gradient_checkpointing, evaluations=s.evaluations, metric=task.metric, better=task.better,
        keep_best=s.keep_best, patience=s.patience, seed=s.seed, folder=checkpoint, checkpoint_minutes=s.checkpoint_minutes,
        resume=s.resume, progress=not s.quiet,
    )  # fmt: skip
    size = 2 * (s.batch_size or 1)
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    if ready.rows["valid"]:
        evaluate = lambda model: task.evaluate(model, ready.rows["valid"], size)
    return train(
        ready.loaded.model, handle, ready.batches, task.loss, settings, evaluate=evaluate, weigh=task.weight, on_step=on_step,
        identity=identity(ready),
    )  # fmt: skip


def identity(ready: Prepared) -> dict[str, Any]:
    """What a stopped run must have in common with the one that goes on with it."""
    digest = hashlib.sha256(json.dumps(ready.rows["train"], default=str).encode()).hexdigest()[:16]
    options = json.dumps({k: str(v) for k, v in sorted(ready.method.options.items())})
    return {"method": ready.method.text, "options": options, "batch_size": ready.settings.batch_size, "data": digest}


def measured(ready: Prepared, handle: Adaptation, history: History, before: Mapping[str, float]) -> dict[str, Any]:
    """{"valid", "test", "base"}: figures by name; "valid" are those of the state that was kept."""
    kept = history.best_step if history.best_step is not None else history.steps[-1]["step"]
    valid = next((e for e in reversed(history.evaluations) if e["step"] == kept), {})
    found: dict[str, Any] = {"valid": {k: v for k, v in valid.items() if k != "step"}}
    found["test"] = figures_of(ready, "test") if ready.rows["test"] else {}
    if ready.rows["test"] and not before and ready.settings.task != "classify":
        before = base_figures(ready, handle)
    found["base"] = dict(before)
    return found


def describe_in_file(ready: Prepared, handle: Adaptation, history: History, **figures: Mapping[str, Any]) -> None:
    """What the adapter's file says of itself: labels, and what `predict` has to know."""
    from .outcome import versions

    s, own = ready.settings, handle.attached[handle.names[-1]]
    own.labels = ready.inputs.labels
    own.trained = {
        "task": s.task, "model": s.model, "quantise": s.quantise, "tokenizer": s.tokenizer, "max_length": ready.task.max_length,
        "temperature": s.temperature, "steps": len(history.steps), "rows": len(ready.inputs.train), "lr": s.lr,
        "seconds": round(history.seconds, 1), "versions": versions(), **figures,
    }  # fmt: skip


def finish(ready: Prepared, handle: Adaptation, history: History, figures: dict[str, Any], screen: Screen) -> Result:
    """Adapter, metrics.json, report.html, and the last lines on the screen."""
    from .outcome import finite, metrics_of, write_metrics, write_report

    s = ready.settings
    metrics = metrics_of(ready, handle, history, figures)
    describe_in_file(ready, handle, history, valid=finite(metrics["valid"]), test=finite(metrics["test"]))
    if not is_first():  # of several processes one writes
        return Result(s.out, metrics, handle)
    handle.save(s.out)
    write_metrics(s.out / "metrics.json", metrics)
    write_report(s.out / "report.html", ready, handle, history, metrics)
    shutil.rmtree(s.out / "checkpoint", ignore_errors=True)
    first, last = history.steps[0]["loss"], sum(history.losses[-10:]) / len(history.losses[-10:])
    pace = 1000 * (history.seconds - history.evaluation_seconds) / len(history.steps)
    early = f" (stopped early of {history.total})" if history.stopped == "early" else ""
    steps = f"{len(history.steps)} steps{early}  loss {first:.3f} → {last:.3f}"
    screen.say("train", f"{steps}   {pace:.0f} ms/step   {history.seconds:.0f} s   peak {megabytes(history.peak_memory)}")
    for part in ("valid", "test"):
        if metrics[part]:
            shown = (f"{title} {_moved(ready.task, key, figures, part)}" for key, title in ready.task.shown.items())
            screen.say(part, "   ".join(shown))
    screen.say("saved", f"{s.out}/adapter.safetensors, metrics.json, report.html")
    example = f"--data {s.test or s.data} --out predictions.{'npy' if s.task == 'embed' else 'csv'}"
    screen.say(
        "next",
        f"rankfold predict --model {s.model} --adapter {s.out} {example}\nrankfold export {s.out} --to peft --out DIR",
    )
    return Result(s.out, metrics, handle)


def _moved(task: Task, key: str, figures: Mapping[str, Any], part: str) -> str:
    value = f"{figures[part][key]:.4g}"
    base = figures["base"].get(key) if part == "test" else None
    return value if base is None else f"{base:.4g} → {value}"

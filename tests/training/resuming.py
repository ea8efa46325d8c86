"""A run that can be stopped in one process and go on in another: `python resuming.py FOLDER METHOD ...` resumes them all."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import rankfold as rf
from rankfold.adapters.files import write_tensors
from rankfold.linalg.random import Random
from rankfold.training.batches import Batches
from rankfold.training.checkpoints import ADAPTER, save_checkpoint
from rankfold.training.loop import LoopSettings, train
from rankfold.training.saving import load

METHODS = {
    "lora": {"rank": 2},
    "dropout+magnitude+lora+init:pissa+update:loraplus": {"rank": 2},
    "adalora": {"rank": 3, "adalora.target": 2, "adalora.warmup": 0.2, "adalora.interval": 1, "adalora.final": 0.2},
}
STEPS = 8


def model() -> nn.Module:
    """Two linear layers with dropout in between, always the same weights."""
    made = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.3), nn.Tanh(), nn.Linear(12, 3))
    for name, p in made.named_parameters():
        p.data = Random("resuming", name).normal(tuple(p.shape), std=0.5)
    return made


def source() -> Batches:
    rows = [(Random("x", i).normal((8,)), Random("y", i).randint(0, 3)) for i in range(20)]
    return Batches(rows, lambda part: (torch.stack([x for x, _ in part]), torch.tensor([y for _, y in part])), size=6, seed=3)


def loss(module: nn.Module, batch: tuple) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def settings(folder: Path, resume: bool = False) -> LoopSettings:
    return LoopSettings(
        lr=0.05, weight_decay=0.01, max_steps=STEPS, epochs=9, folder=folder, resume=resume, schedule="cosine", seed=5
    )


def evaluate(module: nn.Module) -> dict[str, float]:
    x, y = source().batch(0, 0)
    return {"loss": float(nn.functional.cross_entropy(module(x), y))}


def fresh(method: str) -> tuple[nn.Module, rf.Adaptation]:
    module = model()
    return module, rf.adapt(module, method, seed=1, **METHODS[method])


def run(module: nn.Module, adaptation: rf.Adaptation, folder: Path, *, resume: bool = False, stop_after: int | None = None):
    """The whole run, or as far as Ctrl-C after a step lets it."""

    def on_step(record: dict) -> None:
        if record["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    return train(module, adaptation, source(), loss, settings(folder, resume), evaluate=evaluate, on_step=on_step)


def main(folder: Path, methods: list[str]) -> None:
    """Go on with every run below `folder`; write the tensors that they end with."""
    for k in range(len(methods)):
        module = model()
        adaptation = load(module, folder / str(k) / "checkpoint" / ADAPTER)
        history = run(module, adaptation, folder / str(k) / "checkpoint", resume=True)
        tensors = {f"t{i}": t.detach() for i, t in enumerate(adaptation.tensors().values())}
        write_tensors(
            folder / str(k) / "resumed.safetensors", {**tensors, "losses": torch.tensor(history.losses, dtype=torch.float64)}
        )


def die_while_saving(folder: Path, where: str) -> None:
    """Save one checkpoint whole, and be killed in the middle of the second."""
    from rankfold import atomic
    from rankfold.training import checkpoints

    adaptation = fresh("lora")[1]
    state = checkpoints.RunState(1, {}, {}, {"values": {}, "tensors": {}})
    save_checkpoint(folder, adaptation, state)

    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "writing":
        checkpoints.write_json = die
    else:  # between the two renames: the old folder is aside, the new one not yet in its place
        rename = os.rename

        def rename_then_die(source: Path, target: Path) -> None:
            rename(source, target)
            if str(target).endswith(".old"):
                die()

        atomic.os.rename = rename_then_die
    state.step = 2
    save_checkpoint(folder, adaptation, state)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "die":
        die_while_saving(Path(sys.argv[2]), sys.argv[3])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])

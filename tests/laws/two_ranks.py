"""Law 9's runs: every function here gives the same tensors on one process and, cut in halves of the batch, on two.

`python -m laws.two_ranks FOLDER RANK` is one of the two: it runs all cells and leaves what they gave in FOLDER.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rankfold as rf
from rankfold.core.structure import trait
from rankfold.errors import LayoutError
from rankfold.training import statistics
from rankfold.training.bucket import Bucket
from rankfold.training.checkpoints import ADAPTER
from rankfold.training.loop import Interrupted, LoopSettings, train
from rankfold.training.saving import load

from .subjects import shake, small, subjects

ONE, DDP, FSDP, LATE = "one", "ddp", "fsdp", "fsdp-late"
"""One process; torch's DDP around the model; cut, then adapted; adapted, then cut."""
LATES = ("lora", "dora", "full", "adaptertune", "lora-ga")
MUTANTS = ("forgets_to_average", "forgets_to_join")
SAVED = "magnitude+lora+init:pissa"
STEPS = 3
Found = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(9, 15), nn.Linear(15, 9)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


class Net(nn.Module):
    """Two blocks between an embedding and a head; no dimension is even, so that no weight falls into equal halves."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(11, 9), nn.ModuleList([Block(), Block()]), nn.Linear(9, 5)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False) if self.checkpointed else block(h)
        return self.head(h)


def net(dtype: torch.dtype = torch.float64, **options: bool) -> nn.Module:
    """The same weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(**options).double().to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """One of four rows for each step."""
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randint(11, (4, 3), generator=draw), torch.randn(4, 3, 5, generator=draw, dtype=torch.float64).to(dtype))
        for _ in range(STEPS)
    ]


def halves(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(batch[0][:2], batch[1][:2]), (batch[0][2:], batch[1][2:])]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).double() - batch[1].double()).square().mean()


def rank() -> int:
    return torch.distributed.get_rank()


def mine(layout: str, batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """This process's part of a batch."""
    return halves(batch) if layout == ONE else [halves(batch)[rank()]]


def adapted(layout: str, model: nn.Module, method: str, **options: object) -> rf.Adaptation:
    m = small(method, **({"rank": 3} if method == "bone" else {}))  # blocks of 2 x 2 don't tile what is odd
    needs = m.init.needs & {"activations", "gradients"}
    data = {"batches": mine(layout, batches()[0]), "loss": loss} if needs else {}
    if layout == FSDP:
        rf.shard(model, reshard_after_forward=True)
    adaptation = rf.adapt(model, m, seed=1, **data, **options)
    if layout == LATE:
        rf.shard(model, reshard_after_forward=True)
    return adaptation


def without_chance(method: str) -> str:
    """Draws differ from process to process, as they should; nothing else is compared here."""
    m = small(method)
    return m.text.replace("dropout+", "") if trait(m.structure, "stochastic") else method


def trained(layout: str, model: nn.Module, adaptation: rf.Adaptation, dtype: torch.dtype = torch.float64) -> Found:
    """Three steps; the losses, and the tensors that they end with."""
    wrapped = DistributedDataParallel(model) if layout == DDP else model
    optimizer = adaptation.optimizer(lr=0.02, total_steps=STEPS)
    losses = []
    model.train()
    for batch in batches(dtype):
        optimizer.zero_grad()
        parts = mine(layout, batch)
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            value = (loss(wrapped, part) + sum(adaptation.objectives().values())) / len(parts)
            value.backward()
            total += value.detach()
        optimizer.step()
        if layout != ONE:
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        losses.append(total)
    model.eval()
    tensors = {f"tensor/{k.replace('/', '|')}": t.detach().clone() for k, t in adaptation.tensors().items()}
    return {"losses": torch.stack(losses), **tensors}


@torch.no_grad()
def method_cell(layout: str, method: str) -> Found:
    """A method from its start to its removal."""
    model = net().eval()
    ids = batches()[0][0]
    found = {"base": model(ids)}
    adaptation = adapted(layout, model, without_chance(method))
    found |= {f"start/{k.replace('/', '|')}": t.detach().clone() for k, t in adaptation.tensors().items()}
    found["fingerprint"] = text(adaptation.fingerprint().hash)
    shake(adaptation, 0.1)
    with torch.enable_grad():
        found |= trained(layout, model, adaptation)
    found["output"] = model(ids)
    with adaptation.disabled():
        found["disabled"] = model(ids)
    structure = adaptation.method.structure
    if not (adaptation.method.is_side or trait(structure, "input_dependent")):
        found |= {f"folded/{name}": W for name, W in adaptation.folded_weights().items()}
        errors = adaptation.fold()
        found["rounding"] = torch.tensor(list(errors.values())).double()
        found["output folded"] = model(ids)
        found["fingerprint folded"] = text(adaptation.fingerprint().hash)
        adaptation.unfold()
        found["output unfolded"] = model(ids)
        if not adaptation.attached["default"].member.extras:
            form, _ = rf.normal_form(adaptation)
            found |= {f"exported/{key}": entry.delta().dense() for key, entry in form.entries.items()}
    adaptation.remove()
    found["removed"] = model(ids)
    return found


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


# The loop, files, and what users run into


def saved_cell(layout: str, folder: Path) -> Found:
    """Saved here, and what `ONE` has saved loaded here."""
    model = net().eval()
    adaptation = adapted(layout, model, SAVED, extras=["head"])
    shake(adaptation)
    if layout != DDP or rank() == 0:
        adaptation.save(folder / f"saved-{layout}")
    if layout != ONE:
        torch.distributed.barrier()
    ids = batches()[0][0]
    with torch.no_grad():
        found = {"output": model(ids)}
        for source in (ONE, DDP, FSDP, LATE):
            if (folder / f"saved-{source}").exists():
                other = net().eval()
                if layout in (FSDP, LATE):
                    rf.shard(other)
                load(other, folder / f"saved-{source}")
                found[f"output of {source}"] = other(ids)
    digest = hashlib.sha256((folder / f"saved-{layout}" / "adapter.safetensors").read_bytes()).hexdigest()
    return {**found, "file": text(digest)}


def run(layout: str, model: nn.Module, adaptation: rf.Adaptation, folder: Path, *, resume: bool, stop: int | None) -> list[float]:
    data = [half for batch in batches() for half in halves(batch)]

    def on_step(record: dict[str, float]) -> None:
        if record["step"] == stop and (layout == ONE or rank() == 1):
            signal.raise_signal(signal.SIGTERM)  # one process is asked to stop: both do, and save together

    settings = LoopSettings(
        lr=0.05, epochs=2, clip=0.1, folder=folder, resume=resume, grad_accum=2 if layout == ONE else 1, progress=False
    )
    history = train(
        model, adaptation, data, loss, settings, evaluate=lambda m: {"loss": float(loss(m, batches()[0]))}, on_step=on_step
    )
    return history.losses


def loop_cell(first: str, second: str, folder: Path) -> Found:
    """A run of the loop in one layout that is stopped, and goes on in another."""
    model = net()
    adaptation = adapted(first, model, "adalora")
    checkpoint = folder / f"{first}-{second}" / "checkpoint"
    if first != second:
        try:
            run(first, model, adaptation, checkpoint, resume=False, stop=2)
        except Interrupted:
            model = net()
            if second == FSDP:
                rf.shard(model)
            adaptation = load(model, checkpoint / ADAPTER)
    losses = run(second, model, adaptation, checkpoint, resume=first != second, stop=None)
    tensors = {f"tensor/{k.replace('/', '|')}": t.detach().clone() for k, t in adaptation.tensors().items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **tensors}


def heads_cell(layout: str, checkpointed: bool) -> Found:
    """DDP without `find_unused_parameters` over a head and an embedding that train in copies, with checkpointing."""
    model = net(checkpointed=checkpointed)
    adaptation = adapted(layout, model, "lora", extras=["head", "embed"])
    return trained(layout, model, adaptation)


def mixed_cell(layout: str) -> Found:
    """A bf16 base under float32 adapters."""
    model = net(torch.bfloat16)
    adaptation = adapted(layout, model, "dora")
    found = trained(layout, model, adaptation, torch.bfloat16)
    with torch.no_grad():
        return {**found, "output": model(batches()[0][0])}


def clipped_cell(layout: str) -> Found:
    """A loop of one's own: the bucket, then clipping, then a plain optimizer."""
    model = net()
    adaptation = adapted(layout, model, "lora")
    shake(adaptation, 0.1)
    parameters = adaptation.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for batch in batches():
        optimizer.zero_grad()
        for part in (parts := mine(layout, batch)):
            (loss(model, part) / len(parts)).backward()
        adaptation.bucket().all_reduce()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
    return {f"tensor/{k}": p.detach().clone() for k, p in enumerate(parameters)}


def forgotten_cell() -> Found:
    """FSDP given the adapters too: refused at the first forward."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    rf.adapt(model, "pissa", rank=2)
    fully_shard(model, ignored_params=set(rf.adaptation(model).parameters()))  # the frozen ones are left out
    try:
        model(batches()[0][0])
    except LayoutError as error:
        return {"message": text(str(error))}
    return {}


def job_cell(layout: str, folder: Path) -> Found:
    """`rankfold adapt` at one global batch size: two rows at a time for each of two, or four accumulated."""
    from rankfold.jobs.adapt.run import adapt_job
    from rankfold.jobs.adapt.settings import AdaptSettings

    out = folder / f"job-{layout}"
    result = adapt_job(
        AdaptSettings.of(
            model="tiny-llama", data=str(folder / "rows.csv"), task="classify", method="lora", rank=2, out=str(out), batch_size=4,
            max_length=16, valid=0.25, epochs=1, lr=0.01, quiet=True, seed=3, grad_accum=2 if layout == ONE else 1, set={},
            device="cpu",
        )
    )  # fmt: skip
    written = json.loads((out / "metrics.json").read_text()) if layout == ONE or rank() == 0 else result.metrics
    return {"figures": torch.tensor([written["valid"][k] for k in sorted(written["valid"])], dtype=torch.float64)}


@contextmanager
def broken(mutant: str) -> Iterator[None]:
    """The library with one fault."""
    if mutant == "forgets_to_average":
        fault = mock.patch.object(Bucket, "all_reduce", return_value=None)
    else:
        fault = mock.patch.object(statistics, "_join", lambda distinct, wanted, reached: reached)
    with fault:
        yield


def mutant_cell(mutant: str) -> Found:
    with broken(mutant):
        return method_cell(FSDP, "lora" if mutant == "forgets_to_average" else "eva")


def cells(folder: Path) -> dict[str, Callable[[], Found]]:
    """Everything that the pair runs, by name."""
    made: dict[str, Callable[[], Found]] = {}
    for layout in (DDP, FSDP, LATE):
        for method in subjects() if layout != LATE else LATES:
            made[f"{layout} {method}"] = lambda layout=layout, method=method: method_cell(layout, method)
        made[f"{layout} saved"] = lambda layout=layout: saved_cell(layout, folder)
        made[f"{layout} heads"] = lambda layout=layout: heads_cell(layout, checkpointed=True)
        made[f"{layout} mixed"] = lambda layout=layout: mixed_cell(layout)
    for first, second in ((DDP, DDP), (FSDP, FSDP), (FSDP, DDP), (DDP, FSDP)):
        made[f"loop {first} {second}"] = lambda first=first, second=second: loop_cell(first, second, folder)
    made[f"{FSDP} clipped"] = lambda: clipped_cell(FSDP)
    made["forgotten"] = forgotten_cell
    made["job"] = lambda: job_cell(DDP, folder)
    for mutant in MUTANTS:
        made[f"mutant {mutant}"] = lambda mutant=mutant: mutant_cell(mutant)
    return made


def main(folder: Path, index: int) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, and not used: they meet in a file
    faulthandler.dump_traceback_later(200, exit=True)  # a pair that waits for each other says where
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=2, timeout=timedelta(seconds=60)
    )
    errors: dict[str, str] = {}
    tensors: Found = {}
    for name, cell in cells(folder).items():
        try:
            tensors |= {f"{name}//{key}": t.detach().contiguous().clone() for key, t in cell().items()}
        except Exception:
            errors[name] = traceback.format_exc()
    save_file(tensors, folder / f"{index}.safetensors")
    (folder / f"{index}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Law 9's runs: every function here gives the same tensors on one process and, cut in halves of the batch, on two.

`python -m laws.two_ranks FOLDER` imports once, becomes two processes, and leaves in FOLDER what each gave in every cell.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed.tensor
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import rankfold as rf
from rankfold.core import folding
from rankfold.core.structure import trait
from rankfold.errors import LayoutError
from rankfold.linalg.random import Random
from rankfold.training import loop, statistics
from rankfold.training.bucket import Bucket
from rankfold.training.checkpoints import ADAPTER
from rankfold.training.contracts import Edit, RankPolicy, SiteView
from rankfold.training.edits import Slice
from rankfold.training.loop import Interrupted, LoopSettings, train
from rankfold.training.saving import load

from .subjects import shake, small, subjects

ONE, DDP, FSDP, LATE, HAND = "one", "ddp", "fsdp", "fsdp-late", "fsdp-by-hand"
"""One process; torch's DDP around the model; cut, then adapted; adapted, then cut; the same by torch's own `fully_shard`."""
LATES = ("lora", "dora", "full", "adaptertune", "lora-ga")
HANDS = ("pissa", "vera")
"""Methods with tensors that don't train, which must not be cut either."""
KINDS = ("lora", "dora", "pissa")
"""Methods over the kinds of sites that are no linear layers."""
MUTANTS = {
    "forgets_to_average": "lora",
    "forgets_to_join": "eva",
    "reads_its_own_piece": "pissa",
    "forgets_the_new_pieces": "lora",
}
"""Faults, and the method whose cell must show each."""
SAVED = "magnitude+lora+init:pissa"
RUN = "dropout+gate+lora+init:gaussian+rank:adalora"
OPTIONS = {"bone": {"rank": 3}, RUN: {"gate.per": "rank"}}  # blocks of 2 x 2 don't tile what is odd
CHAINS = {
    "ddp, ddp": (DDP, DDP), "cut, cut": (FSDP, FSDP), "cut, ddp": (FSDP, DDP), "ddp, cut": (DDP, FSDP), "alone, cut": (ONE, FSDP),
    "alone, ddp": (ONE, DDP), "cut, ddp, alone": (FSDP, DDP, ONE),
}  # fmt: skip
"""Runs that stop in one layout and go on in the next."""
CHAIN_MUTANTS = ("forgets_the_moments", "draws_by_process")
STEPS = 3
WAITS = timedelta(seconds=60)
Found = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(9, 15), nn.Linear(15, 9)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


class Kinds(nn.Module):
    """The other kinds of sites in one block: a convolution over positions, attention, and a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=9, intermediate_size=7, num_local_experts=3, num_experts_per_tok=2)
        self.conv, self.attention = nn.Conv1d(9, 9, 3, padding=1), nn.MultiheadAttention(9, 1)
        self.router, self.experts = nn.Linear(9, 3), MixtralExperts(config)
        for p in self.experts.parameters():  # the library leaves them as they were in memory
            nn.init.normal_(p, std=0.3)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.conv(h.mT).mT
        # tokens first, contiguous, one head, with its weights: else torch picks a kernel by what requires a gradient
        first = h.transpose(0, 1).contiguous()
        h = h + self.attention(first, first, first)[0].transpose(0, 1)
        flat = h.flatten(0, 1)
        weights, index = self.router(flat).softmax(-1).topk(2, dim=-1)
        return h + self.experts(flat, index, weights).view(h.shape)


class Net(nn.Module):
    """Two blocks between an embedding and a head; no dimension is even, so that no weight falls into equal halves."""

    def __init__(self, checkpointed: bool = False, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(11, 9), nn.ModuleList([block(), block()]), nn.Linear(9, 5)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False) if self.checkpointed else block(h)
        return self.head(h)


def net(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
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
    m = small(method, **OPTIONS.get(method, {}))
    needs = m.init.needs & {"activations", "gradients"}
    data = {"batches": mine(layout, batches()[0]), "loss": loss} if needs else {}
    if layout == FSDP:
        rf.shard(model, reshard_after_forward=True)
    adaptation = rf.adapt(model, m, seed=1, **data, **options)
    if layout == LATE:
        rf.shard(model, reshard_after_forward=True)
    if layout == HAND:
        from torch.distributed.fsdp import fully_shard

        whole = set(model.rankfold.parameters())
        for block in model.blocks:
            fully_shard(block, ignored_params=whole)
        fully_shard(model, ignored_params=whole)
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
    return {"losses": torch.stack(losses), **tensors_of(adaptation)}


def tensors_of(adaptation: rf.Adaptation, prefix: str = "tensor") -> Found:
    return {f"{prefix}/{k.replace('/', '|')}": t.detach().clone() for k, t in adaptation.tensors().items()}


@torch.no_grad()
def method_cell(layout: str, method: str, block: type[nn.Module] = Block) -> Found:
    """A method from its start to its removal."""
    model = net(block=block).eval()
    ids = batches()[0][0]
    found = {"base": model(ids)}
    targets = {} if block is Block else {"targets": "blocks.*", "exclude": "*.router"}
    adaptation = adapted(layout, model, without_chance(method), **targets)
    found |= tensors_of(adaptation, "start")
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
    """An adapter is saved."""
    model = net().eval()
    adaptation = adapted(layout, model, SAVED, extras=["head"])
    shake(adaptation)
    if layout != DDP or rank() == 0:
        adaptation.save(folder / f"saved-{layout}")
    if layout != ONE:
        torch.distributed.barrier()
    digest = hashlib.sha256((folder / f"saved-{layout}" / "adapter.safetensors").read_bytes()).hexdigest()
    with torch.no_grad():
        return {"output": model(batches()[0][0]), "file": text(digest)}


@torch.no_grad()
def loaded_cell(layout: str, folder: Path) -> Found:
    """What every layout has saved is loaded in this one: on a base that is whole, and on one that is cut before or after."""
    found = {}
    for source in (ONE, DDP, FSDP, LATE):
        model = net().eval()
        if layout == FSDP:
            rf.shard(model)
        load(model, folder / f"saved-{source}")
        if layout == LATE:
            rf.shard(model)
        found[f"output of {source}"] = model(batches()[0][0])
    return found


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


def leg(chain: str, k: int, folder: Path) -> Found:
    """Leg k of a chain: two steps of six in its layout, from where the one before was stopped; the last one runs to the end."""
    layouts, checkpoint = CHAINS[chain], folder / chain / "checkpoint"
    model = net()
    if k == 0:
        adaptation = adapted(layouts[0], model, RUN)
    else:
        if layouts[k] == FSDP:
            rf.shard(model)
        adaptation = load(model, checkpoint / ADAPTER)
    last = k == len(layouts) - 1
    try:
        losses = run(layouts[k], model, adaptation, checkpoint, resume=k > 0, stop=None if last else 2 * (k + 1))
    except Interrupted:
        return {}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **tensors_of(adaptation)}


def chain_cell(chain: str, folder: Path) -> Found:
    """The legs of two processes; those of one come before and after."""
    found: Found = {}
    for k, layout in enumerate(CHAINS[chain]):
        if layout != ONE:
            found = leg(chain, k, folder)
    return found


def whole_run(folder: Path) -> Found:
    """One process from the start to the end."""
    model = net()
    adaptation = adapted(ONE, model, RUN)
    losses = run(ONE, model, adaptation, folder / "checkpoint", resume=False, stop=None)
    return {"losses": torch.tensor(losses, dtype=torch.float64), **tensors_of(adaptation)}


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


@dataclass(frozen=True, kw_only=True)
class Halving(RankPolicy):
    """After the first step every site keeps one component of two."""

    name: ClassVar[str] = "halving"
    steps: ClassVar[bool] = True

    def on_step(self, t: int, total: int, sites: Sequence[SiteView]) -> list[Edit]:
        return [Slice(site.key, torch.tensor([1])) for site in sites] if t == 1 else []


def halved(layout: str) -> tuple[nn.Module, rf.Adaptation]:
    model = net()
    if layout == FSDP:
        rf.shard(model)
    adaptation = rf.adapt(model, replace(rf.method("lora", rank=2), rank=Halving()), seed=1)
    shake(adaptation, 0.1)
    return model, adaptation


def halved_cell(layout: str, folder: Path) -> Found:
    """A policy that puts new tensors in the place of the old: by the loop, which averages those that are there."""
    model, adaptation = halved(layout)
    losses = run(layout, model, adaptation, folder / "halved" / layout, resume=False, stop=None)
    return {"losses": torch.tensor(losses, dtype=torch.float64), **tensors_of(adaptation)}


def halved_by_ddp_cell() -> Found:
    """The same under torch's DDP, which would go on with the old ones: refused at that step, which all reach together."""
    model, adaptation = halved(DDP)
    try:
        trained(DDP, model, adaptation)
    except LayoutError as error:
        return {"message": text(str(error))}
    return {"message": text("")}


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


def own_piece(tensor: torch.distributed.tensor.DTensor) -> Tensor:
    """The whole of a tensor, of which this process has only looked at its own rows."""
    rows = -(-tensor.shape[0] // 2)
    found = torch.zeros(tensor.shape, dtype=tensor.dtype)
    found[rank() * rows : (rank() + 1) * rows] = tensor.to_local()
    return found


def by_process(run: loop._Run, k: int) -> None:
    torch.manual_seed(Random(run.step, k, run.accelerator.process_index).randint(0, 2**31))


@contextmanager
def broken(mutant: str) -> Iterator[None]:
    """The library with one fault."""
    from torch.distributed.tensor import DTensor

    faults = {
        "forgets_to_average": (Bucket, "all_reduce", lambda self: None),
        "forgets_to_join": (statistics, "_join", lambda distinct, wanted, reached: reached),
        "reads_its_own_piece": (DTensor, "full_tensor", own_piece),
        "forgets_the_new_pieces": (folding, "renew", lambda model: None),
        "forgets_the_moments": (torch.optim.Optimizer, "load_state_dict", lambda self, state: None),
        "draws_by_process": (loop._Run, "_seed", by_process),
    }
    with mock.patch.object(*faults[mutant]):
        yield


def mutant_cell(mutant: str) -> Found:
    with broken(mutant):
        return method_cell(FSDP, MUTANTS[mutant])


def mutant_chain_cell(mutant: str, folder: Path) -> Found:
    with broken(mutant):
        return chain_cell("cut, ddp", folder / mutant)


def mutant_saved_cell(folder: Path) -> Found:
    with broken("reads_its_own_piece"):
        return saved_cell(FSDP, folder / "mutant")


def cells(folder: Path) -> dict[str, Callable[[], Found]]:
    """Everything that the pair runs, by name."""
    made: dict[str, Callable[[], Found]] = {}
    layouts = (DDP, FSDP, LATE)
    for layout in layouts:
        for method in subjects() if layout != LATE else LATES:
            made[f"{layout} {method}"] = partial(method_cell, layout, method)
        made[f"{layout} saved"] = partial(saved_cell, layout, folder)
        made[f"{layout} heads"] = partial(heads_cell, layout, checkpointed=True)
        made[f"{layout} mixed"] = partial(mixed_cell, layout)
    made |= {f"{layout} kinds {m}": partial(method_cell, layout, m, Kinds) for layout in (DDP, FSDP) for m in KINDS}
    made |= {f"{HAND} {method}": partial(method_cell, HAND, method) for method in HANDS}
    made |= {f"{layout} loaded": partial(loaded_cell, layout, folder) for layout in layouts}
    made |= {f"chain {chain}": partial(chain_cell, chain, folder) for chain in CHAINS}
    made[f"{FSDP} clipped"] = partial(clipped_cell, FSDP)
    made["forgotten"] = forgotten_cell
    made |= {f"halved {layout}": partial(halved_cell, layout, folder) for layout in (DDP, FSDP)}
    made["halved by ddp"] = halved_by_ddp_cell
    made["job"] = partial(job_cell, DDP, folder)
    made |= {f"mutant {mutant}": partial(mutant_cell, mutant) for mutant in MUTANTS}
    made |= {f"mutant {mutant}": partial(mutant_chain_cell, mutant, folder) for mutant in CHAIN_MUTANTS}
    made["mutant saved"] = partial(mutant_saved_cell, folder)
    return made


def one_of_two(folder: Path, index: int) -> None:
    """Run every cell; where the two part ways, stop, since every later cell would wait for the other in vain."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, and not used: they meet in a file
    faulthandler.dump_traceback_later(240, exit=True)  # a pair that waits for each other says where
    torch.set_num_threads(1)
    meeting = torch.distributed.FileStore(str(folder / "meeting"), 2)
    torch.distributed.init_process_group("gloo", store=meeting, rank=index, world_size=2, timeout=WAITS)
    errors: dict[str, str] = {}
    tensors: Found = {}
    for name, cell in cells(folder).items():
        try:
            tensors |= {f"{name}//{key}": t.detach().contiguous().clone() for key, t in cell().items()}
        except Exception:
            errors[name] = traceback.format_exc()
            meeting.set(f"{name} fails in {index}", "1")
            try:
                meeting.wait([f"{name} fails in {1 - index}"], timedelta(seconds=5))
            except torch.distributed.DistStoreError:
                errors["stopped"] = f"after {name}, which failed in process {index} alone:\n{errors[name]}"
                break
    save_file(tensors, folder / f"{index}.safetensors")
    (folder / f"{index}.json").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    """Both processes; gives the worst of their codes."""
    import transformers  # noqa: F401  (what is imported here is imported once)

    import rankfold.jobs.adapt.run  # noqa: F401

    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pair = [start.Process(target=one_of_two, args=(folder, index)) for index in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    return max(abs(process.exitcode or 0) for process in pair)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

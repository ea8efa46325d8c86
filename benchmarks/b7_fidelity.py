"""B7: does the function stay the function? Every structure and init that compose, through start, files, export, fold and sums."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.core import registry
from rankfold.core.structure import Decorator
from rankfold.errors import CompositionError, LayoutError
from rankfold.jobs.exchange import export

from .models import tiny_llama
from .protocol import relative
from .results import Results

__all__ = ["CHECKS", "chains", "fidelity", "run"]

CHECKS = {
    "start": "distance from the base at the start",
    "disabled": "distance from the base when disabled, after training",
    "reload": "saved, loaded into a fresh base",
    "peft": "exported, loaded by peft",
    "told": "error that the export itself reported",
    "fold": "drift of bf16 base weights over 10 folds and unfolds",
    "sum": "two adapters at weights, against the weighted sum of their dense changes",
}
IDS = torch.arange(24).view(2, 12).mul(7).remainder(96)
WEIGHTS = (0.7, -0.4)
FOLDS = 10


def chains() -> Iterator[tuple[str, str | None]]:
    """(method, reason): every structure, and every decorator over the default one, with every init; the reason of a refusal."""
    known = registry.entries("structure")
    default = next(e.name for e in known if dict(e.traits).get("default") == "True")
    for entry in known:
        structure = f"{entry.name}+{default}" if issubclass(registry.resolve(entry), Decorator) else entry.name
        for init in registry.entries("init"):
            text = f"{structure}+{init.key}"
            try:
                rf.method(text)
            except CompositionError as error:
                yield text, str(error).split("\n", maxsplit=1)[0]
            else:
                yield text, None


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(base: nn.Module, text: str, name: str = "default", seed: int = 0) -> rf.Adaptation:
    """The method at rank 4 where it has a rank, with the data that an init may ask for."""
    m = rf.method(text)
    options = {f"{m.structure.core.name}.rank": 4} if hasattr(m.structure.core, "rank") else {}
    batches = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}] if m.init.needs & {"activations", "gradients"} else None
    return rf.adapt(base, text, name=name, seed=seed, batches=batches, loss=_loss if batches else None, **options)


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


def moved(adaptation: rf.Adaptation, name: str = "default", seed: int = 3) -> None:
    """As if trained: every tensor that trains walks away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adaptation.parameters(name):
            p.add_(0.02 * torch.randn(p.shape, generator=generator))


def fidelity(text: str) -> dict[str, float | str]:
    """The largest relative error of each check, or the reason why the method refuses the operation."""
    base = tiny_llama().eval()
    before = logits(base)
    model = copy.deepcopy(base)
    adaptation = adapted(model, text)
    row: dict[str, float | str] = {"start": relative(logits(model), before), "starts": adaptation.method.starts}
    moved(adaptation)
    trained = logits(model)
    with adaptation.disabled():
        row["disabled"] = relative(logits(model), before)
    row["change"] = relative(trained, before)
    if row["change"] < 1e-3:
        raise RuntimeError(f"{text}: the tensors moved and the function did not; every check below would pass for nothing")
    with tempfile.TemporaryDirectory() as folder:
        row["reload"] = _or_reason(lambda: _reloaded(base, adaptation, Path(folder) / "own", trained))
        row["peft"], row["told"] = _exported(base, adaptation, Path(folder) / "peft", trained)
    row["fold"] = _or_reason(lambda: _folded(text))
    row["sum"] = _or_reason(lambda: _summed(base, text))
    return row


def _or_reason(check: Callable[[], float]) -> float | str:
    try:
        return check()
    except (CompositionError, LayoutError) as error:
        return "refused: " + str(error).split("\n", maxsplit=1)[0]


def _reloaded(base: nn.Module, adaptation: rf.Adaptation, folder: Path, trained: Tensor) -> float:
    adaptation.save(folder)
    fresh = copy.deepcopy(base)
    rf.load(fresh, folder)
    return relative(logits(fresh.eval()), trained)


def _exported(base: nn.Module, adaptation: rf.Adaptation, folder: Path, trained: Tensor) -> tuple[float | str, float | str]:
    from peft import PeftModel

    told: list[float] = []

    def check() -> float:
        told.append(export(adaptation.model, adaptation, "peft", folder).largest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return relative(logits(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()), trained)

    error = _or_reason(check)
    return error, told[0] if told else error


def _folded(text: str) -> float:
    """Drift of the base weights in bf16: 0 only where every byte is as it was."""
    model = tiny_llama().eval().to(torch.bfloat16)
    adaptation = adapted(model, text)
    moved(adaptation)
    weights = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("rankfold.")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(FOLDS):
            adaptation.fold()
            adaptation.unfold()
    return drift(model, weights)


def drift(model: nn.Module, before: dict[str, Tensor]) -> float:
    """The largest ‖W − W_before‖ / ‖W_before‖ of any weight."""
    now = dict(model.named_parameters())
    return max(float((now[n].double() - W.double()).norm() / W.double().norm()) for n, W in before.items())


def _summed(base: nn.Module, text: str) -> float:
    model = copy.deepcopy(base)
    adapted(model, text, "a")
    adaptation = adapted(model, text, "b", seed=1)
    changes = []
    for k, name in enumerate("ab"):
        moved(adaptation, name, seed=5 + k)
        adaptation.use(name)
        changes.append(adaptation.folded_weights())
    adaptation.use("a", "b", weight=WEIGHTS)
    oracle = copy.deepcopy(base).double()
    for path in changes[0]:
        W = oracle.get_parameter(path)
        start = W.detach().clone()
        with torch.no_grad():
            for weight, change in zip(WEIGHTS, changes):
                W.add_(weight * (change[path].double() - start))
    return relative(logits(model), logits(oracle))


def run(results: Results, size: str = "short", only: Sequence[str] = ()) -> None:
    from .b7_faults import FAULTS

    for name, fault in FAULTS.items():
        if not only or name in only:
            row = results.measure(name, fault)
            print(f"B7 {name:4} peft {row['peft']:.3g}   ours {row['ours']:.3g}   {row['what']}", flush=True)
    if not only and size != "toy":
        results.forget_all_but({*FAULTS, *(text for text, _ in chains())})
    every = [(text, reason) for text, reason in chains() if not only or any(part in text for part in only)]
    if size == "toy":
        every = [pair for pair in every if pair[0] in ("lora+init:kaiming", "magnitude+lora+init:kaiming", "lora+init:pissa")]
    for text, reason in every:
        row = results.measure(text, lambda text=text, reason=reason: {"refused": reason} if reason else fidelity(text))
        if reason is None:
            shown = "  ".join(f"{k} {v:.1e}" if isinstance(v := row[k], float) else f"{k} refused" for k in CHECKS)
            print(f"B7 {text:36} {shown}", flush=True)

"""The three that are compared at one cell: the frozen model (the floor), peft's and ours, holding the same tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf

from .models import MODELS, embeddings, loss, output
from .protocol import relative

__all__ = ["Cell", "Contenders", "Differs", "contenders"]

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Relative to the largest entry. In bfloat16 peft computes the change in float32 and we do not, so the two round differently."""


class Differs(AssertionError):
    """Two competitors do not compute the same function: their times would compare nothing."""


@dataclass(frozen=True)
class Cell:
    """One row of a table: which model, which change, under which conditions."""

    model: str
    method: str
    rank: int
    dtype: str
    tokens: int
    dropout: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.model}-{self.method}{self.rank}-{self.dtype}-{self.tokens}-drop{self.dropout:g}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Contenders:
    """Models by name ("floor", "peft", "ours") over equal base weights, with the input that all of them read."""

    models: dict[str, nn.Module]
    x: Tensor
    pairs: list[tuple[Any, Tensor]]
    """(peft's trainable tensor, or what has its gradient, and ours): B, A and magnitude of every site."""

    def step(self, name: str) -> Callable[[], None]:
        """Forward and backward. The version of every tensor that trains moves first, as after an optimizer: no cache may help."""
        model = self.models[name]
        trainable = [p for p in model.parameters() if p.requires_grad]

        def run() -> None:
            for p in trainable:
                p.grad = None
                torch.autograd.graph.increment_version(p)
            self.x.grad = None
            loss(model, self.x).backward()

        return run

    def known(self) -> set[int]:
        """Addresses of what exists anyway: parameters and the input."""
        tensors = [self.x, *(t for m in self.models.values() for t in (*m.parameters(), *m.buffers()))]
        return {t.untyped_storage().data_ptr() for t in tensors}

    def check(self, tolerance: float) -> dict[str, float]:
        """Relative difference of ours from peft in evaluation mode: output, input gradient (largest), tensors' gradients (norm).

        Raises:
            Differs: above the tolerance, or the change is zero at both and nothing is compared.
        """
        modes = {n: m.training for n, m in self.models.items()}
        for m in self.models.values():
            m.eval()
        ys = {n: output(m, self.x).detach() for n, m in self.models.items()}
        gradients = {}
        for name in ("peft", "ours"):
            self.step(name)()
            gradients[name] = self.x.grad.clone()  # type: ignore[union-attr]
        errors = {
            "output": relative(ys["ours"], ys["peft"]),
            "input gradient": relative(gradients["ours"], gradients["peft"]),
            "gradients": _relative_norm([(ours.grad, theirs.grad) for theirs, ours in self.pairs]),
        }
        for n, m in self.models.items():
            m.train(modes[n])
        change = relative(ys["ours"], ys["floor"])
        if not all(e <= tolerance for e in errors.values()) or change < 1e-3:
            raise Differs(f"ours and peft differ beyond {tolerance}: {errors}; change of the output: {change:.1e}")
        return errors


def _relative_norm(pairs: list[tuple[Any, Any]]) -> float:
    """‖a − b‖ / ‖b‖ over all tensors together: one tensor whose gradient nearly cancels says nothing in bfloat16."""
    aligned = [(a, b.mT if b.ndim == 2 and b.shape == a.shape[::-1] != a.shape else b.reshape(a.shape)) for a, b in pairs]
    lost = sum(float((a.double() - b.double()).square().sum()) for a, b in aligned)
    return (lost / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


def contenders(cell: Cell) -> Contenders:
    """Build the three, with B drawn at random (a zero B would hide every difference) and peft's tensors copied into ours."""
    from peft import LoraConfig, get_peft_model

    base = MODELS[cell.model]().to(cell.torch_dtype)
    base.requires_grad_(False)
    ours = copy.deepcopy(base)
    names = ["dropout"] * bool(cell.dropout) + ["magnitude"] * (cell.method == "dora") + ["lora"]
    options = {"dropout.p": cell.dropout} if cell.dropout else {}
    adaptation = rf.adapt(ours, "+".join(names), rank=cell.rank, alpha=16, **options)
    config = LoraConfig(
        r=cell.rank, lora_alpha=16, lora_dropout=cell.dropout, use_dora=cell.method == "dora",
        target_modules=[site.name for site in adaptation.sites],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), config)
    pairs = _same_tensors(theirs, adaptation)
    return Contenders({"floor": base, "peft": theirs, "ours": ours}, embeddings(base, cell.tokens, cell.torch_dtype), pairs)


def _same_tensors(theirs: nn.Module, adaptation: rf.Adaptation) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    pairs = []
    for slot in adaptation.slots():
        layer = theirs.get_submodule("base_model.model." + slot.site.name)
        mine = slot.t(adaptation.store)._asdict()
        found = {"B": layer.lora_B["default"].weight, "A": layer.lora_A["default"].weight}
        with torch.no_grad():
            found["B"].normal_(std=0.02)
            if "m" in mine:
                found["m"] = layer.lora_magnitude_vector["default"].weight
                found["m"].mul_(1 + 0.05 * torch.randn_like(found["m"]))
            for name, value in found.items():
                mine[name].copy_(value.reshape(mine[name].shape))
        pairs += [(value, mine[name]) for name, value in found.items()]
    return pairs

"""Five faults that users report of peft, each provoked in peft and in rankfold by the same steps; 0 (U12: 1) is right."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf

from .b7_fidelity import FOLDS, drift, logits, moved
from .models import tiny_llama
from .protocol import relative

__all__ = ["FAULTS"]

Fault = dict[str, Any]


def _peft(base: nn.Module, name: str = "a", **options: Any) -> Any:
    from peft import get_peft_model

    torch.manual_seed(4)
    return get_peft_model(copy.deepcopy(base), _config(**options), adapter_name=name).eval()


def _config(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **options})


def _move(model: nn.Module, part: str) -> None:
    """As if trained: adapter tensors whose name holds `part` walk away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and f".{part}." in name:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def pissa_leaves_the_base() -> Fault:
    """U1: a plain adapter, then a PiSSA adapter beside it. Does the plain one still give the same, and disabled the base?"""
    base = tiny_llama().eval()
    before = logits(base)
    theirs = _peft(base)
    _move(theirs, "a")
    plain = logits(theirs)
    theirs.add_adapter("p", _config(init_lora_weights="pissa"))
    theirs.set_adapter("a")
    other = relative(logits(theirs), plain)
    with theirs.disable_adapter():
        disabled = relative(logits(theirs), before)
    ours = copy.deepcopy(base)
    adaptation = rf.adapt(ours, "lora", rank=4, targets=TARGETS, name="a")
    moved(adaptation, "a")
    plain = logits(ours)
    rf.adapt(ours, "pissa", rank=4, targets=TARGETS, name="p")
    adaptation.use("a")
    mine = relative(logits(ours), plain)
    with adaptation.disabled():
        mine_disabled = relative(logits(ours), before)
    return {
        "what": "a PiSSA adapter attached beside a plain one: change of the plain one's output, and of the base's (disabled)",
        "peft": other, "ours": mine, "peft disabled": disabled, "ours disabled": mine_disabled,
    }  # fmt: skip


def pissa_reload() -> Fault:
    """U2: PiSSA by a randomised SVD, saved and loaded into a fresh base, as one would."""
    from peft import PeftModel

    base = tiny_llama().eval()
    theirs = _peft(base, "default", init_lora_weights="pissa_niter_4")
    _move(theirs, "default")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        torch.manual_seed(99)  # another process, another state of the generator
        again = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    ours = copy.deepcopy(base)
    adaptation = rf.adapt(ours, "pissa", rank=4, targets=TARGETS, **{"pissa.iterations": 4})
    moved(adaptation)
    with tempfile.TemporaryDirectory() as folder:
        adaptation.save(folder)
        fresh = copy.deepcopy(base)
        rf.load(fresh, folder)
    return {
        "what": "PiSSA with 4 subspace iterations, saved and loaded",
        "peft": relative(logits(again), logits(theirs)), "ours": relative(logits(fresh), logits(ours)),
    }  # fmt: skip


def linear_merge() -> Fault:
    """U11: two adapters combined at weights ½ and ½, against the weighted sum of their changes (relative error of the change)."""
    base = tiny_llama().eval()
    theirs = _peft(base, "a")
    theirs.add_adapter("b", _config())
    for name in "ab":
        for parameter_name, p in theirs.named_parameters():
            if f".{name}." in parameter_name:
                torch.manual_seed(sum(parameter_name.encode()) + ord(name))
                p.data.normal_(std=0.1)
    exact = {n: 0.5 * m.get_delta_weight("a") + 0.5 * m.get_delta_weight("b") for n, m in _layers(theirs)}
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "ab", combination_type="linear")
    merged = {n: m.get_delta_weight("ab") for n, m in _layers(theirs)}
    ours = copy.deepcopy(base)
    for name in "ab":
        adaptation = rf.adapt(ours, "lora", rank=4, targets=TARGETS, name=name)
    with torch.no_grad():
        for name in "ab":
            for slot in adaptation.slots(name):
                layer = theirs.get_submodule("base_model.model." + slot.site.name)
                t = slot.t(adaptation.store)
                t.B.copy_(layer.lora_B[name].weight)
                t.A.copy_(layer.lora_A[name].weight)
    adaptation.use("a", "b", weight=[0.5, 0.5])
    changed = adaptation.folded_weights()
    mine = {"base_model.model." + n.removesuffix(".weight"): W - base.get_parameter(n) for n, W in changed.items()}
    return {
        "what": "linear combination of two adapters: error of the combined change against the sum of the changes",
        "peft": _distance(merged, exact), "ours": _distance(mine, exact),
    }  # fmt: skip


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")]


def _distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return max(float((found[n] - exact[n]).detach().norm() / exact[n].detach().norm()) for n in exact)


def rslora_combination() -> Fault:
    """U12: an rsLoRA adapter of rank 4 combined with nothing else at weight 1; the factor by which its change comes out."""
    base = tiny_llama().eval()
    theirs = _peft(base, "a", use_rslora=True)
    _move(theirs, "a")
    theirs.add_weighted_adapter(["a"], [1.0], "again", combination_type="linear")
    ratios = [float(m.get_delta_weight("again").norm() / m.get_delta_weight("a").norm()) for _, m in _layers(theirs)]
    ours = copy.deepcopy(base)
    adaptation = rf.adapt(ours, "rslora", rank=4, targets=TARGETS, name="a")
    moved(adaptation, "a")
    with tempfile.TemporaryDirectory() as folder:
        adaptation.save(folder, "a")
        rf.load(ours, folder, name="copy")
    adaptation.use("a")
    alone = adaptation.folded_weights()
    adaptation.use("a", "copy", weight=[0.5, 0.5])
    twice = adaptation.folded_weights()
    mine = [float((twice[n] - W).norm() / (alone[n] - W).norm()) for n in alone for W in [base.get_parameter(n).detach()]]
    return {
        "what": "an rsLoRA adapter combined with itself: size of the change over its right size",
        "peft": max(ratios), "ours": max(mine, key=lambda r: abs(r - 1)),
    }  # fmt: skip


def bf16_merges() -> Fault:
    """U20: ten merges and unmerges on a bf16 base."""
    base = tiny_llama().eval().to(torch.bfloat16)
    theirs = _peft(base, "a")
    _move(theirs, "a")
    weights = {n: p.detach().clone() for n, p in theirs.named_parameters() if n.endswith("base_layer.weight")}
    ours = copy.deepcopy(base)
    adaptation = rf.adapt(ours, "lora", rank=4, targets=TARGETS)
    moved(adaptation)
    own = {n: p.detach().clone() for n, p in ours.named_parameters() if not n.startswith("rankfold.")}
    for _ in range(FOLDS):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
        adaptation.fold()
        adaptation.unfold()
    return {
        "what": "ten merges and unmerges on a bf16 base: drift of the weights",
        "peft": drift(theirs, weights),
        "ours": drift(ours, own),
    }


def _quiet(fault: Callable[[], Fault]) -> Callable[[], Fault]:
    def run() -> Fault:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of some of these itself
            return fault()

    return run


FAULTS = {
    "U1": _quiet(pissa_leaves_the_base),
    "U2": _quiet(pissa_reload),
    "U11": _quiet(linear_merge),
    "U12": _quiet(rslora_combination),
    "U20": _quiet(bf16_merges),
}

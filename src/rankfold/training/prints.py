"""The fingerprint of a model: which source checkpoint its weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rankfold.adapters.fingerprint import Comparison, Fingerprint, TensorPrint, compare
from rankfold.adapters.fingerprint import fingerprint as of_tensors
from rankfold.core.bases import is_packed, packed_base
from rankfold.core.bases import refusal as packed_refusal
from rankfold.core.bases.quantise import SOURCE
from rankfold.core.host import swapped
from rankfold.core.sharding import close
from rankfold.core.site import Site
from rankfold.core.store import store_of
from rankfold.errors import FingerprintError, LayoutError

__all__ = ["fingerprint", "record_source"]


def fingerprint(model: nn.Module, weights: Sequence[str] | None = None) -> Fingerprint:
    """Shape and hash of strided entries of each weight of the *base*: folded or not, adapted or not, the same.

    A weight that is cut over processes is gathered: each process must call this.

    Args:
        weights: names of the parameters that count, or of blocks; None means every parameter of the model.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> before = fingerprint(model)
    >>> _ = model.weight.data.add_(1.0)
    >>> fingerprint(model) == before
    False
    """
    close(model)
    store = store_of(model)
    originals: dict[str, Tensor] = {}
    for path, kept in (store.folded if store is not None else {}).items():
        for name, tensor in kept:
            originals.setdefault(f"{path}.{name}" if path else name, tensor)
    if weights is None:
        tensors, seen = {}, set()  # a storage that modules share counts once, also while folding has untied it
        for name, parameter in model.named_parameters(remove_duplicate=False):
            original = originals.get(name, parameter)
            if not name.startswith("rankfold.") and id(original) not in seen:
                seen.add(id(original))
                tensors[name] = original
    else:
        tensors = {}
        for path in weights:
            owner, _, leaf = path.rpartition(".")
            weight = model.get_submodule(owner)._parameters.get(leaf)
            if weight is not None:
                tensors[path] = weight
            else:  # a block: all of its own parameters
                tensors |= {f"{path}.{n}": p for n, p in model.get_submodule(path).named_parameters()}
    return Fingerprint({n: _print(model, n, originals.get(n, t)) for n, t in tensors.items()})


def _print(model: nn.Module, name: str, stored: Tensor) -> TensorPrint:
    """The print of one weight. A packed one has the hash of the weight that it was made from, where that is known and it has not
    been written to since, beside a sample of what it holds."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with swapped(module, {leaf: stored}):
        base = _packed(module, leaf)
        if base is None:
            return of_tensors({name: stored.detach()}).tensors[name]
        own = of_tensors({name: base.dense()}, storage=base.format).tensors[name]
    source, held = module.__dict__.get(SOURCE, ("", ""))
    return replace(own, hash=source) if held == own.hash else own


def _packed(module: nn.Module, leaf: str) -> Any:
    if leaf != "weight" or not is_packed(module) or packed_refusal(module, Site("", (0, 0))) is not None:
        return None
    return packed_base(module, Site("", (int(module.out_features), int(module.in_features))))  # type: ignore[arg-type]


def record_source(model: nn.Module, source: nn.Module | Fingerprint) -> Comparison:
    """Tell a quantised model which weights it was made from, if another tool quantised it: then adapters that are trained on it
    carry the fingerprint of the source itself. `rf.quantise` does this by itself.

    Args:
        source: the dense model, or its `fingerprint`.

    Raises:
        FingerprintError: the weights are farther from those of `source` than quantising explains.
        LayoutError: no weight of the model is quantised.

    >>> record_source(nn.Linear(2, 2), nn.Linear(2, 2))
    Traceback (most recent call last):
    ...
    rankfold.errors.LayoutError: record_source: no weight of Linear is quantised
    """
    names = [f"{path}.weight".lstrip(".") for path, module in model.named_modules() if _packed(module, "weight") is not None]
    if not names:
        raise LayoutError(f"record_source: no weight of {type(model).__name__} is quantised")
    given = source if isinstance(source, Fingerprint) else fingerprint(source, names)
    known = Fingerprint({n: given.tensors[n] for n in names if n in given.tensors})
    verdict = compare(known, fingerprint(model, names)) if known.tensors else None
    if verdict is None or len(known.tensors) < len(names) or verdict.verdict == "different":
        reason = verdict.reason if verdict is not None and verdict.verdict == "different" else "it lacks some of the weights"
        raise FingerprintError(f"record_source: this model wasn't made from that one: {reason}")
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        module.__dict__.pop(SOURCE, None)
        module.__dict__[SOURCE] = (given.tensors[name].hash, fingerprint(model, [name]).tensors[name].hash)
    return verdict

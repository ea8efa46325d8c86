"""The fingerprint of a model: which source checkpoint its weights come from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rankfold.adapters.fingerprint import Fingerprint
from rankfold.adapters.fingerprint import fingerprint as of_tensors
from rankfold.core.store import store_of

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, weights: Sequence[str] | None = None) -> Fingerprint:
    """Shape and hash of strided entries of each weight of the *base*: folded or not, adapted or not, the same.

    Args:
        weights: names of the parameters that count, or of blocks; None means every parameter of the model.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> before = fingerprint(model)
    >>> _ = model.weight.data.add_(1.0)
    >>> fingerprint(model) == before
    False
    """
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
    return of_tensors({n: originals.get(n, t).detach() for n, t in tensors.items()})

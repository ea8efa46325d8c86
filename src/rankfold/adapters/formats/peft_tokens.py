"""Rows of an embedding in peft's folder: `trainable_token_indices`, with the rows of each module as one tensor.

Ours are extra tensors with rows in their name, rising: "embed_tokens.weight[3,50:52]". peft keeps the order of its list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import CompositionError, FileError

from ..rows import rows_text, split_rows

__all__ = ["CONFIG_KEY", "PART", "read_rows", "taken"]

CONFIG_KEY = "trainable_token_indices"
PART = "token_adapter.trainable_tokens_delta"
MOST_ROWS = 2**31


def taken(extras: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]], dict[str, Tensor]]:
    """(the extras without rows, the rows by module, their values by module).

    Raises:
        CompositionError: rows of something else than a module's weight.

    >>> taken({"embed.weight[3,50:52]": torch.ones(3, 4)})[1]
    {'embed': [3, 50, 51]}
    """
    whole: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}
    values: dict[str, Tensor] = {}
    for name, t in extras.items():
        parameter, own = split_rows(name, MOST_ROWS)
        if own is None:
            whole[name] = t
            continue
        module, _, leaf = parameter.rpartition(".")
        if leaf != "weight" or not module or t.ndim != 2:
            raise CompositionError(f"{name}: peft trains rows of embeddings and heads only")
        rows[module], values[module] = list(own), t
    return whole, rows, values


def read_rows(found: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The extra tensors, by name with rows, of what stands at each module.

    Raises:
        FileError: indices that are none, or another number of them than there are rows, or rows that are nowhere.
    """
    told = config.get(CONFIG_KEY)
    extras = {}
    if told and not found:
        raise FileError(f"{path}: {CONFIG_KEY} {str(told)[:60]}, and no tensor holds these rows")
    for module, t in found.items():
        if isinstance(told, Mapping):
            keys = [k for k in told if isinstance(k, str) and (module == k or module.endswith("." + k))]
            indices = told[keys[0]] if keys else None
        else:
            indices = told
        good = isinstance(indices, list) and all(type(k) is int and 0 <= k < MOST_ROWS for k in indices)
        if not good or len(set(indices)) != len(indices) or t.ndim != 2 or len(indices) != t.shape[0]:  # type: ignore[arg-type]
            raise FileError(f"{path}: {module}: {list(t.shape)} rows for {CONFIG_KEY} {str(indices)[:60]}")
        order = torch.tensor(indices).argsort()
        extras[f"{module}.weight{rows_text(sorted(indices))}"] = t[order]  # type: ignore[arg-type]
    return extras

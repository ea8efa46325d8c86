"""A model with its changes folded in, as a folder that loads without rankfold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankfold.adapters.files import atomic_folder, read_json, write_json, write_tensors
from rankfold.core.host import fold_weight, site_program
from rankfold.linalg import difference

from .models import quiet_loading

if TYPE_CHECKING:
    from rankfold.training.adaptation import Adaptation

__all__ = ["write_folded"]

OWNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "token*", "vocab*", "merges.txt",
        "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece*", "chat_template*")  # fmt: skip


def write_folded(adaptation: Adaptation, name: str, out: str | Path, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Write W' in the place of every W, whole modules included, and give ‖W'_stored − (W + Δ)‖ / ‖Δ‖ by site.

    A transformers model becomes a folder for `from_pretrained`, with the tokenizer's files of its source; any other model
    becomes model.safetensors, under the keys of its state_dict.

    Raises:
        LayoutError: a side module, or a change that depends on the input. FileError: the folder can't be written.
    """
    model = adaptation.model
    errors = _rounding(adaptation, name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ties that break: the caller says so
        adaptation.fold()
    try:
        state = {k: t if dtype is None or not t.is_floating_point() else t.to(dtype) for k, t in model.state_dict().items()}
        with atomic_folder(out, owns=OWNS) as folder:
            if hasattr(model, "save_pretrained"):
                _save_pretrained(model, folder, state, dtype, adaptation.attached[name].labels)
            else:
                write_tensors(folder / "model.safetensors", state)
    finally:
        adaptation.unfold()
    return errors


@torch.no_grad()
def _rounding(adaptation: Adaptation, name: str, dtype: torch.dtype | None) -> dict[str, float]:
    errors = {}
    for slot in adaptation.slots(name):
        if slot.base is None:
            continue  # fold refuses it, by name
        program = site_program(adaptation.store, [slot], training=False, outside=True)
        stored = fold_weight(program).to(slot.base.dtype).to(dtype or slot.base.dtype).double()
        change = difference(program.expression(), program.base).dense().double()
        size = float(change.norm())
        errors[slot.site.key] = float((stored - program.base.dense().double() - change).norm()) / size if size else 0.0
    return errors


def _save_pretrained(
    model: Any, folder: Path, state: dict[str, Tensor], dtype: torch.dtype | None, labels: tuple[str, ...] | None
) -> None:
    with quiet_loading():
        model.save_pretrained(folder, state_dict=state)
    config = read_json(folder / "config.json")
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    if _untied(model):
        config["tie_word_embeddings"] = False
    if labels:
        config["id2label"] = {str(k): label for k, label in enumerate(labels)}
        config["label2id"] = {label: k for k, label in enumerate(labels)}
    write_json(folder / "config.json", config)
    source = Path(getattr(model.config, "_name_or_path", "") or "")
    if source.is_dir():
        for pattern in OWNS[4:]:
            for file in source.glob(pattern):
                (folder / file.name).write_bytes(file.read_bytes())


def _untied(model: Any) -> bool:
    """Whether the input and output embeddings were one and are no longer."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return False
    ends: list[nn.Module | None] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return None not in ends and ends[0].weight is not ends[1].weight  # type: ignore[union-attr]

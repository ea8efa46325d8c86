"""The model that an adapter folder belongs to, with the head that it was trained with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rankfold.adapters.formats.peft import read_peft
from rankfold.adapters.native import load_native
from rankfold.errors import FileError, OptionError, RankfoldError, nearest

from .exchange import folder_format
from .foreign import FOREIGN, fitted, read_foreign
from .models import load_model

__all__ = ["base_for"]

TASKS = {"SEQ_CLS": "classify", "CAUSAL_LM": "lm", "FEATURE_EXTRACTION": "embed"}


def base_for(adapter: str | Path, model: str | Path | None = None, task: str | None = None) -> nn.Module:
    """The model `model` in the form whose modules the adapter names.

    Args:
        model: folder, built-in or hub name; None takes the one that the adapter was trained on, by its name there.
        task: embed, classify, lm or sft; None takes what the adapter says, else the first form that fits.

    Raises:
        FileError: no form of the model has the adapter's sites. OptionError: no model is named. Whatever `load_model` raises.
    """
    labels: tuple[str, ...] | None = None
    source = folder_format(adapter)
    names: set[str] = set()
    if source in FOREIGN:
        said = told = None
    elif source == "peft":
        read = read_peft(adapter)
        names = {e.name for e in read.entries.values()} | {n.rpartition(".")[0] for n in read.extras}
        said, told = TASKS.get(read.metadata.get("task_type") or ""), read.metadata.get("base_model")
        heads = [
            t
            for n, t in read.extras.items()
            if n.rpartition(".")[0] in ("classifier", "score", "classifier.out_proj") and t.ndim == 2
        ]
        labels = tuple(f"LABEL_{k}" for k in range(heads[0].shape[0])) if heads else None
    else:
        record = load_native(adapter)
        names = {s.name for s in record.sites} | {n.rpartition(".")[0] for n in record.extras}
        labels = record.labels
        said, told = record.trained.get("task") or ("classify" if labels else None), record.trained.get("model")
    model = model or told
    if model is None:
        raise OptionError(f"{adapter}: does not say which model it is for; name it: --model M")
    guess = ["classify", "embed", "lm"] if labels else ["embed", "lm"]
    forms: list[str] = [form] if (form := task or said) else guess
    missing, problems = "", []
    for form in forms:
        try:
            loaded = load_model(model, form, labels=labels if form == "classify" else None, reads_text=False).model
        except RankfoldError as error:
            if len(forms) == 1:
                raise
            problems.append(str(error))
            continue
        if source in FOREIGN:
            try:
                fitted(read_foreign(adapter, source, loaded), loaded, str(adapter))  # type: ignore[arg-type]
                return loaded
            except RankfoldError as error:
                problems.append(str(error))
                continue
        here = {n for n, _ in loaded.named_modules()} | {n for n, _ in loaded.named_parameters()}  # experts are named by theirs
        lacking = sorted(names - here)
        if not lacking:
            return loaded
        missing = f"{lacking[0]!r}; nearest: {', '.join(nearest(lacking[0], here))}"
    reason = f"model {model} has no {missing}" if missing else "; ".join(problems)
    raise FileError(f"{adapter}: {reason}. Another base: --model; another head: --task embed|classify|lm")

"""Predictions of an adapted model for the rows of a file: labels with probabilities, embeddings, text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rankfold.adapters.native import load_native
from rankfold.atomic import atomic_file, write_text
from rankfold.errors import DataError, OptionError, UnknownName
from rankfold.jobs.data import Table, names, read
from rankfold.jobs.exchange import folder_format, load
from rankfold.jobs.models import load_model
from rankfold.training.progress import Progress

from .defaults import DEFAULTS
from .screen import Screen
from .settings import PredictSettings
from .task import Row, Task, task_for

__all__ = ["predict_job"]

INPUTS = {"classify": ["text"], "lm": ["text"], "sft": ["prompt"], "embed": ["query"]}
FORMS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".npy": "npy"}


def predict_job(settings: PredictSettings) -> Path:
    """Write one prediction for each row of the data, in order; gives the path of the file.

    classify: text, label, probability, and every label's probability. embed: one vector a row. lm and sft: what the model writes.

    Raises:
        UnknownName: a form of output that is none. OptionError: no task said, or a form that the task has not.
        FingerprintError: the adapter is for another base. Whatever reading the data raises.
    """
    s = settings
    screen = Screen(s.quiet)
    form = FORMS.get(s.out.suffix.lower())
    if form is None:
        raise UnknownName.of("form of output", s.out.suffix or s.out.name, FORMS, f"written here: {', '.join(FORMS)}")
    facts: Mapping[str, Any] = {}
    labels = None
    if s.adapter is not None and folder_format(s.adapter) == "rankfold":
        record = load_native(s.adapter)
        facts, labels = record.trained, record.labels
    task_name = s.task or facts.get("task")
    if task_name not in INPUTS:
        raise OptionError(f"predict: say what for: --task {'|'.join(INPUTS)} (the adapter does not tell)")
    if form == "npy" and task_name != "embed":
        raise OptionError(f"{s.out}: .npy holds embeddings; for {task_name} write .csv or .jsonl")
    table = _table(s, task_name, labels)
    screen.say("data", table.describe())
    loaded = load_model(s.model, task_name, labels=labels, tokenizer=s.tokenizer or facts.get("tokenizer"), device=s.device)
    if s.adapter is not None:
        load(loaded.model, s.adapter, force=s.force)
    length = s.max_length or facts.get("max_length") or DEFAULTS[task_name]["max_length"]
    task = task_for(task_name, loaded, int(length), float(facts.get("temperature", 0.05)))
    rows = _rows(task, table)
    if task.cut:
        screen.say(
            "note", f"{task.cut:,} of {len(table):,} texts are longer than {task.max_length} tokens: cut to that (--max-length)"
        )
    predictions = []
    with Progress("predict", len(rows), not s.quiet) as bar:
        for prediction in task.predict(loaded.model, rows, s.batch_size, max_new_tokens=s.max_new_tokens):
            predictions.append(prediction)
            bar.at(len(predictions))
    _write(s.out, form, task_name, next(iter(table.columns.values())), predictions)
    screen.say("saved", f"{s.out}   {len(predictions):,} rows")
    return s.out


def _table(s: PredictSettings, task: str, labels: Sequence[str] | None) -> Table:
    """The input column; for embed `query`, else `document`, whichever the file has."""
    wanted = INPUTS[task]
    if task == "classify" and s.data.lower().endswith(".txt") and (texts := _without_labels(s, labels or ())) is not None:
        return texts
    part = "test" if s.data in names() and not Path(s.data).exists() else None
    try:
        return read(s.data, task, s.columns, only=wanted, encoding=s.encoding, split=part)
    except UnknownName:
        if task != "embed":
            raise
        return read(s.data, task, s.columns, only=["document"], encoding=s.encoding, split=part)


def _without_labels(s: PredictSettings, labels: Sequence[str]) -> Table | None:
    """The texts of a .txt file whose every line starts with one of the labels, as training files do; else None."""
    try:
        table = read(s.data, "classify", encoding=s.encoding, classes=1)
    except DataError:
        return None
    if not set(table["label"]) <= set(labels):
        return None
    return replace(table, columns={"text": table["text"]})


def _rows(task: Task, table: Table) -> list[Row]:
    prompts = getattr(task, "prompts", None)
    if prompts is not None:
        return list(prompts(table))
    # of a built-in set all columns come; what is to be found is not read
    only = Table({name: values for name, values in table.columns.items() if name in ("text", "query")}, table.source)
    return task.rows(only if only.columns else table)


def _write(out: Path, form: str, task: str, texts: Sequence[str], predictions: Sequence[Any]) -> None:
    if form == "npy":
        array = np.stack([vector.numpy() for vector in predictions])

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)

        atomic_file(out, save)
        return
    rows = list(_records(task, texts, predictions))
    if form == "jsonl":
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    flat = [_flat(row) for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(flat[0]), delimiter="\t" if form == "tsv" else ",", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(out, buffer.getvalue())


def _records(task: str, texts: Sequence[str], predictions: Iterable[Any]) -> Iterable[dict[str, Any]]:
    for text, prediction in zip(texts, predictions):
        if task == "embed":
            yield {"text": text, "embedding": prediction.tolist()}
        elif task == "classify":
            yield {"text": text, **prediction}
        else:
            yield {"prompt": text, **prediction}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Lists and mappings inside a row as columns of their own."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"p({name})": p for name, p in value.items()}
        elif isinstance(value, list):
            flat |= {f"e{i}": x for i, x in enumerate(value)}
        else:
            flat[key] = value
    return flat

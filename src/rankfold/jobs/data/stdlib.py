"""Data that every Python has: its own standard library, as three data sets under a name.

The same Python version always gives the same rows in the same order; nothing is written anywhere.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache

from rankfold.errors import DataError, OptionError, UnknownName
from rankfold.jobs.data.encoding import decode
from rankfold.jobs.data.functions import first_sentence, functions_with_docstrings, nameless_code, parse_quietly
from rankfold.jobs.data.modules import library_modules
from rankfold.jobs.data.splitting import split as split_rows
from rankfold.jobs.data.splitting import stable_hash
from rankfold.jobs.data.table import Table

__all__ = ["load", "names"]

_WORDS, _STATEMENTS = 3, 2  # below these a query or a function says too little to be found by
_TEST_SHARE = 0.25
_CLASSES, _PER_CLASS = 10, 200


def names() -> dict[str, str]:
    """Name to one line, for `--data`.

    >>> list(names())
    ['stdlib-code', 'stdlib-docs', 'stdlib-source']
    """
    return {
        "stdlib-code": "embed: a docstring's first sentence finds its function's code; train and test share no module",
        "stdlib-docs": f"classify: which of {_CLASSES} modules a docstring is from",
        "stdlib-source": "lm: the source files; train and test share no module",
    }


def load(name: str, split: str = "train", limit: int | None = None, task: str | None = None) -> Table:
    """One split of a built-in set.

    Rows come in a fixed shuffled order, so that `limit` takes a fair sample. Every row tells its `module` beside the
    columns of the task.

    Args:
        name: of `names()`.
        split: "train" or "test".
        limit: at most so many rows.
        task: when given, the set must be one for this task.

    Raises UnknownName for a name or split that is not there, DataError for another task or a Python without sources,
    OptionError for a limit below 1.

    >>> table = load("stdlib-code", "test", limit=800)
    >>> len(table), list(table.columns)
    (800, ['query', 'document', 'module'])
    """
    if name not in names():
        raise UnknownName.of("built-in set", name, names())
    made_for = names()[name].partition(":")[0]
    if task is not None and task != made_for:
        raise DataError(f"{name} is for task {made_for}, not {task}")
    if split not in ("train", "test"):
        raise UnknownName.of(f"split of {name}", split, ("train", "test"))
    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit}: must be at least 1")
    table = _BUILDERS[name]()[split]
    return table if limit is None else table.take(range(min(limit, len(table))))


@lru_cache(maxsize=1)
def _code() -> dict[str, Table]:
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    for module in library_modules():
        tree = parse_quietly(module.path.read_bytes())
        if tree is None:
            dropped["unreadable file"] += 1
            continue
        for node, docstring in functions_with_docstrings(tree):
            query = first_sentence(docstring)
            code, statements = nameless_code(node)
            if len(query.split()) < _WORDS or statements < _STATEMENTS:
                dropped["too short"] += 1
            elif query.lower() in seen or code in seen:
                dropped["duplicate"] += 1
            else:
                rows.append({"query": query, "document": code, "module": module.name, "group": module.group})
            seen.update((query.lower(), code))
    return _by_group(rows, "stdlib-code", dropped)


@lru_cache(maxsize=1)
def _source() -> dict[str, Table]:
    rows = []
    dropped: Counter[str] = Counter()
    for module in library_modules():
        try:
            text = decode(module.path.read_bytes(), module.name)
        except DataError:
            dropped["unreadable file"] += 1
            continue
        if text.strip():
            rows.append({"text": text, "module": module.name, "group": module.group})
    return _by_group(rows, "stdlib-source", dropped)


@lru_cache(maxsize=1)
def _docs() -> dict[str, Table]:
    by_label: dict[str, dict[str, str]] = defaultdict(dict)  # group -> docstring -> module
    for module in library_modules():
        tree = parse_quietly(module.path.read_bytes())
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                by_label[module.group].setdefault(" ".join(text.split()), module.name)
    shared = {text for text, n in Counter(text for texts in by_label.values() for text in texts).items() if n > 1}
    rows: list[dict[str, str]] = []
    for label in sorted(by_label, key=lambda group: (-len(by_label[group]), group))[:_CLASSES]:
        texts = [text for text in by_label[label] if text not in shared and len(text.split()) >= _WORDS]
        texts.sort(key=lambda text: stable_hash("stdlib-docs", text))
        rows += [{"text": text, "label": label, "module": by_label[label][text]} for text in texts[:_PER_CLASS]]
    train, test = split_rows(_table(rows, "stdlib-docs", {}), _TEST_SHARE, stratify="label")
    return {"train": train, "test": test}


def _by_group(rows: list[dict[str, str]], source: str, dropped: Mapping[str, int]) -> dict[str, Table]:
    """Whole groups, in the order of a hash of their names, go to test until it has its share of the rows."""
    sizes = Counter(row["group"] for row in rows)
    test: set[str] = set()
    for group in sorted(sizes, key=lambda name: stable_hash(source, name)):
        if sum(sizes[name] for name in test) >= _TEST_SHARE * len(rows):
            break
        if sizes[group] <= 0.1 * len(rows):  # one large package alone would make test its own subject
            test.add(group)
    return {
        part: _table([row for row in rows if (row["group"] in test) == (part == "test")], source, dropped)
        for part in ("train", "test")
    }


def _table(rows: list[dict[str, str]], source: str, dropped: Mapping[str, int]) -> Table:
    ordered = sorted(rows, key=lambda row: stable_hash(source, *row.values()))
    columns = [name for name in rows[0] if name != "group"] if rows else []
    return Table({name: tuple(row[name] for row in ordered) for name in columns}, source, dict(dropped))


_BUILDERS: Mapping[str, Callable[[], dict[str, Table]]] = {"stdlib-code": _code, "stdlib-docs": _docs, "stdlib-source": _source}

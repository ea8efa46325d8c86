"""JSON, one object a line, or one array of objects."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rankfold.errors import DataError
from rankfold.jobs.data.tasks import find_columns

__all__ = ["parse_json"]


def parse_json(text: str, wanted: Mapping[str, str], source: str) -> dict[str, list[Any]]:
    """Role to values; a row that lacks the key has None there, and a key that no row has is an error.

    Raises DataError with the line number of the first line that is no JSON object, UnknownName for a missing key.

    >>> parse_json('{"query": "a", "document": "b"}\\n{"query": "c"}', {"query": "query", "document": "document"}, "x.jsonl")
    {'query': ['a', 'c'], 'document': ['b', None]}
    """
    rows = list(_array(text, source) if text.lstrip().startswith("[") else _lines(text, source))
    if not rows:
        raise DataError(f"{source}: empty file; expected one JSON object a line")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    find_columns(wanted, keys, source)
    spelled = {key.strip(): key for key in keys}
    return {role: [row.get(spelled[name]) for row in rows] for role, name in wanted.items()}


def _lines(text: str, source: str) -> Iterator[dict[str, Any]]:
    # Not str.splitlines: it also breaks at characters that may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _object(_load(line, f"{source}: line {number:,}"), f"{source}: line {number:,}")


def _array(text: str, source: str) -> Iterator[dict[str, Any]]:
    for number, item in enumerate(_load(text, source), start=1):
        yield _object(item, f"{source}: element {number:,}")


def _load(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as cause:
        raise DataError(
            f"{place}: not JSON: {cause.msg} at character {cause.pos + 1:,}: {text[cause.pos : cause.pos + 40]!r}"
        ) from None
    except (ValueError, RecursionError) as cause:  # numbers of thousands of digits; thousands of open brackets
        raise DataError(f"{place}: not JSON that can be read: {cause}") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object, {{...}}; found {type(value).__name__}")
    return value

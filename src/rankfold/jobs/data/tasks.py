"""What each task reads: the columns by role, and how a user's names are matched to those of a file."""

from collections.abc import Iterable, Mapping, Sequence

from rankfold.errors import DataError, OptionError, UnknownName

__all__ = ["TASKS", "find_columns", "wanted_columns"]

TASKS: Mapping[str, tuple[str, ...]] = {
    "classify": ("text", "label"),
    "sft": ("prompt", "completion"),
    "embed": ("query", "document"),
    "lm": ("text",),
}
"""Task to its columns; the names are the defaults in a file too."""


def wanted_columns(
    task: str, columns: str | Sequence[str] | Mapping[str, str] | None = None, only: Sequence[str] | None = None
) -> dict[str, str]:
    """Role to the column's name in the file.

    Args:
        task: a key of `TASKS`.
        columns: other names than the defaults: `{"label": "category"}`, `"label=category"`, or, all in the order of
            the task, `["text", "category"]` or `"text,category"`.
        only: the roles that are needed, for instance `["text"]` for predictions; None means all.

    Raises UnknownName for a task or role that does not exist, OptionError for a wrong number of names.

    >>> wanted_columns("classify", "label=category")
    {'text': 'text', 'label': 'category'}
    >>> wanted_columns("sft", ["question", "answer"])
    {'prompt': 'question', 'completion': 'answer'}
    """
    if task not in TASKS:
        raise UnknownName.of("task", task, TASKS)
    roles = TASKS[task]
    wanted = {role: role for role in roles}
    for role, name in _named(columns, roles).items():
        if role not in wanted:
            raise UnknownName.of(f"column of task {task}", role, roles, hint=f"columns of this task: {', '.join(roles)}")
        wanted[role] = name
    for role in only or ():
        if role not in wanted:
            raise UnknownName.of(f"column of task {task}", role, roles)
    return {role: wanted[role] for role in (only or roles)}


def _named(columns: str | Sequence[str] | Mapping[str, str] | None, roles: tuple[str, ...]) -> dict[str, str]:
    if columns is None:
        return {}
    if isinstance(columns, Mapping):
        return dict(columns)
    parts = [part.strip() for part in columns.split(",")] if isinstance(columns, str) else list(columns)
    if all("=" in part for part in parts):
        pairs = (part.partition("=") for part in parts)
        return {role.strip(): name.strip() for role, _, name in pairs}
    if len(parts) != len(roles):
        raise OptionError(
            f"columns: {len(parts)} names ({', '.join(parts)}) for the {len(roles)} columns {', '.join(roles)}\n"
            f"  by order: {','.join(roles)}      by name: {','.join(f'{role}=NAME' for role in roles)}"
        )
    return dict(zip(roles, parts))


def find_columns(wanted: Mapping[str, str], available: Iterable[str], source: str) -> dict[str, int]:
    """Role to the place of its column among `available`.

    Raises UnknownName for a column that is not there, with the nearest and what to type; DataError when two have its name.

    >>> find_columns({"text": "text", "label": "category"}, ["id", "category", "text"], "train.csv")
    {'text': 2, 'label': 1}
    """
    names = [name.strip() for name in available]
    for role, name in wanted.items():
        if name not in names:
            listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
            hint = f"columns there: {listed or 'none'}\n  to say which one holds the {role}: --columns {role}=NAME"
            raise UnknownName.of(f"column of {source}", name, names, hint=hint)
        if names.count(name) > 1:
            raise DataError(f"{source}: {names.count(name)} columns are named {name!r}; rename all but one")
    return {role: names.index(name) for role, name in wanted.items()}

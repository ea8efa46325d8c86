"""Examples in docstrings become blocks of code on the reference pages; our docstrings have no "Examples:" that says so."""

from typing import Any

from griffe import Extension, Object

__all__ = ["Doctests"]


class Doctests(Extension):
    """Fences each run of lines that starts with `>>>`."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The docstring with a fence around every example; an example ends at a blank line or at the end."""
    out: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if not inside and line.lstrip().startswith(">>> "):
            out.append("```pycon")
            inside = True
        if inside and not line.strip():
            out.append("```")
            inside = False
        out.append(line)
    return "\n".join(out).rstrip()

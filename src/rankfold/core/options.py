"""Options as data: annotated fields are checked at construction, offered by the command line and printed by the documentation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, get_type_hints

from rankfold.errors import OptionError

__all__ = ["Options", "option_names"]


@cache
def _adapters(cls: Any) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter

    hints = get_type_hints(cls, include_extras=True)
    checked = {}
    for f in dataclasses.fields(cls):
        if f.metadata.get("option", True):
            checked[f.name] = TypeAdapter(hints[f.name], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    return checked


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every member of the catalogue. A field `rank: Annotated[int, Ge(1)] = 16` is an option with its bound.

    A member with `default = True` stands where a method names none of its axis. `axis` and `name` are set by `register`.
    Text from a command line or a file is read as the field's type; a value outside raises OptionError with value and bound.

    >>> from rankfold.methods.structures.lora import LoRA
    >>> LoRA(rank="8").rank
    8
    >>> LoRA(rank=0)
    Traceback (most recent call last):
    ...
    rankfold.errors.OptionError: lora.rank: got 0; input should be greater than or equal to 1
    """

    default: ClassVar[bool] = False
    axis: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        kind: Any = type(self)
        for name, adapter in _adapters(kind).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, adapter.validate_python(_text(value)))
            except ValidationError as error:
                reasons = "; ".join(sorted({e["msg"][0].lower() + e["msg"][1:] for e in error.errors()}))
                who = self.name or type(self).__name__.lower()
                raise OptionError(f"{who}.{name}: got {value!r}; {reasons}") from None


def _text(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def option_names(cls: type) -> list[str]:
    """The options of a member, in the order of its fields."""
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("option", True)]

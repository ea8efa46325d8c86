"""A command whose options are the fields of a settings model: the job declares them once, with help, default and bounds.

Values go to the model as text, so that a command line and a YAML file are checked by one set of rules, in the same words.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from rankfold.errors import FileError, OptionError, UnknownName

__all__ = ["from_settings", "read_config"]

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def from_settings(settings: type[BaseModel], name: str, doc: str, job: Callable[[Any], object]) -> Callable[..., None]:
    """A function for typer that reads the options of `settings`, and `--config`, and runs the job.

    Args:
        settings: the model; `settings.of(**values)` makes and checks one.
        name: of the command.
        doc: its help.
        job: what runs on the settings.
    """

    def command(config: Path | None = None, **given: Any) -> None:
        said = {k: v for k, v in given.items() if v is not None and v != []}
        values = read_config(config, settings) if config is not None else {}
        merged = {k: {**_pairs(values[k]), **_pairs(said[k])} for k in said if isinstance(said[k], list) and k in values}
        values |= {**said, **merged}
        missing = [_flag(k) for k, info in settings.model_fields.items() if info.is_required() and k not in values]
        if missing:
            raise OptionError(f"{name} needs {', '.join(missing)}: give it here, or in a file by --config FILE")
        job(settings.of(**values))  # type: ignore[attr-defined]

    parameters = [_parameter(field, info) for field, info in settings.model_fields.items()]
    config_option = typer.Option(
        help="YAML file of options, by their names; the command line wins.", metavar="FILE", show_default=False
    )
    parameters.append(_keyword("config", Annotated[Path | None, config_option], None))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__, command.__doc__ = name, doc
    return command


def read_config(path: Path, settings: type[BaseModel]) -> dict[str, Any]:
    """The options in a YAML file; `batch-size` and `batch_size` are the same.

    Raises:
        FileError: no such file, no YAML, or no mapping. UnknownName: an option that nobody knows, with the nearest.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise FileError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not all(isinstance(k, str) for k in document):
        raise FileError(f"{path}: must be a mapping of options, for instance 'rank: 8'; it is a {type(document).__name__}")
    values = {k.replace("-", "_"): v for k, v in document.items()}
    for key in values:
        if key not in settings.model_fields:
            raise UnknownName.of("option", key, settings.model_fields, f"in {path}")
    return values


def _pairs(value: Any) -> dict[str, Any]:
    """Options of a method, from `--set` or from a file, as one mapping; what has no `=` is left for the model to refuse."""
    return (
        dict(value)
        if isinstance(value, dict)
        else {item.partition("=")[0].strip(): item.partition("=")[2].strip() for item in value}
    )


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(name: str, info: Any) -> inspect.Parameter:
    flag = _flag(name)
    shown = _default(info)
    note = " [required]" if info.is_required() else f" [default: {shown}]" if shown else ""
    help_text = (info.description or "")[:1].upper() + (info.description or "")[1:] + note
    if info.annotation is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False)
        return _keyword(name, Annotated[bool | None, option], None)
    several = info.annotation is dict or get_origin(info.annotation) is dict
    option = typer.Option(flag, help=help_text, metavar=_metavar(info), show_default=False)
    return _keyword(name, Annotated[list[str] | None if several else str | None, option], None)


def _default(info: Any) -> str:
    if info.is_required() or info.default_factory is not None or info.default in (None, (), ""):
        return ""
    if isinstance(info.default, bool):
        return "yes" if info.default else ""
    return ",".join(info.default) if isinstance(info.default, tuple) else f"{info.default}"


def _metavar(info: Any) -> str:
    kinds = list(_leaves(info.annotation))
    choices = [str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    if choices:
        return "|".join(choices)
    if get_origin(info.annotation) is dict:
        return "OPTION=VALUE"
    if get_origin(info.annotation) is tuple:
        return "NAME,..."
    word = next((w for kind, w in ((int, "INTEGER"), (float, "NUMBER"), (Path, "PATH")) if kinds[0] is kind), "TEXT")
    bounds = [m for source in (info, *_inner_fields(info.annotation)) for m in source.metadata]
    limits = [f"{sign}{getattr(m, attribute):g}" for m in bounds for attribute, sign in SIGNS.items() if hasattr(m, attribute)]
    return word + " " + ",".join(limits) if limits else word


def _leaves(annotation: Any) -> Iterator[Any]:
    """The kinds that an annotation allows, None and metadata left out."""
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _leaves(part)
    elif get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif annotation is not type(None):
        yield annotation


def _inner_fields(annotation: Any) -> Iterator[Any]:
    """The pydantic fields inside `Annotated[int, Field(ge=1)] | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _inner_fields(part)
    elif get_origin(annotation) is Annotated:
        yield from (m for m in get_args(annotation)[1:] if hasattr(m, "metadata"))

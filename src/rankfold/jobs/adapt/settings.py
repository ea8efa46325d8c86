"""Everything that one run of the main job is told, checked before anything is loaded. Imports no torch.

What is None is filled from the defaults of the task (`defaults.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rankfold.errors import OptionError, UnknownName

from .defaults import DEFAULTS

__all__ = ["AdaptSettings", "PredictSettings", "parse_set"]

Task = Literal["classify", "lm", "sft", "embed"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16", "float16"]
Packed = Literal["int8", "int4", "nf4", "bnb-int8"]


def parse_set(items: Sequence[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """`["init.iterations=4", "alpha=16"]` as a mapping; a mapping stays.

    Raises:
        OptionError: an item without `=`.

    >>> parse_set(["init.iterations=4", "alpha=16"])
    {'init.iterations': '4', 'alpha': '16'}
    """
    if items is None:
        return {}
    if isinstance(items, Mapping):
        return dict(items)
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"--set {item!r}: write option=value or part.option=value, for instance --set init.iterations=4")
        pairs[key.strip()] = value.strip()
    return pairs


def _names(value: Any) -> Any:
    """ "query,value" or ["query", "value"] as a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _fraction_or_path(value: Any) -> Any:
    """A share such as 0.1 as a number, whatever wrote it; anything else is a path."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=False)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The settings from keyword arguments, a YAML file or a command line.

        Raises:
            UnknownName: a setting that nobody knows, with the nearest.
            OptionError: a value outside its bounds, or one that is missing.
        """
        for name in values:
            if name not in cls.model_fields:
                raise UnknownName.of("setting", name, cls.model_fields)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else cls.__name__
            if first["type"] == "missing":
                raise OptionError(f"{name}: must be given") from None
            said = str(first.get("ctx", {}).get("error", "")) if first["type"] == "value_error" else ""
            if said:  # our own words, which name the option and the value already
                raise OptionError(said) from None
            raise OptionError(f"{name}: got {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}") from None


class AdaptSettings(_Settings):
    """One run of `rankfold adapt`.

    >>> AdaptSettings.of(model="minilm", data="train.csv", task="classify", out="run", rank=8).filled().lr > 0
    True
    >>> AdaptSettings.of(model="minilm", data="train.csv", task="classify", out="run", rnk=8)
    Traceback (most recent call last):
    ...
    rankfold.errors.UnknownName: unknown setting 'rnk'; nearest: rank
    """

    model: str = Field(description="folder, built-in name (minilm, tiny-llama) or hub name")
    data: str = Field(description="training data: file, folder or built-in set")
    task: Task = Field(description="classify, lm, sft or embed")
    out: Path = Field(description="folder of the results")

    test: str | None = Field(None, description="file for the final figures; a built-in set brings its own test part")
    valid: Annotated[float | str, BeforeValidator(_fraction_or_path)] = Field(
        0.1, description="file for evaluation during training, or the share of the training rows held out for it; 0 means none"
    )
    columns: str | dict[str, str] | None = Field(None, description="columns of the files: label=category, or all by order")
    encoding: str | None = Field(None, description="of text files; UTF-8 by default")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="at most so many training rows")

    method: str = Field("lora", description="a method of `rankfold methods`, or a chain such as magnitude+lora+init:pissa")
    rank: Annotated[int, Field(ge=1)] | None = Field(None, description="rank of the change, for methods that have one")
    set: Annotated[dict[str, Any], BeforeValidator(parse_set)] = Field(
        default_factory=dict, description="further options of the method: part.option=value"
    )
    targets: Names = Field(("all-linear",), description="which weights: all-linear, names, globs")
    exclude: Names = Field((), description="patterns taken out again")
    regex: bool = Field(False, description="patterns are regular expressions")
    extras: Names = Field(
        (),
        description="what trains whole in copies of the adapter: modules and parameters by name or glob, biases (of the adapted "
        "modules), all-biases, norms, or rows of a weight: embed_tokens[50:52]; a new head is added by itself",
    )

    lr: Annotated[float, Field(gt=0)] | None = Field(None, description="learning rate")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="passes over the training rows")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="stop after so many steps, whatever epochs says")
    batch_size: Annotated[int, Field(ge=1)] | None = Field(None, description="rows of one forward pass")
    grad_accum: Annotated[int, Field(ge=1)] = Field(1, description="batches of one step")
    max_length: Annotated[int, Field(ge=2)] | None = Field(None, description="tokens of a row; longer rows are cut, and counted")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decay of the change")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest norm of the gradient; 0 means no clipping")
    schedule: Schedule | None = Field(None, description="of the learning rate after the warm-up: constant, linear or cosine")
    warmup: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="share of the steps over which the rate rises")
    patience: Annotated[int, Field(ge=1)] | None = Field(None, description="stop after so many evaluations without a new best")
    evaluations: Annotated[int, Field(ge=0)] = Field(0, description="evaluations over the run; 0 means one an epoch")
    keep_best: bool = Field(True, description="end with the state of the best evaluation, not with the last")
    temperature: Annotated[float, Field(gt=0)] = Field(0.05, description="embed: divisor of the similarities in the loss")

    seed: Annotated[int, Field(ge=0)] = Field(0, description="of every random choice")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, mps; the best at hand by default")
    dtype: Dtype = Field("float32", description="of the frozen base in memory")
    quantise: Packed | None = Field(None, description="store the frozen linear layers in few bits: int8, int4, nf4 or bnb-int8")
    bf16: bool = Field(False, description="compute in bfloat16 (autocast); what trains stays float32")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: slower, less memory")
    plan: Literal["auto", "fused", "structured", "effective", "plain"] = Field(
        "auto", description="how changes are computed: by the cheapest plan, or by the one named"
    )
    memory: Literal["auto", "keep", "recompute"] = Field("auto", description="keep what the backward pass needs, or recompute it")
    tokenizer: str | None = Field(None, description="folder, name, or `bytes`; the model's own by default")

    resume: bool = Field(False, description="go on from the last checkpoint in `out`")
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(
        10.0, description="between checkpoints; 0 means only when interrupted"
    )
    dry_run: bool = Field(False, description="show the sites, parameters and memory, and stop")
    quiet: bool = Field(False, description="print nothing but errors")

    def filled(self) -> AdaptSettings:
        """The same with every None that has a default of its task replaced by it."""
        defaults = DEFAULTS[self.task]
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=missing)


class PredictSettings(_Settings):
    """One run of `rankfold predict`."""

    model: str = Field(description="the base that the adapter was trained for")
    adapter: Path | None = Field(None, description="folder of the adapter; none means the base alone")
    data: str = Field(description="file, folder or built-in set; only the input columns are read")
    out: Path = Field(description=".csv, .tsv or .jsonl; .npy for embeddings")
    task: Task | None = Field(None, description="what the adapter was trained for, by default")
    columns: str | dict[str, str] | None = Field(None, description="columns of the file")
    encoding: str | None = Field(None, description="of text files; UTF-8 by default")
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="rows of one forward pass")
    max_length: Annotated[int, Field(ge=2)] | None = Field(None, description="tokens of a row; as in training by default")
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(128, description="lm, sft: tokens to write")
    device: str | None = Field(None, description="cpu, cuda, ...; the best at hand by default")
    quantise: Packed | Literal["none"] | None = Field(
        None, description="store the base's linear layers in few bits, or `none`; as in training by default"
    )
    tokenizer: str | None = Field(None, description="folder, name, or `bytes`; the one of training by default")
    force: bool = Field(False, description="take a base with another fingerprint all the same")
    quiet: bool = Field(False, description="print nothing but errors")

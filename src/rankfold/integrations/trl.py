"""TRL's SFTTrainer for adapted models.

rf.adapt(model, "dora", rank=16)
SFTTrainer(model, SFTConfig(...), train_dataset=..., processing_class=tokenizer).train()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rankfold.errors import LayoutError, MissingExtra, OptionError

from .admission import adaptation_within
from .mixin import TrainsAdapter

try:
    import trl
except ImportError as error:
    raise MissingExtra.of("rankfold.integrations.trl", "trl", "integrations") from error

__all__ = ["SFTTrainer"]


class SFTTrainer(TrainsAdapter, trl.SFTTrainer):
    """TRL's SFTTrainer that trains the adapter of a model; arguments are TRL's own.

    TRL computes the loss from the output head's stored weight, chunk by chunk, without calling the head. So an adapter at the
    head, or a copy of it among the extras, would never train: that is refused.

    Raises:
        LayoutError: the head is adapted; and as `TrainsAdapter`.
        OptionError: `peft_config`: the method is chosen in `rf.adapt`.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
        if options.get("peft_config") is not None:
            raise OptionError("peft_config: the model carries an adapter of rankfold; its method and rank are those of rf.adapt")
        if not isinstance(model, nn.Module):
            super().__init__(model, args, *rest, **options)
            return
        _require_plain_head(model)
        with _masters_kept(model):
            super().__init__(model, args, *rest, **options)


def _require_plain_head(model: Any) -> None:
    head = model.get_output_embeddings()
    host = None if head is None else head.__dict__.get("_rankfold")
    if host is not None and not host.empty:
        raise LayoutError(
            f"{host.path} is adapted, and TRL's loss reads its stored weight without calling it: the adapter there would not "
            f"train. Leave it out (exclude={host.path!r}; rows of a tied embedding are rows of the head), or train with "
            f"rankfold.integrations.transformers.Trainer"
        )


@contextmanager
def _masters_kept(model: nn.Module) -> Iterator[None]:
    """TRL rounds everything that trains on a quantised base to bfloat16 when it is made; ours stay as they are stored."""
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    ours = adaptation_within(model).parameters() if quantised else []
    for p in ours:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in ours:
            p.requires_grad_(True)

"""sentence-transformers' Trainer for models whose encoder is adapted.

model = SentenceTransformer(...)
rf.adapt(model[0].model, "dora", rank=16)         # the encoder: the model around it stays savable
SentenceTransformerTrainer(model, args, train_dataset=..., loss=...).train()
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rankfold.errors import LayoutError, MissingExtra, OptionError

from .mixin import TrainsAdapter

try:
    import sentence_transformers
except ImportError as error:
    raise MissingExtra.of("rankfold.integrations.sentence_transformers", "sentence-transformers", "integrations") from error

__all__ = ["SentenceTransformerTrainer"]


class SentenceTransformerTrainer(TrainsAdapter, sentence_transformers.SentenceTransformerTrainer):
    """sentence-transformers' Trainer that trains the adapter of an encoder; arguments are that library's own.

    Raises:
        LayoutError: a loss with parameters of its own, which would be in no checkpoint; and as `TrainsAdapter`.
        OptionError: `learning_rate_mapping`: rates by parameter are the method's update's.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
        if getattr(args, "learning_rate_mapping", None):
            raise OptionError(
                "learning_rate_mapping: the method's update sets the rates (update:loraplus: one for each factor); leave it out"
            )
        super().__init__(model, args, *rest, **options)
        self._require_plain_loss()

    def _require_plain_loss(self) -> None:
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        known = {id(p) for p in self.model.parameters()}
        for loss in losses:
            own = (
                [n for n, p in loss.named_parameters() if p.requires_grad and id(p) not in known]
                if isinstance(loss, nn.Module)
                else []
            )
            if own:
                raise LayoutError(
                    f"{type(loss).__name__} trains parameters of its own ({', '.join(own[:3])}), which would be in no "
                    f"checkpoint. Use a loss without, or make it a module of the model: rf.adapt(..., extras=...)"
                )

"""transformers' Trainer and Seq2SeqTrainer for adapted models.

model = AutoModelForCausalLM.from_pretrained(...)
rf.adapt(model, "dora", rank=16)
Trainer(model, TrainingArguments(...), train_dataset=...).train()

Importing this also makes `from_pretrained(..., experts_implementation="rankfold")` known (models with stacked experts).
"""

from __future__ import annotations

import transformers
import transformers.integrations.moe

from rankfold.core.kinds.experts import register

from .mixin import TrainsAdapter

__all__ = ["Seq2SeqTrainer", "Trainer"]

register()


class Trainer(TrainsAdapter, transformers.Trainer):
    """transformers' Trainer that trains the adapter of a model: the method's update and rank policy act, its loss terms are
    added, checkpoints hold the adapter and resume exactly, quantised bases are taken.

    Arguments are transformers' own; what it refuses, and why: see `TrainsAdapter`.
    """


class Seq2SeqTrainer(TrainsAdapter, transformers.Seq2SeqTrainer):
    """The same of transformers' Seq2SeqTrainer, which evaluates by `generate`."""

"""What the tests of the integrations share: tiny models, rows in a fixed order, and the loop that a Trainer is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import rankfold as rf
from rankfold.training.loop import LoopSettings, train

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "big", "small", "red", "old", "and", "in", "on", "house"]


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; made here, so that nothing is fetched."""
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[EOS]", "[BOS]", "[UNK]", *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]", unk_token="[UNK]"
    )


def texts(count: int, seed: int = 3) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=g).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g).tolist()) for n in lengths]


def rows(count: int = 18) -> list[dict[str, torch.Tensor]]:
    """Token rows of which some positions have no label, so that batches differ in how many terms their mean has."""
    g = torch.Generator().manual_seed(1)
    made = []
    for k in range(count):
        ids = torch.randint(3, 64, (10,), generator=g)
        labels = ids.clone()
        labels[: k % 5] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def batch(part: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in part]) for key in part[0]}


class InOrder:
    """Ready batches in the same order in every epoch: what train_sampling_strategy="sequential" gives."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, epoch: int, index: int) -> Any:
        return self.batches[index]


def terms(batch: dict[str, torch.Tensor]) -> float:
    return float((batch["labels"][:, 1:] != -100).sum())


def loop_losses(
    adaptation: rf.Adaptation, batches: list[Any], *, weigh: Any = terms, loss: Any = None, **settings: Any
) -> list[float]:
    defaults = {"lr": 0.02, "weight_decay": 0.1, "warmup": 0.0, "grad_accum": 2, "epochs": 2, "progress": False}
    settings = LoopSettings(**{**defaults, **settings})
    loss = loss or (lambda model, batch: model(**batch).loss)
    return train(adaptation.model, adaptation, InOrder(batches), loss, settings, weigh=weigh).losses


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    """Two epochs of batches of four, two a step: six steps; eighteen rows leave the third of an epoch one batch, of two rows."""
    defaults = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": 0.02,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**defaults, **options})


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def tensors(adaptation: rf.Adaptation) -> dict[str, torch.Tensor]:
    return {key: t.detach().clone() for key, t in adaptation.tensors().items()}


def assert_bitwise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key]), key

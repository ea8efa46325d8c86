"""TRL's SFTTrainer of rankfold.integrations: texts in, the loop's numbers, and what its chunked loss can't do."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from small_models import arguments, assert_bitwise, llama, loop_losses, losses, tensors, terms, texts, tokenizer

import rankfold as rf
from rankfold.errors import LayoutError, OptionError

trl = pytest.importorskip("trl")
from rankfold.integrations.trl import SFTTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL reports its use, but not from tests


def sft_arguments(folder, **options):
    return arguments(
        folder,
        trl.SFTConfig,
        **{"activation_checkpointing": False, "bf16": False, "max_length": 16, "loss_type": "nll", **options},
    )


def trainer_of(adaptation, folder, **options):
    data = Dataset.from_dict({"text": texts(18)})
    return SFTTrainer(adaptation.model, sft_arguments(folder, **options), train_dataset=data, processing_class=tokenizer())


def batches():
    """The same texts as the loop would have them: tokens, the end, padding without a label."""
    made = []
    coded = [tokenizer()(text)["input_ids"] + [1] for text in texts(18)]
    for start in range(0, len(coded), 4):
        part = coded[start : start + 4]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


@pytest.mark.parametrize("method", ["lora", "dora+update:loraplus", "adalora"])
def test_losses_are_those_of_the_loop(method, tmp_path):
    options = (
        {"rank": 4} if method != "adalora" else {"rank": 3, "adalora.target": 2, "adalora.warmup": 0.2, "adalora.final": 0.2}
    )
    trainer = trainer_of(rf.adapt(llama(), method, seed=1, **options), tmp_path)
    trainer.train()
    expected = loop_losses(rf.adapt(llama(), method, seed=1, **options), batches(), weigh=terms)
    assert len(expected) == 6
    assert losses(trainer) == pytest.approx(expected, abs=1e-6)
    assert expected[-1] < expected[0]


def test_checkpoints_hold_the_adapter_and_resume_exactly(tmp_path):
    whole = trainer_of(rf.adapt(llama(), "dropout+lora", seed=1, p=0.1), tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    names = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter.json", "adapter.safetensors"} <= names
    assert "model.safetensors" not in names
    fresh = trainer_of(rf.adapt(llama(), "dropout+lora", seed=1, p=0.1), tmp_path)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(fresh) == losses(whole)
    assert_bitwise(tensors(fresh.adaptation), tensors(whole.adaptation))


def test_a_base_in_few_bits_trains_as_by_the_loop(tmp_path):
    pytest.importorskip("torchao")
    made = []
    for _ in range(2):
        model = llama()
        rf.quantise(model, "int8")
        made.append(rf.adapt(model, "lora", rank=4, seed=1))
    trainer = trainer_of(made[0], tmp_path)
    trainer.train()
    assert losses(trainer) == pytest.approx(loop_losses(made[1], batches(), weigh=terms), abs=1e-6)


@pytest.mark.parametrize("options", [{"targets": ["lm_head", "q_proj"]}, {"extras": ["lm_head"]}])
def test_an_adapted_head_is_refused(options, tmp_path):
    adaptation = rf.adapt(llama(), "lora", rank=2, **options)
    with pytest.raises(LayoutError, match=r"lm_head is adapted, and TRL's loss reads its stored weight"):
        trainer_of(adaptation, tmp_path)


def test_peft_config_and_names_are_refused(tmp_path):
    adaptation = rf.adapt(llama(), "lora", rank=2)
    data = Dataset.from_dict({"text": texts(4)})
    with pytest.raises(OptionError, match="peft_config"):
        SFTTrainer(adaptation.model, sft_arguments(tmp_path), train_dataset=data, peft_config=SimpleNamespace())
    with pytest.raises(LayoutError, match="load it and adapt it first"):
        SFTTrainer("some/model", sft_arguments(tmp_path), train_dataset=data)


def test_masters_on_a_quantised_base_stay_float32(tmp_path):
    """TRL rounds what trains there to bfloat16 when it is made."""
    adaptation = rf.adapt(llama(), "lora", rank=4, seed=1)
    before = tensors(adaptation)
    adaptation.model.is_loaded_in_4bit = True
    trainer_of(adaptation, tmp_path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adaptation.parameters())
    assert_bitwise(tensors(adaptation), before)

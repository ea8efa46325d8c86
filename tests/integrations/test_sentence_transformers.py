"""sentence-transformers over an adapted encoder: encode, save, and its Trainer."""

import pytest
import torch
from datasets import Dataset
from small_models import InOrder, arguments, assert_bitwise, losses, tensors, texts, tokenizer
from transformers import BertConfig, BertModel

import rankfold as rf
from rankfold.errors import LayoutError, OptionError
from rankfold.training.loop import LoopSettings, train

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses as loss_functions  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402

from rankfold.integrations.sentence_transformers import SentenceTransformerTrainer  # noqa: E402

QUERIES, ANSWERS = texts(16, seed=5), texts(16, seed=6)


@pytest.fixture
def folder(tmp_path):
    """A BERT and its tokenizer on disk: what the library starts from."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def made(folder):
    encoder = modules.Transformer(str(folder))
    pooling = modules.Pooling(32, pooling_mode="mean")
    return sentence_transformers.SentenceTransformer(modules=[encoder, pooling], device="cpu")


def inner(model):
    return model[0].model


def adapted(folder, method="lora", **options):
    model = made(folder)
    return model, rf.adapt(inner(model), method, rank=4, seed=1, exclude=["pooler*"], **options)


def shake(adaptation):
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(k))


def test_encode_is_the_adapted_function_and_saving_writes_the_base(folder, tmp_path):
    model = made(folder)
    plain = model.encode(QUERIES, convert_to_tensor=True)
    adaptation = rf.adapt(inner(model), "dora", rank=4, exclude=["pooler*"])
    shake(adaptation)
    changed = model.encode(QUERIES, convert_to_tensor=True)
    assert (changed - plain).norm() > 0.05 * plain.norm()
    coded = tokenizer()(QUERIES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = inner(model)(**coded).last_hidden_state
    mask = coded["attention_mask"][..., None].float()
    torch.testing.assert_close(changed, (hidden * mask).sum(1) / mask.sum(1), rtol=1e-5, atol=1e-6)
    model.save(str(tmp_path / "saved"))
    adaptation.save(tmp_path / "adapter")
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.encode(QUERIES, convert_to_tensor=True), plain)
    rf.load(inner(again), tmp_path / "adapter")
    torch.testing.assert_close(again.encode(QUERIES, convert_to_tensor=True), changed)
    with adaptation.disabled():
        assert torch.equal(model.encode(QUERIES, convert_to_tensor=True), plain)


def trainer_of(model, tmp_path, **options):
    args = arguments(
        tmp_path, sentence_transformers.SentenceTransformerTrainingArguments, gradient_accumulation_steps=1, **options
    )
    data = Dataset.from_dict({"anchor": QUERIES, "positive": ANSWERS})
    return SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss_functions.MultipleNegativesRankingLoss(model))


def test_training_is_the_loop_s_and_resumes_exactly(folder, tmp_path):
    model, adaptation = adapted(folder, "dora+update:loraplus")
    trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=5, batch_sampler=in_order)
    trainer.train()
    other, expected = adapted(folder, "dora+update:loraplus")
    function = loss_functions.MultipleNegativesRankingLoss(other)
    pairs = [[other.preprocess(part[i : i + 4]) for part in (QUERIES, ANSWERS)] for i in range(0, 16, 4)]

    def loss(module, batch):
        return function([dict(features) for features in batch], None)

    settings = LoopSettings(lr=0.02, weight_decay=0.1, warmup=0.0, epochs=2, progress=False)
    record = train(inner(other), expected, InOrder(pairs), loss, settings).losses
    assert losses(trainer) == pytest.approx(record, abs=1e-6)
    assert sum(record[4:]) < sum(record[:4])
    assert {p.name for p in (tmp_path / "checkpoint-5").iterdir()} >= {"adapter.json", "adapter.safetensors", "optimizer.json"}
    assert not list((tmp_path / "checkpoint-5").rglob("model.safetensors"))
    model, fresh = adapted(folder, "dora+update:loraplus")
    again = trainer_of(model, tmp_path, batch_sampler=in_order)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(again) == losses(trainer)
    assert_bitwise(tensors(fresh), tensors(adaptation))


def in_order(dataset, batch_size, drop_last, **options):
    from sentence_transformers.base.sampler import DefaultBatchSampler

    return DefaultBatchSampler(torch.utils.data.SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def test_what_would_be_lost_is_refused(folder, tmp_path):
    model, _ = adapted(folder)
    args = arguments(tmp_path, sentence_transformers.SentenceTransformerTrainingArguments)
    data = Dataset.from_dict({"a": QUERIES, "b": ANSWERS, "label": [0, 1] * 8})
    loss = loss_functions.SoftmaxLoss(model, num_labels=2, sentence_embedding_dimension=32)
    with pytest.raises(LayoutError, match=r"SoftmaxLoss trains parameters of its own \(classifier.weight"):
        SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss)
    args.learning_rate_mapping = {"pooler": 1e-3}
    with pytest.raises(OptionError, match="learning_rate_mapping"):
        SentenceTransformerTrainer(model, args, train_dataset=data)
    with pytest.raises(LayoutError, match="has no adapter"):
        SentenceTransformerTrainer(
            made(folder), args.__class__(str(tmp_path), use_cpu=True, report_to="none"), train_dataset=data
        )

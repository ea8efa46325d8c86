"""What users asked of training in mixed precision, with heads of their own and with checkpointed activations (U16-U18)."""

import pytest
import torch
from small_models import arguments, llama, losses, rows
from transformers import LlamaConfig, LlamaForSequenceClassification

import rankfold as rf
from rankfold.integrations.transformers import Trainer


class Watched(Trainer):
    """Keeps the gradients that the first optimizer step gets."""

    first: dict

    def _clip_grad_norm(self, model):
        if not hasattr(self, "first"):
            self.first = {
                n: None if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad
            }
        return super()._clip_grad_norm(model)


def gradients(model, folder, data=None, **options):
    trainer = Watched(model, arguments(folder, max_steps=2, **options), train_dataset=data or rows())
    trainer.train()
    return trainer.first, losses(trainer)


def moving(model, method="dora", **options):
    """An adapter none of whose gradients is zero by its start."""
    adaptation = rf.adapt(model, method, rank=4, seed=1, **options)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adaptation.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return adaptation


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_u18_gradient_checkpointing_gives_gradients(reentrant, tmp_path):
    model, other = llama(), llama()
    moving(model), moving(other)
    plain, expected = gradients(other, tmp_path)
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found, here = gradients(model, tmp_path, **options)
    assert model.is_activation_checkpointing
    assert found.keys() == plain.keys()
    for name, grad in found.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, plain[name], rtol=1e-5, atol=1e-7)
    assert here == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_u17_no_unused_parameters(reentrant, tmp_path):
    """DDP waits for a gradient of everything that trains: with a head of the adapter's own there is one, also checkpointed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        num_labels=3,
    )
    model = LlamaForSequenceClassification(config)
    adaptation = moving(model, "lora", extras=["score"])
    data = [{"input_ids": row["input_ids"], "labels": torch.tensor(k % 3)} for k, row in enumerate(rows(16))]
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found, _ = gradients(model, tmp_path, data, **options)
    assert len(found) == len(adaptation.parameters())
    assert any("score" in name for name in found)
    assert [name for name, grad in found.items() if grad is None or grad.abs().max() == 0] == []
    assert not model.score.weight.requires_grad  # the base's head is not among them


@pytest.mark.parametrize("autocast", [False, True], ids=["as stored", "autocast"])
def test_u16_mixed_precision_between_the_factors(autocast, tmp_path):
    """A float32 and B bfloat16 on a bfloat16 base: trains, each with a gradient of its own dtype, near that of float32."""
    model, exact = llama().bfloat16(), llama()
    exact.load_state_dict(model.state_dict())
    mixed, reference = moving(model, "lora"), moving(exact, "lora")
    halves = 0
    with torch.no_grad():
        for (key, p), q in zip(mixed.tensors().items(), reference.tensors().values(), strict=True):
            if key.endswith("B"):
                p.data = p.data.bfloat16()
                halves += 1
            else:
                p.data = p.data.float()
            q.copy_(p)
    assert 0 < halves < len(mixed.tensors())
    found, here = gradients(model, tmp_path, bf16=autocast)
    expected, there = gradients(exact, tmp_path)
    dtypes = {p.dtype for p in mixed.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}
    for name, grad in found.items():
        assert grad.dtype == dict(model.named_parameters())[name].dtype
        want = expected[name]
        assert (grad.float() - want).norm() < 0.1 * want.norm(), name
    assert here == pytest.approx(there, rel=0.02)

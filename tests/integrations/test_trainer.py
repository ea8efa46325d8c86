"""transformers' Trainer of rankfold.integrations: the loop's numbers, files without the base, exact resume, refusals."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers
from small_models import InOrder, arguments, assert_bitwise, batch, llama, loop_losses, losses, rows, tensors, tokenizer
from transformers import TrainerCallback

import rankfold as rf
from rankfold.errors import CompositionError, FileError, InactiveError, LayoutError, OptionError
from rankfold.integrations.transformers import Seq2SeqTrainer, Trainer
from rankfold.training.contracts import POINTS, RankPolicy
from rankfold.training.loop import LoopSettings, train

ADALORA = {"rank": 3, "adalora.target": 2, "adalora.warmup": 0.2, "adalora.interval": 1, "adalora.final": 0.2}
METHODS = {"lora": {"rank": 4}, "dora+init:pissa+update:loraplus": {"rank": 4}, "adalora": ADALORA, "hra": {"rank": 4}}


def batches():
    data = rows()
    return [batch(data[i : i + 4]) for i in range(0, len(data), 4)]


def trained(method, folder, **options):
    adaptation = rf.adapt(llama(), method, seed=1, **METHODS.get(method, {}))
    trainer = Trainer(adaptation.model, arguments(folder, **options), train_dataset=rows())
    trainer.train()
    return trainer


# the loop's numbers


@pytest.mark.parametrize(("method", "schedule"), [*((m, "linear") for m in METHODS), ("lora", "cosine"), ("lora", "constant")])
def test_losses_and_tensors_are_those_of_the_loop(method, schedule, tmp_path):
    trainer = trained(method, tmp_path, lr_scheduler_type=schedule)
    other = rf.adapt(llama(), method, seed=1, **METHODS[method])
    expected = loop_losses(other, batches(), schedule=schedule)
    assert len(expected) == 6
    assert losses(trainer) == pytest.approx(expected, abs=1e-6)
    assert expected[-1] < expected[0]
    for key, value in tensors(other).items():  # by the norm: where a gradient is near zero, Adam makes its sign a whole step
        assert (trainer.adaptation.tensors()[key] - value).norm() <= 1e-3 * value.norm(), key


def test_a_term_of_the_method_is_added_once_a_step(tmp_path):
    """AdaLoRA's orthogonality term, whether the loss joins the batches of a step or the Trainer does."""

    def first(weight, joined):
        model = llama()
        adaptation = rf.adapt(model, "adalora", seed=1, **{**ADALORA, "adalora.orthogonality": weight})
        adaptation.optimizer(total_steps=6)
        term = sum(float(t.detach()) for t in adaptation.objectives().values())
        trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(8))
        trainer.model_accepts_loss_kwargs = joined
        trainer.train()
        return losses(trainer)[0], term

    for joined in (True, False):
        (none, _), (much, term) = first(0.0, joined), first(50.0, joined)
        assert term > 0.1
        assert much - none == pytest.approx(term, rel=1e-4)


@dataclass(frozen=True, kw_only=True)
class Recorder(RankPolicy):
    """Notes what it sees at its point of every step."""

    name: ClassVar[str] = "recorder"
    steps: ClassVar[bool] = True
    seen: ClassVar[list]

    def on_step(self, t, total, sites):
        grads = [s.grad("B").norm().item() for s in sites]
        self.seen.append([t, total, *grads, *(s.tensors["B"].norm().item() for s in sites)])
        return []


@pytest.mark.parametrize("point", POINTS)
def test_a_policy_acts_at_the_same_point_and_sees_the_same(point, tmp_path):
    def method():
        kind = type("Recorder", (Recorder,), {"point": point, "seen": []})
        return replace(rf.method("lora", rank=2), rank=kind())

    ours, theirs = method(), method()
    adaptation = rf.adapt(llama(), ours, seed=1)
    Trainer(adaptation.model, arguments(tmp_path, max_grad_norm=0.01), train_dataset=rows()).train()
    loop_losses(rf.adapt(llama(), theirs, seed=1), batches(), clip=0.01)
    assert len(theirs.rank.seen) == 6
    torch.testing.assert_close(torch.tensor(ours.rank.seen), torch.tensor(theirs.rank.seen), rtol=1e-3, atol=1e-6)


def test_adam_settings_reach_the_update(tmp_path):
    adaptation = rf.adapt(llama(), "lora", rank=2)
    options = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3}
    trainer = Trainer(adaptation.model, arguments(tmp_path, **options), train_dataset=rows(4))
    group = trainer.create_optimizer().param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-3)


def test_every_call_of_train_is_a_run_of_its_own(tmp_path):
    trainer = trained("adalora", tmp_path, max_steps=3)
    first = trainer.adaptation._get(None).engine
    trainer.train()
    second = trainer.adaptation._get(None).engine
    assert first is not second
    assert (second.step, second.calls) == (3, 3)


# files


def test_checkpoints_hold_the_adapter_and_not_the_base(tmp_path):
    adaptation = rf.adapt(llama(), "dora", rank=4, extras=["lm_head"])
    options = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = Trainer(adaptation.model, options, train_dataset=rows(), processing_class=tokenizer(), data_collator=batch)
    trainer.train()
    names = {p.name for p in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter.json", "adapter.safetensors", "optimizer.json", "optimizer.safetensors", "trainer_state.json"} <= names
    assert not any(n.startswith(("model", "pytorch_model", "optimizer.pt", "scheduler", "training_args.bin")) for n in names)
    assert "tokenizer.json" in names
    assert json.loads((tmp_path / "checkpoint-2" / "adapter.json").read_text())["trained"]["steps"] == 2
    trainer.save_model(tmp_path / "final")
    fresh = llama()
    loaded = rf.load(fresh, tmp_path / "final")
    assert_bitwise(tensors(loaded), tensors(adaptation))
    ids = torch.arange(3, 11)[None]
    assert torch.equal(fresh.eval()(ids).logits, adaptation.model.eval()(ids).logits)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


RESUMED = {"lora": {"rank": 4}, "adalora": ADALORA, "dropout+dora+init:pissa+update:loraplus": {"rank": 4, "p": 0.2}}


def resumable(method, folder, model=None, **options):
    model = model or llama(attention_dropout=0.1)
    if not hasattr(model, "rankfold"):
        rf.adapt(model, method, seed=1, **RESUMED[method])
    options = {"save_strategy": "steps", "save_steps": 50, "train_sampling_strategy": "random", **options}
    return Trainer(model, arguments(folder, lr_scheduler_type="cosine", warmup_steps=2, **options), train_dataset=rows())


@pytest.mark.parametrize(
    ("method", "at"), [("lora", 3), ("adalora", 2), ("dropout+dora+init:pissa+update:loraplus", 2)]
)  # two steps are within an epoch, three are an epoch
def test_resume_is_exact(method, at, tmp_path):
    whole = resumable(method, tmp_path / "whole")
    whole.train()
    part = resumable(method, tmp_path / "part", save_steps=at)
    part.add_callback(StopAfter(at))
    part.train()
    assert len(losses(part)) == at
    fresh = resumable(method, tmp_path / "part")
    fresh.train(resume_from_checkpoint=True)
    assert losses(fresh) == losses(whole)
    assert_bitwise(tensors(fresh.adaptation), tensors(whole.adaptation))
    ours, theirs = (t.adaptation._get(None).engine.state_dict() for t in (fresh, whole))
    assert ours["values"] == theirs["values"]
    assert_bitwise(ours["tensors"], theirs["tensors"])


def resume_elsewhere(folder):
    """In a new process: from what was saved alone."""
    model = llama(attention_dropout=0.1)
    rf.load(model, os.path.join(folder, "checkpoint-2"))
    trainer = resumable("adalora", folder, model)
    trainer.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-2"))
    print(json.dumps(losses(trainer)))


@pytest.mark.full
def test_resume_in_a_new_process(tmp_path):
    whole = resumable("adalora", tmp_path, save_steps=2)
    whole.train()
    code = f"from test_trainer import resume_elsewhere; resume_elsewhere({str(tmp_path)!r})"
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == losses(whole)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    trainer = resumable("lora", tmp_path, max_steps=3, save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()  # it is the last to be written
    fresh = resumable("lora", tmp_path, max_steps=3)
    fresh.train(resume_from_checkpoint=True)
    assert losses(fresh) == losses(trainer)


def test_what_can_not_be_resumed_says_so(tmp_path):
    trainer = resumable("lora", tmp_path, max_steps=1, save_only_model=True)
    trainer.train()
    with pytest.raises(FileError, match=r"no state of a run to go on from.*save_only_model"):
        resumable("lora", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(FileError, match="no whole checkpoint of an adapter"):
        resumable("lora", tmp_path / "empty").train(resume_from_checkpoint=True)
    saved = resumable("lora", tmp_path / "other", max_steps=1)
    saved.train()
    model = llama()
    rf.adapt(model, "dora", rank=4)
    with pytest.raises(FileError, match="holds a run of 'lora'"):
        resumable("lora", tmp_path / "other", model).train(resume_from_checkpoint=True)


def test_the_best_state_comes_back(tmp_path):
    adaptation = rf.adapt(llama(), "lora", rank=4)
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    args = arguments(tmp_path, metric_for_best_model="worse", greater_is_better=True, include_for_metrics=["loss"], **options)
    figures = iter([0.1, 0.9, 0.3, 0.2, 0.1, 0.0])
    trainer = Trainer(
        adaptation.model, args, train_dataset=rows(), eval_dataset=rows(2), compute_metrics=lambda _: {"worse": next(figures)}
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert_bitwise(tensors(adaptation), tensors(rf.load(llama(), tmp_path / "checkpoint-2")))
    assert any(not torch.equal(a, b) for a, b in zip(
        tensors(adaptation).values(), tensors(rf.load(llama(), tmp_path / "checkpoint-6")).values()
    ))  # fmt: skip


def test_an_upload_from_a_checkpoint_takes_the_adapter_along(tmp_path, monkeypatch):
    uploaded = []

    def upload(self, checkpoint_folder):
        uploaded.append({p.name for p in tmp_path.iterdir()})

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", upload)
    trainer = resumable("lora", tmp_path, max_steps=1)
    trainer.train()
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert {"adapter.json", "adapter.safetensors"} <= uploaded[0]
    assert "model.safetensors" not in uploaded[0]


# quantised bases


def quantised():
    """As transformers marks a model that it has quantised."""
    model = llama()
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(
        is_trainable=False, is_qat_trainable=False, quantization_config=SimpleNamespace(quant_method="x")
    )
    return model


def test_a_quantised_base_trains(tmp_path):
    model = quantised()
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, arguments(tmp_path), train_dataset=rows())
    rf.adapt(model, "lora", rank=4, seed=1)
    with pytest.raises(ValueError, match="purely quantized"):  # for transformers there are peft's adapters alone
        transformers.Trainer(model, arguments(tmp_path), train_dataset=rows())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows())
    assert not model._hf_peft_config_loaded
    trainer.train()
    assert losses(trainer) == losses(trained("lora", tmp_path))


def test_a_quantised_base_from_model_init_trains(tmp_path):
    def made():
        model = quantised()
        rf.adapt(model, "lora", rank=4, seed=1)
        return model

    trainer = Trainer(model_init=made, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert losses(trainer) == losses(trained("lora", tmp_path))


def packed(seed=1):
    """A base of torchao's int8, and an adapter."""
    pytest.importorskip("torchao")
    model = llama()
    rf.quantise(model, "int8")
    return rf.adapt(model, "dora", rank=4, seed=seed)


def test_a_base_in_few_bits_trains_as_by_the_loop_and_resumes_exactly(tmp_path):
    adaptation = packed()
    trainer = Trainer(adaptation.model, arguments(tmp_path, save_strategy="steps", save_steps=4), train_dataset=rows())
    trainer.train()
    assert losses(trainer) == pytest.approx(loop_losses(packed(), batches()), abs=1e-6)
    stored = sum(p.stat().st_size for p in (tmp_path / "checkpoint-4").glob("*.safetensors"))
    assert stored < 5 * sum(t.nbytes for t in adaptation.tensors().values())  # the adapter, its moments, heads of files
    again = Trainer(packed(seed=7).model, arguments(tmp_path), train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == losses(trainer)
    assert_bitwise(tensors(again.adaptation), tensors(adaptation))


@pytest.mark.full
def test_a_compiled_model_trains_and_is_saved_as_an_adapter(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager", "save_strategy": "steps", "save_steps": 6}
    trainer = trained("lora", tmp_path, **options)
    assert losses(trainer) == pytest.approx(losses(trained("lora", tmp_path / "plain")), abs=1e-6)
    names = {p.name for p in (tmp_path / "checkpoint-6").iterdir()}
    assert {"adapter.json", "adapter.safetensors"} <= names
    assert not any(n.startswith(("model", "pytorch_model")) for n in names)
    assert_bitwise(tensors(rf.load(llama(), tmp_path / "checkpoint-6")), tensors(trainer.adaptation))


# what it refuses


def test_a_model_must_carry_one_adapter_that_is_live(tmp_path):
    model = llama()
    with pytest.raises(LayoutError, match="has no adapter; give it one before the Trainer"):
        Trainer(model, arguments(tmp_path), train_dataset=rows())
    with pytest.raises(LayoutError, match="load it and adapt it first"):
        Trainer("some/model", arguments(tmp_path), train_dataset=rows())
    with pytest.raises(LayoutError, match="has no adapter"):
        Trainer(model_init=lambda: llama(), args=arguments(tmp_path), train_dataset=rows())
    adaptation = rf.adapt(model, "lora", rank=2)
    adaptation.fold()
    with pytest.raises(LayoutError, match="unfold"):
        Trainer(model, arguments(tmp_path), train_dataset=rows())
    adaptation.unfold()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(LayoutError, match=r"beside the adapter 1 parameters train \(lm_head.weight\).*extras="):
        Trainer(model, arguments(tmp_path), train_dataset=rows())


@pytest.mark.parametrize("what", ["deepspeed", "fsdp"])
def test_sharding_trainers_are_refused(what, tmp_path):
    model = llama()
    rf.adapt(model, "lora", rank=2)
    args = arguments(tmp_path)
    setattr(args, what, {"zero_optimization": {"stage": 3}} if what == "deepspeed" else ["full_shard"])
    with pytest.raises(LayoutError, match=f"{what}: .*Use DDP"):
        Trainer(model, args, train_dataset=rows())


def test_data_parallel_is_refused(tmp_path):
    model = llama()
    rf.adapt(model, "lora", rank=2)
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(LayoutError, match="2 devices in one process"):
        Trainer(model, args, train_dataset=rows())


def test_the_optimizer_is_the_method_s(tmp_path):
    model = llama()
    adaptation = rf.adapt(model, "lora+update:loraplus", rank=2)
    with pytest.raises(OptionError, match=r"optim='adafactor'.*update:NAME"):
        Trainer(model, arguments(tmp_path, optim="adafactor"), train_dataset=rows())
    brought = torch.optim.SGD(adaptation.parameters(), lr=0.1)
    with pytest.raises(CompositionError, match="update 'loraplus' would not act"):
        Trainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(brought, None))


def test_another_optimizer_may_stand_in_for_adamw(tmp_path):
    adaptation = rf.adapt(llama(), "lora", rank=4, seed=1)
    brought = torch.optim.SGD(adaptation.parameters(), lr=0.1)
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = Trainer(adaptation.model, args, train_dataset=rows(), optimizers=(brought, None))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    other = rf.adapt(llama(), "lora", rank=4, seed=1)
    brought = torch.optim.SGD(other.parameters(), lr=0.1)
    again = Trainer(other.model, args, train_dataset=rows(), optimizers=(brought, None))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bitwise(tensors(adaptation), tensors(other))


def test_the_library_s_own_trainer_raises_where_the_method_needs_ours(tmp_path):
    """Law 6: its AdamW moved the tensors, so the next forward says that the policy did nothing."""
    model = llama()
    rf.adapt(model, "adalora", **ADALORA)
    with pytest.raises(InactiveError, match="another optimizer moved its tensors, so rank policy 'adalora' did nothing"):
        transformers.Trainer(model, arguments(tmp_path), train_dataset=rows()).train()
    plain = rf.adapt(llama(), "lora", rank=4, seed=1)
    trainer = transformers.Trainer(plain.model, arguments(tmp_path, weight_decay=0.0), train_dataset=rows())
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(trained("lora", tmp_path, weight_decay=0.0)), abs=1e-6)


def test_a_site_that_no_gradient_reaches_is_said_at_the_end(tmp_path):
    model = llama()
    adaptation = rf.adapt(model, "lora", rank=2)
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows())
    for p in (t.param for t in adaptation.trainables() if "layers.1.mlp.down_proj" in t.name):
        p.requires_grad_(True).register_hook(lambda g: None)
    model.model.layers[1].mlp.forward = lambda x: x * 0
    with pytest.raises(InactiveError, match=r"no gradient reached|bypassed|was never called|not called"):
        trainer.train()


def test_seq2seq_evaluates_by_generating(tmp_path):
    from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 5
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(8)]
    rf.adapt(model, "dora", rank=2, batches=[batch(data)])
    args = arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=2, predict_with_generate=True)
    trainer = Seq2SeqTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert len(trainer.predict(data).predictions) == 8


def test_the_loop_is_seen_to_differ(tmp_path):
    """The comparison with the loop can fail: half a learning rate is far outside of it."""
    adaptation = rf.adapt(llama(), "lora", rank=4, seed=1)
    settings = LoopSettings(lr=0.01, weight_decay=0.1, warmup=0.0, grad_accum=2, epochs=2, progress=False)
    other = train(adaptation.model, adaptation, InOrder(batches()), lambda m, b: m(**b).loss, settings).losses
    assert max(abs(a - b) for a, b in zip(losses(trained("lora", tmp_path)), other)) > 1e-4

"""The loop: what a step is, when it stops, and what it says when something is wrong."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.adapters.files import read_tensors
from rankfold.errors import DataError, InactiveError, LayoutError, NumericError, OptionError
from rankfold.linalg.random import Random
from rankfold.training.batches import Batches, as_source
from rankfold.training.loop import Interrupted, LoopSettings, train
from rankfold.training.schedules import rate_factor


def network(*sizes, scale=0.5):
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    for k, layer in enumerate(layers):
        layer.weight.data = Random("network", k).normal(tuple(layer.weight.shape), std=scale)
    return nn.Sequential(*layers)


def data(rows, key="data"):
    return Random(key, "x").normal((rows, 4)), Random(key, "y").normal((rows, 3))


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def tensors(adaptation):
    return [t.detach().clone() for t in adaptation.tensors().values()]


def test_a_step_is_that_of_a_plain_loop():
    x, y = data(6)
    model, other = network(4, 5, 3), network(4, 5, 3)
    adaptation, plain = rf.adapt(model, "lora", rank=2), rf.adapt(other, "lora", rank=2)
    train(model, adaptation, [(x, y)], loss, LoopSettings(epochs=3, lr=0.01, clip=0.1, schedule="constant", warmup=0))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(other, (x, y)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    for a, b in zip(tensors(adaptation), tensors(plain)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_batches_of_one_step_weigh_as_one_large_batch():
    x, y = data(8)
    parts = [(x[:6], y[:6]), (x[6:], y[6:])]
    made = []
    for batches, accumulated in (([(x, y)], 1), (parts, 2)):
        model = network(4, 5, 3)
        adaptation = rf.adapt(model, "lora", rank=2)
        settings = LoopSettings(lr=0.01, grad_accum=accumulated, max_steps=4, epochs=4)
        history = train(model, adaptation, batches, loss, settings, weigh=lambda batch: len(batch[0]))
        made.append((history, tensors(adaptation)))
    assert len(made[0][0].steps) == len(made[1][0].steps) == 4
    for a, b in zip(made[0][0].steps, made[1][0].steps):
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-5)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for a, b in zip(made[0][1], made[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # Adam's first steps divide by small gradients


def test_the_mean_of_unequal_batches_would_be_another_gradient():
    x, y = data(8)
    parts = [(x[:6], y[:6]), (x[6:], y[6:])]
    norms = []
    for weigh in (None, lambda batch: len(batch[0])):
        model = network(4, 5, 3)
        adaptation = rf.adapt(model, "lora", rank=2)
        norms.append(train(model, adaptation, parts, loss, LoopSettings(grad_accum=2), weigh=weigh).steps[0]["norm"])
    assert abs(norms[0] - norms[1]) > 1e-3 * norms[1]


def test_the_best_state_is_kept_and_patience_ends_the_run():
    figures = iter([0.5, 0.9, 0.7, 0.6, 0.8, 0.1])
    seen = []
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)

    def evaluate(module):
        assert not module.training
        seen.append(tensors(adaptation))
        return {"score": next(figures)}

    settings = LoopSettings(lr=0.1, epochs=9, metric="score", better="higher", patience=2, evaluate_first=True)
    history = train(model, adaptation, [data(4)], loss, settings, evaluate=evaluate)
    assert history.stopped == "early"
    assert [e["step"] for e in history.evaluations] == [0, 1, 2, 3]
    assert history.best_step == 1
    assert all(torch.equal(a, b) for a, b in zip(tensors(adaptation), seen[1]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[1], seen[3]))


def test_without_keep_best_the_last_state_stays():
    figures = iter([0.5, 0.9, 0.7])
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    seen = []

    def evaluate(module):
        seen.append(tensors(adaptation))
        return {"score": next(figures)}

    settings = LoopSettings(epochs=2, metric="score", better="higher", keep_best=False)
    train(model, adaptation, [data(4)], loss, settings, evaluate=evaluate)
    assert all(torch.equal(a, b) for a, b in zip(tensors(adaptation), seen[-1]))


@pytest.mark.parametrize(("evaluations", "steps"), [(0, [0, 3, 6]), (2, [0, 3, 6]), (4, [0, 2, 3, 5, 6]), (1, [0, 6])])
def test_evaluations_are_spread_over_the_run(evaluations, steps):
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    settings = LoopSettings(epochs=2, evaluations=evaluations)
    history = train(model, adaptation, [data(2, str(k)) for k in range(3)], loss, settings, evaluate=lambda m: {"loss": 1.0})
    assert [e["step"] for e in history.evaluations] == steps


def test_an_unknown_metric_is_named():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    with pytest.raises(OptionError, match="evaluate gives accuracy"):
        train(model, adaptation, [data(2)], loss, LoopSettings(metric="f1"), evaluate=lambda m: {"accuracy": 1.0})


def test_every_group_keeps_its_multiple_of_the_rate():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "loraplus", rank=2)
    made, rates = [], []
    own = adaptation.optimizer
    adaptation.optimizer = lambda *a, **k: made.append(own(*a, **k)) or made[-1]
    settings = LoopSettings(epochs=4, lr=0.01, schedule="linear", warmup=0)
    train(model, adaptation, [data(2)], loss, settings, on_step=lambda r: rates.append([g["lr"] for g in made[0].param_groups]))
    assert len(rates[0]) > 1
    assert rates[0][1] != rates[0][0]
    for now, factor in zip(rates, (1, 0.75, 0.5, 0.25)):
        assert now == pytest.approx([factor * rate for rate in rates[0]])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.5, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_schedules(schedule, expected):
    assert [rate_factor(t, 8, schedule, 0.25) for t in range(8)] == pytest.approx(expected)


def test_the_rate_of_the_optimizer_follows_the_schedule():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    history = train(model, adaptation, [data(2)], loss, LoopSettings(epochs=4, lr=0.2, schedule="linear", warmup=0.0))
    assert [r["lr"] for r in history.steps] == pytest.approx([0.2, 0.15, 0.1, 0.05])


# what is wrong


def test_a_loss_that_is_not_finite_names_the_module():
    model = network(4, 5, 6, 3)
    model[1].weight.data.fill_(3e38)
    adaptation = rf.adapt(model, "lora", rank=2)
    with pytest.raises(NumericError, match=r"step 1 of 1; first in the output of 1\b"):
        train(model, adaptation, [data(2)], loss, LoopSettings())


def test_a_batch_that_is_not_finite_is_named():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    x, y = data(2)
    with pytest.raises(NumericError, match="the batch itself, at 0"):
        train(model, adaptation, [(x * float("nan"), y)], loss, LoopSettings())


def test_a_gradient_that_is_not_finite_is_named_and_the_state_before_is_saved(tmp_path):
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    calls = []

    def breaks_later(module, batch):
        calls.append(len(calls))
        value = loss(module, batch)
        return value if len(calls) < 3 else value + (module(batch[0]) * 0).sum().sqrt()  # 0 at an infinite slope

    before = []
    with pytest.raises(
        NumericError, match=r"gradient became nan at step 3 of 9; first in the gradient at the output of 1\n.*saved"
    ):
        train(
            model, adaptation, [data(2)], breaks_later, LoopSettings(epochs=9, folder=tmp_path / "c"),
            on_step=lambda r: before.append(tensors(adaptation)),
        )  # fmt: skip
    assert all(torch.isfinite(t).all() for t in adaptation.tensors().values())
    other = network(4, 5, 3)
    from rankfold.training.saving import load

    again = load(other, tmp_path / "c" / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), before[-1]))


def test_a_tensor_that_is_not_finite_is_named():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    adaptation.tensors()["default/1/B"].data.fill_(float("inf"))
    with pytest.raises(NumericError, match="tensor B of site 1"):
        train(model, adaptation, [data(2)], loss, LoopSettings())


def test_an_adapter_that_is_off_raises():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    rf.adapt(model, "lora", rank=2, name="other")
    adaptation.use("other")
    with pytest.raises(InactiveError):
        train(model, adaptation, [data(2)], loss, LoopSettings(), name="default")


def test_a_site_that_never_gets_a_gradient_raises():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)

    def half(module, batch):
        module(batch[0])
        return module[1](torch.ones(2, 5)).square().mean()

    with pytest.raises(InactiveError, match="no gradient reached 0"):
        train(model, adaptation, [data(2)], half, LoopSettings())


@pytest.mark.parametrize("batches", [[], iter([1])])
def test_data_that_cannot_be_gone_over(batches):
    model = network(4, 5, 3)
    with pytest.raises(DataError):
        train(model, rf.adapt(model, "lora", rank=2), batches, loss)


@pytest.mark.parametrize(
    "setting", [{"lr": 0}, {"epochs": -1}, {"schedule": "step"}, {"clip": -1}, {"grad_accum": 0}, {"warmup": 2}]
)
def test_settings_outside_their_bounds(setting):
    with pytest.raises(OptionError, match=next(iter(setting))):
        LoopSettings(**setting)


def test_ctrl_c_without_a_folder_says_that_nothing_was_saved():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="after step 2 of 5; no folder"):
        train(
            model, adaptation, [data(2)], loss, LoopSettings(epochs=5),
            on_step=lambda r: os.kill(os.getpid(), signal.SIGINT) if r["step"] == 2 else None,
        )  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is handler


# what is left alone


def test_random_states_and_mode_are_as_before():
    import random

    import numpy as np

    model = network(4, 5, 3).eval()
    adaptation = rf.adapt(model, "dropout+lora", rank=2)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    train(model, adaptation, [data(2)], loss, LoopSettings(epochs=2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    assert not model.training


def test_the_base_is_not_written():
    model = network(4, 5, 3)
    before = [p.detach().clone() for p in model.parameters()]
    adaptation = rf.adapt(model, "full")
    train(model, adaptation, [data(2)], loss, LoopSettings(epochs=3, lr=0.1))
    base = [p for n, p in model.named_parameters() if not n.startswith("rankfold")]
    assert all(torch.equal(a, b) for a, b in zip(before, base))
    with adaptation.disabled():
        assert torch.equal(model(torch.eye(4)), network(4, 5, 3)(torch.eye(4)))


def test_the_method_s_own_terms_are_added():
    model = network(4, 5, 3)
    adaptation = rf.adapt(model, "lora", rank=2)
    plain = loss(model, data(2)).item()
    adaptation.objectives = lambda: {"pull": (adaptation.parameters()[0] - 1).square().sum()}
    pull = adaptation.objectives()["pull"].item()
    history = train(model, adaptation, [data(2)], loss, LoopSettings())
    assert history.losses[0] == pytest.approx(plain + pull)


# memory and dtype


@pytest.fixture
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    return BertModel(BertConfig(**sizes, hidden_dropout_prob=0.1))


def hidden_loss(model, batch):
    return model(input_ids=batch).last_hidden_state[..., :4].square().mean()


def test_gradient_checkpointing_changes_memory_and_nothing_else(bert):
    import copy

    ids = Random("ids").integers((4, 7), 30)
    made = []
    for on in (False, True):
        model = copy.deepcopy(bert)
        adaptation = rf.adapt(model, "lora", rank=2, exclude=["pooler.dense"])
        history = train(model, adaptation, [ids], hidden_loss, LoopSettings(epochs=3, gradient_checkpointing=on))
        made.append((history.losses, tensors(adaptation)))
        assert not model.encoder.layer[0].gradient_checkpointing
        assert not model.embeddings.word_embeddings._forward_hooks
    assert made[0][0] == made[1][0]
    assert all(torch.equal(a, b) for a, b in zip(made[0][1], made[1][1]))


def test_gradient_checkpointing_is_really_on(bert):
    adaptation = rf.adapt(bert, "lora", rank=2, exclude=["pooler.dense"])
    calls = []
    bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda m, a: calls.append(m.training))
    train(bert, adaptation, [Random("ids").integers((2, 5), 30)], hidden_loss, LoopSettings(gradient_checkpointing=True))
    assert len(calls) == 2  # forward, and again for the backward pass


def test_a_model_without_gradient_checkpointing_is_refused():
    model = network(4, 5, 3)
    with pytest.raises(LayoutError, match="offers no gradient checkpointing"):
        train(model, rf.adapt(model, "lora", rank=2), [data(2)], loss, LoopSettings(gradient_checkpointing=True))


def test_bf16_computes_in_bfloat16_and_keeps_float32_masters(bert):
    adaptation = rf.adapt(bert, "lora", rank=2, exclude=["pooler.dense"])
    seen = set()
    bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    history = train(
        bert, adaptation, [Random("ids").integers((4, 7), 30)], hidden_loss, LoopSettings(epochs=4, bf16=True, lr=0.01)
    )
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in adaptation.parameters()} == {torch.float32}
    assert history.losses[-1] < history.losses[0]


# the order of data


def test_every_row_comes_once_an_epoch_in_another_order():
    source = Batches(range(50), list, size=8, seed=1)
    epochs = [[row for i in range(len(source)) for row in source.batch(e, i)] for e in range(3)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    again = Batches(range(50), list, size=8, seed=1)
    assert again.batch(2, 3) == source.batch(2, 3)
    assert Batches(range(50), list, size=8, seed=2).batch(2, 3) != source.batch(2, 3)


def test_rows_of_similar_length_share_a_batch():
    lengths = Random("lengths").integers((200,), 40).tolist()
    source = Batches(lengths, list, size=10, seed=1, length=lambda n: n)
    batches = [source.batch(0, i) for i in range(len(source))]
    assert sorted(n for b in batches for n in b) == sorted(lengths)
    padded = sum(max(b) * len(b) for b in batches) / sum(lengths)
    plain = Batches(lengths, list, size=10, seed=1)
    assert padded < 1.3 < sum(max(b) * 10 for b in (plain.batch(0, i) for i in range(20))) / sum(lengths)


def test_a_short_last_batch_can_be_left_out():
    assert len(Batches(range(10), list, size=4)) == 3
    assert len(Batches(range(10), list, size=4, drop_last=True)) == 2
    assert len(Batches(range(3), list, size=4, drop_last=True)) == 1


def test_ready_batches_are_shuffled_each_epoch():
    source = as_source(list("abcdefgh"), seed=0)
    orders = {"".join(source.batch(e, i) for i in range(8)) for e in range(4)}
    assert len(orders) == 4
    assert {"".join(sorted(o)) for o in orders} == {"abcdefgh"}


def test_two_processes_are_one_that_accumulates(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command, out, accumulated in (([sys.executable], "one", "2"), (launcher, "two", "1")):
        arguments = [*command, str(script), str(tmp_path / out), accumulated]
        ended = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert len(one["losses"]) == len(two["losses"]) == 6
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)

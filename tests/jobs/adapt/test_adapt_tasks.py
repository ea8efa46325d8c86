"""What the four tasks make of rows: tokens, masks, losses and figures, each against its definition."""

import math

import pytest
import torch
from torch import nn

from rankfold.errors import DataError
from rankfold.jobs.adapt.embed import info_nce, mean_pooled
from rankfold.jobs.adapt.lm import IGNORED, token_losses
from rankfold.jobs.adapt.task import pad, task_for
from rankfold.jobs.data import Table
from rankfold.jobs.models import load_model
from rankfold.linalg.random import Random

LABELS = ("bad", "good")


@pytest.fixture(scope="module")
def loaded():
    return {
        name: load_model("tiny-llama", name, labels=LABELS if name == "classify" else None, device="cpu")
        for name in ("classify", "lm", "sft", "embed")
    }


def table(**columns):
    return Table({name: tuple(values) for name, values in columns.items()}, "here")


def bytes_of(text):
    return [b + 3 for b in text.encode()]


# lm


def test_lm_cuts_running_text_into_windows_and_loses_nothing(loaded):
    task = task_for("lm", loaded["lm"], 8)
    rows = task.rows(table(text=["abcdefghij", "klm"]))
    assert [row["input_ids"] for row in rows] == [bytes_of("abcdefgh"), [*bytes_of("ij"), 1, *bytes_of("klm"), 1]]
    assert task.cut == 0


def test_lm_needs_two_tokens(loaded):
    task = task_for("lm", loaded["lm"], 8)
    with pytest.raises(DataError):
        task.rows(table(text=[""]))


def test_perplexity_is_that_of_the_definition(loaded):
    task = task_for("lm", loaded["lm"], 16)
    rows = task.rows(table(text=["hello there, you", "a", "some more text here to read"]))
    model = loaded["lm"].model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = row["input_ids"]
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            total -= sum(float(logp[i, ids[i + 1]]) for i in range(len(ids) - 1))
            count += len(ids) - 1
    for size in (1, 2, 5):
        found = task.evaluate(model, rows, size)
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_batches_weigh_by_their_labelled_tokens(loaded):
    task = task_for("sft", loaded["sft"], 32)
    rows = task.rows(table(prompt=["a", "b"], completion=["long answer", "x"]))
    batch = task.collate(rows)
    assert task.weight(batch) == len("long answer") + 1 + len("x") + 1
    total, count = token_losses(torch.zeros(2, batch["labels"].shape[1], 259), batch["labels"])
    assert float(total / count) == pytest.approx(math.log(259), rel=1e-6)


# sft


def test_sft_learns_the_completion_alone(loaded):
    task = task_for("sft", loaded["sft"], 64)
    (row,) = task.rows(table(prompt=["2+2?"], completion=["four"]))
    answer = [*bytes_of("four"), 1]
    assert row["input_ids"] == bytes_of("2+2?\n") + answer
    assert row["labels"] == [IGNORED] * 5 + answer


def test_sft_loss_has_no_part_of_the_prompt(loaded):
    task = task_for("sft", loaded["sft"], 64)
    model = loaded["sft"].model.eval()
    batch = task.collate(task.rows(table(prompt=["one", "a longer prompt"], completion=["yes", "no"])))
    expected, count = 0.0, 0
    with torch.no_grad():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
            n = int(mask.sum())
            logp = model(ids[None, :n]).logits[0].double().log_softmax(-1)
            for i in range(n - 1):
                if labels[i + 1] != IGNORED:
                    expected, count = expected - float(logp[i, ids[i + 1]]), count + 1
    assert count == len("yes") + 1 + len("no") + 1
    assert task.loss(model, batch).item() == pytest.approx(expected / count, rel=1e-5)


def test_sft_cuts_the_beginning_of_the_prompt_first(loaded):
    task = task_for("sft", loaded["sft"], 8)
    rows = task.rows(table(prompt=["abcdefghij", "p"], completion=["xyz", "a very long answer"]))
    assert rows[0]["input_ids"] == [*bytes_of("hij\n"), *bytes_of("xyz"), 1]
    assert len(rows[1]["input_ids"]) == 8
    assert rows[1]["labels"].count(IGNORED) == 1  # one token of the prompt stays
    assert task.cut == 2
    assert task.prompts(table(prompt=["0123456789"]))[0]["input_ids"] == bytes_of("3456789\n")


def test_a_chat_template_is_used(loaded):
    import copy

    tokenizer = copy.deepcopy(loaded["sft"].tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    with_chat = load_model("tiny-llama", "sft", device="cpu")
    with_chat.tokenizer = tokenizer
    task = task_for("sft", with_chat, 64)
    (row,) = task.rows(table(prompt=["hi"], completion=["yo"]))
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == "<user>hi<me>yo"
    assert row["labels"].count(IGNORED) == len("<user>hi<me>")


def test_writing_stops_and_does_not_depend_on_the_batch(loaded):
    task = task_for("sft", loaded["sft"], 64)
    model = loaded["sft"].model.eval()
    rows = task.prompts(table(prompt=["a", "what about this longer one", "xyz"]))
    alone = [next(task.predict(model, [row], 1, max_new_tokens=5)) for row in rows]
    together = list(task.predict(model, rows, 3, max_new_tokens=5))
    assert alone == together
    assert all(set(p) == {"text"} for p in together)


# classify


def test_classify_rows_and_unknown_labels(loaded):
    task = task_for("classify", loaded["classify"], 6)
    rows = task.rows(table(text=["fine", "awful film"], label=["good", "bad"]))
    assert [row["label"] for row in rows] == [1, 0]
    assert task.cut == 1
    assert len(rows[1]["input_ids"]) == 6
    assert rows[1]["input_ids"][-1] == 1  # the end mark stays
    with pytest.raises(DataError, match="superb"):
        task.rows(table(text=["x"], label=["superb"]))


def test_classify_figures_and_predictions_agree_whatever_the_batch(loaded):
    task = task_for("classify", loaded["classify"], 32)
    model = loaded["classify"].model.eval()
    texts = [f"text {'x' * k}" for k in range(7)]
    rows = task.rows(table(text=texts, label=[LABELS[k % 2] for k in range(7)]))
    one, many = task.evaluate(model, rows, 1), task.evaluate(model, rows, 4)
    assert one == pytest.approx(many, rel=1e-5)
    predictions = list(task.predict(model, rows, 3))
    right = sum(p["label"] == LABELS[r["label"]] for p, r in zip(predictions, rows))
    assert one["accuracy"] == right / 7
    for p in predictions:
        assert sum(p["probabilities"].values()) == pytest.approx(1)
        assert p["probability"] == max(p["probabilities"].values()) == p["probabilities"][p["label"]]


# embed


def slow_info_nce(q, d, same, temperature):
    q, d = q.double(), d.double()
    total = 0.0
    for left, right in ((q, d), (d, q)):
        for i in range(len(left)):
            allowed = [j for j in range(len(left)) if j == i or not same[i, j]]
            scores = [math.exp(float(left[i] @ right[j]) / temperature) for j in allowed]
            total -= math.log(math.exp(float(left[i] @ right[i]) / temperature) / sum(scores))
    return total / (2 * len(q))


def test_info_nce_is_its_definition():
    q = nn.functional.normalize(Random("q").normal((5, 6)), dim=-1)
    d = nn.functional.normalize(Random("d").normal((5, 6)), dim=-1)
    same = torch.eye(5, dtype=torch.bool)
    same[1, 3] = same[3, 1] = True
    assert float(info_nce(q, d, same, 0.2)) == pytest.approx(slow_info_nce(q, d, same, 0.2), rel=1e-5)
    assert float(info_nce(q, d, torch.eye(5, dtype=torch.bool), 0.2)) != pytest.approx(slow_info_nce(q, d, same, 0.2), rel=1e-3)


def test_copies_are_no_wrong_answers(loaded):
    task = task_for("embed", loaded["embed"], 32)
    rows = task.rows(table(query=["a", "b", "a", "c"], document=["one", "two", "three", "two"]))
    assert task.collate(rows)["same"].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_pooling_leaves_padding_out(loaded):
    task = task_for("embed", loaded["embed"], 32)
    model = loaded["embed"].model.eval()
    texts = ["short", "a rather longer text"]
    rows = task.rows(table(query=texts))
    together = list(task.predict(model, rows, 2))
    with torch.no_grad():
        for text, vector in zip(texts, together):
            hidden = model(torch.tensor([[*bytes_of(text), 1]])).last_hidden_state[0].double().mean(0)
            torch.testing.assert_close(vector.double(), hidden / hidden.norm(), rtol=1e-4, atol=1e-6)


def test_mean_pooled_is_float32_and_of_length_one():
    pooled = mean_pooled(torch.ones(2, 3, 4, dtype=torch.bfloat16), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(2))


def test_ranks_count_no_copy_of_the_right_answer_as_a_rival(loaded):
    task = task_for("embed", loaded["embed"], 32)
    model = loaded["embed"].model.eval()
    rows = task.rows(table(query=["q", "r"], document=["the same", "the same"]))
    ranks, similarity = task.ranks(model, rows, 2)
    assert similarity.shape == (2, 2)
    assert ranks.tolist() == [1, 1]


def test_retrieval_figures_are_those_of_the_vectors(loaded):
    task = task_for("embed", loaded["embed"], 32)
    model = loaded["embed"].model.eval()
    queries, documents = [f"query number {k}" for k in range(6)], [f"{k} document {'z' * k}" for k in range(6)]
    rows = task.rows(table(query=queries, document=documents))
    q = torch.stack(list(task.predict(model, task.rows(table(query=queries)), 6)))
    d = torch.stack(list(task.predict(model, task.rows(table(document=documents)), 6)))
    scores = (q.double() @ d.double().T).tolist()
    ranks = [1 + sum(scores[i][j] > scores[i][i] for j in range(6) if j != i) for i in range(6)]
    found = task.evaluate(model, rows, 4)
    assert found["mrr"] == pytest.approx(sum(1 / r for r in ranks) / 6)
    assert found["recall@1"] == sum(r == 1 for r in ranks) / 6


def test_padding_left_and_right():
    ids, mask = pad([[5, 6], [7]], 0, left=True)
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_max_length_is_bounded_by_the_model(loaded):
    assert task_for("lm", loaded["lm"], 10_000).max_length == 512

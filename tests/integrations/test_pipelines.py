"""transformers' pipelines and ways of generating, on adapted models with a tokenizer that is made here."""

import pytest
import torch
from small_models import llama, texts, tokenizer
from transformers import BertConfig, BertForSequenceClassification, pipeline

import rankfold as rf


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3)
    ).eval()


def shaken(model, method, **options):
    adaptation = rf.adapt(model, method, rank=4, **options)
    for k, p in enumerate(adaptation.parameters()):
        p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(k))
    return adaptation


def pipe(task, model):
    return pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")


@pytest.mark.parametrize("method", ["lora", "magnitude+hra"])
def test_text_classification(method):
    model = bert()
    adaptation = shaken(model, method, extras=["classifier"])
    ready = pipe("text-classification", model)
    found = [{row["label"]: row["score"] for row in ready(text, top_k=None)} for text in texts(3)]
    for text, scores in zip(texts(3), found):
        logits = model(**tokenizer()(text, return_tensors="pt")).logits[0].softmax(-1)
        assert [scores[f"LABEL_{k}"] for k in range(3)] == pytest.approx(logits.tolist(), abs=1e-6)
    with adaptation.disabled():
        plain = [{row["label"]: row["score"] for row in ready(text, top_k=None)} for text in texts(3)]
    assert plain != found
    adaptation.remove()
    assert [{row["label"]: row["score"] for row in ready(text, top_k=None)} for text in texts(3)] == plain


def test_feature_extraction():
    model = bert().bert
    shaken(model, "dora", exclude=["pooler*"])
    features = torch.tensor(pipe("feature-extraction", model)(texts(1)[0]))
    torch.testing.assert_close(features, model(**tokenizer()(texts(1), return_tensors="pt")).last_hidden_state)


def test_text_generation():
    model = llama().eval()
    adaptation = shaken(model, "dora")
    ready = pipe("text-generation", model)
    options = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
    prompt = tokenizer()(texts(1), return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert ready(texts(1)[0], **options)[0]["generated_token_ids"] == expected[0].tolist()
    with adaptation.disabled():
        plain = ready(texts(1)[0], **options)[0]["generated_token_ids"]
    assert plain != expected[0].tolist()


# ways of generating: each equals the same search over a model whose weights are the changed ones

WAYS = {
    "beams": {"num_beams": 3},
    "beams that differ": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "top_k": 8, "temperature": 0.8},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


def dense(adaptation):
    """The model with W' written into plain weights: no adapter, no host."""
    changed = llama().eval()
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name, value in adaptation.folded_weights().items():
            parameters[name].copy_(value)
    return changed


@pytest.mark.parametrize("way", WAYS)
def test_generate_is_that_of_the_changed_weights(way):
    model = llama().eval()
    adaptation = shaken(model, "dora")
    other = dense(adaptation)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    found = []
    for m in (model, other):
        torch.manual_seed(0)
        found.append(m.generate(ids, max_new_tokens=8, pad_token_id=0, **{"do_sample": False, **WAYS[way]}))
    assert torch.equal(*found)
    assert not torch.equal(found[0], llama().eval().generate(ids, max_new_tokens=8, pad_token_id=0, do_sample=False))


def test_assisted_generation_with_the_base_as_the_draft():
    """A small model proposes, the adapted one decides: the text is the adapted one's own greedy text."""
    model = llama().eval()
    shaken(model, "lora")
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, assistant_model=llama().eval(), **options), model.generate(ids, **options))

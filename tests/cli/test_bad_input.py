"""A user's mistake is one clean message and an exit code: never a traceback, never a half-written file."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankfold as rf
from rankfold.cli import failures
from rankfold.cli.entry import run
from rankfold.errors import BudgetError, InactiveError, NumericError, RankfoldError
from rankfold.jobs.models import load_model

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "bad-input.md"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "run"
    adaptation = rf.adapt(load_model("tiny-llama", "lm").model, "lora", rank=2)
    for p in adaptation.parameters():
        p.data.fill_(0.01)
    adaptation.attached["default"].trained = {"task": "lm", "model": "tiny-llama", "tokenizer": "bytes"}
    return adaptation.save(folder)


def copied(adapter: Path, to: Path) -> Path:
    to.mkdir()
    for file in adapter.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def refused(result: tuple[int, str, str], *said: str, code: int = 2) -> None:
    got, out, err = result
    assert got == code, err
    assert "Traceback" not in out + err
    assert err.startswith("error: ")
    for words in said:
        assert re.search(words, err), err


# the command line itself


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adap"], "adapt"),
        (["adapt", "--modl", "x"], r"no option --modl; nearest: --model"),
        (["adapt", "--model"], "requires an argument"),
        (["export"], "missing argument"),
        (["export", "x"], "missing option '--to'"),
        (["papers", "gallore"], "nearest: galore"),
        (["demo", "--scale", "7"], "--scale"),
        (["adapt", "--config", "nowhere.yaml"], "nowhere.yaml: can't be read"),
    ],
)
def test_a_wrong_command_line(command, arguments, said):
    refused(command(*arguments), said)


def test_no_command_shows_the_help(command):
    code, out, err = command()
    assert code == 2
    assert "Commands:" in out + err


# adapters


def damage(folder: Path, how: str) -> None:
    tensors, record = folder / "adapter.safetensors", folder / "adapter.json"
    named = load_file(tensors)
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "oversized header":
        tensors.write_bytes((2**62).to_bytes(8, "little") + tensors.read_bytes()[8:])
    elif how == "NaN":
        next(iter(named.values())).view(-1)[0] = float("nan")
        save_file(named, tensors)
    elif how == "no JSON":
        record.write_text("{")
    elif how == "unknown field":
        record.write_text(json.dumps({**json.loads(record.read_text()), "evil": 1}))
    elif how == "missing field":
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "method"}))
    elif how == "newer":
        record.write_text(json.dumps({**json.loads(record.read_text()), "schema": 99}))
    elif how == "no tensors":
        tensors.unlink()
    elif how == "path in a name":
        q, path = "model.layers.0.self_attn.q_proj", "../../etc/passwd"
        save_file({name.replace(q, path): t for name, t in named.items()}, tensors)
        record.write_text(record.read_text().replace(q, path))
    elif how == "pickle":
        tensors.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n")
    elif how == "unknown method":
        record.write_text(record.read_text().replace('"lora"', '"lorra"'))
    elif how == "option of another kind":
        record.write_text(record.read_text().replace('"lora.rank": 2', '"lora.rank": {"a": 1}'))
    elif how == "wrong shape":
        record.write_text(record.read_text().replace('"rank": 2', '"rank": 3'))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "truncated"), ("oversized header", "header"), ("NaN", "NaN"), ("no JSON", "JSON"),
        ("unknown field", "evil"),
        ("missing field", "method"), ("newer", "schema|version|newer"), ("no tensors", "adapter.safetensors"),
        ("path in a name", "passwd"), ("pickle", "pickle"), ("unknown method", "bad: its method 'lorra'.*nearest: lora"),
        ("option of another kind", "bad: its method 'lora'.*rank: got"), ("wrong shape", "rank|shape|want"),
    ],
)  # fmt: skip
def test_a_damaged_adapter(command, adapter, tmp_path, how, said):
    folder = copied(adapter, tmp_path / "bad")
    damage(folder, how)
    refused(command("export", folder, "--to", "peft", "--out", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()
    code, out, err = command("inspect", folder)
    assert "Traceback" not in out + err
    assert code in (0, 2)


def test_an_undamaged_one_is_exported(command, adapter, tmp_path):
    code, out, _ = command("export", adapter, "--to", "peft", "--out", tmp_path / "out")
    assert code == 0
    assert "exact" in out
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_an_adapter_for_another_base(command, adapter, tmp_path):
    model = load_model("tiny-llama", "lm").model
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer_config.json").write_text("{}")
    refused(
        command("export", adapter, "--to", "peft", "--model", tmp_path / "other", "--out", tmp_path / "out"),
        "another base",
        "--force",
    )
    assert command("export", adapter, "--to", "peft", "--model", tmp_path / "other", "--out", tmp_path / "out", "--force")[0] == 0


@pytest.mark.parametrize("what", ["nowhere", "file", "empty folder"])
def test_no_adapter_there(command, adapter, tmp_path, what):
    place = {"nowhere": tmp_path / "nowhere", "file": adapter / "adapter.json", "empty folder": tmp_path}[what]
    refused(command("export", place, "--to", "peft", "--out", tmp_path / "out"), re.escape(str(place)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "pfet"], "nearest: peft"),
        (["--to", "folded", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["--to", "folded", "--rank", "1"], "no rank"),
        (["--to", "peft", "--task", "emed"], "nearest: embed"),
    ],
)
def test_what_export_can_not_do(command, adapter, tmp_path, arguments, said):
    refused(command("export", adapter, *arguments, "--out", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_export_does_not_write_into_the_adapter(command, adapter):
    refused(command("export", adapter, "--to", "peft", "--out", adapter), "own folder")


def test_a_folder_that_can_not_be_written(command, adapter, tmp_path):
    (tmp_path / "file").write_text("here")
    refused(command("export", adapter, "--to", "peft", "--out", tmp_path / "file"), "not a folder")
    assert (tmp_path / "file").read_text() == "here"


def test_an_unknown_model(command, tmp_path):
    refused(command("inspect", tmp_path / "nowhere"), "nowhere")
    refused(command("inspect", tmp_path), "neither an adapter nor a model")


# exit codes


class Stop(RankfoldError):
    """One of our own."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Stop("no"), 2), (BudgetError("no"), 2), (InactiveError("no"), 3), (NumericError("no"), 4),
        (KeyboardInterrupt(), 130), (KeyboardInterrupt("saved; go on with --resume"), 130),
        (FileNotFoundError(2, "No such file", "x.csv"), 2), (PermissionError(13, "Permission denied", "x.csv"), 2),
        (KeyError("x"), 1),
        (OSError("odd"), 1),
    ],
    ids=lambda e: type(e).__name__ if isinstance(e, BaseException) else str(e),
)  # fmt: skip
def test_each_kind_of_failure_has_its_exit_code(command, monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("rankfold.cli.methods._list", fail)
    got, _, err = command("methods")
    assert str(error.args[0] if len(error.args) == 1 else "") in err
    assert got == code
    assert "Traceback" not in err
    assert ("--debug" in err) == (code == 1)
    got, _, err = command("methods", "--debug")
    assert (got, "Traceback" in err) == (code, True)


def test_the_exit_codes_are_documented():
    text = DOCS.read_text(encoding="utf-8")
    codes = {c.exit_code for c in _tree(RankfoldError)} | {0, failures.UNEXPECTED, failures.MISTAKE, failures.STOPPED}
    assert {int(c) for c in re.findall(r"^\| (\d+) \|", text, re.M)} == codes


def _tree(cls: type) -> list[type]:
    return [cls, *(c for sub in cls.__subclasses__() if sub.__module__.startswith("rankfold") for c in _tree(sub))]


def test_a_warning_of_ours_is_one_line_and_no_error(capsys):
    import warnings

    from rankfold.cli import entry

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = entry._say
        warnings.warn_explicit("base in other storage", UserWarning, os.path.join("src", "rankfold", "x.py"), 1)
        warnings.warn_explicit("of a library", UserWarning, os.path.join("src", "torch", "x.py"), 1)
    assert capsys.readouterr().err == "warning: base in other storage\n"


def test_run_gives_a_code_and_never_raises():
    assert run(["methods", "nobody-knows-this"]) == 2

"""From rows to an adapter, its figures and its export, as a person types it."""

import json

import pytest

TRAIN = "text,label\n" + "".join(f"good {k},pos\nbad {k},neg\n" for k in range(8))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "run.yaml").write_text(
        "model: tiny-llama\ndata: train.csv\ntask: classify\nrank: 2\nbatch-size: 4\nmax_steps: 3\n"
    )
    return tmp_path


def test_adapt_inspect_predict_export(command, data):
    code, _, err = command(
        "adapt", "--config", "run.yaml", "--out", "run", "--method", "dora", "--set", "detach=false", "--quiet"
    )
    assert code == 0, err
    assert json.loads((data / "run" / "metrics.json").read_text())
    assert json.loads((data / "run" / "adapter.json").read_text())["options"]["magnitude.detach"] is False
    code, out, _ = command("inspect", "run")
    assert code == 0
    assert "neg, pos" in out
    assert (
        command("predict", "--model", "tiny-llama", "--adapter", "run", "--data", "train.csv", "--out", "p.csv", "--quiet")[0]
        == 0
    )
    assert len((data / "p.csv").read_text().splitlines()) == 17
    for to in ("peft", "folded"):
        code, out, err = command("export", "run", "--to", to, "--out", to)
        assert code == 0, err
        assert to in out


def test_a_dry_run_writes_nothing(command, data):
    assert command("adapt", "--config", "run.yaml", "--out", "run", "--dry-run")[0] == 0
    assert not (data / "run" / "adapter.json").exists()
    assert not (data / "run" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "lorra"], "nearest: lora"),
        (["--method", "lora+init:pissa+init:eva"], "init:pissa + init:eva: a method has one init"),
        (["--set", "init.iteratons=4"], "options of this method: structure:lora has rank"),
        (["--targets", "re:(", "--regex"], "no regular expression"),
        (["--targets", "re:q.*"], "regex=True"),
        (["--extras", "clasifier"], "unknown module or parameter for extras 'clasifier'; nearest: "),
        (["--method", "magnitude+mixture"], "magnitude"),
        (["--method", "vera+init:pissa"], "pissa"),
        (["--rank", "1000"], "larger than the matrix"),
        (["--targets", "q_prj"], "q_proj"),
        (["--set", "init.iterations=4"], "iterations"),
        (["--set", "alpha=-1"], "alpha"),
        (["--model", "no-such-folder/at-all/x"], "no-such-folder"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--columns", "label=category"], "category"),
        (["--device", "tpu9"], "tpu9"),
    ],
)
def test_a_mistake_is_one_message(command, data, arguments, said):
    code, _, err = command("adapt", "--config", "run.yaml", "--out", "run", *arguments)
    assert code == 2, err
    assert err.startswith("error: ") or "\nerror: " in err
    assert "Traceback" not in err
    assert said in err
    assert not (data / "run" / "adapter.json").exists()

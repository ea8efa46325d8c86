"""B9 needs a large GPU; here every line of it that needs no code generation runs on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import b9_gpu


def test_b9_runs_at_toy_size_and_prints_date_and_machine(tmp_path, capsys):
    b9_gpu.main(["--toy", "--cell", "dora", "--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "b9.json").read_text(encoding="utf-8"))["cells"]
    assert [*found] == ["toy-dora12-eager"]
    for row in found.values():
        assert [*row["rows"]] == ["floor", *b9_gpu.CONTENDERS]
        for figures in row["rows"].values():
            assert figures["tokens/s"] > 0
            assert figures["peak GB"] > 0
    said = capsys.readouterr().out
    assert next(iter(found.values()))["conditions"]["date"] in said
    assert "| ours |" in said


def toy(tmp_path, *more):
    b9_gpu.main(["--toy", "--cell", "lora4-eager", "--rounds", "1", "--out", str(tmp_path), *more])
    file = tmp_path / "b9.json"
    return json.loads(file.read_text(encoding="utf-8"))["cells"]["toy-lora4-eager"]["rows"] if file.exists() else {}


def test_a_competitor_that_does_not_fit_is_a_row(tmp_path, monkeypatch, capsys):
    native = b9_gpu.step

    def step(model, x, labels):
        if "Peft" in type(model).__name__:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")
        return native(model, x, labels)

    monkeypatch.setattr(b9_gpu, "step", step)
    rows = toy(tmp_path)
    assert rows["peft"]["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 8 GiB"
    assert rows["ours"]["x floor"] > 0
    assert "| peft | OutOfMemoryError: CUDA out of memory." in capsys.readouterr().out


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    assert toy(tmp_path, "--minutes", "0") == {}
    assert "time is up" in capsys.readouterr().out
    native = b9_gpu.Bench.row

    def cut_off(self, name, cell):
        if name == "peft, no autocast":
            raise KeyboardInterrupt
        return native(self, name, cell)

    monkeypatch.setattr(b9_gpu.Bench, "row", cut_off)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path)
    monkeypatch.setattr(b9_gpu.Bench, "row", native)
    seen = []
    monkeypatch.setattr(b9_gpu.Bench, "row", lambda self, name, cell: seen.append(name) or native(self, name, cell))
    rows = toy(tmp_path)
    assert [*rows] == ["floor", *b9_gpu.CONTENDERS]
    assert seen == ["floor", "peft, no autocast", "floor", "ours", "floor"]


def test_the_cells_of_a_gpu_are_those_of_the_page():
    keys = [cell.key for cell in b9_gpu.cells()]
    assert len(keys) == len(set(keys)) == 12
    assert {"1B-lora16-eager", "8B-dora384-compiled"} < {*keys}

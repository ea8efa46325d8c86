"""B9 needs a large GPU; here every line of it that needs no code generation runs on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest

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


def test_the_cells_of_a_gpu_are_those_of_the_page():
    keys = [cell.key for cell in b9_gpu.cells()]
    assert len(keys) == len(set(keys)) == 12
    assert {"1B-lora16-eager", "8B-dora384-compiled"} < {*keys}

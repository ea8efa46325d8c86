"""The benchmarks run at a toy size, say what the page needs, refuse to compare different functions, and resume."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the package

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import b1_step, render  # noqa: E402
from benchmarks.contenders import TOLERANCE, Cell, Differs, contenders  # noqa: E402
from benchmarks.protocol import Timing, interleave, kept_bytes, peak_bytes, relative  # noqa: E402
from benchmarks.reach import reach_of  # noqa: E402
from benchmarks.results import Results  # noqa: E402

TOY = Cell("tiny", "dora", 4, "float32", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    command.main(["--toy", "--out", str(out)])
    return out


def cells(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["cells"]


def test_every_benchmark_writes_cells_with_conditions(folder):
    for name in command.BENCHMARKS:
        found = cells(folder, name.lower())
        assert found, name
        for row in found.values():
            assert {"cpu", "threads", "load", "torch", "peft", "source"} <= row["conditions"].keys()


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_steps_have_times_ratios_with_intervals_on_both_clocks_and_errors(folder, name):
    for row in cells(folder, name).values():
        for pair in ("ours/floor", "peft/floor", "ours/peft"):
            for clock in ("cpu", "wall"):
                median, low, high = row["ratios"][pair][clock]
                assert 0 < low <= median <= high
        assert max(row["errors"].values()) < 1e-4
        assert all(ms > 0 for clock in row["ms"].values() for ms in clock.values())


def test_bytes_of_both_are_above_the_floor(folder):
    for row in cells(folder, "b4").values():
        for share in (row["kept/floor"], row["peak/floor"]):
            assert share["floor"] == 1
            assert min(share["ours"], share["peft"]) > 1


def test_fidelity_is_bitwise_where_it_must_be_and_shows_the_faults(folder):
    found = cells(folder, "b7")
    for row in found.values():
        if "disabled" in row:
            assert row["start"] == row["disabled"] == row["reload"] == row["fold"] == 0
            assert max(row["peft"], row["sum"]) <= 1e-6
            assert row["change"] > 1e-3
    assert {k: found[k]["ours"] < 1e-6 for k in ("U1", "U2", "U11", "U20")} == dict.fromkeys(("U1", "U2", "U11", "U20"), True)
    assert abs(found["U12"]["ours"] - 1) < 1e-6


def test_the_page_has_a_row_for_every_cell(folder):
    text = (folder / "benchmarks.md").read_text(encoding="utf-8")
    assert text == render.page(folder)
    assert text.count("\n## ") == len(command.BENCHMARKS)
    for name in ("b7", "b11", "calibrate"):
        for key in cells(folder, name):
            assert key in text
    assert "met" in text
    assert "nan" not in text


def test_a_second_run_measures_only_what_is_missing(folder, capsys):
    results = Results("B1", folder, resume=True)
    before = dict(results.cells)
    b1_step.run(results, "toy")
    assert results.cells == before
    results.cells[next(iter(before))]["conditions"]["source"] = "another state"
    b1_step.run(results, "toy")
    assert results.cells != before
    assert "ours" in capsys.readouterr().out


def test_a_comparison_of_different_functions_fails():
    trio = contenders(TOY)
    assert max(trio.check(TOLERANCE["float32"]).values()) < 1e-5
    with torch.no_grad():
        trio.pairs[0][1].mul_(1.01)  # ours alone
    with pytest.raises(Differs, match="differ beyond"):
        trio.check(TOLERANCE["float32"])


def test_the_norm_cache_is_not_carried_from_step_to_step():
    trio = contenders(TOY)
    versions = [mine._version for _, mine in trio.pairs]
    trio.step("ours")()
    assert all(mine._version > v for (_, mine), v in zip(trio.pairs, versions))


def test_competitors_take_turns():
    said = []
    timing = interleave({n: lambda n=n: said.append(n) for n in "abc"}, rounds=2, warm_up=1)
    assert "".join(said) == "abc" + "abccba"
    assert {len(v) for clock in (timing.cpu, timing.wall) for v in clock.values()} == {2}


def test_the_ratio_is_the_median_of_paired_ratios():
    slow = Timing({"a": [2.0, 20.0, 4.0], "b": [1.0, 10.0, 1.0]})  # the second round met a busy machine
    assert slow.ratio("a", "b")[0] == 2.0


def test_bytes_are_counted_once_and_without_what_is_known():
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, w)}
    assert kept_bytes(lambda: (x * w).exp(), known) == 40  # exp keeps its result; the product keeps x and w, which are known
    assert kept_bytes(lambda: (x * w).exp(), set()) == 120


def test_the_peak_forgets_what_was_freed():
    def one_after_the_other():
        for _ in range(5):
            torch.ones(100).sum()

    assert 400 <= peak_bytes(one_after_the_other) <= 800
    assert peak_bytes(lambda: [torch.ones(100) for _ in range(5)]) >= 2000


def test_relative_is_zero_only_for_equal_tensors():
    a = torch.tensor([1.0, 2.0])
    assert relative(a, a.clone()) == 0
    assert relative(a, torch.nextafter(a, torch.tensor(9.0))) > 0


def test_reach_is_missed_above_the_bound_or_beside_peft():
    reach = reach_of("B1", {"model": "llama", "method": "lora", "dtype": "bfloat16", "dropout": 0.0})
    assert reach.met(1.15, 0.92)
    assert not reach.met(1.151, 0.5)
    assert not reach.met(1.0, 0.93)


def test_the_page_of_the_committed_results_is_the_committed_page():
    from benchmarks.results import FOLDER

    assert render.page(FOLDER) == render.PAGE.read_text(encoding="utf-8")

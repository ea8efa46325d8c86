"""Law 9: two processes are one. DDP, and FSDP2 over a base that is cut, give what one process gives on the whole batch: starts
from W and from data, steps, folding, export, fingerprint, files, and runs that stop in one layout and go on in another.

One pair of processes runs all cells (`two_ranks.py`); the tests here compare what it left with one process.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import rankfold as rf
from rankfold.core.structure import trait
from rankfold.training.saving import load

from . import two_ranks
from .checks import Checks
from .subjects import shake, subjects
from .two_ranks import DDP, FSDP, HAND, HANDS, KINDS, LATE, LATES, MUTANTS, ONE

NEAR = 1e-6
"""Relative distance in float64 after three steps of Adam, which divides small gradients by their size."""
EXACT = 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    """Where the pair works, with what it is given and what it left. Workers of pytest-xdist share it."""
    mine = tmp_path_factory.getbasetemp()
    here = (mine if worker_id == "master" else mine.parent) / "two ranks"
    here.mkdir(exist_ok=True)
    with FileLock(here / "lock"):
        if not (here / "said").exists():
            (here / "said").write_text(run_the_pair(here))
    return here


def run_the_pair(here):
    """What both processes said; nothing where they ended well."""
    rows = "".join(f"{['red', 'blue'][k % 2]} thing {k},{['warm', 'cold'][k % 2]}\n" for k in range(40))
    (here / "rows.csv").write_text("text,label\n" + rows)
    two_ranks.saved_cell(ONE, here)
    for chain, layouts in two_ranks.CHAINS.items():
        if layouts[0] == ONE:
            two_ranks.leg(chain, 0, here)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (here / "output").open("w") as output:  # a file: a pipe that nobody reads would hold one of them, and so both
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "laws.two_ranks", str(here)],
            cwd=Path(__file__).parents[1], env=environment, stdout=output, stderr=output, timeout=400,
        )  # fmt: skip
    return "" if ended.returncode == 0 else f"code {ended.returncode}\n{(here / 'output').read_text()}"


@pytest.fixture(scope="module")
def pair(folder):
    """[{cell: {name: tensor}}] by process, and the errors."""
    assert (folder / "said").read_text() == ""
    found: list[dict[str, dict[str, torch.Tensor]]] = []
    for k in range(2):
        found.append({})
        for name, tensor in load_file(folder / f"{k}.safetensors").items():
            cell, _, key = name.partition("//")
            found[k].setdefault(cell, {})[key] = tensor
    errors = [json.loads((folder / f"{k}.json").read_text()) for k in range(2)]
    return found, errors


def given(pair, cell):
    """What both processes gave in a cell."""
    found, errors = pair
    for k in range(2):
        assert cell not in errors[k], f"{cell}, process {k}:\n{errors[k][cell]}"
        assert cell in found[k], f"{cell}, process {k}: not run; {errors[k].get('stopped')}"
    return [found[k][cell] for k in range(2)]


@functools.cache
def alone(method, block=two_ranks.Block):
    return two_ranks.method_cell(ONE, method, block)


def check_same(cell, found, expected, near=NEAR, but=(), only=""):
    """Law 9 in one cell: both processes have the names and values of one; of those that begin with `only`."""
    with Checks(f"law 9, {cell}") as check:
        for k, mine in enumerate(found):
            names = {n for n in expected if n not in but and n.startswith(only)}
            there = {n for n in mine if n not in but and n.startswith(only)}
            check.that(names == there != set(), f"process {k} gave {sorted(mine)}, one {sorted(expected)}")
            for name in sorted(names):
                if mine[name].dtype == torch.uint8:
                    check.bitwise(mine[name], expected[name], f"process {k}, {name}")
                else:
                    check.close(mine[name], expected[name], EXACT if name.startswith("start/") else near, f"process {k}, {name}")


def check_base(cell, found):
    """Laws 1 and 3 where the base is cut: off, and removed, the model has the base's bits; unfolded those from before."""
    with Checks(f"law 9, {cell}") as check:
        for mine in found:
            check.bitwise(mine["disabled"], mine["base"], "disabled")
            check.bitwise(mine["removed"], mine["base"], "removed")
            if "output folded" in mine:
                check.bitwise(mine["output unfolded"], mine["output"], "unfolded")
                check.bitwise(mine["fingerprint folded"], mine["fingerprint"], "fingerprint")
                check.close(mine["output folded"], mine["output"], EXACT, "folded")


CELLS = [(layout, m) for layout in (DDP, FSDP) for m in subjects()] + [(LATE, m) for m in LATES] + [(HAND, m) for m in HANDS]


@pytest.mark.parametrize(("layout", "method"), CELLS)
def test_two_processes_are_one(layout, method, pair):
    cell = f"{layout} {method}"
    # rounding errors of 1e-16 have no near relative distance
    check_same(cell, given(pair, cell), alone(method), but={"rounding"})
    check_base(cell, given(pair, cell))


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("layout", [DDP, FSDP])
def test_every_kind_of_site_is_one(layout, method, pair):
    """Convolutions, attention and experts beside linear layers."""
    cell = f"{layout} kinds {method}"
    check_same(cell, given(pair, cell), alone(method, two_ranks.Kinds), but={"rounding"})
    check_base(cell, given(pair, cell))


def test_every_kind_of_axis_is_among_the_cells():
    methods = [rf.method(m) for m in subjects()]
    assert {n for m in methods for n in m.init.needs} >= {"weights", "activations", "gradients"}
    assert any(m.rank.steps for m in methods)
    assert any(m.is_side for m in methods)
    assert any(trait(m.structure, "input_dependent") for m in methods)


def check_files(layout, found, here):
    """Every layout writes the bytes of one process."""
    with Checks(f"law 9, {layout}, files") as check:
        for mine in found:
            check.bitwise(mine["file"], here["file"], "adapter.safetensors")
            check.close(mine["output"], here["output"], EXACT, "output")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return two_ranks.saved_cell(ONE, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("layout", [DDP, FSDP, LATE])
def test_every_layout_writes_the_same_file(layout, pair, saved):
    check_files(layout, given(pair, f"{layout} saved"), saved)


@pytest.mark.parametrize("layout", [DDP, FSDP, LATE])
def test_every_layout_loads_what_any_other_wrote(layout, pair, folder, saved):
    found = given(pair, f"{layout} loaded")
    with Checks(f"law 9, {layout}, loading") as check:
        for mine in found:
            check.that(len(mine) == 4, f"loaded {sorted(mine)}")
            for source, output in mine.items():
                check.close(output, saved["output"], EXACT, source)
        model = two_ranks.net().eval()
        load(model, folder / f"saved-{layout}")
        with torch.no_grad():
            check.bitwise(model(two_ranks.batches()[0][0]), saved["output"], f"saved under {layout}, loaded in one process")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return two_ranks.whole_run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("chain", two_ranks.CHAINS)
def test_a_run_goes_on_in_another_layout(chain, pair, folder, whole_run, tmp_path):
    """Cut, then replicated, then alone: the run is the one that never stopped, with the same draws."""
    found = given(pair, f"chain {chain}") if two_ranks.CHAINS[chain][-1] != ONE else []
    if not found:
        shutil.copytree(folder / chain, tmp_path / chain)
        found = [two_ranks.leg(chain, len(two_ranks.CHAINS[chain]) - 1, tmp_path)]
    check_same(f"chain {chain}", found, whole_run)


def test_a_loop_of_ones_own_averages_before_it_clips(pair):
    check_same("bucket", given(pair, f"{FSDP} clipped"), two_ranks.clipped_cell(ONE))


@pytest.mark.parametrize("layout", [DDP, FSDP, LATE])
def test_u17_ddp_has_no_unused_parameters(layout, pair):
    check_same(f"{layout}, heads", given(pair, f"{layout} heads"), two_ranks.heads_cell(ONE, checkpointed=True))


@pytest.mark.parametrize("layout", [DDP, FSDP, LATE])
def test_u15_mixed_dtypes_shard(layout, pair):
    found, one = given(pair, f"{layout} mixed"), two_ranks.mixed_cell(ONE)
    assert all(t.dtype == torch.float32 for name, t in found[0].items() if name.startswith("tensor/"))
    check_same(f"{layout}, bf16 base", found, one, near=2e-2)


def test_adapters_cut_along_with_the_base_are_refused(pair):
    for mine in given(pair, "forgotten"):
        assert "ignored_params=set(model.rankfold.parameters())" in bytes(mine["message"].tolist()).decode()


@pytest.mark.parametrize("layout", [DDP, FSDP])
def test_a_policy_that_cuts_ranks_is_one_run_by_the_loop(layout, pair, tmp_path):
    one = two_ranks.halved_cell(ONE, tmp_path)
    assert all(1 in t.shape for name, t in one.items() if name.startswith("tensor/"))
    check_same(f"halved, {layout}", given(pair, f"halved {layout}"), one)


def test_new_tensors_under_ddp_are_refused(pair):
    """DDP averages the gradients of the tensors that it was given, so those of a policy's new ones would differ by process."""
    for mine in given(pair, "halved by ddp"):
        said = bytes(mine["message"].tolist()).decode()
        assert "rank policy 'halving' asks for a slice at step 1" in said
        assert "choose a policy that masks" in said


def test_the_job_gives_the_same_figures_and_one_process_writes(pair, folder):
    one, (first, second) = two_ranks.job_cell(ONE, folder), given(pair, "job")
    torch.testing.assert_close(first["figures"], one["figures"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second["figures"], one["figures"], rtol=1e-4, atol=1e-6)
    names = {p.name for p in (folder / f"job-{DDP}").iterdir()}
    assert names == {p.name for p in (folder / f"job-{ONE}").iterdir()}
    a, b = (load_file(folder / f"job-{layout}" / "adapter.safetensors") for layout in (ONE, DDP))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)


# What the law must reject


SEEN_IN = {
    "forgets_to_average": ("tensor/", "output", "exported/"),
    "forgets_to_join": ("start/",),
    "reads_its_own_piece": ("start/", "fingerprint", "folded/"),
    "forgets_the_new_pieces": ("output folded",),
}
"""What each fault must show in, taken alone."""


@pytest.mark.parametrize(("mutant", "only"), [(m, only) for m, names in SEEN_IN.items() for only in names])
def test_the_law_rejects(mutant, only, pair):
    assert SEEN_IN.keys() == MUTANTS.keys()
    with pytest.raises(AssertionError, match="law 9"):
        check_same(mutant, given(pair, f"mutant {mutant}"), alone(MUTANTS[mutant]), only=only)


@pytest.mark.parametrize("mutant", two_ranks.CHAIN_MUTANTS)
def test_the_law_rejects_a_run_that_forgets(mutant, pair, whole_run):
    with pytest.raises(AssertionError, match="law 9"):
        check_same(mutant, given(pair, f"mutant {mutant}"), whole_run)


def test_the_law_rejects_a_file_of_its_own_pieces(pair, saved):
    with pytest.raises(AssertionError, match="law 9"):
        check_files(FSDP, given(pair, "mutant saved"), saved)


def test_the_law_rejects_a_base_that_was_written():
    model = two_ranks.net()
    adaptation = rf.adapt(model, "lora", rank=2)
    shake(adaptation)
    ids = two_ranks.batches()[0][0]
    with torch.no_grad():
        found = {"base": two_ranks.net()(ids), "disabled": model(ids), "removed": model(ids)}
    with pytest.raises(AssertionError, match="law 9"):
        check_base("written", [found])


def test_the_law_rejects_a_cell_that_gave_nothing():
    with pytest.raises(AssertionError, match="law 9"):
        check_same("nothing", [{}, {}], alone("lora"))


def test_accelerates_own_sharding_is_refused():
    from rankfold.errors import LayoutError
    from rankfold.training.loop import _refuse_foreign_sharding

    with pytest.raises(LayoutError, match=r"rf\.shard"):
        _refuse_foreign_sharding("FSDP")
    _refuse_foreign_sharding("MULTI_GPU")


def test_sharding_without_processes_is_refused():
    from rankfold.errors import LayoutError

    with pytest.raises(LayoutError, match="init_process_group"):
        rf.shard(two_ranks.net())

"""Every claim as it is stated: it runs at toy size, where its identities hold already; its recorded result is not stale."""

import math
from pathlib import Path

import pytest

from rankfold.cli.papers import load as papers
from rankfold.errors import UnknownName
from rankfold.study.claims import main, results, runner
from rankfold.study.claims.protocol import overall

DOCS = Path(__file__).parents[2] / "docs" / "claims.md"
NAMES = results.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_runs_at_toy_size(name, tmp_path):
    claim = runner.load(name)
    result = runner.run_claim(name, tmp_path, quick=True, show=False)
    found = results.outcomes(claim, result)
    assert {arm for run in result["runs"].values() for arm in run} == set(claim.arms)
    assert all(math.isfinite(o.mean) for o in found)
    assert [c.name for c, o in zip(claim.checks, found) if c.kind == "identity" and o.verdict != "holds"] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_result_is_of_the_claim_that_is_there(name):
    claim, result = runner.load(name), results.read(name, results.RECORDED)
    assert result is not None, f"run it: rankfold claims {name} --out src/rankfold/study/claims/results"
    assert results.stale(name, result) == []
    assert not result["quick"]
    assert tuple(map(int, result["runs"])) == claim.seeds
    found = results.outcomes(claim, result)
    assert results.as_rows(found) == result["checks"]
    assert overall(claim, found) == result["verdict"]


def test_the_page_is_rendered_from_the_recorded_results(tmp_path):
    main(render_only=True, page=tmp_path / "claims.md")
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == DOCS.read_text(encoding="utf-8")


def test_no_claim_is_tested_on_seeds_that_any_claim_was_tuned_on():
    tested = [seed for name in NAMES for seed in runner.load(name).seeds]
    assert len(set(tested)) == len(tested)
    assert set(tested).isdisjoint(seed for name in NAMES for seed in runner.load(name).tuning_seeds)


@pytest.mark.parametrize("paper", [p for p in papers() if p.claim or p.state == "done"], ids=lambda p: p.key)
def test_a_paper_that_is_done_has_a_claim_that_was_run(paper):
    assert paper.claim in NAMES
    assert runner.load(paper.claim).row == paper.number
    assert results.read(paper.claim, results.RECORDED) is not None


def test_without_a_name_the_command_lists_every_claim(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


def test_a_name_that_nobody_knows_lists_the_nearest():
    with pytest.raises(UnknownName, match="nearest: lora"):
        main(["lorra"])


def test_a_quick_run_prints_its_checks_and_writes_its_page(tmp_path, capsys):
    main(["lora"], out=tmp_path, quick=True)
    assert "toy run" in capsys.readouterr().out
    assert "toy run" in (tmp_path / "claims.md").read_text(encoding="utf-8")

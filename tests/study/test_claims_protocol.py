"""The protocol of claims decides as it says: the rule of verdicts, what it refuses, tuning, resuming, staleness, Holm."""

import json
import math
from dataclasses import replace

import pytest
from scipy import stats

from rankfold.errors import FileError, NumericError, OptionError, UnknownName
from rankfold.study.claims import page, protocol, results, runner
from rankfold.study.claims.protocol import Check, Claim, judge, overall

ABOVE = Check(
    name="gain", says="it gains .1", value=lambda arms: arms["new"]["x"] - arms["old"]["x"], direction="above", margin=0.1
)
BELOW = replace(ABOVE, direction="below")
SEEDS = tuple(range(1000, 1010))


def claim(**changes):
    """Two arms, of which `new` is better by .3 at its best rate, .01, and `old` best at .1."""

    def run(arm, seed, settings):
        best = {"new": 0.01, "old": 0.1}[arm]
        loss = abs(math.log10(settings["lr"] / best))
        return {"x": {"new": 0.3, "old": 0.0}[arm] - loss + 0.001 * (seed % 7), "loss": loss}

    given = {
        "row": None, "title": "t", "statement": "s", "not_tested": "n", "checks": (ABOVE,), "arms": ("new", "old"), "run": run,
        "seeds": SEEDS, "budget": {"steps": 3}, "toy": {"steps": 1}, "grid": (0.01, 0.1), "tuned": ("new", "old"),
        "tuning_seeds": (1, 2), "tune_by": "loss",
    }  # fmt: skip
    return Claim(**{**given, **changes})


# The rule


@pytest.mark.parametrize(
    ("check", "values", "verdict"),
    [
        (ABOVE, [0.30, 0.31, 0.29], "holds"),
        (ABOVE, [0.00, 0.01, -0.01], "not reproduced here"),
        (ABOVE, [0.00, 0.10, 0.20], "inconclusive"),
        (BELOW, [0.30, 0.31, 0.29], "not reproduced here"),
        (BELOW, [0.00, 0.01, -0.01], "holds"),
        (BELOW, [0.00, 0.10, 0.20], "inconclusive"),
        (ABOVE, [0.09, 0.08, 0.10], "inconclusive"),  # the mean is on the wrong side, but the margin lies within
        (ABOVE, [0.10, 0.10, 0.10], "inconclusive"),  # exactly at the margin
    ],
)
def test_the_interval_decides_by_the_margin(check, values, verdict):
    assert judge(check, values).verdict == verdict


@pytest.mark.parametrize("check", [ABOVE, BELOW])
def test_the_interval_is_students_of_the_values(check):
    values = [0.2, 0.5, 0.1, 0.4, 0.35]
    mean, error = sum(values) / 5, stats.sem(values)
    low, high = stats.t.interval(0.95, 4, mean, error)
    outcome = judge(check, values)
    assert (outcome.mean, outcome.low, outcome.high) == pytest.approx((mean, low, high))


def test_p_is_of_the_claimed_side():
    values = [0.30, 0.31, 0.29, 0.33]
    assert judge(ABOVE, values).p == 2**-4
    assert judge(BELOW, values).p == 1.0


@pytest.mark.parametrize(("value", "verdict"), [(0.2, "holds"), (0.1, "not reproduced here"), (0.0, "not reproduced here")])
def test_an_identity_needs_one_number_and_no_interval(value, verdict):
    outcome = judge(replace(ABOVE, kind="identity"), [value])
    assert (outcome.verdict, outcome.p, outcome.low, outcome.runs) == (verdict, None, None, 1)


def test_a_claim_is_as_good_as_its_worst_check_and_no_worse_for_what_stands_beside_it():
    named = {v: judge(ABOVE, values) for v, values in (("good", [0.3, 0.31]), ("open", [0.0, 0.2]), ("bad", [0.0, 0.001]))}
    checks = tuple(replace(ABOVE, name=n) for n in named)
    assert overall(claim(checks=checks), list(named.values())) == "not reproduced here"
    assert overall(claim(checks=checks[:2]), list(named.values())[:2]) == "inconclusive"
    assert overall(claim(checks=(checks[0], *(replace(c, beside=True) for c in checks[1:]))), list(named.values())) == "holds"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": SEEDS[:9]}, "9 seeds"),
        ({"seeds": (*SEEDS[:9], SEEDS[0])}, "twice"),
        ({"seeds": (*SEEDS[:9], 999)}, "seed 999 is not fresh"),
        ({"tuning_seeds": (1, 1003)}, r"\[1003\] are both tuned on and tested"),
        ({"tuned": ("new", "older")}, "no arm is called older"),
        ({"grid": (0.1,)}, "at least two rates"),
        ({"tuning_seeds": ()}, "tuning_seeds"),
        ({"tune_by": ""}, "tune_by"),
        ({"toy": {"step": 1}}, r"\['step'\] are not in the budget"),
        ({"checks": ()}, "nothing could contradict"),
        ({"checks": (replace(ABOVE, beside=True),)}, "nothing could contradict"),
        ({"checks": (ABOVE, ABOVE)}, "same name"),
    ],
)
def test_a_protocol_that_is_none_is_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        claim(**changes)


@pytest.mark.parametrize("changes", [{"direction": "up"}, {"kind": "guess"}, {"margin": math.nan}])
def test_a_check_that_could_not_decide_is_refused(changes):
    with pytest.raises(OptionError):
        replace(ABOVE, **changes)


def test_one_seed_is_enough_for_an_identity():
    assert claim(checks=(replace(ABOVE, kind="identity"),), seeds=(1000,)).seeds == (1000,)


# Runs


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder of claims with one file, `toy-one`, and a bed that it imports; gives (folder, calls of `claim().run`)."""
    (tmp_path / "beds").mkdir()
    (tmp_path / "beds" / "ground.py").write_text("x = 1\n")
    (tmp_path / "toy_one.py").write_text("from .beds.ground import x\nCLAIM = x\n")
    (tmp_path / "helper.py").write_text("OTHER = 1\n")
    calls = []

    def counted(stated):
        def run(arm, seed, settings):
            calls.append((arm, seed, settings["lr"], settings["steps"]))
            return stated.run(arm, seed, settings)

        return replace(stated, run=run)

    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(runner, "load", lambda name: counted(claim()))
    return tmp_path, calls


def test_claims_are_found_by_folder(house):
    assert results.names() == ["toy-one"]
    with pytest.raises(UnknownName, match="toy-one"):
        results.file_of("toy-two")


def test_rates_are_tuned_for_each_arm_on_other_seeds(house):
    folder, calls = house
    result = runner.run_claim("toy-one", folder / "out", show=False)
    assert {arm: entry["rate"] for arm, entry in result["tuning"].items()} == {"new": 0.01, "old": 0.1}
    tested = [call for call in calls if call[1] in SEEDS]
    assert sorted(tested) == sorted([("new", s, 0.01, 3) for s in SEEDS] + [("old", s, 0.1, 3) for s in SEEDS])
    assert sorted(set(calls) - set(tested)) == [(a, s, lr, 3) for a in ("new", "old") for s in (1, 2) for lr in (0.01, 0.1)]
    assert result["verdict"] == "holds"
    assert result["checks"][0]["mean"] == pytest.approx(0.3)


def test_a_rate_that_diverges_is_out_and_an_end_of_the_grid_is_marked(house, monkeypatch):
    folder, _ = house

    def run(arm, seed, settings):
        return {"x": 0.0, "loss": math.nan if settings["lr"] == 0.1 and seed == 2 else 1 / settings["lr"]}

    monkeypatch.setattr(runner, "load", lambda name: claim(run=run, grid=(0.001, 0.01, 0.1)))
    result = runner.run_claim("toy-one", folder / "out", show=False)
    assert result["tuning"]["new"]["rate"] == 0.01
    assert not result["tuning"]["new"]["at_edge"]
    monkeypatch.setattr(runner, "load", lambda name: claim(run=run, grid=(0.001, 0.01)))
    assert runner.run_claim("toy-one", folder / "other", show=False)["tuning"]["old"]["at_edge"]


def test_a_run_that_is_not_finite_stops_with_its_place(house, monkeypatch):
    folder, _ = house
    run = lambda arm, seed, settings: {"x": math.inf if (arm, seed) == ("old", 1004) else 0.0, "loss": 0.0}
    monkeypatch.setattr(runner, "load", lambda name: claim(run=run))
    with pytest.raises(NumericError, match="'old' at seed 1004"):
        runner.run_claim("toy-one", folder / "out", show=False)


def test_an_interrupted_run_goes_on_where_it_stopped(house, monkeypatch):
    folder, calls = house
    whole = runner.run_claim("toy-one", folder / "whole", show=False)
    once = calls.copy()
    stated = runner.load("toy-one")

    def stopping(arm, seed, settings):
        if (arm, seed) == ("old", 1005):
            raise KeyboardInterrupt
        return stated.run(arm, seed, settings)

    calls.clear()
    monkeypatch.setattr(runner, "load", lambda name: replace(stated, run=stopping))
    with pytest.raises(KeyboardInterrupt):
        runner.run_claim("toy-one", folder / "out", show=False)
    assert page.verdict("toy-one", stated, results.read("toy-one", folder / "out")) == "unfinished"
    monkeypatch.setattr(runner, "load", lambda name: stated)
    result = runner.run_claim("toy-one", folder / "out", show=False)
    assert calls == once
    assert (result["runs"], result["checks"]) == (whole["runs"], whole["checks"])


def test_a_finished_result_is_not_run_again_unless_its_file_changed(house):
    folder, calls = house
    runner.run_claim("toy-one", folder / "out", show=False)
    done = len(calls)
    result = runner.run_claim("toy-one", folder / "out", show=False)
    assert len(calls) == done
    assert results.stale("toy-one", result) == []
    for file in (folder / "beds" / "ground.py", folder / "toy_one.py"):
        before = file.read_text()
        file.write_text(before + "# changed\n")
        assert results.stale("toy-one", result) == [file.relative_to(folder).as_posix()]
        assert "stale" in page.verdict("toy-one", claim(), result)
        file.write_text(before)
    (folder / "toy_one.py").write_text("CLAIM = 2\n")
    assert results.stale("toy-one", result) == ["beds/ground.py", "toy_one.py"]
    runner.run_claim("toy-one", folder / "out", show=False)
    assert len(calls) == 2 * done


def test_a_toy_run_leaves_the_fresh_seeds_unseen_and_has_no_verdict(house):
    folder, calls = house
    result = runner.run_claim("toy-one", folder / "out", quick=True, show=False)
    assert {call[1] for call in calls}.isdisjoint(SEEDS)
    assert {call[3] for call in calls} == {1}
    assert page.verdict("toy-one", claim(), result) == "toy run"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 2, "claim": "toy-one"}', '{"schema": 1, "claim": "toy-one"}'])
def test_a_damaged_result_is_an_error_that_names_it(house, text):
    folder, _ = house
    (folder / "toy-one.json").write_text(text)
    with pytest.raises(FileError, match=r"toy-one\.json"):
        results.read("toy-one", folder)


def test_a_result_tells_where_it_is_from(house):
    folder, _ = house
    runner.run_claim("toy-one", folder / "out", show=False)
    written = json.loads((folder / "out" / "toy-one.json").read_text())
    assert all(written["machine"][key] for key in ("cpu", "cores", "threads", "python", "torch", "date", "commit"))
    assert all(len(digest) == 64 for digest in written["sources"].values())


# The page


def numbers(x):
    """A result in which `new` is above `old` by x[k] at the k-th seed."""
    runs = {str(s): {"new": {"x": v, "loss": 0.0}, "old": {"x": 0.0, "loss": 0.0}} for s, v in zip(SEEDS, x)}
    rates = {arm: {"trials": {}, "rate": 0.01, "at_edge": False} for arm in ("new", "old")}
    machine = {"cpu": "c", "cores": 2, "threads": 1, "python": "3", "torch": "2", "date": "d", "commit": "e"}
    return {"quick": False, "sources": {}, "machine": machine, "seconds": 1.0, "tuning": rates, "runs": runs, "verdict": ""}


def test_holm_runs_over_the_repeated_checks_of_all_claims():
    identity = replace(ABOVE, name="identity", kind="identity")
    clear, vague = [0.3 + 0.01 * k for k in range(10)], [0.1 + 0.01 * (k - 4) for k in range(10)]
    found = page.rows({"a": (claim(checks=(ABOVE, identity)), numbers(clear)), "b": (claim(), numbers(vague))})
    assert [row["holm"] is None for row in found] == [False, True, False]
    assert found[0]["p"] == 2**-10
    assert found[0]["holm"] == pytest.approx(2 * 2**-10)
    assert found[2]["holm"] == pytest.approx(found[2]["p"])


def test_the_page_lists_identities_apart_and_says_what_is_not_tested(house, tmp_path):
    stated = claim(checks=(ABOVE, replace(ABOVE, name="algebra", says="algebra holds", kind="identity")))
    result = {**numbers([0.3] * 9 + [0.31]), "reading": "as it should be."}
    page.render({"toy-one": (stated, result)}, tmp_path / "claims.md")
    text = (tmp_path / "claims.md").read_text(encoding="utf-8")
    learning, identities = text.split("## Learning")[1].split("## Identities")
    assert "it gains .1" in learning
    assert "algebra holds" not in learning
    assert "algebra holds" in identities
    assert "Not tested here: n." in text
    assert "Read afterwards: as it should be." in text


def test_the_rule_in_words_has_the_levels_of_the_code():
    assert f"{protocol.LEVEL:.0%}".replace("%", " %") in protocol.__doc__
    assert protocol.RUNS >= 10

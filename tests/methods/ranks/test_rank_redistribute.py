"""Redistribution: the budget to the unit, the best components by brute force, ties by order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankfold as rf
from rankfold.errors import CompositionError, NumericError, OptionError
from rankfold.methods.ranks.redistribute import Redistribute

LARGE = 10**6


def brute_force(scores, budget):
    """The best components one by one: whoever has the highest next score, the earlier site first."""
    given = dict.fromkeys(scores, 0)
    for _ in range(budget):
        key = max(scores, key=lambda k: scores[k][given[k]] if given[k] < len(scores[k]) else -1.0)
        given[key] += 1
    return given


descending = st.lists(st.integers(0, 9), min_size=4, max_size=8).map(lambda v: [x / 10 for x in sorted(v, reverse=True)])


@settings(deadline=None, max_examples=60)
@given(st.lists(descending, min_size=1, max_size=5), st.integers(1, 4))
def test_it_is_the_brute_force_choice_and_keeps_the_budget(values, rank):
    scores = {f"s{k}": torch.tensor(v, dtype=torch.float64) for k, v in enumerate(values)}
    ranks = dict.fromkeys(scores, rank)
    found = Redistribute().allocate(scores, ranks, dict.fromkeys(scores, LARGE))
    assert sum(found.values()) == rank * len(scores)
    assert found == brute_force({k: v.tolist() for k, v in scores.items()}, rank * len(scores))


@settings(deadline=None, max_examples=30)
@given(st.lists(descending, min_size=2, max_size=5))
def test_a_component_never_leaves_when_the_budget_grows(values):
    scores = {f"s{k}": torch.tensor(v, dtype=torch.float64) for k, v in enumerate(values)}
    before = dict.fromkeys(scores, 0)
    for rank in (1, 2, 3, 4):
        found = Redistribute().allocate(scores, dict.fromkeys(scores, rank), dict.fromkeys(scores, LARGE))
        assert all(found[k] >= before[k] for k in scores)
        before = found


def test_equal_spectra_stay_within_one():
    scores = {k: torch.tensor([0.5, 0.3, 0.1, 0.1]) for k in "abc"}
    found = Redistribute().allocate(scores, dict.fromkeys("abc", 2), dict.fromkeys("abc", LARGE))
    assert found == {"a": 2, "b": 2, "c": 2}


def test_a_site_may_lose_its_adapter_and_none_gets_more_than_it_can_hold():
    scores = {"a": torch.tensor([0.9, 0.8, 0.7, 0.6]), "b": torch.tensor([0.1, 0.1]), "c": torch.tensor([0.2, 0.1])}
    assert Redistribute().allocate(scores, dict.fromkeys("abc", 1), dict.fromkeys("abc", LARGE)) == {"a": 3, "b": 0, "c": 0}
    limits = {"a": 2, "b": LARGE, "c": LARGE}
    assert Redistribute().allocate(scores, dict.fromkeys("abc", 1), limits) == {"a": 2, "b": 0, "c": 1}


def test_a_site_without_scores_keeps_its_rank():
    found = Redistribute().allocate({"a": torch.ones(4)}, {"a": 2, "words": 2}, {"a": LARGE, "words": LARGE})
    assert found == {"a": 2, "words": 2}


def test_too_few_scores_still_fill_the_budget():
    scores = {"a": torch.tensor([0.9]), "b": torch.tensor([0.5])}
    found = Redistribute().allocate(scores, {"a": 2, "b": 2}, {"a": LARGE, "b": LARGE})
    assert sum(found.values()) == 4


@settings(deadline=None, max_examples=30)
@given(st.lists(descending, min_size=2, max_size=5), st.data())
def test_parameters_do_not_grow_and_are_nearly_used(values, draw):
    scores = {f"s{k}": torch.tensor(v, dtype=torch.float64) for k, v in enumerate(values)}
    costs = {k: draw.draw(st.integers(10, 100)) for k in scores}
    ranks = dict.fromkeys(scores, 2)
    found = Redistribute(unit="params").allocate(scores, ranks, dict.fromkeys(scores, LARGE), costs)
    budget, used = sum(2 * costs[k] for k in scores), sum(found[k] * costs[k] for k in scores)
    assert used <= budget
    full = all(found[k] == len(scores[k]) for k in scores)
    assert full or budget - used < max(costs.values())


def test_the_cheap_component_wins_at_equal_score():
    scores = {"wide": torch.tensor([0.5, 0.5]), "narrow": torch.tensor([0.5, 0.5])}
    costs = {"wide": 100, "narrow": 10}
    found = Redistribute(unit="params").allocate(scores, {"wide": 1, "narrow": 1}, dict.fromkeys(scores, LARGE), costs)
    assert found == {"wide": 0, "narrow": 2}


def test_what_cannot_be():
    scores = {"a": torch.tensor([float("nan")])}
    with pytest.raises(NumericError, match="a has a score"):
        Redistribute().allocate(scores, {"a": 1}, {"a": 4})
    with pytest.raises(OptionError, match="costs"):
        Redistribute(unit="params").allocate({"a": torch.ones(2)}, {"a": 1}, {"a": 4})
    with pytest.raises(CompositionError, match="no scores"):
        rf.method("lora+rank:eva")

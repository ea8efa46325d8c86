"""Every two members compose and keep the laws, or are refused with the traits that clash.

A covering array of strength 2 over (outer and inner decorator, structure over structure, init, rank, update): every pair of
members that composes at all stands in at least one method here. It is drawn with the seed that the test run prints;
RANKFOLD_LAWS_SEED repeats or changes it. The product of decorator, structure, init, rank and update runs whole under the
marker `full`.
"""

from __future__ import annotations

import functools
import itertools
import random
import warnings

import pytest
import torch

import rankfold as rf
from rankfold.core import registry
from rankfold.core.structure import trait
from rankfold.errors import CompositionError
from rankfold.training.method import Method
from rankfold.training.saving import load

from .checks import Checks
from .models import BLOCK, tiny
from .seed import SEED
from .subjects import adapt, decorators, default_structure, plain_structures, shake, small, train
from .test_save_and_load import nothing_starts
from .tolerances import TOLERANCES, distance

FRONT = ("outer", "decorator", "over", "structure")
AXES = (*FRONT, "init", "rank", "update")
NOTHING = "-"
TRIES = 24


@functools.cache
def members() -> dict[str, tuple[str, ...]]:
    """Values of each factor of the array."""
    return {
        "outer": (NOTHING, *decorators()),
        "decorator": (NOTHING, *decorators()),
        "over": (NOTHING, *plain_structures()),
        "structure": tuple(plain_structures()),
        **{axis: tuple(e.name for e in registry.entries(axis)) for axis in AXES[len(FRONT) :]},
    }


def text(row: dict[str, str]) -> str:
    return "+".join([*(row[a] for a in FRONT if row[a] != NOTHING), *(f"{a}:{row[a]}" for a in AXES[len(FRONT) :])])


def options(row: dict[str, str]) -> list[dict[str, object]]:
    """Option sets to try: the defaults, then each other value of the decorators' choices (a gate per component, say)."""
    found: list[dict[str, object]] = [{}]
    for entry in registry.entries("structure"):
        for option in entry.options:
            if entry.name in (row["outer"], row["decorator"]) and option.type.startswith("Literal["):
                choices = [c.strip().strip("'\"") for c in option.type[len("Literal[") : -1].split(",")]
                found += [{f"{entry.name}.{option.name}": c} for c in choices if repr(c) != option.default]
    return found


@functools.cache
def composed(key: tuple[str, ...]) -> Method | CompositionError:
    """The method of a row, with the first option set that composes; else the first refusal."""
    row = dict(zip(AXES, key))
    refusal: CompositionError | None = None
    for given in options(row):
        try:
            return rf.method(text(row), **given)
        except CompositionError as error:
            refusal = refusal or error
    assert refusal is not None
    return refusal


def composes(key: tuple[str, ...]) -> bool:
    return isinstance(composed(key), Method)


def pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    values = members()
    return [((a, x), (b, y)) for a, b in itertools.combinations(AXES, 2) for x in values[a] for y in values[b]]


def pairs_of(key: tuple[str, ...]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(zip(AXES, key), 2))


def defaults() -> dict[str, str]:
    nothing = dict.fromkeys(FRONT, NOTHING)
    plain = {a: next(e.name for e in registry.entries(a) if dict(e.traits).get("default") == "True") for a in AXES[len(FRONT) :]}
    return {**nothing, "structure": default_structure(), **plain}


def completions(pair: tuple[tuple[str, str], tuple[str, str]], draw: random.Random):
    """Rows with that pair: the defaults first, then those with one more axis changed, then drawn ones."""
    values, fixed = members(), dict(pair)
    yield {**defaults(), **fixed}
    for axis in AXES:
        if axis not in fixed:
            yield from ({**defaults(), **fixed, axis: v} for v in values[axis])
    for _ in range(TRIES):
        yield {axis: fixed.get(axis, draw.choice(values[axis])) for axis in AXES}


@functools.cache
def covering_array(seed: int) -> tuple[list[tuple[str, ...]], list[tuple[tuple[str, str], tuple[str, str]]]]:
    """(rows that compose and hold every pair that composes at all, the pairs that no completion found composes)."""
    with pytest.MonkeyPatch.context() as patch:  # thousands of methods are composed: the folders are listed once for all
        patch.setattr(registry, "entries", functools.cache(registry.entries))
        return _covering_array(seed)


def _covering_array(seed: int):
    draw = random.Random(seed)
    values, rows, refused = members(), [], []
    missing = dict.fromkeys(pairs())
    order = list(missing)
    draw.shuffle(order)
    for pair in order:
        if pair not in missing:
            continue
        fixed, best, gain = dict(pair), None, 0
        for _ in range(TRIES):  # rows that hold many missing pairs, where they compose
            key = tuple(fixed.get(axis, draw.choice(values[axis])) for axis in AXES)
            if (more := len(pairs_of(key) & missing.keys())) > gain and composes(key):
                best, gain = key, more
        if best is None:
            found = (tuple(row[a] for a in AXES) for row in completions(pair, draw))
            best = next((key for key in found if composes(key)), None)
        if best is None:
            refused.append(pair)
            del missing[pair]
            continue
        rows.append(best)
        for done in pairs_of(best):
            missing.pop(done, None)
    held = set().union(*(pairs_of(key) for key in rows))
    return rows, [pair for pair in refused if pair not in held]


def check_quickly(method: Method, folder) -> None:
    """Laws 1 to 6 in brief, at linear sites (or blocks): start, a step, the base, fold, save and load."""
    m = small(method.text, **method.options)
    with Checks(f"pairs, seed {SEED}, {m}") as check:
        case = tiny(BLOCK if m.is_side else "linear")
        y = case.output().detach()
        values = {n: t.clone() for n, t in case.model.state_dict().items()}
        a = adapt(case, m)
        if m.starts == "base":
            check.close(case.output().detach(), y, TOLERANCES[torch.float64].start, "output at the start")
        before = {n: t.detach().clone() for n, t in a.tensors().items()}
        losses = train(case, a)
        check.that(all(torch.isfinite(x) for x in losses), f"losses {losses}")
        moved = any(t.shape != before[n].shape or not torch.equal(t, before[n]) for n, t in a.tensors().items())
        check.that(moved, "two steps moved nothing")
        shake(a)
        changed = case.output().detach()
        check.that(distance(changed, y) > 1e-6, "tensors moved and the output did not")
        for n, t in case.model.state_dict().items():
            check.bitwise(t, values[n], f"the base: {n}")
        with a.disabled():
            check.bitwise(case.output().detach(), y, "disabled output")
        a.save(folder / "adapter")
        twin = case.again()
        with nothing_starts():
            load(twin.model, folder / "adapter")
        check.bitwise(twin.output().detach(), changed, "output after loading")
        if not (m.is_side or trait(m.structure, "input_dependent")):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fold: .* shared its weight")
                a.fold()
            check.close(case.output().detach(), changed, TOLERANCES[torch.float64].value, "folded output")


def rows() -> list[str]:
    return ["|".join(key) for key in covering_array(SEED)[0]]


@pytest.mark.parametrize("row", rows())
def test_a_row_of_the_covering_array_keeps_the_laws(row, tmp_path):
    check_quickly(composed(tuple(row.split("|"))), tmp_path)


def test_the_array_covers_every_pair():
    with Checks(f"pairs, seed {SEED}") as check:
        found, refused = covering_array(SEED)
        held = set().union(*(pairs_of(key) for key in found))
        check.that(held.isdisjoint(refused), "a pair is both held and refused")
        check.that(held | set(refused) == set(pairs()), f"{len(set(pairs()) - held - set(refused))} pairs are in no row")


def words_of(error: CompositionError) -> str:
    return str(error).lower()


TRAITS = (
    "role", "trains", "rank", "scores", "decorate", "owns", "side module", "depends on the input", "tensors named", "twice",
    "factors", "components", "offset",
)  # fmt: skip


def check_refusal(pair) -> None:
    """A refused pair is refused by name, with the trait."""
    row = {**defaults(), **dict(pair)}
    error = composed(tuple(row[a] for a in AXES))
    with Checks(f"pairs, seed {SEED}, {pair}") as check:
        check.that(isinstance(error, CompositionError), "composes with the defaults, and is counted as refused")
        said = words_of(error)
        (_, first), (_, second) = pair
        check.that(first in said or second in said, f"names neither {first} nor {second}: {error}")
        check.that(any(word in said for word in TRAITS), f"says no trait: {error}")


@pytest.mark.parametrize("pair", covering_array(SEED)[1], ids=lambda p: "+".join(f"{a}:{n}" for a, n in p))
def test_a_refused_pair_says_why(pair):
    check_refusal(pair)


@functools.cache
def product() -> list[str]:
    one = ("outer", "over")  # one decorator, one structure
    keys = itertools.product(*((NOTHING,) if a in one else members()[a] for a in AXES))
    return ["|".join(key) for key in keys]


@pytest.mark.full
@pytest.mark.parametrize("structure", plain_structures())
def test_the_whole_product_keeps_the_laws(structure, tmp_path):
    tried = 0
    for row in product():
        key = tuple(row.split("|"))
        if key[AXES.index("structure")] != structure:
            continue
        found = composed(key)
        if isinstance(found, Method):
            tried += 1
            check_quickly(found, tmp_path / str(tried))
        else:
            with Checks(row) as check:
                check.that(any(word in words_of(found) for word in TRAITS), f"refused without a trait: {found}")
    assert tried, f"{structure} composes with nothing"


# What the law must reject


def test_the_law_rejects_a_start_elsewhere(monkeypatch, tmp_path):
    from .test_start import draws_all

    draws_all(monkeypatch)
    with pytest.raises(AssertionError, match="pairs"):
        check_quickly(rf.method("lora"), tmp_path)


def test_the_law_rejects_a_silent_refusal(monkeypatch):
    monkeypatch.setitem(globals(), "composed", lambda key: CompositionError("cannot compose"))
    with pytest.raises(AssertionError, match="names neither"):
        check_refusal((("structure", "lora"), ("init", "pissa")))


def test_the_law_rejects_an_array_with_a_hole(monkeypatch):
    found, refused = covering_array(SEED)
    monkeypatch.setitem(globals(), "covering_array", lambda seed: (found[: len(found) // 2], refused))
    with pytest.raises(AssertionError, match="pairs are in no row"):
        test_the_array_covers_every_pair()

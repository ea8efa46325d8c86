"""`rankfold methods`: everything of the catalogue is listed, one is shown in full, and the matrix tells the truth."""

import json

import pytest

import rankfold as rf
from rankfold.cli.matrix import COLUMNS, pairs
from rankfold.cli.member import allowed, page
from rankfold.core.registry import AXES, entries
from rankfold.errors import CompositionError
from rankfold.methods.catalogue import COMPOSITIONS

PLUGIN = '''
"""Twice: a change counted twice.

Nobody, "A Paper That Is Not There", 2026.
"""
from dataclasses import dataclass
from rankfold.core import Spec, Structure, register
from rankfold.linalg import LowRank

@register("structure", "twice-over", paper="nobody2026")
@dataclass(frozen=True, kw_only=True)
class Twice(Structure):
    """ΔW = 2 B A."""

    rank: int = 4

    def tensors(self, site):
        return {"B": Spec((site.shape[0], self.rank), role="B"), "A": Spec((self.rank, site.shape[1]), role="A")}

    def delta(self, t, site, ctx=None):
        return LowRank(t.B, t.A, scale=2.0)
'''


def test_every_member_and_composition_is_listed(command):
    code, out, _ = command("methods")
    assert code == 0
    for name in [*(e.name for e in entries()), *COMPOSITIONS]:
        assert f"\n{name} " in out
    assert all(f"\n{axis}\n" in "\n" + out for axis in {e.axis for e in entries()})


def test_one_axis(command):
    _, out, _ = command("methods", "--axis", "update")
    assert "\nadamw " in out
    assert "\npissa " not in out


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.key)
def test_a_member_in_full_has_its_formula_its_options_and_its_source(entry):
    text = page(entry)
    assert entry.summary.split(",")[0].split(";")[0][:40] in " ".join(text.split())
    assert all(f"  {o.name}" in text for o in entry.options)
    assert f"file {entry.file.name}" in text
    assert "Composes:" in text


def test_a_composition_in_full_comes_with_the_member_of_its_name(command):
    code, out, _ = command("methods", "pissa")
    assert code == 0
    assert "composition pissa = lora+init:pissa" in out
    assert "init:pissa\n" in out


def test_bounds_are_shown_in_words(command):
    _, out, _ = command("methods", "lora")
    assert "rank = 16   (int >= 1)" in out
    assert "alpha   (float > 0, or none)" in out
    assert allowed("float") == "float"


def test_json_has_every_member(command):
    _, out, _ = command("methods", "--json")
    assert [f"{m['axis']}:{m['name']}" for m in json.loads(out)] == [e.key for e in entries()]


def test_the_matrix_agrees_with_what_can_be_made():
    found = pairs()
    for axis in ("init", "rank", "update"):
        assert len([p for p in found if p.column == axis]) == len(entries("structure")) * len(entries(axis))
    for pair in found:
        if pair.state == "refused":
            assert pair.note
            with pytest.raises(CompositionError):
                rf.method(pair.chain)
        else:
            rf.method(pair.chain)
    assert {p.column for p in found} == set(COLUMNS)
    assert {p.state for p in found} == {"tested", "derived", "refused"}


def test_the_matrix_shows_the_pair_and_the_reason_that_an_error_points_to(command):
    _, _, err = command("adapt", *("--model", "m", "--data", "d", "--task", "lm", "--out", "o"), "--method", "hra+loraplus")
    code, out, _ = command("methods", "hra", "--matrix")
    assert code == 0
    assert "--matrix" in err
    assert "-: update 'loraplus' works on trainable A, B; structure 'hra' trains value\n     hra+update:loraplus\n" in out
    assert "structure \\ decorator" in out


def test_the_matrix_of_one(command):
    code, out, _ = command("methods", "lora", "--matrix")
    assert code == 0
    assert "pissa" in out
    assert "\nvera " not in out
    assert command("methods", "lorra", "--matrix")[0] == 2


def test_a_plugin_is_listed_shown_and_composed(command, tmp_path, monkeypatch):
    from rankfold.core import registry

    monkeypatch.setattr(registry, "_extra_files", [])
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    code, out, _ = command("--plugin", file, "methods")
    assert code == 0
    assert "\ntwice-over " in out
    _, out, _ = command("--plugin", file, "methods", "twice-over")
    assert "nobody2026" in out
    assert "init: eva" in out


@pytest.mark.parametrize(
    "content",
    [b"def x(:", b"\xff", b"\x00", b'name = "x"\n@register("structure", name)\nclass X:\n    """X."""\n'],
    ids=["syntax", "bytes", "null", "no literal"],
)
def test_a_plugin_that_can_not_be_read_is_a_mistake(command, tmp_path, content):
    (tmp_path / "mine.py").write_bytes(content)
    code, _, err = command("--plugin", tmp_path / "mine.py", "methods")
    assert code == 2
    assert "mine.py" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["methods", "lorra"], "unknown method 'lorra'; nearest: lora"),
        (["methods", "--axis", "inti"], "unknown axis 'inti'; nearest: init"),
        (["--plugin", "nowhere.py", "methods"], "plugin file"),
    ],
)
def test_what_nobody_knows_is_a_mistake_with_the_nearest(command, arguments, said):
    code, _, err = command(*arguments)
    assert code == 2
    assert said in err


def test_axes_are_those_of_the_registry():
    assert {e.axis for e in entries()} <= set(AXES)

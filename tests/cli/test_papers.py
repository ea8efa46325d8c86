"""`rankfold papers`: the table is whole, and the command finds, filters and prints it without torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rankfold.cli.papers import FAMILIES, STATES, find, load, papers, select
from rankfold.errors import UnknownName

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(papers)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


def test_there_are_122_papers_numbered_without_a_gap():
    assert [p.number for p in load()] == list(range(1, 123))


@pytest.mark.parametrize("field", ["key", "name", "title"])
def test_no_two_papers_share_a(field):
    values = [getattr(p, field) for p in load()]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("paper", load(), ids=lambda p: p.key)
def test_a_row_is_complete(paper):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.key)
    assert paper.name
    assert paper.title
    assert paper.headline
    assert paper.family in FAMILIES
    assert paper.kind in ("core", "neighbour")
    assert paper.difficulty in ("S", "M", "L")
    assert paper.state in STATES
    assert paper.files
    assert all(re.fullmatch(r"src/rankfold(/[a-z0-9_]+)+\.py", file) for file in paper.files), paper.files


@pytest.mark.parametrize("paper", load(), ids=lambda p: p.key)
def test_done_means_that_the_files_are_there_and_the_claim_has_a_name(paper):
    assert bool(paper.left) == (paper.state == "begun"), "a row that is begun says what is left, and no other"
    if paper.state != "planned":
        assert paper.claim, "a row is begun or done when its claim has been run"
        assert [file for file in paper.files if not (ROOT / file).is_file()] == []


def test_every_family_has_a_paper():
    assert {p.family for p in load()} == set(FAMILIES)


def test_a_number_a_key_and_a_name_find_one_paper():
    assert [p.key for p in find("23")] == [p.key for p in find("galore")] == [p.key for p in find("GaLore")] == ["galore"]


def test_a_part_finds_all_that_contain_it():
    found = find("federated")
    assert {"lora-fair", "fedsvd"} <= {p.key for p in found}
    assert all("federated" in p.title.lower() for p in found)


def test_a_name_that_nobody_knows_lists_the_nearest():
    with pytest.raises(UnknownName, match="nearest: galore"):
        find("gallore")


def test_a_number_out_of_range_says_the_range():
    with pytest.raises(UnknownName, match="from 1 to 122"):
        find("123")


@pytest.mark.parametrize("query", ["", "   "])
def test_an_empty_query_is_no_wildcard(query):
    with pytest.raises(UnknownName):
        find(query)


def test_filters_narrow_the_rows():
    rows = select(load(), state="planned", family="rank")
    assert rows
    assert {(p.state, p.family) for p in rows} == {("planned", "rank")}


def test_a_filter_that_nobody_knows_lists_the_nearest():
    with pytest.raises(UnknownName, match="unknown family 'merg'; nearest: merge"):
        select(load(), family="merg")
    with pytest.raises(UnknownName, match="there are: planned, begun, done"):
        select(load(), state="finished")


def test_the_command_prints_one_line_for_each_paper():
    lines = run().splitlines()
    numbers = [int(match[1]) for line in lines if (match := re.match(r"\s*(\d+)  ", line))]
    assert numbers == list(range(1, 123))
    assert lines[-1].startswith("122 papers: ")
    assert max(map(len, lines)) <= 120


def test_the_command_prints_one_paper_in_full():
    (paper,) = find("shira")
    output = run("shira")
    assert all(value in output for value in (paper.title, paper.state, *paper.files))


def test_json_holds_every_field_and_nothing_else_is_printed():
    (row,) = json.loads(run("talking-heads", "--json"))
    assert row["number"] == 111
    assert row["files"] == ["src/rankfold/measure/heads.py"]


def test_listing_papers_does_not_import_torch():
    code = "import sys; from rankfold.cli.papers import load; load(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

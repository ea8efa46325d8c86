"""The page: loads nothing, escapes everything, equal input gives equal bytes, and is written whole or not at all."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from rankfold.errors import FileError
from rankfold.measure import Interval
from rankfold.report import (
    Column,
    Example,
    Hit,
    Point,
    Report,
    change_per_site,
    learning_curves,
    quality_vs_parameters,
    rank_trajectories,
)

HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&`$x^2$\x00\x1b[31m"
VOID = {"meta", "link", "img", "br", "hr", "input"}


def interval(estimate, low, high):
    return Interval(estimate, low, high, level=0.95)


class Tags(HTMLParser):
    """Every element with its attributes, and a failure where elements do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def full_report(name: str = "lora") -> Report:
    """Every kind of block, with `name` wherever a user's text can stand."""
    report = Report(name, subtitle=name, lead=name, footer={name: name})
    results = report.section(name)
    rows = [{"method": name, "mrr": interval(0.4, 0.3, 0.5)}, {"method": "full", "mrr": interval(0.42, 0.4, 0.45)}]
    results.table(rows, [Column("method", name), Column("mrr", "MRR", unit=name, format=".3f", better="higher")], caption=name)
    results.figure(quality_vs_parameters([Point("frozen", 0, 0.3), Point(name, 1000, 0.4)], metric=name), name)
    learning = report.section("Learning")
    learning.figure(learning_curves({name: [(0, 1.0), (1, 0.5)]}, metric=name, references={name: 0.7}), name)
    learning.figure(change_per_site({name: 0.1, f"layer.0.{name}": 0.0}, what=name), name)
    learning.figure(rank_trajectories({name: [(0, 4), (5, 2)]}), name)
    rest = report.section("Rest")
    rest.text(f"{name}\n\n{name}")
    rest.note(name)
    rest.facts({name: name})
    rest.code(name, name)
    hits = [Hit(1, name, name, 0.5), Hit(7, name, relevant=True)]
    rest.examples([Example(name, hits, hits[::-1])], before=name, after=name)
    return report


def test_the_page_loads_nothing():
    html = full_report().html()
    assert not re.search(r"https?:|//[a-z]|@import|data:", html)
    for tag, attributes in Tags(html).seen:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base", "image"}
        for attribute in ("src", "srcset", "href", "xlink:href", "action", "poster", "data"):
            assert (attributes.get(attribute) or "#").startswith("#"), (tag, attribute, attributes)
    assert all(target == "#" for target in re.findall(r"url\((.)", html))


def test_the_policy_allows_exactly_the_script_that_is_there():
    html = full_report().html()
    [script] = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [(_, policy)] = [(t, a["content"]) for t, a in Tags(html).seen if a.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_text_stays_text_everywhere():
    tags, plain = Tags(full_report(HOSTILE).html()), Tags(full_report().html())
    assert [tag for tag, _ in tags.seen if tag in {"script", "img", "style"}] == ["style", "script"]
    assert not [a for _, a in tags.seen if any(key.startswith("on") for key in a)]
    assert {tag for tag, _ in tags.seen} - {"code"} <= {tag for tag, _ in plain.seen}
    text = "".join(tags.text)
    assert text.count("<script>alert(1)</script>") > 20
    assert "\x00" not in text
    assert "\x1b" not in text


def test_equal_reports_give_equal_bytes():
    assert full_report().html() == full_report().html()


def test_bytes_do_not_depend_on_process_or_personal_style(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.grid: True\nsvg.fonttype: path\n")
    code = (
        "from rankfold.report import learning_curves as f, change_per_site as g;"
        "print(f({'a':[(0,1),(1,2)]}).wide + g({'a.0.b': 1.0}).narrow)"
    )
    outputs = set()
    for seed, folder in (("1", os.getcwd()), ("2", str(tmp_path))):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "MPLCONFIGDIR": folder if seed == "2" else str(tmp_path / "none")}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1


def test_ids_are_unique_and_references_resolve():
    html = full_report().html()
    tags = Tags(html).seen
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', html))
    assert wanted <= set(ids)


def test_sections_with_one_title_have_their_own_anchors():
    report = Report("r")
    anchors = [report.section(title).anchor for title in ("A b", "a  B", "a-b-2", "a b", "", "…")]
    assert len(set(anchors)) == 6
    assert anchors[0] == "a-b"


def test_empty_parts_say_so():
    report = Report("empty")
    report.section("Nothing")
    part = report.section("Hollow")
    part.table([], [Column("method")], caption="Results")
    part.figure(learning_curves({}))
    part.figure(learning_curves({"lora": []}, metric="MRR"))
    part.figure(learning_curves({"lora": [(0, float("nan"))]}))
    part.figure(quality_vs_parameters([]))
    part.figure(change_per_site({}))
    part.figure(rank_trajectories({}))
    part.examples([])
    part.examples([Example("q", [], [])])
    part.facts({})
    part.text("")
    html = report.html()
    Tags(html)
    for words in (
        "Nothing was recorded here.",
        "Results: no rows.",
        "No finite values of MRR.",
        "No ranks were recorded.",
        "No examples.",
    ):
        assert words in html
    assert "<figure" not in html


def test_figures_have_words_for_those_who_cannot_see_them():
    tags = Tags(full_report().html()).seen
    figures = [a for tag, a in tags if tag == "svg" and "aria-hidden" not in a]
    assert len(figures) == 8  # four plots, each for a page and for a phone
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in figures)


def test_rank_of_the_right_answer():
    before = [Hit(1, "a"), Hit(7, "b", relevant=True)]
    assert Example("q", before, [Hit(1, "a")]).moved == (7, None)
    report = Report("r")
    report.section("s").examples([Example("q", before, [Hit(1, "a")])], before="frozen", after="lora")
    assert "frozen <strong>7</strong>, lora <strong>not shown</strong>" in report.html()


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = full_report().write(tmp_path / "new" / "report.html")
    former = path.read_text(encoding="utf-8")
    assert former == full_report().html()
    broken = Report("broken")
    broken.section("s").blocks.append({"kind": "figure"})  # the template fails in the middle of the page
    with pytest.raises(Exception, match="plot"):
        broken.write(path)

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(FileError, match="no space left"):
        Report("other").write(path)
    with pytest.raises(FileError, match="no space left"):
        Report("other").write(path.parent / "absent.html")
    assert path.read_text(encoding="utf-8") == former
    assert os.listdir(path.parent) == ["report.html"]


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path):
    report = full_report("bad \ud800 name")
    assert "bad ? name" in report.write(tmp_path / "report.html").read_text(encoding="utf-8")


def test_importing_reports_is_light():
    code = (
        "import sys, rankfold.report as r; r.Report('t'); r.Column('a'); r.learning_curves;"
        "print(sorted({'torch', 'matplotlib', 'jinja2', 'rich', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    import rankfold.report as package

    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match="nothing_of_this"):
        _ = package.nothing_of_this

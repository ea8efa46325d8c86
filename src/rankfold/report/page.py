"""One report, one file: an HTML page that loads nothing, works offline, prints, and follows light and dark mode.

Everything that a caller passes is text and is escaped; only our own figures and tables enter as markup. The page carries
a content security policy that allows its own script by hash and no request at all.
"""

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.atomic import write_text

from .palette import css_variables
from .svg import NARROW, SANS, WIDE, Plot
from .tables import Column, cells, html_table
from .values import clean, show

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["Example", "Hit", "Report", "Section"]


@dataclass(frozen=True)
class Hit:
    """One ranked result: where it stood, what it is, more of it on a second line, its score, and whether it is the right one."""

    rank: int
    text: str
    detail: str = ""
    score: float | None = None
    relevant: bool = False


@dataclass(frozen=True)
class Example:
    """What one query found before and after; a right result below the shown ones may be added with its own rank."""

    query: str
    before: Sequence[Hit]
    after: Sequence[Hit]

    @property
    def moved(self) -> tuple[int | None, int | None]:
        """Rank of the first right result before and after, None where it is not among those given."""
        first = [min((hit.rank for hit in hits if hit.relevant), default=None) for hits in (self.before, self.after)]
        return first[0], first[1]


@dataclass
class Section:
    """A part of a report; its methods add blocks in the order in which they are called."""

    title: str
    anchor: str
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def text(self, text: str) -> None:
        """Paragraphs, parted by empty lines; `backticks` make code, everything else is plain text."""
        self.blocks.append({"kind": "text", "paragraphs": [_inline(p) for p in re.split(r"\n\s*\n", text) if p.strip()]})

    def note(self, text: str) -> None:
        """A remark that must not be missed: what was skipped, cut, or could not be measured."""
        self.blocks.append({"kind": "note", "text": _inline(text)})

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Names and values, for configurations and data summaries."""
        self.blocks.append({"kind": "facts", "facts": [(clean(name), show(value)) for name, value in facts.items()]})

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], caption: str = "") -> None:
        """A sortable table; a line below explains its marks where it has any."""
        marks = {cell.mark for row in cells(rows, columns) for cell in row}
        legend = ["Bold: best in its column."] if "best" in marks else []
        legend += ["Dotted: interval overlaps the best one’s."] if "tied" in marks else []
        block = {"table": html_table(rows, columns), "empty": not rows, "legend": " ".join(legend)}
        self.blocks.append({"kind": "table", "caption": clean(caption), **block})

    def figure(self, plot: Plot, caption: str = "") -> None:
        """A plot with its caption; a plot of nothing becomes a sentence."""
        self.blocks.append({"kind": "figure", "plot": plot, "caption": _inline(caption)})

    def code(self, code: str, caption: str = "") -> None:
        """Code or a command, as it is."""
        self.blocks.append({"kind": "code", "code": _printable(code), "caption": _inline(caption)})

    def examples(self, examples: Sequence[Example], before: str = "before", after: str = "after") -> None:
        """Ranked results side by side; `before` and `after` name the two columns."""
        block = {"examples": list(examples), "before": clean(before), "after": clean(after)}
        self.blocks.append({"kind": "examples", **block})


@dataclass
class Report:
    """A report: title, one line below it, the result in a sentence (`lead`), sections, and where it came from (`footer`).

    >>> report = Report("Adapted <encoder>")
    >>> report.section("Result").text("MRR rose from `0.336` to `0.402`.")
    >>> html = report.html()
    >>> "Adapted &lt;encoder&gt;" in html, "<code>0.402</code>" in html, "http" in html.replace("http-equiv", "")
    (True, True, False)
    """

    title: str
    subtitle: str = ""
    lead: str = ""
    footer: Mapping[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str) -> Section:
        """Appends an empty section and returns it."""
        slug = re.sub(r"[^a-z0-9]+", "-", clean(title).lower()).strip("-") or "section"
        taken = {section.anchor for section in self.sections}
        anchor = next(a for a in (slug, *(f"{slug}-{n}" for n in range(2, len(taken) + 3))) if a not in taken)
        self.sections.append(Section(clean(title), anchor))
        return self.sections[-1]

    def html(self) -> str:
        """The page as text: equal reports give equal text."""
        import jinja2
        from markupsafe import Markup

        folder = Path(__file__).parent / "templates"
        script = (folder / "page.js").read_text(encoding="utf-8").strip()
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["show"] = show
        environment.filters["clean"] = clean
        environment.filters["printable"] = _printable
        counter = iter(range(1, 1_000_000))
        environment.globals["draw"] = lambda svg, alt: _inlined(svg, alt, next(counter))
        text = environment.get_template("page.html.j2").render(
            report=self,
            lead=_inline(self.lead),
            footer=[(clean(name), show(value)) for name, value in self.footer.items()],
            light=Markup(css_variables(dark=False)),
            dark=Markup(css_variables(dark=True)),
            sans=Markup(SANS),
            css=Markup((folder / "page.css").read_text(encoding="utf-8").strip()),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            wide=WIDE,
            narrow=NARROW,
        )
        return text.rstrip() + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page in one piece: on an error or a kill the former file is still whole."""
        write_text(path, self.html())
        return Path(path)


def _inline(text: str) -> "Markup":
    """Escaped text in which `backticks` are code; an unpaired one stays."""
    from markupsafe import Markup, escape

    parts = _printable(text).strip().split("`")
    if len(parts) % 2 == 0:
        parts[-2:] = ["`".join(parts[-2:])]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _printable(text: Any) -> str:
    """Text without control characters other than line breaks and tabs, encodable as UTF-8."""
    kept = "".join(c for c in str(text) if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
    return kept.encode("utf-8", "replace").decode("utf-8")


def _inlined(svg: str, alt: str, number: int) -> "Markup":
    """The figure with a label for those who cannot see it, its ids made unique within the page."""
    from markupsafe import Markup, escape

    # No anchor of a section holds two dashes. Only tags are changed, never what a label says.
    svg = re.sub(r"<[^<>]+>", lambda tag: re.sub(r'( id="|url\(#| href="#)', rf"\1f{number}--", tag.group()), svg)
    label = f'<svg role="img" aria-label="{escape(alt)}"'
    return Markup(svg.replace("<svg", label, 1))

"""Reports: plots, tables and one self-contained HTML page.

Nothing here imports torch; matplotlib, jinja2 and rich are imported when something is drawn, rendered or printed.

    report = Report("Search over a code base", subtitle="all-MiniLM-L6-v2, dora, rank 8")
    results = report.section("Results")
    results.table(rows, [Column("method"), Column("mrr", "MRR", format=".3f", better="higher")])
    results.figure(learning_curves(histories, metric="MRR", better="higher"), "Validation MRR during training")
    report.write("report.html")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .page import Example, Hit, Report, Section
    from .plots import Point, learning_curves, lr_curves, quality_vs_parameters, spectrum
    from .sites import change_per_site, rank_trajectories
    from .svg import Plot
    from .tables import Column, console_table, html_table, markdown_table

_HOME = {
    "Column": "tables",
    "Example": "page",
    "Hit": "page",
    "Plot": "svg",
    "Point": "plots",
    "Report": "page",
    "Section": "page",
    "change_per_site": "sites",
    "console_table": "tables",
    "html_table": "tables",
    "learning_curves": "plots",
    "lr_curves": "plots",
    "markdown_table": "tables",
    "quality_vs_parameters": "plots",
    "rank_trajectories": "sites",
    "spectrum": "plots",
}

__all__ = [
    "Column",
    "Example",
    "Hit",
    "Plot",
    "Point",
    "Report",
    "Section",
    "change_per_site",
    "console_table",
    "html_table",
    "learning_curves",
    "lr_curves",
    "markdown_table",
    "quality_vs_parameters",
    "rank_trajectories",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""`rankfold adapt`: fit a model to own data."""

from rankfold.jobs.adapt.defaults import DEFAULTS
from rankfold.jobs.adapt.settings import AdaptSettings

from .settings import from_settings

__all__ = ["adapt"]


def _job(settings: AdaptSettings) -> object:
    from rankfold.jobs.adapt.run import adapt_job

    return adapt_job(settings)


def _defaults() -> str:
    """What each task fills in, one line a task; the first mark keeps the lines apart in the help."""
    lines = [
        f"  {task:<9}" + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in filled.items()) for task, filled in DEFAULTS.items()
    ]
    return "\n".join(["\b", "Defaults by task:", *lines])


adapt = from_settings(
    AdaptSettings,
    "adapt",
    "Fit a model to your data by a small change beside its weights.\n\n"
    "Writes the adapter, metrics.json and report.html into --out. --dry-run shows what would train, and what it needs.\n\n"
    + _defaults(),
    _job,
)

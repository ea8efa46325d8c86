"""`rankfold adapt`: fit a model to own data."""

from rankfold.jobs.adapt.settings import AdaptSettings

from .settings import from_settings

__all__ = ["adapt"]


def _job(settings: AdaptSettings) -> object:
    from rankfold.jobs.adapt.run import adapt_job

    return adapt_job(settings)


adapt = from_settings(
    AdaptSettings,
    "adapt",
    "Fit a model to your data by a small change beside its weights.\n\n"
    "Writes the adapter, metrics.json and report.html into --out. --dry-run shows what would train, and what it needs.",
    _job,
)

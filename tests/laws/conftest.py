"""Prints what a run of the laws was drawn with."""

from .seed import SEED


def pytest_report_header() -> str:
    return f"laws: pairs drawn with seed {SEED}; RANKFOLD_LAWS_SEED={SEED} repeats them"

"""Predictions of an adapted model for the rows of a file: labels with probabilities, embeddings, text."""

from __future__ import annotations

from pathlib import Path

from .settings import PredictSettings

__all__ = ["predict_job"]


def predict_job(settings: PredictSettings) -> Path:
    """Write one prediction for each row of the data; gives the path of the file."""
    raise NotImplementedError

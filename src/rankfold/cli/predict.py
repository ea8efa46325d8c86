"""`rankfold predict`: use what `adapt` made."""

from rankfold.jobs.adapt.settings import PredictSettings

from .settings import from_settings

__all__ = ["predict"]


def _job(settings: PredictSettings) -> object:
    from rankfold.jobs.adapt.predict import predict_job

    return predict_job(settings)


predict = from_settings(
    PredictSettings,
    "predict",
    "Use an adapted model on the rows of a file.\n\nWrites labels with probabilities, embeddings, or text.",
    _job,
)

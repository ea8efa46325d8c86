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
    "Use an adapted model: labels with probabilities, embeddings or text for each row of a file.",
    _job,
)

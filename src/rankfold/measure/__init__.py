"""Pure metrics: predictions in (numpy, torch or plain sequences), numbers out. No model is run here."""

from rankfold.measure.bootstrap import Interval, bootstrap_difference, bootstrap_interval
from rankfold.measure.calibration import ace, ace_top, ece, mce
from rankfold.measure.classification import accuracy, confusion, f1, perplexity
from rankfold.measure.retrieval import mrr, ndcg_at, ranks_of, recall_at
from rankfold.measure.significance import PairedTest, holm, paired_test, spearman

__all__ = [
    "Interval",
    "PairedTest",
    "accuracy",
    "ace",
    "ace_top",
    "bootstrap_difference",
    "bootstrap_interval",
    "confusion",
    "ece",
    "f1",
    "holm",
    "mce",
    "mrr",
    "ndcg_at",
    "paired_test",
    "perplexity",
    "ranks_of",
    "recall_at",
    "spearman",
]

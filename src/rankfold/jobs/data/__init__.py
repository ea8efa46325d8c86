"""Data of every job: files, folders and built-in sets, read into one light record without importing torch."""

from rankfold.jobs.data.limits import Limits
from rankfold.jobs.data.reader import read
from rankfold.jobs.data.splitting import split
from rankfold.jobs.data.stdlib import load, names
from rankfold.jobs.data.table import Table, label_ids, label_names
from rankfold.jobs.data.tasks import TASKS

__all__ = ["TASKS", "Limits", "Table", "label_ids", "label_names", "load", "names", "read", "split"]

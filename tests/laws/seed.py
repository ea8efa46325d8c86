"""The seed of what the laws draw: fixed, so that a run can be repeated; RANKFOLD_LAWS_SEED gives another."""

import os

__all__ = ["SEED"]

SEED = int(os.environ.get("RANKFOLD_LAWS_SEED", "0"))

"""Fused paths of the hot operators. The expressions of `linalg` are their oracle."""

from .inputs import watching
from .lowrank import lowrank_linear
from .magnitude import magnitude_linear, row_norms
from .paths import has_path, path_for

__all__ = ["has_path", "lowrank_linear", "magnitude_linear", "path_for", "row_norms", "watching"]

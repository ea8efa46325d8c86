"""Adapters as plain data: the record, its algebra, fingerprints of bases, safe files, and the formats of other tools.

Imports `linalg` and `errors` only; knows nothing of models.
"""

from .adapter import Adapter, Entry
from .fingerprint import Comparison, Fingerprint, compare, fingerprint
from .native import NativeAdapter, SiteRecord, load_native, save_native

__all__ = [
    "Adapter",
    "Comparison",
    "Entry",
    "Fingerprint",
    "NativeAdapter",
    "SiteRecord",
    "compare",
    "fingerprint",
    "load_native",
    "save_native",
]

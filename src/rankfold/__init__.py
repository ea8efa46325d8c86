"""rankfold: low-rank learning for PyTorch. Every method is one small file, every two methods compose or say why not, and no
method ever touches the base weights.

    import rankfold as rf
    adaptation = rf.adapt(model, "dora", rank=8)
    ...train model as ever...
    adaptation.save("my-adapter")

Names are imported on first use: `import rankfold` alone loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adaptation": "training.adaptation",
    "Adapter": "adapters.adapter",
    "Bank": "jobs.bank",
    "Entry": "adapters.adapter",
    "Method": "training.method",
    "SITE_KINDS": "core.site",
    "Site": "core.site",
    "Targets": "core.targets",
    "adapt": "training.adapting",
    "adaptation": "training.adaptation",
    "explain": "training.explain",
    "fingerprint": "training.prints",
    "load": "jobs.exchange",
    "method": "training.method",
    "methods": "training.method",
    "normal_form": "training.saving",
    "quantise": "core.bases.quantise",
    "record_source": "training.prints",
    "shard": "core.sharding",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankfold' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rankfold.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from .adapters.adapter import Adapter, Entry
    from .core.bases.quantise import quantise
    from .core.sharding import shard
    from .core.site import SITE_KINDS, Site
    from .core.targets import Targets
    from .jobs.bank import Bank
    from .jobs.exchange import load
    from .training.adaptation import Adaptation, adaptation
    from .training.adapting import adapt
    from .training.explain import explain
    from .training.method import Method, method, methods
    from .training.prints import fingerprint, record_source
    from .training.saving import normal_form

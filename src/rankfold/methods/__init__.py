"""The catalogue: one file per idea, in a folder per axis.

The package shares its name with `rf.methods()`, and Python puts an imported package in the place of the function: so it
answers calls like the function does.
"""

import sys
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self) -> list[str]:
        from rankfold.training.method import methods

        return methods()


sys.modules[__name__].__class__ = _Callable

"""A folder for each family, one file for each method. The package can be called: `al.methods("lora*")` lists ids.

A file whose name begins with an underscore holds what the methods of its family share; it lies beside them.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _Methods(ModuleType):
    def __call__(self, pattern: str = "*") -> list[str]:
        from adapterlab.registry import ids

        return ids(pattern)


# A module may be given a subclass of ModuleType; this is what makes `al.methods` both a package and a function.
sys.modules[__name__].__class__ = _Methods

"""One file per method. The package can be called: `al.methods("lora*")` lists the matching ids."""

from __future__ import annotations

import sys
from types import ModuleType


class _Methods(ModuleType):
    def __call__(self, pattern: str = "*") -> list[str]:
        from adapterlab.registry import ids

        return ids(pattern)


# A module may be given a subclass of ModuleType; this is what makes `al.methods` both a package and a function.
sys.modules[__name__].__class__ = _Methods

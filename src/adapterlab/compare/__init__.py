"""Compare methods on one model and one data set, with figures that can be trusted.

    result = compare(load_config("compare.yaml"))
    print(result.recommendation.text)

Names are imported on first use.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "Active": "engine",
    "CompareConfig": "config",
    "Comparison": "results",
    "Outlook": "power",
    "Run": "results",
    "Watcher": "engine",
    "compare": "engine",
    "work": "engine",
    "load": "results",
    "load_config": "config",
    "outlook": "power",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)

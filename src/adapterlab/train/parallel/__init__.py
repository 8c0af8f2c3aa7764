"""How a run is spread over processes and devices: one file for each kind, and what they have in common in `alone`."""

from __future__ import annotations

from adapterlab.train.parallel.alone import Alone
from adapterlab.train.parallel.choosing import KINDS, Kind, kind_of, loading, named

__all__ = ["KINDS", "Alone", "Kind", "kind_of", "loading", "named"]

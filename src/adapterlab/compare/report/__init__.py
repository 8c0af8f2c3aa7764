"""What people read of a comparison: a page, tables, results in HF PEFT's shape, a picture, a live view.

Everything is made from the comparison's records alone, at any time and on any machine.
"""

from __future__ import annotations

from adapterlab.compare.report.write import FILES, PICTURE, rebuild, write

__all__ = ["FILES", "PICTURE", "rebuild", "write"]

"""Optimizers and learning-rate schedules."""

from adapterlab.optim.adamw import AdamW, adamw, master
from adapterlab.optim.forgetting import moments, reorder, thin_out, written
from adapterlab.optim.schedule import Span, factor, schedule, steps_of

__all__ = [
    "AdamW",
    "Span",
    "adamw",
    "factor",
    "master",
    "moments",
    "reorder",
    "schedule",
    "steps_of",
    "thin_out",
    "written",
]

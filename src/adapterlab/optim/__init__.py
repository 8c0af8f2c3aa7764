"""Optimizers and learning-rate schedules."""

from adapterlab.optim.adamw import AdamW, adamw, master
from adapterlab.optim.schedule import factor, schedule, steps_of

__all__ = ["AdamW", "adamw", "factor", "master", "schedule", "steps_of"]

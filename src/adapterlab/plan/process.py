"""From live tensors to what a process takes: libraries, allocator, kernels, loading."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

from adapterlab.plan.device import Device
from adapterlab.plan.result import Plan
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import Trace

_GPU_SLACK = 0.06  # of the tensors: blocks that the caching allocator cannot fill


@functools.cache
def figures() -> dict[str, Any]:
    """Return the constants of the CPU's estimate, and how far it was off when they were measured."""
    found: dict[str, Any] = json.loads(files("adapterlab.plan").joinpath("process.json").read_text(encoding="utf-8"))
    return found


def estimate(setup: Setup, trace: Trace, place: Device) -> int:
    """Bytes that a process needs at its peak; on a GPU, bytes of the device."""
    if place.kind != "cpu":
        return round(trace.peak.total * (1 + _GPU_SLACK)) + place.context
    constants = figures()["constants"]
    resting = sum(trace.resting.values())
    working = trace.peak.total - resting
    # Whole blocks that come and go leave holes in the heap that the allocator of the system does not fill.
    holes = constants["holes"] * working if setup.training.recompute == "full" else 0
    packed = constants["packed"] if setup.quantize else 0
    steady = constants["libraries"] + packed + constants["resting"] * resting
    return round(steady + constants["working"] * working + holes)


def of_base(plan: Plan) -> int:
    """Bytes of a planned process with the base weights alone; on a GPU, bytes of the device."""
    if plan.device.kind != "cpu":
        return round(plan.base * (1 + _GPU_SLACK)) + plan.device.context
    constants = figures()["constants"]
    packed = constants["packed"] if plan.quantize else 0
    return round(constants["libraries"] + packed + constants["resting"] * plan.base)


def band(place: Device) -> tuple[float, float]:
    """Median and worst relative error of the estimate; on a GPU, the allowance that it contains."""
    if place.kind != "cpu":
        return (_GPU_SLACK / 2, _GPU_SLACK)
    errors = figures()["errors"]
    return (errors["median"], errors["worst"])

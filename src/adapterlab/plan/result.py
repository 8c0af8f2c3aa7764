"""What a plan says: plain numbers that can be printed, compared and written as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from adapterlab.plan.device import Device
from adapterlab.plan.parallel import Traffic

Verdict = Literal["fits", "tight", "does not fit", "unknown"]


@dataclass(frozen=True)
class Plan:
    """Memory and work of training a method on a model.

    Attributes:
        model: name; method: id; settings: those given; device: as given.
        batch: rows computed at once; length: tokens of a row.
        precision: of the frozen weights; quantize: how they are packed; recompute: what is computed again.
        peak: bytes of live tensors at the fullest moment of a step; moment: which one that is.
        process: bytes the process (on a GPU: the device) needs at its peak: tensors, libraries, allocator, kernels.
        band: median and worst relative error of `process` when it was last measured.
        parts: bytes at the peak by what they are for.
        layers: activations at the peak, by layer.
        trainable: number of trainable scalars; base: bytes of the base weights.
        adapter: bytes of the adapter; state: bytes of the optimizer's state.
        flops: floating-point operations of one optimizer step of one batch.
        seconds: estimate of its time; None without a speed of the device.
        limit: bytes the device has; None when it is not known.
        loss: way the loss is computed; notes: what else to know.
        simulated: layers that were simulated; where they are fewer than the model has, the rest is like them.
        devices: how many; everything else is of one of them, with `batch` rows of its own, or of all with device_map.
        parallel: how the step is divided among them; traffic: what each sends. None on one device.
    """

    model: str
    method: str
    settings: dict[str, Any]
    device: Device
    batch: int
    length: int
    precision: str
    quantize: str | None
    recompute: str
    peak: int
    moment: str
    process: int
    band: tuple[float, float]
    parts: dict[str, int]
    layers: list[int]
    trainable: int
    base: int
    adapter: int
    state: int
    flops: float
    seconds: float | None
    limit: int | None
    loss: str
    notes: list[str] = field(default_factory=list)
    simulated: int = 0
    devices: int = 1
    parallel: str | None = None
    traffic: Traffic | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether it fits into the device's memory; `tight` is within the error of the estimate."""
        return self.fits_into(self.limit)

    def fits(self, limit: int) -> bool:
        """Say whether it fits into so many bytes, as far as the estimate can tell."""
        return self.process <= limit

    def fits_into(self, limit: int | None) -> Verdict:
        """Say how surely it fits into so many bytes."""
        return verdict(self.process, self.band[1], limit)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        plain = dataclasses.asdict(self)
        return {**plain, "band": list(self.band), "verdict": self.verdict}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Read what `to_json` wrote."""
        known = {key: value for key, value in values.items() if key != "verdict"}
        traffic = known.get("traffic") and Traffic(**known["traffic"])
        return cls(**{**known, "device": Device(**known["device"]), "band": tuple(known["band"]), "traffic": traffic})


def verdict(process: int, worst: float, limit: int | None) -> Verdict:
    """Say how surely an estimate with a worst relative error fits into so many bytes; `tight` is within the error."""
    if limit is None:
        return "unknown"
    if process * (1 + worst) <= limit:
        return "fits"
    return "tight" if process * (1 - worst) <= limit else "does not fit"

"""A model placed over the devices of one process by accelerate's hooks, as `device_map` of transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapterlab.foreign.model import input_device
from adapterlab.train.parallel.alone import Alone


class Placed(Alone):
    """Layers on several devices, or in the CPU's memory or on the disk until they are called; adapters are beside them.

    One device computes at a time. What is kept elsewhere is fetched for the forward pass, and what of it the backward
    pass needs stays until then; with `training.recompute: full` it is fetched once more instead. It cannot train.
    """

    kind = "device_map"

    def __init__(self, accelerator: Any, places: dict[str, Any]):
        super().__init__(accelerator)
        self.places = places

    def __str__(self) -> str:
        devices = dict.fromkeys(str(place) for place in self.places.values())
        return f"one process, layers on {', '.join(devices)}"

    def device(self, model: nn.Module) -> torch.device:
        """Where the input table computes."""
        return input_device(model)

"""What is planned: a model's shape, a method, and the numbers of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from adapterlab.core.method import Method
    from adapterlab.plan.parallel import Parallel
    from adapterlab.train.config import Training


@dataclass(frozen=True)
class Setup:
    """Everything that memory depends on.

    Attributes:
        config: of the model.
        method: with its settings.
        training: how a step is done; its batch size and number of steps are replaced.
        batch: rows computed at once.
        length: tokens of a row.
        labelled: share of the tokens that bear a label.
        precision: of the frozen weights.
        quantize: None, "nf4" or "int8".
        kind: of the device: its kernels and its allocator matter.
        trust_remote_code: whether code that the model brings may run.
        parallel: how the step is divided among devices, each with rows of its own; None on one.
    """

    config: PretrainedConfig
    method: Method
    training: Training
    batch: int = 1
    length: int = 1024
    labelled: float = 1.0
    precision: str = "bf16"
    quantize: str | None = None
    kind: str = "cpu"
    trust_remote_code: bool = False
    parallel: Parallel | None = None

    @property
    def accumulation(self) -> int:
        """Batches of a step; a plan needs no more than one, or two when gradients are summed."""
        return min(2, self.training.accumulation)

    @property
    def granularity(self) -> int:
        """Bytes to which the device's allocator rounds."""
        return 512 if self.kind == "cuda" else 1

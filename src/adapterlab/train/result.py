"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        folder: of the run.
        best: folder of the adapter with the lowest evaluation loss; None without evaluation.
        last: folder of the final adapter.
        steps: optimizer steps done, before an interruption included.
        epochs: passes over the training rows.
        train_loss: of the last step, in nats a token.
        eval_loss: at the end; None without evaluation.
        best_loss: lowest evaluation loss.
        best_step: where it was.
        stopped_early: whether patience ended it.
        tokens: input tokens trained on, padding not counted.
        seconds: spent in training steps; evaluation and saving not counted.
        tokens_per_second: the ratio of the two.
        memory: bytes: `loaded`, `peak`, `peak_beyond_loaded`, `mean` of resident memory; `gpu_peak`.
        proven: number of tensors seen to train in the first steps of the last process.
        trainable: number of trainable scalars.
        total: number of scalars of model and adapter.
        outcome: what training decided, such as the rank of each module; a word and what it is.
    """

    folder: Path
    best: Path | None
    last: Path
    steps: int
    epochs: float
    train_loss: float
    eval_loss: float | None
    best_loss: float | None
    best_step: int | None
    stopped_early: bool
    tokens: int
    seconds: float
    tokens_per_second: float
    memory: dict[str, Any]
    proven: int
    trainable: int
    total: int
    outcome: dict[str, str] = field(default_factory=dict)

    @property
    def adapter(self) -> Path:
        """Folder of the adapter to use: the best, or the last where nothing was evaluated."""
        return self.best or self.last

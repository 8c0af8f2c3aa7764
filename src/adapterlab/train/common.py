"""What runs that are trained together must have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterlab.errors import ConfigError
from adapterlab.train.config import TrainConfig

COMMON = (
    "model", "precision", "quantize", "device", "parallel", "cpu_offload", "trust_remote_code", "training.recompute",
    "training.offload",
)  # fmt: skip


def check_common(configs: Sequence[TrainConfig]) -> None:
    """Check that runs can be trained together.

    Raises:
        ConfigError: there is none, they do not share a base, or two share an output folder.
    """
    if not configs:
        raise ConfigError("There is no run to train. Give a configuration for each.")
    first, *others = [config.flat() for config in configs]
    outputs: dict[Path, int] = {}
    for number, config in enumerate(configs):
        if (before := outputs.setdefault(config.output.absolute(), number)) != number:
            raise ConfigError(
                f"Runs {before + 1} and {number + 1} both write to {config.output}. Give each an output of its own."
            )
    for config, flat in zip(configs[1:], others, strict=True):
        differing = [f"  {key}: {first[key]!r} and {flat[key]!r}" for key in COMMON if first[key] != flat[key]]
        if differing:
            raise ConfigError(
                f"Runs that are trained together share one base, and those of {configs[0].output} and {config.output} "
                "differ in it:\n" + "\n".join(differing) + "\nMake these settings the same, or train them one by one."
            )

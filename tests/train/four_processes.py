"""A base that is split among four processes, and what is left of two, four or one of them. Used by test_four_processes.

    python four_processes.py ROOT

Ranks are forked as in two_processes. Nothing divides by four: of the rows of some tensors a rank has one less, of
others none, and in the last step three ranks have no row.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from launches import command, stopped
from two_processes import ROOT, kill, on, ranks

from tiny_runs import make_config

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 3, "dropout": 0.0, "targets": "all-linear"},
}
ROWS = 8  # of a step, whoever computes them
STOP = 2  # step after which a run is stopped
# From how many processes to how many.
RESUMES = [(2, 4), (4, 2), (1, 2)]


def configuration(output: str, method: str, world: int, **training: Any) -> Path:
    """Write the configuration of a run that some processes share."""
    usual = {
        "steps": None, "epochs": 1, "batch_size": 1, "accumulation": ROWS // world, "lr": 1e-3, "eps": 1e-4,
        "eval_every": 2, "save_every": 2, "warmup": 0,
    }  # fmt: skip
    fields = make_config(ROOT, **{**usual, **training})
    fields["data"]["eval_size"] = 7
    fields |= {"method": METHODS[method], "parallel": "fsdp", "output": str(ROOT / output)}
    file = ROOT / f"{output}-{world}.yaml"
    file.write_text(json.dumps(fields))
    return file


def main() -> dict[str, Any]:
    os.environ.update(ADAPTERLAB_HOME=str(ROOT / "home"))
    found: dict[str, Any] = {}

    def go(name: str, method: str, world: int, *words: str, output: str = "", **options: Any) -> None:
        file = configuration(output or name, method, world, **options.pop("training", {}))
        found[name] = ranks(world, ["train", str(file), *words], **options)

    for method in METHODS:
        go(f"{method}-alone", method, 1)
        go(f"{method}-four", method, 4)
        for before, after in RESUMES:
            name = f"{method}-{before}-{after}"
            go(f"{name} stopped", method, before, output=name, trouble=on(before - 1, STOP, stop))
            found[f"{name} stopped"]["parts"] = parts(name)
            go(f"{name} resumed", method, after, "--resume", output=name)
    go("killed", "full", 4, trouble=on(1, 3, kill))
    found["killed"]["parts"] = parts("killed")
    go("killed resumed", "full", 4, "--resume", output="killed")
    # A launcher is told to end; ranks that are started alike go on.
    long = {"steps": 80, "epochs": None, "save_every": 1000, "eval_every": 40}
    file = configuration("launched", "full", 2, **long)
    code, said = stopped(command(file, 2), ROOT / "launched")
    found["launched"] = {"codes": [code], "said": [said], "parts": parts("launched")}
    go("launched resumed", "full", 2, "--resume", output="launched", training=long)
    go("launched straight", "full", 2, output="straight", training=long)
    return found


def parts(output: str) -> dict[str, int]:
    """The files that ranks wrote, with their sizes."""
    checkpoint = ROOT / output / "checkpoint"
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in checkpoint.rglob("*.safetensors")}


def stop() -> None:
    kill(signal.SIGTERM)


if __name__ == "__main__":
    print(json.dumps(main()))

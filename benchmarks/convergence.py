"""How fast variants of low-rank adaptation learn: one run each, same model, rows, order, steps and seed.

    python benchmarks/convergence.py            # all variants, results/convergence.json and .png
    python benchmarks/convergence.py lora dora  # some of them, the others keep their curves

The rates are the ones each paper relates to LoRA's; nothing was searched, and one seed tells little about small
differences. The curves are kept as they come out.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import adapterlab
from adapterlab.io.atomic import write_json
from adapterlab.train import fit

RESULTS = Path(__file__).parent / "results"
RATE, RANK = 1e-3, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"r": RANK, "alpha": 16},
    "rslora": {"r": RANK, "alpha": 16},
    "lora_plus": {"r": RANK, "alpha": 16},
    "dora": {"r": RANK, "alpha": 16},
    "pissa": {"r": RANK, "alpha": RANK},
    "lora_fa": {"r": RANK, "alpha": 16},
    "vera": {},
}
RATES = {"vera": 1e-2, "lora_plus": RATE / 4}  # vectors need about ten times the rate; LoRA+ speeds B up by itself


def config(name: str, steps: int, folder: str) -> dict[str, Any]:
    return {
        "model": "smollm2-135m",
        "method": {"name": name, "targets": "all-linear", **VARIANTS[name]},
        "data": {
            "task": "chain_sum",
            "task_args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            "limit": 16 * steps,
            "eval_size": 100,
        },
        "training": {
            "steps": steps,
            "batch_size": 16,
            "lr": RATES.get(name, RATE),
            "warmup": 4,
            "eval_every": max(1, steps // 4),
        },
        "output": folder,
    }


def run(name: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = config(name, steps, f"{folder}/run")
        result = fit(settings, quiet=True)
        assert result is not None
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "config": {key: settings[key] for key in ("method", "data", "training")},
        "trainable": result.trainable,
        "train": [[line["step"], round(line["loss"], 5)] for line in lines if "loss" in line],
        "eval": [[line["step"], round(line["eval_loss"], 5)] for line in lines if "eval_loss" in line],
    }


def draw(curves: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, curve in curves.items():
        steps, losses = zip(*curve["train"], strict=True)
        smooth = [sum(losses[max(0, i - 4) : i + 1]) / len(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
        axes.plot(steps, smooth, label=f"{name} ({curve['trainable']:,})")
    axes.set(xlabel="step of 16 rows", ylabel="training loss, mean of five steps", yscale="log")
    axes.set_title("SmolLM2-135M on sums of two numbers, one seed")
    axes.legend(title="method (trainable)")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    steps = 40
    chosen = sys.argv[1:] or list(VARIANTS)
    file = RESULTS / "convergence.json"
    stored = json.loads(file.read_text())["curves"] if file.exists() else {}
    for name in chosen:
        stored[name] = run(name, steps)
        print(
            f"{name:10} trainable {stored[name]['trainable']:>9,}  evaluation loss {stored[name]['eval']}", flush=True
        )
        curves = {key: stored[key] for key in VARIANTS if key in stored}
        conditions = {
            "model": "smollm2-135m",
            "precision": "bf16",
            "device": "cpu",
            "seed": 0,
            "adapterlab": adapterlab.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        write_json(file, {"conditions": conditions, "curves": curves})
    draw(curves, RESULTS / "convergence.png")


if __name__ == "__main__":
    main()

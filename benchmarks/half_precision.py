"""What a LoRA step in bfloat16 takes on a processor without instructions for it, against float32, here and with PEFT.

    python benchmarks/half_precision.py
    python benchmarks/half_precision.py --quick

Each run is a process that loads the model in one precision and trains LoRA on all linear layers on random tokens that
all bear a label. PEFT's side is its LoRA of the same rank on the same modules, with torch's products and attention and
the loss of transformers. Where the processor has instructions for bfloat16 the two precisions take about as long.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _bench as bench
import step_time
from _bench import Figures, Job

SIDES = {
    "ours in bfloat16": ("adapterlab", "bfloat16"),
    "ours in float32": ("adapterlab", "float32"),
    "PEFT in float32": ("PEFT", "float32"),
    "PEFT in bfloat16": ("PEFT", "bfloat16"),
}
FIRST = next(iter(SIDES))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="2x128", help="rows x tokens")
    parser.add_argument("--steps", type=int, default=1, help="timed steps in a run, after one to warm up")
    parser.add_argument("--rank", type=int, default=8)


def plan(args: argparse.Namespace) -> list[Job]:
    shape = [int(side) for side in ("2x16" if args.quick else args.shape).split("x")]
    common = {"model": bench.chosen_model(args), "shape": shape, "steps": args.steps, "rank": args.rank}
    return [
        Job("lora", side, pair, {**common, "by": by, "dtype": dtype})
        for pair in range(args.pairs)
        for side, (by, dtype) in SIDES.items()
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    model = bench.load(job["model"], dtype=job["dtype"])
    memory, batch = bench.Memory(model), bench.batch(model, *job["shape"])
    model.train()
    step = (_ours if job["by"] == "adapterlab" else _peft)(job, model)
    seconds = bench.timed(lambda: step(batch), job["steps"])
    return {"step": bench.statistics.median(seconds), **memory.figures(), "threads": torch.get_num_threads()}


def _ours(job: dict[str, Any], model: Any) -> Any:
    import adapterlab as al

    return bench.driver(al.attach(model, al.LoRA(r=job["rank"], targets="all-linear")))


def _peft(job: dict[str, Any], model: Any) -> Any:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": job["rank"], "target_modules": "all-linear"}
    return step_time._peft({"config": config}, model, None)[0]


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary, table = {}, []
    for side in SIDES:
        time = bench.ratios(done, ("lora", side), ("lora", FIRST), lambda run: run["step"])
        runs = [figures for job, figures in done if job.side == side]
        held = {key: bench.spread([run[key] / 1e9 for run in runs]) for key in ("loaded", "above")}
        summary[side] = {"time / ours in bfloat16": time, **held}
        table.append([side, *(bench.shown(found) for found in (time, held["loaded"], held["above"]))])
    header = ["LoRA", f"time of a step / {FIRST}", "process with the model, GB", "above it, GB"]
    return summary, bench.markdown(header, table)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options)

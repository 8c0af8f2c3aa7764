"""A LoRA step on rows that begin alike, with the beginning computed once and in each row: time, memory, gradients.

    python benchmarks/shared_openings.py
    python benchmarks/shared_openings.py --dtype float32   # for processors without bfloat16 instructions
    python benchmarks/shared_openings.py --quick

The rows are those of `adapterlab quickstart`, sums behind one instruction, and of GSM8K behind the system prompt of the
model's template. Each run is a process of its own that takes the same steps on packed rows; the last figure is the
largest relative difference of a gradient in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES = {"shared": True, "whole": False}
LOCAL = Path("../../shared/data/gsm8k/train.jsonl")  # seen from this folder, where workers run
GSM8K = str(LOCAL) if (bench.HERE / LOCAL).exists() else "openai/gsm8k"
CASES: dict[str, dict[str, Any]] = {
    "sums": {
        "rows": 16,
        "data": {
            "task": "chain_sum", "task_args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            "system": "You are a calculator.",
        },
    },
    "gsm8k": {"rows": 8, "data": {"path": GSM8K, "max_length": 512}},
}  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one to warm up")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the base")


def plan(args: argparse.Namespace) -> list[Job]:
    common = {"model": bench.chosen_model(args), "steps": args.steps, "dtype": args.dtype}
    return [
        Job(case, side, pair, {**common, **CASES[case], "share": share, "exact": pair == 0})
        for pair in range(args.pairs)
        for case in CASES
        for side, share in SIDES.items()
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al
    from adapterlab.data import PackingCollator
    from adapterlab.data.batching import count_tokens
    from adapterlab.engine.attention import fast_attention
    from adapterlab.engine.loss import Loss
    from adapterlab.engine.norms import lean_norms
    from adapterlab.optim import adamw

    model = bench.load(job["model"], dtype=job["dtype"])
    rows = _rows(job)
    memory = bench.Memory(model)
    host = al.attach(model, al.LoRA(r=8, targets="all-linear"))
    loss, optimizer = Loss(model), adamw(host.parameters("default"), lr=1e-4)
    batch = PackingCollator(share=job["share"])(rows)
    model.train()

    def backward(batch: Any) -> None:
        with fast_attention(model), lean_norms(model):
            loss(batch).backward()

    def step() -> None:
        backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    memory.reset()
    seconds = bench.timed(step, job["steps"])
    figures: Figures = {"step": bench.statistics.median(seconds), "seconds": seconds, **memory.figures()}
    figures |= {"computed": batch["input_ids"].numel(), "tokens": count_tokens(batch)}
    if job["share"] and job["exact"]:
        model.float()
        found = []
        for share in SIDES.values():
            backward(PackingCollator(share=share)(rows))
            found.append([p.grad.clone() for p in host.parameters("default")])
            optimizer.zero_grad()
        figures["farthest"] = max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True) if b.any())
    return {**figures, "threads": torch.get_num_threads()}


def _rows(job: dict[str, Any]) -> list[Any]:
    from adapterlab.data import DataConfig, encode, load_data
    from adapterlab.models import resolve

    if not isinstance(job["model"], str):
        ids = [[*range(3, 23), 30 + i, 31, 40 + i] for i in range(job["rows"])]
        return [{"input_ids": row, "labels": [-100] * 21 + row[21:]} for row in ids]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve(job["model"])))
    settings = DataConfig(**job["data"], limit=job["rows"], eval_size=0)
    return list(encode(load_data(settings).train, tokenizer, settings, window=None).rows)


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    measures = {"time": "step", "peak memory above the model": "above"}
    summary: dict[str, Any] = {}
    for case in CASES:
        figures = next(f for job, f in done if job.case == case and "farthest" in f)
        summary[case] = {
            what: bench.ratios(done, (case, "shared"), (case, "whole"), lambda run, key=key: run[key])
            for what, key in measures.items()
        } | {key: figures[key] for key in ("computed", "tokens", "farthest")}
    header = ["rows", "tokens computed", *(f"{what}, shared / whole" for what in measures), "farthest gradient"]
    table = [
        [
            case,
            f"{found['computed']:,} of {found['tokens']:,}",
            *(bench.shown(found[what]) for what in measures),
            f"{found['farthest']:.1e}",
        ]
        for case, found in summary.items()
    ]
    return summary, bench.markdown(header, table)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

"""What a search for a learning rate gains when its rates share one base: a round of eight LoRAs, as `compare` makes it.

    python benchmarks/rate_search.py
    python benchmarks/rate_search.py --quick

Both sides train the same eight rates for the same steps on sums of two numbers, in one process: with `together: auto`
all in one pass, with `never` one after the other. Time is that of the whole search, loading the model included. Both
have to find the same rate; how far their validation losses are apart is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES = ("auto", "never")
VALIDATION = 16  # rows that choose


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of each rate")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--precision", default="bf16", help="of the base; fp32 for processors without bfloat16")


def plan(args: argparse.Namespace) -> list[Job]:
    from adapterlab.models import pull

    common = {"rates": 2 if args.quick else args.rates, "steps": 2 if args.quick else args.steps}
    common |= {"rows": args.rows, "precision": args.precision, "model": bench.MODEL}
    pull(bench.MODEL)
    case = f"{common['rates']} rates, {common['steps']} steps of {args.rows} rows"
    return [Job(case, side, pair, {**common, "side": side}) for pair in range(args.pairs) for side in SIDES]


def work(job: dict[str, Any]) -> Figures:
    import torch

    from adapterlab.compare import CompareConfig, preparing, worker
    from adapterlab.compare.jobs import Job as SearchJob
    from adapterlab.compare.jobs import JobFolder, Progress

    with tempfile.TemporaryDirectory() as place:
        config = CompareConfig(**fields(Path(place), job))
        contenders = config.contenders()
        facts, _, train, held = preparing.read_rows(config, contenders)
        with preparing.claimed(config, overwrite=False):
            preparing.write_rows(config, facts, train, held)
            asked = SearchJob(kind="search", contender=contenders[0], steps=job["steps"], config=config.plain())
            folder = JobFolder(asked.folder(config.output))
            folder.path.mkdir(parents=True)
            began = time.perf_counter()
            found = worker.search(asked, folder, Progress(folder))
            seconds = time.perf_counter() - began
    (trials,) = found["rounds"]
    assert all(trial["together"] == (job["rates"] if job["side"] == "auto" else 1) for trial in trials), trials
    return {
        "seconds": seconds,
        "peak": bench.peak(),
        "chosen": found["chosen"],
        "losses": [trial["loss"] for trial in trials],
        "threads": torch.get_num_threads(),
    }


def fields(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """A comparison of one method whose rate is searched for in one round."""
    draw = random.Random(0)
    for name, count in (("train", job["rows"] * job["steps"] + VALIDATION), ("eval", 8)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for _ in range(count):
                a, b = draw.randrange(100), draw.randrange(100)
                stream.write(json.dumps({"prompt": f"{a} + {b} =", "completion": f" {a + b}"}) + "\n")
    return {
        "model": job["model"], "precision": job["precision"], "device": "cpu", "validation": VALIDATION,
        "data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl"), "scorer": "none"},
        "methods": [{"name": "lora", "r": 8, "alpha": 16}], "budget": {"steps": job["steps"]}, "seeds": 1,
        "lr": "auto", "search": {"rates": job["rates"], "factor": 1.5, "fractions": [1.0], "extend": 0},
        "training": {"batch_size": job["rows"]}, "evaluation": {"samples": 0, "costs": False},
        "together": job["side"], "output": folder / "comparison",
    }  # fmt: skip


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary: dict[str, Any] = {}
    table = []
    for case in dict.fromkeys(job.case for job, _ in done):
        there = {job.side: figures for job, figures in done if job.case == case and "error" not in figures}
        if len(there) < len(SIDES):
            continue
        assert there["auto"]["chosen"] == there["never"]["chosen"], "the sides chose different rates"
        pairs = zip(there["auto"]["losses"], there["never"]["losses"], strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        ratio = {
            what: bench.ratios(done, (case, "never"), (case, "auto"), lambda run, w=what: run[w])
            for what in ("seconds", "peak")
        }
        summary[case] = {**ratio, "losses_apart": apart}
        table.append([case, *map(bench.shown, ratio.values()), f"{apart:.1e}"])
    header = ["search", "time, one after the other / together", "memory, likewise", "losses apart"]
    return summary, bench.markdown(header, table)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

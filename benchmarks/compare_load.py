"""What does a comparison of a hundred jobs cost beside the jobs: here, over Ray, and by workers on a folder?

Two cases, each with the same number of processes at a time on all sides. `idle`: each job is a process that only writes
down a result, so that all of the time is what the engine, the pool and the start of a process take. `runs`: each job
trains a tiny random model for three steps and is examined, so that nearly all of the time is what surrounds a training:
imports, loading, examining; the sides have to find the same figures, to the last bit. A side `ray` needs Ray installed.

    python benchmarks/compare_load.py            # 100 jobs of each case and side
    python benchmarks/compare_load.py --quick    # 4
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES, HELP = ("local", "ray", "folder"), "--help-with"
IDLE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
exam = {"loss": 1.0, "losses": [1.0] * 16, "tokens": [1] * 16, "score": 0.5, "right": [0, 1] * 8}
who = job["contender"] or {"label": "untrained", "key": "untrained", "method": "untrained"}
run = {"label": who["label"], "key": who["key"], "method": who["method"], "seed": job["seed"], "status": "finished",
       "wall_seconds": 0.0, "train_seconds": 0.0, "best": exam, "final": exam}
(folder / "result.json").write_text(json.dumps(run if job["contender"] else {"run": run, "tokens_per_row": 5.0}))
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(pairs=1)
    parser.add_argument("--jobs", type=int, default=100, help="of each case and side")
    parser.add_argument("--cases", default="idle,runs")
    parser.add_argument("--at-once", type=int, default=2, help="processes at a time")


def plan(args: argparse.Namespace) -> list[Job]:
    count = 4 if args.quick else args.jobs
    sides = [side for side in SIDES if side != "ray" or importlib.util.find_spec("ray")]
    return [
        Job(f"{count} {case}", side, pair, {"jobs": count, "at_once": args.at_once, "side": side, "case": case})
        for pair in range(args.pairs)
        for case in args.cases.split(",")
        for side in sides
    ]


def work(job: dict[str, Any]) -> Figures:
    from adapterlab.compare import CompareConfig, compare

    if job["case"] == "idle":
        be_idle()
    with tempfile.TemporaryDirectory() as place:
        config = CompareConfig(**fields(Path(place), job["jobs"], job["at_once"]))
        before, cpu, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.monotonic()
        helpers = []
        if job["side"] == "folder":
            compare(config, engine="folder")
            command = [sys.executable, __file__, HELP, str(config.output), job["case"]]
            helpers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(job["at_once"])]
        result = compare(config, engine=job["side"], wait=True)
        wall = time.monotonic() - began
        for helper in helpers:
            helper.wait()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        runs = [run for run in result.runs if not run.is_untrained]
        assert [run.status for run in runs] == ["finished"] * job["jobs"], [run.reason for run in runs]
        answers = [[run.label, run.seed, run.best.losses, run.train_curve] for run in runs if run.best]
        return {
            "wall": wall,
            "inside": sum(run.wall_seconds or 0.0 for run in result.runs) / len(result.runs),
            "training": sum(run.train_seconds or 0.0 for run in runs) / len(runs),
            "driver_cpu": time.process_time() - cpu,
            "driver_before": before * 1024,
            "driver_peak": peak * 1024,
            "same": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
        }


def be_idle() -> None:
    """Let the jobs that this process starts do nothing."""
    from adapterlab.compare import pools

    pools.can_fork = lambda: False
    pools.command = lambda folder: [sys.executable, "-S", "-c", IDLE, str(folder)]


def help_with(folder: str, case: str) -> None:
    from adapterlab.compare import work as helping

    if case == "idle":
        be_idle()
    helping(Path(folder), processes=1)


def fields(folder: Path, count: int, at_once: int) -> dict[str, Any]:
    """A comparison of so many runs: half as many values of alpha, two seeds each."""
    write_model(folder / "model")
    draw = random.Random(0)
    for name, rows in (("train", 64), ("eval", 16)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for _ in range(rows):
                a, b = draw.randrange(2), draw.randrange(10)
                stream.write(json.dumps({"prompt": f"{a} {b}=", "completion": str(a)}) + "\n")
    return {
        "model": str(folder / "model"), "precision": "fp32", "device": "cpu", "validation": 8,
        "data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl")},
        "methods": [{"name": "lora", "r": 2, "alpha": list(range(1, count // 2 + 1))}],
        "budget": {"steps": 3}, "seeds": 2, "lr": 1e-2, "training": {"batch_size": 4, "warmup": 0},
        "evaluation": {"max_new_tokens": 2}, "together": "never", "processes": at_once, "threads": 1,
        "output": folder / "comparison",
    }  # fmt: skip


def write_model(folder: Path) -> None:
    """A random two-layer Llama over single characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<p>", "<s>", "<e>", "<u>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *string.digits, *"= "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<p>", bos_token="<s>", eos_token="<e>", unk_token="<u>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<e>"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def check(done: list[tuple[Job, Figures]]) -> None:
    for case in {job.case for job, _ in done}:
        if len({figures["same"] for job, figures in done if job.case == case}) > 1:
            raise SystemExit("The sides found other figures for the same runs.")


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary, rows = {}, []
    for job, found in done:
        count, places = job.settings["jobs"] + 1, job.settings["at_once"]
        a_job, growth = found["wall"] * places / count, found["driver_peak"] - found["driver_before"]
        summary[job.key] = {"a_job": a_job, "around": a_job - found["inside"], "driver_growth": growth}
        rows.append([
            job.case, job.side, f"{found['wall']:,.1f} s", f"{a_job:.2f} s", f"{a_job - found['inside']:.2f} s",
            f"{found['inside']:.2f} s", f"{found['training']:.2f} s", f"{1000 * found['driver_cpu'] / count:,.0f} ms",
            f"{found['driver_peak'] / 2**20:,.0f} MiB", f"{growth / 2**20:,.0f} MiB",
        ])  # fmt: skip
    header = (
        "case", "engine", "wall time", "a place, for each job", "of it around the job", "in the job, after its imports",
        "in training steps", "driver's CPU time for each job", "driver's peak memory", "more than before",
    )  # fmt: skip
    return summary, bench.markdown(header, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == [HELP]:
        help_with(*sys.argv[2:])
    else:
        bench.main(__file__, plan=plan, work=work, report=report, options=options, check=check, peers=False)

"""What does a comparison of a hundred runs cost beside the runs: here, over Ray, and by workers on a folder?

Each run trains a tiny random model for three steps, so that nearly all of the time is what surrounds a run: starting a
process, importing, loading, examining, writing, and deciding what comes next. All sides do the same runs with as many
processes at a time, and their figures have to be equal to the last bit. `ray` and `folder` wait for nothing else.

    python benchmarks/compare_load.py            # 100 runs a side
    python benchmarks/compare_load.py --quick    # 4 runs a side
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

SIDES = ("local", "ray", "folder")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=100, help="runs of each side")
    parser.add_argument("--at-once", type=int, default=2, help="processes at a time")


def plan(args: argparse.Namespace) -> list[Job]:
    count = 4 if args.quick else args.jobs
    sides = [side for side in SIDES if side != "ray" or importlib.util.find_spec("ray")]
    settings = {"jobs": count, "at_once": args.at_once}
    return [
        Job(f"{count} runs", side, pair, {**settings, "side": side}) for pair in range(args.pairs) for side in sides
    ]


def work(job: dict[str, Any]) -> Figures:
    from adapterlab.compare import CompareConfig, compare

    with tempfile.TemporaryDirectory() as place:
        config = CompareConfig(**fields(Path(place), job["jobs"], job["at_once"]))
        before, cpu, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.monotonic()
        helpers = []
        if job["side"] == "folder":
            compare(config, engine="folder")
            command = [
                sys.executable,
                "-m",
                "adapterlab",
                "compare",
                str(config.output),
                "--worker",
                "--processes",
                "1",
            ]
            helpers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(job["at_once"])]
        result = compare(config, engine=job["side"], wait=True)
        wall = time.monotonic() - began
        for helper in helpers:
            helper.wait()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        runs = [run for run in result.runs if not run.is_untrained]
        assert [run.status for run in runs] == ["finished"] * job["jobs"], [run.reason for run in runs]
        inside = sum(run.wall_seconds or 0.0 for run in result.runs)
        training = sum(run.train_seconds or 0.0 for run in runs)
        answers = json.dumps([[run.label, run.seed, run.best.losses, run.train_curve] for run in runs if run.best])
        return {
            "wall": wall,
            "a_run": wall * job["at_once"] / len(result.runs),
            "inside": inside / len(result.runs),
            "training": training / len(runs),
            "driver_cpu": time.process_time() - cpu,
            "driver_before": before * 1024,
            "driver_peak": peak * 1024,
            "same": hashlib.sha256(answers.encode()).hexdigest(),
        }


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
    if len({figures["same"] for _, figures in done}) > 1:
        raise SystemExit("The sides found other figures for the same runs.")


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary, rows = {}, []
    for job, found in done:
        surrounding = found["a_run"] - found["inside"]
        growth = found["driver_peak"] - found["driver_before"]
        summary[job.key] = {**found, "surrounding": surrounding, "driver_growth": growth}
        rows.append([
            job.side, job.settings["jobs"], job.settings["at_once"], f"{found['wall']:,.0f} s",
            f"{found['a_run']:.2f} s",
            f"{surrounding:.2f} s", f"{found['inside']:.2f} s", f"{found['training']:.2f} s",
            f"{found['driver_cpu']:.1f} s", f"{found['driver_peak'] / 2**20:,.0f} MiB", f"{growth / 2**20:,.0f} MiB",
        ])  # fmt: skip
    header = (
        "engine", "runs", "at once", "wall time", "a run and place", "of it start, imports and waiting",
        "from loading to the last figure", "training steps", "driver's CPU time", "driver's peak memory",
        "more than before",
    )  # fmt: skip
    return summary, bench.markdown(header, rows)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, check=check, peers=False)

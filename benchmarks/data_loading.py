"""How long a run waits for its rows: seconds from the start of the process to the end of the first step, and memory.

    python benchmarks/data_loading.py                  # 20,000 and 200,000 chat rows
    python benchmarks/data_loading.py --rows 2000000   # one more

Each number of rows is three runs of three steps of four rows, in processes of their own: the first with empty caches, a
second one, and one that continues an interrupted run. The model is tiny and has SmolLM2's tokenizer, so nearly all of
the time is imports and rows. Memory is the peak of what the process had to itself (`anonymous`) and of all that was
mapped (`resident`), which counts pages of files that the system can take back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _bench import Figures, Job, chosen_model, main

CASES = ("first", "second", "resumed")
WORDS = [
    f"{a}{b}{c}" for a in ("ba", "ko", "mi", "tu") for b in ("ren", "sal", "dor", "li") for c in ("s", "n", "t", "")
]


def write_rows(file: Path, count: int) -> None:
    """Chat rows of about 300 bytes, written as they are made."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choices(WORDS, k=number))

    with file.open("w", encoding="utf-8") as stream:
        for i in range(count):
            turns = [
                {"role": "user", "content": f"{i}: {words(14)}?"},
                {"role": "assistant", "content": f"{words(22)}."},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")


def write_model(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from adapterlab.models import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def one(folder: Path, case: str) -> None:
    """One run; its figures are the last line."""
    import psutil

    from adapterlab.train.loop import Listener, Loop, Record
    from adapterlab.train.run import fit
    from adapterlab.train.signals import Interrupted

    began = psutil.Process().create_time()
    figures: Figures = {"anonymous": 0}

    class Watch(Listener):
        def stepped(self, loop: Loop, record: Record) -> None:
            figures.setdefault("seconds", time.time() - began)
            figures["anonymous"] = max(figures["anonymous"], _status("RssAnon"))
            if case == "interrupted" and record["step"] == 3:
                os.kill(os.getpid(), 15)

    config: dict[str, Any] = {
        "model": str(folder / "model"), "precision": "fp32", "device": "cpu",
        "data": {"path": str(folder / "rows.jsonl")},
        "training": {"steps": 6 if case in ("interrupted", "resumed") else 3, "batch_size": 4, "eval_every": 100},
        "output": str(folder / ("again" if case in ("interrupted", "resumed") else case)),
    }  # fmt: skip
    with contextlib.suppress(Interrupted):
        fit(config, quiet=True, resume=case == "resumed", callbacks=[Watch()])
    print("\n" + json.dumps({**figures, "resident": _status("VmHWM")}))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def work(settings: dict[str, Any]) -> Figures:
    folder = Path(tempfile.mkdtemp(prefix="adapterlab-rows-"))
    try:
        write_rows(folder / "rows.jsonl", settings["rows"])
        write_model(folder / "model")
        environment = {
            **os.environ,
            "ADAPTERLAB_HOME": str(folder / "home"),
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        found: Figures = {"bytes": (folder / "rows.jsonl").stat().st_size}
        for case in ("first", "second", "interrupted", "resumed"):
            command = [sys.executable, __file__, "--one", str(folder), case]
            made = subprocess.run(command, capture_output=True, text=True, env=environment)
            if made.returncode:
                raise RuntimeError(made.stderr[-1500:])
            if case in CASES:
                found[case] = json.loads(made.stdout.strip().splitlines()[-1])
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan(args: argparse.Namespace) -> list[Job]:
    chosen_model(args) if not args.quick else None
    counts = [2_000] if args.quick else [20_000, 200_000, *args.rows]
    return [Job(f"{count:,} rows", "adapterlab", i, {"rows": count}) for count in counts for i in range(args.pairs)]


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary: dict[str, Any] = {}
    lines = ["| rows | run | seconds to the first step | anonymous MiB | resident MiB |", "|---|---|---:|---:|---:|"]
    for job, figures in done:
        for case in CASES:
            summary.setdefault(job.case, {}).setdefault(case, []).append(figures[case])
    for name, cases in summary.items():
        for case, runs in cases.items():
            best = min(runs, key=lambda run: run["seconds"])
            memory = f"{best['anonymous'] / 2**20:.0f} | {best['resident'] / 2**20:.0f}"
            lines.append(f"| {name} | {case} | {best['seconds']:.1f} | {memory} |")
    return summary, "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, action="append", default=[], help="one more number of rows; may be repeated"
    )
    parser.set_defaults(pairs=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]), sys.argv[3])
    else:
        main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

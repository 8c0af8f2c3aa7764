"""How long `adapterlab quickstart` takes, from its first line to its last, against an earlier revision of the sources.

    python benchmarks/quickstart.py
    python benchmarks/quickstart.py --quick

Each run is the command in a process of its own, on the sources as they are and on those of `--before`, in turns. What
is kept: seconds of the whole, seconds in training steps, and how many questions were answered rightly at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

BEFORE = "c126e42^"  # rows of like length had no attention in common, and beginnings were computed in every row
_SHARE = re.compile(r"(\d+) of (\d+) \(")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", default=BEFORE, help=f"revision to compare with (default {BEFORE})")
    parser.add_argument("--steps", type=int, default=130, help="as many as the command has by itself")
    parser.add_argument("--questions", type=int, default=100)


def plan(args: argparse.Namespace) -> list[Job]:
    from adapterlab.models import pull

    pull(bench.MODEL)
    steps, questions = (1, 3) if args.quick else (args.steps, args.questions)
    common = {"steps": steps, "questions": questions}
    sides = {"now": {}, "before": {"revision": args.before}}
    return [
        Job(f"{steps} steps", side, pair, {**common, **more})
        for pair in range(args.pairs)
        for side, more in sides.items()
    ]


def work(job: dict[str, Any]) -> Figures:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        sources = _sources(job["revision"], folder) if "revision" in job else bench.ROOT / "src"
        command = [sys.executable, "-m", "adapterlab", "quickstart", "--output", str(folder / "run")]
        command += ["--steps", str(job["steps"]), "--questions", str(job["questions"])]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(sources)})
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-1500:])
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        trained = [record["seconds"] for record in map(json.loads, lines) if "seconds" in record][-1]
        return {"seconds": seconds, "training": trained, "right": _SHARE.findall(done.stdout)[-1]}


def _sources(revision: str, folder: Path) -> Path:
    """The library's sources of a revision, in the folder."""
    packed = subprocess.run(["git", "archive", revision, "src"], cwd=bench.ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder / "src"


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    case = done[0][0].case
    found = {
        what: bench.ratios(done, (case, "before"), (case, "now"), lambda run, w=what: run[w])
        for what in ("seconds", "training")
    }
    summary: dict[str, Any] = {"before / now": found}
    table = []
    for side in ("before", "now"):
        runs = [figures for job, figures in done if job.side == side]
        each = {what: bench.spread([run[what] for run in runs]) for what in found}
        right = ", ".join(f"{run['right'][0]} of {run['right'][1]}" for run in runs)
        summary[side] = {**each, "right": right}
        table.append([side, *(bench.shown(value, 0) for value in each.values()), right])
    table.append(["before / now", *map(bench.shown, found.values()), ""])
    return summary, bench.markdown(
        ["`adapterlab quickstart`", "whole, s", "training steps, s", "right at the end"], table
    )


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

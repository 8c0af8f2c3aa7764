"""How long the first token takes when the adapter is loaded already, and when it lies on the disk.

    python benchmarks/first_token.py
    python benchmarks/first_token.py --quick

One model, one engine for each side, LoRA of rank 8 on all linear layers. Some requests of the base run all the time.
One after the other, requests for other adapters come at random times: first all of them cold, their files dropped from
the system's cache, then all of them warm. With the side `ahead` files are read while a step is computed; with `late`
when it is the request's turn. A stall is the longest time that the requests of the base waited for a token meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES = {"ahead": 0.5, "late": 0.0}  # of read_ahead_gb
SHOWN = {
    "warm_ms": "first token, adapter loaded, ms",
    "cold_ms": "first token, adapter on disk, ms",
    "step_ms": "between tokens of the base, ms",
    "stall_ms": "longest stall of the base by a cold adapter, ms",
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--running", type=int, default=8, help="requests of the base meanwhile")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")


def plan(args: argparse.Namespace) -> list[Job]:
    keys = ("adapters", "running", "prompt")
    common = {"model": bench.chosen_model(args), **{key: getattr(args, key) for key in keys}}
    if args.quick:
        common |= {"adapters": 3, "running": 2}
    return [Job("lora", side, pair, {**common, "side": side}) for pair in range(args.pairs) for side in SIDES]


def work(job: dict[str, Any]) -> Figures:
    from adapterlab.serve import Engine, EngineSettings, Request, Sampling, Token

    model = bench.load(job["model"], dtype="float32").eval()
    draw, came = random.Random(bench.SEED), list[tuple[float, int]]()
    prompts = bench.batch(model, job["adapters"] + job["running"], job["prompt"])["input_ids"].tolist()
    settings = EngineSettings(read_ahead_gb=SIDES[job["side"]], prefix_cache=False, max_adapters=job["adapters"] + 1)

    def first(request: Request) -> float:
        began = time.perf_counter()
        handle = engine.submit(request)
        assert isinstance(handle.next_event(120), Token)
        taken = time.perf_counter() - began
        handle.result(120)
        return taken

    def note(event: Any) -> None:
        came.append((time.perf_counter(), event.index))

    found: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder, Engine(model, None, settings) as engine:
        names = _saved(model, Path(folder), job["adapters"], engine)
        engine.warm(names[0])  # the first of a kind is tried, and compared with the model by itself
        base = Request(tuple(prompts[-1]), None, Sampling(n=job["running"], max_tokens=1500, ignore_end=True))
        running, stalls = engine.submit(base, note), []
        for kind, chosen in (("cold", names[1:]), ("warm", names[1:])):
            for name, prompt in zip(chosen, prompts, strict=False):
                if kind == "cold":
                    _drop(Path(folder) / name)
                time.sleep(draw.random() * 0.2)
                begun = len(came)
                found[kind].append(first(Request(tuple(prompt), name, Sampling(temperature=0, max_tokens=2))))
                stalls += [_longest(came[begun:])] if kind == "cold" else []
        running.cancel()
    return {
        "warm_ms": 1000 * statistics.median(found["warm"]), "cold_ms": 1000 * statistics.median(found["cold"]),
        "step_ms": 1000 * statistics.median(_gaps(came)), "stall_ms": 1000 * statistics.median(stalls),
    }  # fmt: skip


def _saved(model: Any, root: Path, count: int, engine: Any) -> list[str]:
    """Save and register adapters; the model of the engine is as it was before."""
    import copy

    import torch

    import adapterlab as al

    other, names = copy.deepcopy(model), [f"lora{i}" for i in range(count)]
    host = al.attach(other, al.LoRA(r=8, targets="all-linear"), "a")
    for name in names:
        with torch.no_grad():
            for parameter in host.parameters("a"):
                parameter.normal_(std=0.02)
        engine.register(name, host.save(root / name, "a"))
    return names


def _drop(folder: Path) -> None:
    """Take files out of the system's cache, where it does that."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _gaps(came: list[tuple[float, int]]) -> list[float]:
    """Times between the tokens of the first answer."""
    times = [at for at, index in came if index == 0]
    return [after - before for before, after in itertools.pairwise(times)] or [0.0]


def _longest(came: list[tuple[float, int]]) -> float:
    return max(_gaps(came))


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary = {
        side: {key: bench.spread([figures[key] for job, figures in done if job.side == side]) for key in SHOWN}
        for side in SIDES
    }
    rows = [[text, *(bench.shown(summary[side][key], 0) for side in SIDES)] for key, text in SHOWN.items()]
    return summary, bench.markdown(["", "read ahead", "read when it is its turn"], rows)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

"""How fast the serving engine answers: the base alone, one LoRA, a LoRA for each request, and some of many registered.

    python benchmarks/serving.py
    python benchmarks/serving.py --quick

Each run takes one model and one engine. A side is one load: so many requests at the same time, prompts of random
tokens, answers of a fixed length, greedy, and no prefix kept. The sides take turns with `generate` of the base on the
same prompts as one batch; a figure is a side's tokens per second over those of `generate` beside it. Adapters of the
side `many` are drawn anew each time from all that are registered, so that it reads adapters that are not loaded.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES = {
    "base": "the base",
    "one": "one LoRA for all",
    "each": "a LoRA of its own for each request",
    "many": "likewise, drawn from all that are registered",
}
TARGETS = {"all": "all-linear", "qv": ("q", "v")}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--registered", type=int, default=500, help="adapters that are registered")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each side in a run, after one to warm up")


def plan(args: argparse.Namespace) -> list[Job]:
    keys = ("requests", "prompt", "tokens", "rank", "registered", "rounds")
    common = {"model": bench.chosen_model(args), **{key: getattr(args, key) for key in keys}}
    if args.quick:
        common |= {"requests": 4, "tokens": 8, "registered": 12, "rounds": 1}
    return [
        Job(case, "adapterlab", pair, {**common, "targets": case}) for pair in range(args.pairs) for case in TARGETS
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    from adapterlab.serve import Engine, EngineSettings

    model = bench.load(job["model"], dtype="float32").eval()
    draw, count = random.Random(bench.SEED), job["requests"]
    prompts = bench.batch(model, count, job["prompt"])["input_ids"]
    settings = EngineSettings(
        prefix_cache=False, max_running=max(count, 8), step_tokens=256 + count, max_adapters=count
    )
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder, Engine(model, None, settings) as engine:
        began = time.perf_counter()
        for number, saved in zip(range(job["registered"]), _saved(job, Path(folder)), strict=False):
            engine.register(f"lora{number}", saved)
        registering = time.perf_counter() - began
        for number in range(job["rounds"] + 1):
            for side in SIDES:
                before = _generated(model, prompts, job["tokens"])
                after = _served(engine, prompts, job, _names(side, count, job["registered"], draw))
                if number:
                    found[side].append(before / after)
        seen = engine.statistics()
    ratios = {side: bench.statistics.median(each) for side, each in found.items()}
    rate = count * job["tokens"] / before
    return {
        **ratios, "generate_tokens_per_s": rate, "registering_s": registering, "loads": seen.loads,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _saved(job: dict[str, Any], root: Path) -> Iterator[Path]:
    """Folders of adapters, as many different ones as there are requests, again and again."""
    import torch

    import adapterlab as al

    other = bench.load(job["model"], dtype="float32")
    folders = []
    for number in range(job["requests"]):
        host = al.attach(other, al.LoRA(r=job["rank"], targets=TARGETS[job["targets"]]), "a")
        with torch.no_grad():
            for parameter in host.parameters("a"):
                parameter.normal_(std=0.02)
        folders.append(host.save(root / str(number), "a"))
        host.detach("a")
    while True:
        yield from folders


def _names(side: str, count: int, registered: int, draw: random.Random) -> list[str | None]:
    if side == "many":
        return [f"lora{i}" for i in draw.sample(range(registered), count)]
    return {"base": [None] * count, "one": ["lora0"] * count, "each": [f"lora{i}" for i in range(count)]}[side]


def _generated(model: Any, prompts: Any, tokens: int) -> float:
    """Seconds of one batch of `generate`."""
    import torch

    def run() -> None:
        with torch.no_grad():
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens,
                min_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip

    return bench.timed(run, 1, warm=0)[0]


def _served(engine: Any, prompts: Any, job: dict[str, Any], names: list[str | None]) -> float:
    """Seconds until all requests are answered."""
    from adapterlab.serve import Request, Sampling

    sampling = Sampling(temperature=0, max_tokens=job["tokens"], ignore_end=True)

    def run() -> None:
        requests = [Request(tuple(p), name, sampling) for p, name in zip(prompts.tolist(), names, strict=True)]
        for handle in [engine.submit(request) for request in requests]:
            handle.result()

    return bench.timed(run, 1, warm=0)[0]


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary = {
        case: {
            side: bench.spread([figures[side] for job, figures in done if job.case == case])
            for side in (*SIDES, "generate_tokens_per_s", "registering_s")
        }
        for case in TARGETS
    }
    header = ["tokens/s / those of `generate` on the base", "LoRA on all linear layers", "on q and v"]
    table = [[text, *(bench.shown(summary[case][side]) for case in TARGETS)] for side, text in SIDES.items()]
    rates = [bench.shown(summary[case]["generate_tokens_per_s"], 0) for case in TARGETS]
    return summary, bench.markdown(header, [*table, ["`generate`, tokens/s", *rates]])


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

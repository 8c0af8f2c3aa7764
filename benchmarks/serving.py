"""How fast the serving engine answers: the base alone, one LoRA, a LoRA for each request, and some of many registered.

    python benchmarks/serving.py
    python benchmarks/serving.py --quick

Each run takes one model and one engine. A side is one load: so many requests at the same time, prompts of random
tokens, answers of a fixed length, greedy, and no prefix kept; on the side `many` three times as many requests, of which
so many are answered at the same time. The sides take turns with `generate` of the base on the
same prompts as one batch; a figure is a side's tokens per second over those of `generate` beside it. Adapters of the
side `many` are drawn anew each time from all that are registered, so that it reads adapters that are not loaded. PEFT
answers the same requests as one batch, by `generate` with all of its adapters on the model.
"""

from __future__ import annotations

import argparse
import itertools
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
PEFT = {
    "peft one": "PEFT, one LoRA for all",
    "peft each": "PEFT, a mixed batch: a LoRA of its own for each row",
}
WAVES = 3
TARGETS = {"all": "all-linear", "qv": ("q", "v")}
PEFT_TARGETS = {"all": "all-linear", "qv": ["q_proj", "v_proj"]}


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

    model, other = (bench.load(job["model"], dtype="float32").eval() for _ in range(2))  # the engine's is its own
    peft, by_peft = _with_peft(job)
    draw, count = random.Random(bench.SEED), job["requests"]
    prompts = bench.batch(model, count, job["prompt"])["input_ids"]
    settings = EngineSettings(
        prefix_cache=False, max_running=max(count, 8), step_tokens=256 + count, max_adapters=count
    )
    found: dict[str, list[float]] = {side: [] for side in (*SIDES, *PEFT)}
    with tempfile.TemporaryDirectory() as folder, Engine(model, None, settings) as engine:
        began = time.perf_counter()
        for number, saved in zip(range(job["registered"]), _saved(job, other, Path(folder)), strict=False):
            engine.register(f"lora{number}", saved)
        registering = time.perf_counter() - began
        for number in range(job["rounds"] + 1):
            for side in SIDES:
                before = _generated(other, prompts, job["tokens"])
                names = _names(side, count, job["registered"], draw)
                after = _served(engine, prompts, job, names)
                if number:
                    found[side].append(len(names) / count * before / after)
            for side, given in by_peft.items():
                before = _generated(other, prompts, job["tokens"])
                after = _generated(peft, prompts, job["tokens"], **given)
                if number:
                    found[side].append(before / after)
        seen = engine.statistics()
    ratios = {side: bench.statistics.median(each) for side, each in found.items()}
    rate = count * job["tokens"] / before
    return {
        **ratios, "generate_tokens_per_s": rate, "registering_s": registering, "loads": seen.loads,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _saved(job: dict[str, Any], model: Any, root: Path) -> Iterator[Path]:
    """Folders of adapters, as many different ones as there are requests, again and again."""
    import torch

    import adapterlab as al

    folders = []
    for number in range(job["requests"]):
        host = al.attach(model, al.LoRA(r=job["rank"], targets=TARGETS[job["targets"]]), "a")
        with torch.no_grad():
            for parameter in host.parameters("a"):
                parameter.normal_(std=0.02)
        folders.append(host.save(root / str(number), "a"))
        host.detach("a")
    while True:
        yield from folders


def _names(side: str, count: int, registered: int, draw: random.Random) -> list[str | None]:
    if side == "many":
        return [f"lora{i}" for i in draw.sample(range(registered), WAVES * count)]
    return {"base": [None] * count, "one": ["lora0"] * count, "each": [f"lora{i}" for i in range(count)]}[side]


def _with_peft(job: dict[str, Any]) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A model with PEFT's adapters, and what `generate` is given for each side."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=job["rank"], target_modules=PEFT_TARGETS[job["targets"]])
    names = [f"lora{number}" for number in range(job["requests"])]
    model: Any = get_peft_model(bench.load(job["model"], dtype="float32"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    model.set_adapter(names[0])
    return model.eval(), {"peft one": {}, "peft each": {"adapter_names": names}}


def _generated(model: Any, prompts: Any, tokens: int, **given: Any) -> float:
    """Seconds of one batch of `generate`."""
    import torch

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens,
                min_new_tokens=tokens, pad_token_id=0, **given,
            )  # fmt: skip

    return bench.timed(run, 1, warm=0)[0]


def _served(engine: Any, prompts: Any, job: dict[str, Any], names: list[str | None]) -> float:
    """Seconds until all requests are answered."""
    from adapterlab.serve import Request, Sampling

    sampling = Sampling(temperature=0, max_tokens=job["tokens"], ignore_end=True)

    def run() -> None:
        asked = zip(itertools.cycle(prompts.tolist()), names, strict=False)
        requests = [Request(tuple(prompt), name, sampling) for prompt, name in asked]
        for handle in [engine.submit(request) for request in requests]:
            handle.result()

    return bench.timed(run, 1, warm=0)[0]


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary = {
        case: {
            side: bench.spread([figures[side] for job, figures in done if job.case == case])
            for side in (*SIDES, *PEFT, "generate_tokens_per_s", "registering_s")
        }
        for case in TARGETS
    }
    header = ["tokens/s / those of `generate` on the base", "LoRA on all linear layers", "on q and v"]
    table = [
        [text, *(bench.shown(summary[case][side]) for case in TARGETS)] for side, text in {**SIDES, **PEFT}.items()
    ]
    rates = [bench.shown(summary[case]["generate_tokens_per_s"], 0) for case in TARGETS]
    return summary, bench.markdown(header, [*table, ["`generate`, tokens/s", *rates]])


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options)

"""What adapters cost in a decoding step of many requests: the base alone, one LoRA for all, a LoRA for each.

    python benchmarks/adapter_products.py
    python benchmarks/adapter_products.py --quick

A step is one pass over one token of each request, without a cache: what is measured are linear layers and updates, not
attention. Sides take turns within a run; a figure is the base's time over the side's. Where the adapters are others in
every step, drawn from more than fit into the processor's cache, what is prepared for a step is prepared anew: the worst
that a server with thousands of adapters meets.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

BASE = "base"
APART = "apart "  # what begins the names of adapters of which the model knows nothing
SIDES = {
    "kernel": "updates alone, beside bare modules: a LoRA for each, by the compiled kernel",
    "one": "one LoRA for all",
    "each": "a LoRA for each, by the compiled kernel",
    "changing": "likewise, others in every step",
    "torch": "a LoRA for each, in torch",
    "torch changing": "likewise, others in every step",
}
TARGETS = {"all": "all-linear", "qv": ("q", "v")}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--attached", type=int, default=96, help="adapters in memory")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side in a run")
    parser.add_argument("--dtype", default="float32", help="of the base; LoRA's factors are float32")


def plan(args: argparse.Namespace) -> list[Job]:
    keys = ("requests", "rank", "attached", "rounds", "dtype")
    common = {"model": bench.chosen_model(args), **{key: getattr(args, key) for key in keys}}
    if args.quick:
        common |= {"requests": 4, "attached": 6, "rounds": 1}
    return [
        Job(case, "adapterlab", pair, {**common, "targets": case}) for pair in range(args.pairs) for case in TARGETS
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al
    from adapterlab.core.adapter import Tokenwise
    from adapterlab.engine.products import Products
    from adapterlab.ops.by_address import ByAddress

    model, count = bench.load(job["model"], dtype=job["dtype"]).eval(), job["requests"]
    ids = bench.batch(model, 1, count)["input_ids"]
    names = [f"lora{number}" for number in range(job["attached"])]
    for name in names:
        al.attach(model, al.LoRA(r=job["rank"], targets=TARGETS[job["targets"]]), name)
    host, draw = al.host(model), random.Random(bench.SEED)
    host.activate()
    with torch.no_grad():
        for name in names:
            for parameter in host.parameters(name):
                parameter.normal_(std=0.02)
    model.eval()
    products = Products(ByAddress(), model.dtype)
    for name in names:
        found = {}
        for adapter in host.adapters(name).values():
            out, n_in = adapter.site.shape
            found[products.number(adapter.site.module, n_in, out)] = Tokenwise(adapter.A, adapter.B, adapter.scale)
        products.take(APART + name, found)

    def step(side: str) -> float:
        changes, way = side.endswith("changing"), None if side.startswith(("torch", "one")) else products
        chosen = draw.sample(names, count) if changes else names[:1] if side == "one" else names[:count]
        if way is not None:
            chosen = [APART + name for name in chosen]
        with _mixed(host, side, chosen, count, way):
            if not changes:  # what the first step prepares stays
                model(input_ids=ids, use_cache=False)
            began = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            return time.perf_counter() - began

    found: dict[str, list[float]] = {side: [] for side in (BASE, *SIDES)}
    with torch.no_grad():
        for number in range(job["rounds"] + 1):
            for side in found:
                seconds = step(side)
                if number:
                    found[side].append(seconds)
    ratios = {
        side: bench.statistics.median(b / s for b, s in zip(found[BASE], found[side], strict=True)) for side in SIDES
    }
    return {**ratios, BASE: bench.statistics.median(found[BASE]), "threads": torch.get_num_threads()}


@contextlib.contextmanager
def _mixed(host: Any, side: str, chosen: list[str], count: int, products: Any) -> Iterator[None]:
    """Give each token of the next pass its adapter."""
    if side == BASE:
        with host.using():
            yield
    elif side == "kernel":
        with host.using(), _beside(host, chosen, products):
            yield
    elif side == "one":
        with host.using(*chosen):
            yield
    else:
        host.state.products = products
        try:
            with host.tokens([(name, count // len(chosen)) for name in chosen]):
                yield
        finally:
            host.state.products = None


@contextlib.contextmanager
def _beside(host: Any, chosen: list[str], products: Any) -> Iterator[None]:
    """Put the products right behind the modules' own, with nothing between."""
    from torch.nn import functional as F

    from adapterlab.core.segments import segments

    prepared = products._prepare(segments([((name,), 1) for name in chosen], by_token=True))

    def call(module: Any, number: int) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            y = F.linear(x, module.weight, module.bias)
            prepared.step(number, x, y)
            return y

        return forward

    modules = {module: number for module, number in products._numbers.items() if number in prepared.adds}
    for module, number in modules.items():
        module.forward = call(module, number)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary = {
        case: {
            side: bench.spread([figures[side] for job, figures in done if job.case == case]) for side in (*SIDES, BASE)
        }
        for case in TARGETS
    }
    header = ["speed / the base's", "LoRA on all linear layers", "on q and v"]
    table = [[text, *(bench.shown(summary[case][side]) for case in TARGETS)] for side, text in SIDES.items()]
    times = [bench.shown(summary[case][BASE], 3) for case in TARGETS]
    return summary, bench.markdown(header, [*table, ["the base, seconds a step", *times]])


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

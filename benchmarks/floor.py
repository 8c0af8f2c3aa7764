"""How far a LoRA step is from what it cannot do without: a forward pass, and its matrix products alone.

    python benchmarks/floor.py
    python benchmarks/floor.py --quick

Each run measures three things on one batch: the training step; the base model's forward pass with logits, without
gradients; and all matrix products that the step calls, with operands of the same shapes, strides and types, called one
after the other. The products inside torch's attention kernels are not calls of their own and are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
TYPES = {"c10::BFloat16": "bfloat16", "float": "float32", "c10::Half": "float16", "double": "float64"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="2x256,4x512", help="rows x tokens")
    parser.add_argument("--steps", type=int, default=3, help="timed repetitions in a run, after one to warm up")
    parser.add_argument("--rank", type=int, default=8)


def plan(args: argparse.Namespace) -> list[Job]:
    common = {"model": bench.chosen_model(args), "steps": args.steps, "rank": args.rank}
    shapes = ["2x16"] if args.quick else args.shapes.split(",")
    return [
        Job(shape, "adapterlab", pair, {**common, "shape": [int(side) for side in shape.split("x")]})
        for pair in range(args.pairs)
        for shape in shapes
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al

    model = bench.load(job["model"])
    batch = bench.batch(model, *job["shape"])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    host = al.attach(model, al.LoRA(r=job["rank"], alpha=2 * job["rank"], targets="all-linear"))
    model.train()
    step = bench.driver(host)

    def forward() -> None:
        with torch.no_grad(), host.using():
            model(**inputs, use_cache=False)

    step(batch)
    calls = products(lambda: step(batch))
    replay, operations = prepared(calls)
    found: dict[str, list[float]] = {"step": [], "forward": [], "products": []}
    for turn in range(job["steps"] + 1):
        for name, function in (("step", lambda: step(batch)), ("forward", forward), ("products", replay)):
            seconds = bench.timed(function, 1, warm=0)
            found[name] += seconds if turn else []
    middle = {name: bench.statistics.median(seconds) for name, seconds in found.items()}
    return {
        **middle,
        "step / forward": middle["step"] / middle["forward"],
        "step / products": middle["step"] / middle["products"],
        "calls": len(calls),
        "gigaflops": operations / 1e9,
        "threads": torch.get_num_threads(),
    }


def products(function: Callable[[], Any]) -> list[dict[str, Any]]:
    """The matrix products that a function calls, those inside fused operators and the backward pass too.

    Returns:
        name, and shape, strides and type of each operand.
    """
    from torch.profiler import ExecutionTraceObserver

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/trace.json"
        observer = ExecutionTraceObserver().register_callback(file)
        observer.start()
        try:
            function()
        finally:
            observer.stop()
            observer.unregister_callback()
        nodes = json.loads(Path(file).read_text(encoding="utf-8"))["nodes"]
    kinds = {node["id"]: node["name"].removeprefix("aten::").rstrip("_") for node in nodes}
    found = []
    for node in nodes:
        name = kinds[node["id"]]
        if not node["name"].startswith("aten::") or name not in PRODUCTS or kinds.get(node["ctrl_deps"]) in PRODUCTS:
            continue
        inputs = node["inputs"]
        tensors = [
            (tuple(shape), tuple(strides), TYPES[kind.removeprefix("Tensor(").removesuffix(")")])
            for shape, strides, kind in zip(inputs["shapes"], inputs["strides"], inputs["types"], strict=True)
            if kind.startswith("Tensor(")
        ]
        found.append({"name": name, "operands": tensors[: 3 if "add" in name else 2]})
    return found


def prepared(calls: list[dict[str, Any]]) -> tuple[Callable[[], None], float]:
    """A function that does the products on random operands, and their number of floating-point operations."""
    import torch

    made: dict[Any, Any] = {}
    for call in calls:
        for place, (shape, strides, kind) in enumerate(call["operands"]):
            size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
            values = torch.randn(size, dtype=torch.float32).to(getattr(torch, kind))
            made.setdefault((place, shape, strides, kind), values.as_strided(shape, strides))
    run = [
        (getattr(torch, call["name"]), [made[(place, *operand)] for place, operand in enumerate(call["operands"])])
        for call in calls
    ]

    def replay() -> None:
        with torch.no_grad():
            for function, operands in run:
                function(*operands)

    return replay, sum(2 * math.prod(operands[-2].shape) * operands[-1].shape[-1] for _, operands in run)


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary: dict[str, Any] = {}
    for shape in dict.fromkeys(job.case for job, _ in done):
        runs = [figures for job, figures in done if job.case == shape]
        names = ("step", "forward", "products", "step / forward", "step / products", "gigaflops")
        summary[shape] = {name: bench.spread([run[name] for run in runs]) for name in names}
    header = ["rows × tokens", "step, s", "forward alone, s", "products alone, s", "step / forward", "step / products"]
    table = [
        [shape.replace("x", " × "), *(bench.shown(found[name]) for name in list(found)[:5])]
        for shape, found in summary.items()
    ]
    return summary, bench.markdown(header, table)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

"""Several LoRA jobs in one training step on one base: time and memory against one job alone.

    python benchmarks/segments.py
    python benchmarks/segments.py --quick

Each run is a process of its own that trains jobs of equal size on a shared base: one of them alone, all in the rows of
one batch (`host.rows`), or all in one packed row (`host.tokens`). Memory is the peak above the loaded model; what the
backward pass is kept for is counted beside it, tensor by tensor. The last figure says how many gradients of a packed
step in float32 are those of separate steps to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES = {
    "one": "one job alone",
    "rows": "all jobs, `host.rows`",
    "tokens": "all jobs, `host.tokens` in one packed row",
}
EXACT = "exact"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--shape", default="2x64", help="rows x tokens of a job")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one to warm up")
    parser.add_argument("--rank", type=int, default=8)


def plan(args: argparse.Namespace) -> list[Job]:
    rows, length = (2, 32) if args.quick else map(int, args.shape.split("x"))
    common = {"model": bench.chosen_model(args), "jobs": args.jobs, "rows": rows, "length": length}
    common |= {"steps": args.steps, "rank": args.rank}
    sides = [Job("step", side, pair, {**common, "side": side}) for pair in range(args.pairs) for side in SIDES]
    return [*sides, Job("step", EXACT, 0, {**common, "side": EXACT})]


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al
    from adapterlab.engine.loss import Loss
    from adapterlab.engine.modes import fast_passes
    from adapterlab.optim import adamw

    side, exact = job["side"], job["side"] == EXACT
    model = bench.load(job["model"], dtype="float32" if exact else "bfloat16")
    memory = bench.Memory(model)
    names = [f"job{number}" for number in range(1 if side == "one" else job["jobs"])]
    host = al.attach(model, al.LoRA(r=job["rank"], targets="all-linear"), names[0])
    for name in names[1:]:
        host.attach(al.LoRA(r=job["rank"], targets="all-linear"), name)
    filled(host)
    loss, batch = Loss(model), bench.batch(model, len(names) * job["rows"], job["length"])
    optimizers = [adamw(host.parameters(name), lr=1e-4) for name in names]
    model.train()

    def backward() -> None:
        with fast_passes(model):
            with shared(host, side, names, job["rows"] * job["length"]):
                value = loss(batch if side == "rows" else packed(batch))
            value.backward()

    if exact:
        return compared(host, names, backward, lambda rows: loss(packed(rows)), batch)

    def step() -> None:
        backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    memory.reset()
    seconds = bench.timed(step, job["steps"])
    figures = {"step": bench.statistics.median(seconds), "seconds": seconds, **memory.figures()}
    return {**figures, "kept": kept(model, backward), "threads": torch.get_num_threads()}


def filled(host: Any) -> None:
    """Give all factors values, so that every gradient is one of a product."""
    import torch

    draw = torch.Generator().manual_seed(bench.SEED)
    with torch.no_grad():
        for name in host.methods:
            for parameter in host.parameters(name):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)


def packed(batch: Any) -> Any:
    """The rows behind each other."""
    from adapterlab.data import PackingCollator

    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    return PackingCollator()([{"input_ids": ids, "labels": labels} for ids, labels in rows])


def shared(host: Any, side: str, names: list[str], tokens: int) -> Any:
    """Let each job have its part of the batch; all parts are of one size."""
    if side == "one":
        return contextlib.nullcontext()
    return host.rows(names) if side == "rows" else host.tokens([(name, tokens) for name in names])


def kept(model: Any, backward: Any) -> int:
    """Bytes that autograd keeps in a step, parameters left out."""
    import torch

    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        backward()
    return sum(sizes.values())


def compared(host: Any, names: list[str], backward: Any, alone: Any, batch: Any) -> Figures:
    """How many gradients of one step of all jobs are those of a step of each, to the bit."""
    import torch

    from adapterlab.engine.modes import fast_passes

    def gradients(name: str) -> list[torch.Tensor]:
        found = [p.grad.clone() for p in host.parameters(name)]
        host.model.zero_grad()
        return found

    count = len(batch["input_ids"]) // len(names)
    backward()
    together = [[p.grad.clone() for p in host.parameters(name)] for name in names]
    host.model.zero_grad()
    equal, farthest, total = 0, 0.0, 0
    for number, name in enumerate(names):
        rows = {key: value[number * count : (number + 1) * count] for key, value in batch.items()}
        with fast_passes(host.model), host.using(name):
            (alone(rows) / len(names)).backward()
        for one, other in zip(together[number], gradients(name), strict=True):
            equal, total = equal + torch.equal(one, other), total + 1
            farthest = max(farthest, float((one - other).norm() / other.norm()))
    return {"equal": equal, "tensors": total, "farthest": farthest, "threads": torch.get_num_threads()}


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    measures = {"time": "step", "peak memory": "above", "kept for the backward pass": "kept"}
    summary: dict[str, Any] = {
        side: {
            what: bench.ratios(done, ("step", side), ("step", "one"), lambda run, key=key: run[key])
            for what, key in measures.items()
        }
        for side in SIDES
    }
    summary[EXACT] = found = next(figures for job, figures in done if job.side == EXACT)
    jobs = next(iter(done))[0].settings["jobs"]
    header = [f"{jobs} jobs / one job", *measures]
    table = [[text, *(bench.shown(summary[side][what]) for what in measures)] for side, text in SIDES.items()]
    said = f"{found['equal']} of {found['tensors']} gradients of a packed step in float32 equal those of separate steps"
    said += f" to the bit; the farthest differs by {found['farthest']:.1e} of its norm."
    return summary, f"{bench.markdown(header, table)}\n\n{said}"


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

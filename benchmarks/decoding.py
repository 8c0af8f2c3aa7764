"""How much of the base model's speed a decoding step keeps with adapters: one LoRA, a merged one, several, mixed rows.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --quick

Each run takes one model with 32 LoRAs on all linear layers, reads a prompt, and then times one further token with the
cache, without gradients: for one row and for 32 rows. The sides take turns within the process, and each figure is the
base's time over the side's, so 1 is the speed of the base alone. Sides in torch do without the kernel that is compiled
where there is a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES = {
    "one": "one LoRA",
    "two": "two LoRAs at once",
    "merged": "one LoRA, merged",
    "rows": "`host.rows`, a LoRA of its own for each row",
    "stack": "`host.stack`, likewise",
    "one in torch": "one LoRA, in torch alone",
    "rows in torch": "`host.rows`, in torch alone",
    "stack in torch": "`host.stack`, in torch alone",
}
IN_TORCH = " in torch"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="1,32", help="rows of a batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side in a run, after one to warm up")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the base; float32 for processors without bfloat16")


def plan(args: argparse.Namespace) -> list[Job]:
    keys = ("prompt", "steps", "rank", "dtype")
    common = {"model": bench.chosen_model(args), **{key: getattr(args, key) for key in keys}}
    counts = ["2"] if args.quick else args.rows.split(",")
    return [
        Job(count, "adapterlab", pair, {**common, "rows": int(count)}) for pair in range(args.pairs) for count in counts
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al
    from adapterlab.foreign.cache import NAMES

    model = bench.load(job["model"], dtype=job.get("dtype", "bfloat16"), device=job.get("device", "cpu")).eval()
    rows = job["rows"]
    names = [f"lora{number}" for number in range(max(rows, 2))]
    host = al.attach(model, al.LoRA(r=job["rank"], targets="all-linear"), names[0])
    for name in names:
        if name != names[0]:
            host.attach(al.LoRA(r=job["rank"], targets="all-linear"), name, active=False)
        with torch.no_grad():
            for parameter in host.parameters(name):
                parameter.normal_(std=0.02)
    model.eval()
    prompt, ids = bench.batch(model, rows, job["prompt"])["input_ids"], bench.batch(model, rows, 1)["input_ids"]

    argument = next(name for name in NAMES if name in inspect.signature(model.forward).parameters)

    def cached(side: str) -> Any:
        with live(host, side, names, rows), torch.no_grad():
            return next(value for name, value in model(prompt, use_cache=True).items() if name in NAMES)

    seconds: dict[str, list[float]] = {side: [] for side in ("base", *SIDES)}
    for side in seconds:
        cache = cached(side)

        def step(cache: Any = cache) -> None:
            model(ids, **{argument: cache}, use_cache=True)
            cache.crop(-1)

        with live(host, side, names, rows), torch.no_grad():
            step()
        for _ in range(job["steps"]):
            # The base beside each side: a machine whose speed drifts slows both.
            with live(host, "base", names, rows), torch.no_grad():
                before = bench.timed(step, 1, warm=1)
            with live(host, side, names, rows), torch.no_grad():
                seconds[side].append(bench.timed(step, 1, warm=1)[0] / before[0])
    found = {side: 1 / bench.statistics.median(each) for side, each in seconds.items()}
    return {**found, "threads": torch.get_num_threads()}


@contextlib.contextmanager
def live(host: Any, side: str, names: list[str], rows: int) -> Any:
    """Make what a side is live inside the context."""
    if side.endswith(IN_TORCH):
        host.state.in_torch = True
        try:
            with live(host, side.removesuffix(IN_TORCH), names, rows):
                yield
        finally:
            host.state.in_torch = False
        return
    each = names[:rows]
    if side == "rows":
        with host.rows(each):
            yield
    elif side == "stack":
        with host.stack(*each) as stack:
            stack.rows(each)
            yield
    elif side == "merged":
        with host.using(names[0]):
            host.merge(names[0])
            try:
                yield
            finally:
                host.restore(names[0])
    else:
        with host.using(*{"base": (), "one": names[:1], "two": names[:2]}[side]):
            yield


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    counts = list(dict.fromkeys(job.case for job, _ in done))
    summary = {
        count: {
            side: bench.spread([figures[side] for job, figures in done if job.case == count])
            for side in ("base", *SIDES)
        }
        for count in counts
    }
    header = ["decoding speed / the base's", *(f"{count} rows" if count != "1" else "1 row" for count in counts)]
    table = [
        [text, *(bench.shown(summary[count][side]) for count in counts)]
        for side, text in {"base": "the base itself, again", **SIDES}.items()
    ]
    return summary, bench.markdown(header, table)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

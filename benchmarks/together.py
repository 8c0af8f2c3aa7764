"""Several LoRA jobs on one base: in one pass, one after the other, and in processes side by side.

    python benchmarks/together.py
    python benchmarks/together.py --quick

Every job is a LoRA on all linear layers with rows of its own. The three sides do the same steps. `together` trains the
jobs in one process with one packed pass a round, as `adapterlab train --together` does; `in turn` trains them in one
process one after the other; `processes` starts one process a job, lets all train at the same moment, and divides the
cores among them. Time is that of one step of every job, after the first ones. Memory is the largest resident size: the
sum over processes, in which pages that they share (libraries, weights mapped from a file) count once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

SIDES = ("together", "in turn", "processes")
WARM = 2  # steps that are not timed: kernels are chosen, and training is proven


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", default="2,4,8", help="how many at once")
    parser.add_argument("--shapes", default="1x16,2x64,4x256", help="rows x tokens of a step of each job")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each job")
    parser.add_argument("--rank", type=int, default=8)


def plan(args: argparse.Namespace) -> list[Job]:
    common = {"model": bench.chosen_model(args), "steps": 2 if args.quick else args.steps, "rank": args.rank}
    jobs = ["2"] if args.quick else args.jobs.split(",")
    shapes = ["2x16"] if args.quick else args.shapes.split(",")
    return [
        Job(f"{count} x ({shape})", side, pair, {**common, "jobs": int(count), "shape": shape, "side": side})
        for pair in range(args.pairs)
        for shape in shapes
        for count in jobs
        for side in SIDES
    ]


def work(job: dict[str, Any]) -> Figures:
    if job["side"] == "processes":
        return side_by_side(job)
    import torch

    from adapterlab.hosts import Host
    from adapterlab.train import Entrant, train_together

    host = Host(bench.load(job["model"]))
    memory, clock = bench.Memory(host.model), Clock(job["steps"])
    numbers = [job["number"]] if job["side"] == "child" else range(job["jobs"])

    def entrant(number: int) -> Entrant:
        name = f"job{number}"
        return Entrant(
            name,
            lambda stopping: loop_of(host, name, number, job, clock).course(stopping),
            leave=lambda: host.detach(name),
        )

    if job["side"] == "together":
        endings = train_together(host, [entrant(number) for number in numbers])
        assert not any(ending.error or ending.why for ending in endings), endings
    else:
        for number in numbers:
            loop_of(host, f"job{number}", number, job, clock).run()
            host.detach(f"job{number}")
    return {
        "step": clock.seconds(job["side"] == "together"),
        "peak": memory.figures()["process_peak"],
        "shared": shared_pages(),
        "threads": torch.get_num_threads(),
    }


def loop_of(host: Any, name: str, number: int, job: dict[str, Any], clock: Any) -> Any:
    import torch

    import adapterlab as al
    from adapterlab.train import Loop, Training

    count, length = map(int, job["shape"].split("x"))
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(3, host.model.config.vocab_size, (8 * count, length), generator=draw).tolist()
    training = Training(
        steps=WARM + job["steps"], batch_size=count, lr=1e-4, seed=number, warmup=0, proof_steps=WARM,
    )  # fmt: skip
    host.activate()
    host.attach(al.LoRA(r=job["rank"], alpha=2 * job["rank"], targets="all-linear"), name)
    on_start = (lambda: wait_for_the_others()) if job["side"] == "child" else None
    return Loop(
        host, name, [{"input_ids": row, "labels": row} for row in ids], training, listeners=[clock.watching(on_start)]
    )


class Clock:
    """When the steps of each job ended."""

    def __init__(self, steps: int):
        self.steps = steps
        self.ends: dict[str, list[float]] = {}

    def watching(self, warmed: Callable[[], None] | None) -> Any:
        """A listener that notes the steps of a run, and calls something before the first one that is timed."""
        from adapterlab.train import Listener

        clock = self

        class Watching(Listener):
            def stepped(self, loop: Any, record: Any) -> None:
                if warmed is not None and record["step"] == WARM:
                    warmed()
                clock.ends.setdefault(loop.name, []).append(time.perf_counter())

        return Watching()

    def seconds(self, at_once: bool) -> float:
        """Time of one step of every job."""
        timed = [ends[WARM - 1 :] for ends in self.ends.values()]
        if at_once:
            return (max(ends[-1] for ends in timed) - max(ends[0] for ends in timed)) / self.steps
        return sum(ends[-1] - ends[0] for ends in timed) / self.steps


def shared_pages() -> int:
    """Resident bytes of this process that others may share; 0 where the system does not tell."""
    import psutil

    return int(getattr(psutil.Process().memory_info(), "shared", 0))


# ---------------------------------------------------------------------- processes


def wait_for_the_others() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def side_by_side(job: dict[str, Any]) -> Figures:
    """Let processes train at the same moment: all are warm before the first timed step."""
    threads = max(1, len(os.sched_getaffinity(0)) // job["jobs"])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps({**job, "side": "child", "number": number})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=bench.HERE, text=True,
        )
        for number in range(job["jobs"])
    ]  # fmt: skip
    for child in children:
        if "ready\n" not in iter(child.stdout.readline, ""):
            raise RuntimeError("a process ended before it trained")
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    found = [json.loads(child.communicate()[0].strip().splitlines()[-1]) for child in children]
    shared = max(one["shared"] for one in found)
    return {
        "step": max(one["step"] for one in found),
        "peak": sum(one["peak"] - one["shared"] for one in found) + shared,
        "shared": shared,
        "threads": threads,
    }


# ---------------------------------------------------------------------- the table


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary: dict[str, Any] = {}
    table = []
    for case in dict.fromkeys(job.case for job, _ in done):
        found = {
            f"{what}, {other}": bench.ratios(done, (case, other), (case, "together"), lambda run, w=what: run[w])
            for what in ("step", "peak")
            for other in SIDES[1:]
        }
        summary[case] = found
        table.append([case, *map(bench.shown, found.values())])
    header = [
        "jobs x (rows x tokens)", "time, one after the other / together", "time, processes / together",
        "memory, one after the other / together", "memory, processes / together",
    ]  # fmt: skip
    return summary, bench.markdown(header, table)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

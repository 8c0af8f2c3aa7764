"""How training and `compare` grow: to 70B models, 64 GPUs, 10^7 rows and 10^4 runs.

    python benchmarks/scaling_on_paper.py [--only training|rows|comparing] [--counted FOLDER]

Nothing here trains. Memory, work and traffic of a step are `adapterlab plan`'s, from configurations alone; speeds of
devices and links are those of datasheets, named below; what a comparison of many runs costs besides its runs is
measured on made-up results (tests/compare/fabricate.py). `--counted` is a comparison's folder whose files are counted.
The tables stand in docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _bench as bench

sys.path.insert(0, str(bench.ROOT / "tests" / "compare"))

RESULTS = bench.RESULTS / "scaling_on_paper.json"
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it.

    Attributes:
        memory: GiB; peak: dense bf16 products with float32 sums, 10^12 operations a second.
        link: to the others of a machine, by the name that the planner has for it.
        source: the datasheet.
    """

    memory: float
    peak: float
    link: str
    source: str


# Datasheets count sparse products, which are twice the dense ones here.
GPUS = {
    "H100 SXM": Gpu(80, 989.4, "nvlink4", "NVIDIA H100 Tensor Core GPU datasheet (SXM5, 900 GB/s NVLink)"),
    "H100 PCIe": Gpu(80, 756.5, "pcie5", "NVIDIA H100 Tensor Core GPU datasheet (PCIe 5.0, 128 GB/s)"),
    "A100 80GB SXM": Gpu(80, 312, "nvlink3", "NVIDIA A100 Tensor Core GPU datasheet (600 GB/s NVLink)"),
    "RTX 4090": Gpu(24, 165.2, "pcie4", "NVIDIA Ada GPU architecture whitepaper (PCIe 4.0 x16)"),
}
FABRIC = "ndr"  # between machines of eight: a ConnectX-7 port of 400 Gbit/s for each GPU (NVIDIA ConnectX-7 datasheet)
UTILISATION = 0.4  # of the peak
MACHINE = 8  # GPUs
MODELS = {"smollm2-135m": "135M", "qwen2.5-1.5b": "1.5B", "llama3.1-8b": "8B", "llama3.1-70b": "70B"}
METHODS = ({"name": "lora", "r": 16}, {"name": "full"})
LENGTH, ROW = 2048, 512  # tokens that a GPU computes at once, and of a row: rows are packed
ROWS = 10_000_000
COUNTS = (1, 8, 64)
SIZES = (100, 1000, 10_000)  # runs of a comparison
SEEDS, STEPS, QUESTIONS = 5, 200, 100


# ---------------------------------------------------------------------- training


def training(done: dict[str, Any]) -> None:
    """Plan each model and method once, and divide the step among devices; what is there already is kept."""
    from adapterlab.plan.child import apart
    from adapterlab.plan.planning import setup_of, trace_of

    found = done.setdefault("training", [])
    for model in MODELS:
        for method in METHODS:
            if _of(found, model, method["name"]):
                continue
            began = time.perf_counter()
            with apart():
                setup = setup_of(model, dict(method), batch=1, length=LENGTH, recompute="full", kind="cuda")
                trace = trace_of(setup, 2)  # that layers of these models lie on a line is known
            print(f"{model}, {method['name']}: simulated in {time.perf_counter() - began:.0f} s", flush=True)
            found += list(_divided(model, setup, trace))
            _keep(done)


def _divided(model: str, setup: Any, trace: Any) -> Iterator[dict[str, Any]]:
    from adapterlab.plan import Device
    from adapterlab.plan.parallel import Parallel
    from adapterlab.plan.planning import described

    place = Device("cuda", None, None, "cuda")
    for count in COUNTS:
        for kind in ("ddp", "fsdp") if count > 1 else (None,):
            division = Parallel(kind, count) if kind else None
            plan = described(model, replace(setup, parallel=division), trace, place)
            sent, waited = (plan.traffic.sent, plan.traffic.waited) if plan.traffic else (0, 0)
            yield {
                "model": model, "method": setup.method.id, "devices": count, "parallel": kind, "flops": plan.flops,
                "trainable": plan.trainable, "memory": plan.process, "peak": plan.peak, "sent": sent,
                "steps": {name: _seconds(gpu, plan.flops, sent, waited, count) for name, gpu in GPUS.items()},
            }  # fmt: skip


def _seconds(gpu: Gpu, flops: float, sent: int, waited: int, count: int) -> dict[str, float]:
    """Seconds of a step: products at the stated share of the peak, and what is sent on the slowest link.

    Some of what is sent, `waited`, goes when there is nothing to compute.
    """
    from adapterlab.plan.parallel import LINKS

    rate = LINKS[gpu.link] if count <= MACHINE else min(LINKS[gpu.link], LINKS[FABRIC])
    compute = flops / (UTILISATION * gpu.peak * 1e12)
    return {"compute": compute, "communication": sent / (rate * 1e9), "waited": waited / (rate * 1e9)}


def _hours(one: dict[str, Any], gpu: str) -> float:
    """Hours for all rows, if communication goes on beside computation where it can."""
    step = one["steps"][gpu]
    whole = max(step["compute"], step["communication"] - step["waited"]) + step["waited"]
    return ROWS * ROW / (LENGTH * one["devices"]) * whole / 3600


def _memory_table(found: Sequence[dict[str, Any]]) -> str:
    kinds = [(1, None), (8, "ddp"), (8, "fsdp"), (64, "fsdp")]
    header = ["model", "method", "trains", *(f"{kind} x {count}" if kind else "one GPU" for count, kind in kinds)]
    rows = []
    for model, short in MODELS.items():
        for method in METHODS:
            own = {(o["devices"], o["parallel"]): o for o in _of(found, model, method["name"])}
            if not own:  # not planned yet
                continue
            cells = [f"{own[key]['memory'] / GIB:,.1f}" for key in kinds]
            rows.append([short, method["name"], f"{own[1, None]['trainable'] / 1e6:,.1f} M", *cells])
    return bench.markdown(header, rows)


def _time_table(found: Sequence[dict[str, Any]]) -> str:
    header = ["model", "method", "GPUs", "sends, GB", *(f"{name}: s a step (compute + link), hours" for name in GPUS)]
    rows = []
    for model, short in MODELS.items():
        for method in METHODS:
            for one in _of(found, model, method["name"]):
                if one["parallel"] == "ddp" and one["memory"] > 80 * GIB:
                    continue
                rows.append([short, method["name"], _named(one), f"{one['sent'] / 1e9:,.2f}", *_times(one)])
    return bench.markdown(header, rows)


def _of(found: Sequence[dict[str, Any]], model: str, method: str) -> list[dict[str, Any]]:
    return [one for one in found if (one["model"], one["method"]) == (model, method)]


def _named(one: dict[str, Any]) -> str:
    return f"{one['devices']} {one['parallel']}" if one["parallel"] else "1"


def _times(one: dict[str, Any]) -> Iterator[str]:
    for name, gpu in GPUS.items():
        if one["memory"] > gpu.memory * GIB:
            yield "no room"
        else:
            step = one["steps"][name]
            hours = _hours(one, name)
            long = f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"
            yield f"{step['compute']:.2g} + {step['communication']:.2g}, {long} h"


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw memory and the share of communication by the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model, short in MODELS.items():
        for method, style in zip(METHODS, ("-o", "--s"), strict=True):
            own = [o for o in _of(found, model, method["name"]) if o["parallel"] in (None, "fsdp")]
            if not own:
                continue
            colour = f"C{list(MODELS).index(model)}"
            label = f"{short}, {method['name']}"
            left.plot([o["devices"] for o in own], [o["memory"] / GIB for o in own], style, color=colour, label=label)
            steps = [o["steps"]["H100 SXM"] for o in own]
            shares = [s["communication"] / s["compute"] for s in steps]
            right.plot([o["devices"] for o in own][1:], shares[1:], style, color=colour, label=label)
    for gpu in (24, 80):
        left.axhline(gpu, color="0.6", linewidth=0.8)
    left.set(xscale="log", yscale="log", xticks=COUNTS, xticklabels=COUNTS, xlabel="GPUs (fsdp)",
             ylabel="GiB a GPU", title=f"Memory, {LENGTH:,} tokens a GPU")  # fmt: skip
    right.set(xscale="log", yscale="log", xticks=COUNTS[1:], xticklabels=COUNTS[1:], xlabel="GPUs (fsdp)",
              ylabel="time on the link / time of products", title="H100 SXM, machines of 8, 400 Gbit/s")  # fmt: skip
    right.axhline(1, color="0.6", linewidth=0.8)
    shares = (0.05, 0.1, 0.3, 1, 3)
    right.set_yticks(shares, [f"{share:g}" for share in shares])
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    for panel in (left, right):
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, metadata={"Software": "adapterlab"})


# ---------------------------------------------------------------------- rows


def encoding() -> dict[str, float]:
    """Tokenise chat rows of two lengths in one process, with SmolLM2's tokenizer and template."""
    from transformers import AutoTokenizer

    from adapterlab.data.config import DataConfig
    from adapterlab.data.encoding import Encoder
    from adapterlab.data.formats import Example
    from adapterlab.models import resolve

    draw = random.Random(bench.SEED)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    tokenizer = AutoTokenizer.from_pretrained(str(resolve("smollm2-135m")))
    encoder = Encoder(tokenizer, DataConfig(path="made up", max_length=LENGTH), None)
    found = {}
    for name, count, length in (("short", 4000, 30), ("long", 1000, 160)):
        texts = [" ".join(draw.choices(words, k=length)) for _ in range(2 * count)]
        rows = [
            Example(({"role": "user", "content": a}, {"role": "assistant", "content": b}), row=i)
            for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True), 1)
        ]
        encoder(rows[:100])
        began = time.perf_counter()
        tokens = sum(len(row["input_ids"]) for row in encoder(rows).rows)
        seconds = time.perf_counter() - began
        found |= {f"{name} rows a second": count / seconds, f"{name} tokens a second": tokens / seconds}
    return found


# ---------------------------------------------------------------------- comparing


def comparing(done: dict[str, Any]) -> None:
    """Measure what a comparison costs besides its runs; what is there already is kept."""
    found = done.setdefault("comparing", [])
    for size in SIZES:
        if not any(one["runs"] == size for one in found):
            found.append(_compared(size))
            print(json.dumps(found[-1]), flush=True)
            _keep(done)


def _compared(size: int) -> dict[str, Any]:
    import fabricate

    from adapterlab.compare.jobs import JobFolder
    from adapterlab.compare.report import write
    from adapterlab.compare.results import FILE, Run, load
    from adapterlab.compare.summary import summarise

    facts, runs = fabricate.many(size // SEEDS, seeds=SEEDS, steps=STEPS, rows=QUESTIONS)
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        places = [JobFolder(root / "runs" / run.key / f"seed{run.seed}") for run in runs]
        for place, run in zip(places, runs, strict=True):
            place.path.mkdir(parents=True)
            (place.path / "result.json").write_text(json.dumps(run.model_dump(mode="json")))
        read = _timed(times, "read results", lambda: [Run(**(place.result() or {})) for place in places])
        whole = _timed(times, "statistics", lambda: summarise(read, **facts))
        _timed(times, "write comparison.json", lambda: whole.save(root))
        _timed(times, "read comparison.json", lambda: load(root))
        written = _timed(times, "report", lambda: write(whole, root))
        sizes = {file.name: file.stat().st_size for file in [root / FILE, *written]}
        result = statistics.fmean((place.path / "result.json").stat().st_size for place in places)
    return {"runs": size, "labels": size // SEEDS, "seconds": times, "bytes": sizes, "result": result}


def _timed(times: dict[str, float], what: str, call: Any) -> Any:
    began = time.perf_counter()
    found = call()
    times[what] = time.perf_counter() - began
    return found


def counted(folder: Path) -> dict[str, float]:
    """Files and bytes of a finished run in a comparison's folder."""
    runs = [file.parent for file in folder.glob("runs/*/seed*/result.json")]
    files = [[f for f in run.rglob("*") if f.is_file()] for run in runs]
    if not runs:
        raise SystemExit(f"{folder} holds no finished run of a comparison.")
    sizes = [sum(f.stat().st_size for f in own) for own in files]
    return {"runs": len(runs), "files": statistics.fmean(map(len, files)), "bytes": statistics.fmean(sizes)}


def _comparing_table(found: Sequence[dict[str, Any]]) -> str:
    names = list(found[0]["seconds"])
    header = ["", *(f"{one['runs']:,} runs" for one in found)]
    rows = [[name, *(f"{one['seconds'][name]:,.1f} s" for one in found)] for name in names]
    rows += [[name, *(f"{one['bytes'][name] / MIB:,.1f} MiB" for one in found)] for name in found[0]["bytes"]]
    return bench.markdown(header, rows)


# ---------------------------------------------------------------------- all


def _keep(done: dict[str, Any]) -> None:
    bench.write(RESULTS, json.dumps(done, indent=1) + "\n")


def main() -> None:
    """Do the parts that were asked for, and write the tables of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("training", "rows", "comparing"), help="leave the others")
    parser.add_argument("--fresh", action="store_true", help="forget what is done")
    parser.add_argument("--counted", type=Path, help="a comparison's folder whose files are counted")
    given = parser.parse_args()
    done = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not given.fresh else {}
    done["conditions"] = bench.circumstances()
    if given.only in (None, "training"):
        training(done)
    if given.only in (None, "rows"):
        done["rows"] = encoding()
    if given.only in (None, "comparing"):
        comparing(done)
    if given.counted:
        done["counted"] = counted(given.counted)
    _keep(done)
    if "training" in done:
        bench.write(bench.RESULTS / "scale_memory.md", _memory_table(done["training"]) + "\n")
        bench.write(bench.RESULTS / "scale_time.md", _time_table(done["training"]) + "\n")
        draw(done["training"], bench.RESULTS / "scaling_on_paper.png")
    if "comparing" in done:
        bench.write(bench.RESULTS / "scale_comparing.md", _comparing_table(done["comparing"]) + "\n")


if __name__ == "__main__":
    main()

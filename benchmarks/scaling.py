"""How time and memory of a LoRA step grow: with tokens, rank, number of adapted modules, and vocabulary.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --sweeps tokens rank
    python benchmarks/scaling.py --quick

Each point is a process of its own. Memory is the peak above the loaded model. For the vocabulary, random models that
differ in nothing else are trained on equally many tokens, all of which bear a label: the loss must not need memory
that grows with the vocabulary, beyond the weights themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

LENGTHS = (256, 512, 1024)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TARGETS = (["q"], ["q", "v"], ["q", "k", "v", "o"], ["all-linear"])
SHARES = (1 / 6, 1 / 2, 1)  # upper layers alone
VOCABULARIES = (1_000, 5_000, 20_000, 50_000, 100_000, 200_000)
AXES = {"tokens": "tokens", "rank": "rank", "modules": "adapted modules", "vocabulary": "vocabulary"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweeps", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--most-tokens", type=int, default=8192, help="of a batch in the sweep over tokens")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a point, after one to warm up")
    parser.add_argument("--repeats", type=int, default=1, help="processes for each point")


def plan(args: argparse.Namespace) -> list[Job]:
    base = {
        "model": bench.chosen_model(args), "shape": [1, 16] if args.quick else [2, 256], "rank": 8,
        "targets": ["all-linear"], "share": 1.0, "steps": args.steps, "series": "",
    }  # fmt: skip
    every = [(sweep, point) for sweep in args.sweeps for point in points(sweep, args.most_tokens, args.quick)]
    return [
        Job(f"{sweep} {index}", sweep, repeat, {**base, **point})
        for repeat in range(args.repeats)
        for index, (sweep, point) in enumerate(every)
    ]


def points(sweep: str, most: int, quick: bool) -> list[dict[str, Any]]:
    """What varies in a sweep."""
    if sweep == "tokens":
        lengths = (16, 32) if quick else LENGTHS
        most = 128 if quick else most
        rows = {length: [2**i for i in range(14) if length * 2**i <= most] for length in lengths}
        return [
            {"shape": [count, length], "series": f"length {length}"} for length in lengths for count in rows[length]
        ]
    if sweep == "rank":
        return [{"rank": rank} for rank in (RANKS[:3] if quick else RANKS)]
    if sweep == "modules":
        some = [{"targets": list(targets), "series": "some roles, all layers"} for targets in TARGETS]
        return [*some, *({"share": share, "series": "all roles, upper layers"} for share in SHARES)]
    sizes = {"hidden": 64, "layers": 2}
    shape = {"shape": [2, 16] if quick else [8, 256]}
    return [{"model": {"vocabulary": v, **sizes}, **shape} for v in (VOCABULARIES[:3] if quick else VOCABULARIES)]


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al
    from adapterlab.core.targets import Targets

    model = bench.load(job["model"])
    layers = model.config.num_hidden_layers
    first = layers - max(1, round(job["share"] * layers))
    memory = bench.Memory(model)
    targets = Targets(include=tuple(job["targets"]), layers=tuple(range(first, layers)))
    host = al.attach(model, al.LoRA(r=job["rank"], alpha=2 * job["rank"], targets=targets))
    model.train()
    batch = bench.batch(model, *job["shape"])
    step = bench.driver(host)
    seconds = bench.timed(lambda: step(batch), job["steps"])
    return {
        "step": bench.statistics.median(seconds),
        "seconds": seconds,
        **memory.figures(),
        "tokens": job["shape"][0] * job["shape"][1],
        "series": job["series"],
        "rank": job["rank"],
        "modules": len(host.adapters("default")),
        "vocabulary": model.config.vocab_size,
        "trainable": sum(p.numel() for p in host.parameters("default")),
        "weights": sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad),
        "threads": torch.get_num_threads(),
    }


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least-squares line: slope, intercept, and the share of the variance it explains."""
    import numpy as np

    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + intercept)
    spread = float(np.sum((np.asarray(y) - np.mean(y)) ** 2))
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": 1 - float(np.sum(rest**2)) / spread if spread else 1.0,
    }


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    sweeps: dict[str, list[Figures]] = {}
    for job, figures in done:
        sweeps.setdefault(job.side, []).append(figures)
    summary: dict[str, Any] = {}
    table = []
    for sweep, runs in sweeps.items():
        for name, group in _groups(sweep, runs).items():
            x = [run[sweep] for run in group]
            if len(set(x)) < 2:
                continue
            memory, seconds = line(x, [run["above"] for run in group]), line(x, [run["step"] for run in group])
            lowest, highest = min(run["above"] for run in group), max(run["above"] for run in group)
            summary[name] = {"memory": memory, "step": seconds, "least": lowest, "most": highest}
            table.append([
                name, f"{min(x):,}–{max(x):,}", f"{lowest / 2**20:,.0f}–{highest / 2**20:,.0f}",
                f"{memory['slope'] / 2**10:,.2f}", f"{memory['r2']:.4f}",
                f"{1e3 * seconds['slope']:.3g}", f"{seconds['r2']:.4f}",
            ])  # fmt: skip
    draw(sweeps, file.with_suffix(".png"))
    header = ["sweep", "from–to", "memory above the model, MiB", "KiB for one more", "R²", "ms for one more", "R²"]
    return summary, bench.markdown(header, table)


def _groups(sweep: str, runs: list[Figures]) -> dict[str, list[Figures]]:
    """The runs of a sweep, and of each of its series: tokens at one length, for example."""
    series = [name for name in dict.fromkeys(run["series"] for run in runs) if name]
    parts = {f"{AXES[sweep]}, {name}": [run for run in runs if run["series"] == name] for name in series}
    return {AXES[sweep]: runs, **parts}


def draw(sweeps: dict[str, list[Figures]], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is missing (pip install matplotlib).")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 5), squeeze=False)
    for column, (sweep, runs) in enumerate(sweeps.items()):
        groups = _groups(sweep, runs)
        for name, group in groups.items():
            if len(groups) > 1 and name == AXES[sweep]:
                continue
            group = sorted(group, key=lambda run: run[sweep])
            x = [run[sweep] for run in group]
            panels[0, column].plot(x, [run["above"] / 2**20 for run in group], "o-", ms=3, label=name)
            panels[1, column].plot(x, [run["step"] for run in group], "o-", ms=3)
        for panel in panels[:, column]:
            panel.margins(y=0.1)
            panel.set_ylim(bottom=0)
        panels[0, column].legend(fontsize=7)
        panels[1, column].set_xlabel(AXES[sweep])
    panels[0, 0].set_ylabel("MiB above the model")
    panels[1, 0].set_ylabel("seconds a step")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

"""Do two tasks get in each other's way? Mixtures, sparse changes and LoRA on a mixture of two tasks, judged by task.

    python benchmarks/two_tasks.py                       # about 45 minutes on one core
    python benchmarks/two_tasks.py --methods lora mola   # some of them
    python benchmarks/two_tasks.py --quick               # few steps and rows: shows that everything works

Rows of two reasoning-gym tasks alternate. Two LoRAs are trained first, each on one task alone for half of the steps;
methods over saved adapters are made of these. Then `adapterlab compare` trains every method once on the mixture, at the
rate of its page, and the answers and losses of the evaluation rows are taken apart by task. One seed and one rate show
that and how a method learns, and rank nothing. A comparison that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _bench as bench

HERE = Path(__file__).resolve().parent
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
}
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {},
    "diff_pruning": {},
    "far": {},
    "fish_dip": {},
    "child_tuning": {"mode": "f"},
    "lt_sft": {},
    "sam_second_order": {},
    "molora": {"experts": 4},
    "mov": {},
    "loramoe": {"column": "kind"},
    "mola": {},
    "ming_moe": {},
}
SAVED = ("lora_average", "arrow", "lorahub", "xlora")  # made of the two LoRAs


def rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the tasks in turns; the seed is another one for training and for evaluation."""
    from adapterlab.data.tasks import make_task

    share = count // len(TASKS)
    made = [make_task(task, args, seed=seed + i, size=share) for i, (task, args) in enumerate(TASKS.items())]
    for number in range(share):
        for kind, task in enumerate(made):
            yield {"question": task[number]["question"], "answer": str(task[number]["answer"]), "kind": kind}


def write_rows(folder: Path, train: int, judge: int) -> None:
    """Write rows for training, all of them and by task, and for judging; no question stands in both."""
    folder.mkdir(parents=True, exist_ok=True)
    judging = list(rows(judge, 1_000_000))
    asked = {row["question"] for row in judging}
    training = [row for row in rows(train, 0) if row["question"] not in asked]
    parts = {"judge": judging, "train": training}
    parts |= {task: [row for row in training if row["kind"] == kind] for kind, task in enumerate(TASKS)}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def experts(folder: Path, steps: int) -> dict[str, str]:
    """Train a LoRA on each task alone, and return the folders of their runs."""
    from adapterlab.train import fit

    found = {}
    for task in TASKS:
        output = folder / f"lora_{task}"
        found[task] = str(output)
        if not (output / "last").exists():
            shutil.rmtree(output, ignore_errors=True)
            fit(
                {
                    "model": "smollm2-135m", "precision": "bf16", "output": str(output),
                    "method": {"name": "lora", "targets": "all-linear"},
                    "data": {"path": str(folder / f"{task}.jsonl")},
                    "training": {"steps": steps, "batch_size": 8, "lr": 5e-4, "warmup": 0.1},
                },
                quiet=True,
            )  # fmt: skip
    return found


def comparison(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What is compared."""
    from adapterlab.registry import method

    chosen = {id: fields for id, fields in TRAINED.items() if id in args.methods}
    methods = [{id: {"lr": method(id).typical_lr, **fields}} for id, fields in chosen.items()]
    saved = [id for id in SAVED if id in args.methods]
    parts = experts(folder, args.steps // 2) if saved else {}
    methods += [{id: {"adapters": parts, **({"lr": method(id).typical_lr} if id == "xlora" else {})}} for id in saved]
    return {
        "model": "smollm2-135m",
        "precision": "bf16",
        "data": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "judge.jsonl"),
            "scorer": "exact",
        },
        "validation": args.judge // 2,
        "methods": methods,
        "budget": {"steps": args.steps},
        "seeds": 1,
        "threads": args.threads,
        "processes": args.processes,
        "training": {"batch_size": 8, "schedule": "linear", "warmup": 0.08},
        "evaluation": {"max_new_tokens": 12, "batch_size": 50},
        "output": str(folder / "comparison"),
    }


def by_task(found: Any) -> dict[str, dict[str, Any]]:
    """Share of right answers and loss a token of each task, by label."""
    figures = {}
    for run in found.runs:
        judged = run.best or run.final
        if judged is None:
            figures[run.label] = {"failed": run.reason}
            continue
        figures[run.label] = {}
        for kind, task in enumerate(TASKS):
            mine = slice(kind, None, len(TASKS))
            loss = sum(judged.losses[mine]) / sum(judged.tokens[mine])
            right = judged.right[mine]
            figures[run.label][task] = {"right": sum(right) / len(right), "loss": loss, "rows": len(right)}
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Tasks beside each other."""
    header = ["method", *(f"{task}: {what}" for task in TASKS for what in ("right", "loss"))]
    lines = []
    for label, tasks in figures.items():
        cells = [f"{tasks[t]['right']:.0%} | {tasks[t]['loss']:.2f}" if t in tasks else "failed | –" for t in TASKS]
        lines.append([f"`{label}`", *cells])
    return bench.markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*TRAINED, *SAVED]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--judge", type=int, default=100, help="rows that judge, of both tasks together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.judge = 4, 8
    from adapterlab.compare import CompareConfig, compare
    from adapterlab.io.atomic import write_json

    folder = HERE / ".cache" / ("two_tasks_quick" if args.quick else "two_tasks")
    write_rows(folder, 8 * args.steps + args.judge, args.judge)
    found = compare(CompareConfig(**comparison(folder, args)))
    figures = by_task(found)
    text = table(figures)
    if not args.quick:
        conditions = {"versions": found.versions, "conditions": found.conditions, "tasks": TASKS, "git": found.git}
        write_json(HERE / "results" / "two_tasks.json", {**conditions, "by task": figures})
        bench.write(HERE / "results" / "two_tasks.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()

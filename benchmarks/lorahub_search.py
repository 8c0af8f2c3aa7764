"""What a search over saved LoRAs gains on an unseen task, over the best single one, their average, and routing.

    python benchmarks/lorahub_search.py
    python benchmarks/lorahub_search.py --quick

Eight LoRAs are trained, one on each of eight small tasks. For a ninth task, which mixes what some of them know, there
are five examples: LoraHub searches with them, 40 evaluations a seed, and each seed draws other examples. The figures
are mean token losses on rows that nothing was chosen by. The best single adapter is shown twice: chosen by the five
examples, as a user could, and chosen by the rows that judge, as nobody can.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

DIGITS = {"min_digits": 1, "max_digits": 2}
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, **DIGITS},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"max_value": 50},
    "lcm": {"max_value": 20},
    "count_bits": {"max_n": 100},
    "letter_counting": {"max_words": 6},
    "spell_backward": {},
    "fraction_simplification": {"max_value": 20, "max_factor": 10},
}
UNSEEN = {"basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
EXAMPLES, BUDGET, HELD = 5, 40, 64
BASE, SINGLE, ORACLE = "the base", "best single, chosen by the examples", "best single, chosen by the judging rows"
FIXED: dict[str, dict[str, Any]] = {
    "average of the changes": {"name": "lora_average"},
    "average of the factors": {"name": "lora_average", "mix": "factors"},
    "arrow, 3 experts a token": {"name": "arrow"},
    "arrow, factors": {"name": "arrow", "mix": "factors"},
}
SEARCHED: dict[str, dict[str, Any]] = {
    "lorahub": {"name": "lorahub", "budget": BUDGET, "examples": EXAMPLES},
    "lorahub, deltas": {"name": "lorahub", "mix": "deltas", "budget": BUDGET, "examples": EXAMPLES},
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=30, help="of each LoRA")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--lr", type=float, default=1e-3)


def plan(args: argparse.Namespace) -> list[Job]:
    folder = bench.HERE / ".cache" / ("library_quick" if args.quick else "library")
    common = {"model": bench.chosen_model(args), "folder": str(folder)}
    train = {"what": "library", "steps": args.steps, "batch": args.batch, "lr": args.lr, **common}
    jobs = [Job("library", task, 0, {**train, "task": task}) for task in TASKS]
    jobs += [Job("unseen", side, 0, {"what": "fixed", "method": method, **common}) for side, method in FIXED.items()]
    jobs += [Job("unseen", SINGLE, seed, {"what": "singles", "seed": seed, **common}) for seed in range(args.pairs)]
    return jobs + [
        Job("unseen", side, seed, {"what": "search", "method": method, "seed": seed, **common})
        for side, method in SEARCHED.items()
        for seed in range(args.pairs)
    ]


def work(job: dict[str, Any]) -> Figures:
    made: Figures = {"library": train_one, "fixed": judge_fixed, "singles": judge_singles, "search": search}[
        job["what"]
    ](job)
    return made


def train_one(job: dict[str, Any]) -> Figures:
    """Train the LoRA of one task and keep it."""
    import torch

    import adapterlab as al
    from adapterlab.train.config import Training
    from adapterlab.train.loop import train

    count = job["steps"] * job["batch"]
    model, rows, held = model_and_rows(job, {job["task"]: TASKS[job["task"]]}, count)
    before = loss_of(model, held)
    torch.manual_seed(0)
    host = al.attach(model, al.LoRA(r=8, alpha=16, targets="all-linear"))
    train(host, "default", rows, Training(steps=job["steps"], batch_size=job["batch"], lr=job["lr"], warmup=4, seed=0))
    folder = Path(job["folder"]) / job["task"]
    shutil.rmtree(folder, ignore_errors=True)
    host.save(folder)
    return {"base": before, "loss": loss_of(model, held)}


def judge_fixed(job: dict[str, Any]) -> Figures:
    """Attach what needs no examples, and judge it."""
    import adapterlab as al

    model, _, held = model_and_rows(job, UNSEEN, HELD)
    made = dict(job["method"])
    found = {"base": loss_of(model, held)}
    al.attach(model, al.method(made.pop("name"))(adapters=adapters(job), **made))
    return {**found, "loss": loss_of(model, held)}


def judge_singles(job: dict[str, Any]) -> Figures:
    """Judge each adapter by itself, and by the examples of a seed."""
    import adapterlab as al

    model, rows, held = model_and_rows(job, UNSEEN, HELD)
    shown = drawn(rows, job["seed"])
    chosen, judged = {"none": loss_of(model, shown)}, {"none": loss_of(model, held)}
    for task, folder in adapters(job).items():
        host = al.load(model, folder, task, active=True)
        chosen[task], judged[task] = loss_of(model, shown), loss_of(model, held)
        host.detach(task)
    return {"loss": judged[min(chosen, key=lambda t: chosen[t])], "judged": judged, "chosen": chosen}


def search(job: dict[str, Any]) -> Figures:
    """Search with the examples of a seed, and judge what comes out."""
    import adapterlab as al
    from adapterlab.train.config import Training
    from adapterlab.train.loop import Listener, Loop, train

    model, rows, held = model_and_rows(job, UNSEEN, HELD)
    values: list[float] = []

    class Curve(Listener):
        def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
            values.append(record["loss"])

    made = dict(job["method"])
    host = al.attach(model, al.method(made.pop("name"))(adapters=adapters(job), **made))
    train(host, "default", rows, Training(batch_size=EXAMPLES, seed=job["seed"]), listeners=[Curve()])
    coefficients = host.methods["default"].coefficients
    return {"loss": loss_of(model, held), "first": values[0], "found": min(values), "coefficients": coefficients}


def adapters(job: dict[str, Any]) -> dict[str, str]:
    return {task: str(Path(job["folder"]) / task) for task in TASKS}


def drawn(rows: Any, seed: int) -> Any:
    """The examples that a search of this seed looks at."""
    from adapterlab.train.sampler import order

    return [rows[i] for i in order([1] * len(rows), seed, 0)[:EXAMPLES]]


def loss_of(model: Any, rows: Any) -> float:
    from adapterlab.data import Collator
    from adapterlab.evaluate.loss import evaluate_loss

    return evaluate_loss(model, rows, Collator(model.config.pad_token_id or 0), 16)[0]


def model_and_rows(job: dict[str, Any], task: dict[str, dict[str, Any]], count: int) -> tuple[Any, Any, Any]:
    """The model, rows to train on, and rows that judge."""
    import torch

    import adapterlab as al
    from adapterlab.data import DataConfig, encode, load_data

    ((name, given),) = task.items()
    if not isinstance(job["model"], str):
        model = bench.load(job["model"], dtype="float32")
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        ids = torch.randint(3, model.config.vocab_size, (count + HELD, 12), generator=draw).tolist()
        rows = [{"input_ids": row, "labels": row} for row in ids]
        return model, rows[:count], rows[count:]
    model, tokenizer = al.load_model(job["model"], precision="bf16", device="cpu")
    data = DataConfig(task=name, task_args=given, limit=count, eval_size=HELD, system="Answer the question.")
    splits = load_data(data)
    rows, held = (encode(part, tokenizer, data, window=None).rows for part in (splits.train, splits.eval))
    return model, rows, held


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    runs = [(job, figures) for job, figures in done if job.case == "unseen"]
    base = next(figures["base"] for job, figures in runs if job.side in FIXED)
    oracle = min(next(figures["judged"] for job, figures in runs if job.side == SINGLE).values())
    losses: dict[str, list[float]] = {BASE: [base]}
    for job, figures in runs:
        losses.setdefault(job.side, []).append(figures["loss"])
    losses[ORACLE] = [oracle]
    order = [BASE, SINGLE, ORACLE, *FIXED, *SEARCHED]
    summary = {side: bench.spread(losses[side]) | {"mean": statistics.fmean(losses[side])} for side in order}
    taught = [
        f"{job.side} {figures['base']:.2f} to {figures['loss']:.2f}" for job, figures in done if job.case == "library"
    ]
    table = bench.markdown(
        ("on a task that none was trained for", "seeds", "loss, nats a token", "mean", "less than the base"),
        [
            (side, len(losses[side]), bench.shown(summary[side], 3), f"{summary[side]['mean']:.3f}",
             f"{base - summary[side]['mean']:+.3f}")
            for side in order
        ],
    )  # fmt: skip
    return {"sides": summary, "library": taught}, f"{table}\n\nThe library, loss on its own tasks: {'; '.join(taught)}."


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

"""What a search over saved LoRAs gains on an unseen task, over the best single one, their average, and routing.

    python benchmarks/lorahub_search.py

A small model is trained on eight tasks mixed together, strings of six letters to strings of six letters, without being
told which is asked for; then eight LoRAs are trained, one on each task. Of three further tasks, which compose or mix
what some of the eight do, there are five examples. LoraHub searches with them, 40 evaluations each. The figures are
mean token losses on rows that nothing was chosen by, for several libraries and several draws of the examples. The best
single adapter is there twice: chosen by the five examples, as a user could, and by the rows that judge, as nobody can.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

import _bench as bench
from _bench import Figures, Job

LENGTH, LETTERS, MODEL = 6, 10, {"vocabulary": 16, "hidden": 64, "layers": 2}
EXAMPLES, BUDGET, HELD, DRAWS = 5, 40, 256, 4
Word = list[int]


def shifted(word: Word, by: int) -> Word:
    return [(letter + by) % LETTERS for letter in word]


TASKS: dict[str, Callable[[Word], Word]] = {
    "copy": lambda w: w,
    "reverse": lambda w: w[::-1],
    "sort": sorted,
    "next letters": lambda w: shifted(w, 1),
    "letters before": lambda w: shifted(w, -1),
    "rotate": lambda w: w[1:] + w[:1],
    "first half twice": lambda w: w[: LENGTH // 2] * 2,
    "mirror": lambda w: [LETTERS - 1 - letter for letter in w],
}
UNSEEN: dict[str, Callable[[Word], Word]] = {
    "reverse, then next letters": lambda w: shifted(w[::-1], 1),
    "copy half, next letters of the other": lambda w: w[: LENGTH // 2] + shifted(w[LENGTH // 2 :], 1),
    "reverse or rotate, by the first letter": lambda w: w[::-1] if w[0] % 2 else w[1:] + w[:1],
}
BASE, SINGLE, ORACLE = (
    "the model alone",
    "best single, chosen by the examples",
    "best single, chosen by the judging rows",
)
TAUGHT = "a new LoRA trained on the examples, 40 steps"
FIXED: dict[str, dict[str, Any]] = {
    "average of the changes": {"name": "lora_average"},
    "average of the factors": {"name": "lora_average", "mix": "factors"},
    "arrow, outputs of 3 experts": {"name": "arrow"},
    "arrow, factors of 3 experts": {"name": "arrow", "mix": "factors"},
}
SEARCHED: dict[str, dict[str, Any]] = {
    "lorahub": {"name": "lorahub", "budget": BUDGET, "examples": None},
    "lorahub, deltas": {"name": "lorahub", "mix": "deltas", "budget": BUDGET, "examples": None},
}
SIDES = (BASE, SINGLE, ORACLE, *FIXED, *SEARCHED, TAUGHT)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=600, help="of the model's own training")
    parser.add_argument("--lora-steps", type=int, default=80, help="of each LoRA")


def plan(args: argparse.Namespace) -> list[Job]:
    steps, lora_steps = (40, 10) if args.quick else (args.steps, args.lora_steps)
    return [
        Job("library", "all", pair, {"seed": pair, "steps": steps, "lora_steps": lora_steps})
        for pair in range(args.pairs)
    ]


def rows_of(task: Callable[[Word], Word], count: int, seed: object) -> list[dict[str, Word]]:
    """Rows of the letters 3 to 12, with a sign between question and answer; the answer bears the labels."""
    draw, made = random.Random(repr(seed)), []
    for _ in range(count):
        word = [draw.randrange(LETTERS) for _ in range(LENGTH)]
        question, answer = [3 + letter for letter in word] + [13], [3 + letter for letter in task(word)]
        made.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return made


def work(job: dict[str, Any]) -> Figures:
    """Make a model and a library, and judge every side on every unseen task."""
    import torch

    import adapterlab as al

    seed, parts = job["seed"], list(TASKS)
    model = trained_model(seed, job["steps"])
    library = {}
    for part, task in TASKS.items():
        before = loss_of(model, rows_of(task, HELD, (part, "held")))
        torch.manual_seed(seed)
        host = al.attach(model, al.LoRA(r=4, alpha=8), part.replace(" ", "_"))
        fit(host, part.replace(" ", "_"), rows_of(task, 2000, (seed, part)), job["lora_steps"], 16, 5e-3, seed)
        library[part] = (before, loss_of(model, rows_of(task, HELD, (part, "held"))))
        host.activate()
    adapters = {part.replace(" ", "_"): part.replace(" ", "_") for part in parts}
    found = {name: judged(host, adapters, name, task, seed) for name, task in UNSEEN.items()}
    return {"library": library, "unseen": found}


def judged(host: Any, adapters: dict[str, str], name: str, task: Any, seed: int) -> dict[str, list[float]]:
    """The loss of every side on rows of one unseen task, one for each draw of the examples."""
    import adapterlab as al

    held, losses = rows_of(task, HELD, (name, "held")), {side: [] for side in SIDES}
    single = {part: loss_of(host.model, held, host, part) for part in adapters}

    def attached(method: dict[str, Any], rows: Any = None, draw: int = 0) -> float:
        settings = {key: value for key, value in method.items() if key != "name"}
        given = {} if method["name"] == "lora" else {"adapters": adapters}
        host.attach(al.method(method["name"])(**given, **settings), "tried")
        if rows is not None:
            fit(host, "tried", rows, BUDGET, EXAMPLES, 5e-3, 100 * seed + draw)
        loss = loss_of(host.model, held, host, "tried")
        host.detach("tried")
        return loss

    losses[BASE], losses[ORACLE] = [loss_of(host.model, held, host)], [min(single.values())]
    for side, method in FIXED.items():
        losses[side] = [attached(method)]
    for draw in range(DRAWS):
        shown = rows_of(task, EXAMPLES, (name, seed, draw))
        by = {part: loss_of(host.model, shown, host, part) for part in adapters}
        losses[SINGLE].append(single[min(by, key=lambda part: by[part])])
        for side, method in {**SEARCHED, TAUGHT: {"name": "lora", "r": 4, "alpha": 8.0}}.items():
            losses[side].append(attached(method, shown, draw))
    return losses


def trained_model(seed: int, steps: int) -> Any:
    """A model that has seen all tasks, and is not told which one a row is of."""
    import torch

    from adapterlab.data import Collator

    model, collate = bench.load(MODEL, seed=seed, dtype="float32"), Collator(0)
    rows = [row for part, task in TASKS.items() for row in rows_of(task, 4000, (seed, part, "model"))]
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**collate(draw.sample(rows, 64))).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def fit(host: Any, name: str, rows: Any, steps: int, batch: int, lr: float, seed: int) -> None:
    from adapterlab.train.config import Training
    from adapterlab.train.loop import train

    host.activate(name)
    train(host, name, rows, Training(steps=steps, batch_size=batch, lr=lr, warmup=4, seed=seed))


def loss_of(model: Any, rows: Any, host: Any = None, *names: str) -> float:
    import contextlib

    from adapterlab.data import Collator
    from adapterlab.evaluate.loss import evaluate_loss

    with contextlib.nullcontext() if host is None else host.using(*names):
        return evaluate_loss(model, rows, Collator(0), 256)[0]


def report(done: list[tuple[Job, Figures]], file: Any) -> tuple[dict[str, Any], str]:
    def over(name: str, side: str) -> list[float]:
        return [loss for _, figures in done for loss in figures["unseen"][name][side]]

    summary = {
        name: {side: bench.spread(over(name, side)) | {"mean": statistics.fmean(over(name, side))} for side in SIDES}
        for name in UNSEEN
    }
    rows = [[side, *(f"{bench.shown(summary[name][side])}" for name in UNSEEN)] for side in SIDES]
    pairs = [figures["library"] for _, figures in done]
    taught = [
        f"{part} {statistics.median(lib[part][0] for lib in pairs):.2f} to "
        f"{statistics.median(lib[part][1] for lib in pairs):.2f}"
        for part in TASKS
    ]
    wins = [
        statistics.fmean(
            hub < one
            for _, figures in done
            for hub, one in zip(figures["unseen"][name]["lorahub"], figures["unseen"][name][SINGLE], strict=True)
        )
        for name in UNSEEN
    ]
    won = ", ".join(f"{share:.0%}" for share in wins)
    table = bench.markdown(("loss, nats a token: median (range)", *UNSEEN), rows)
    said = f"LoraHub is below the single adapter that the same examples choose in {won} of the draws."
    return {"sides": summary, "wins": dict(zip(UNSEEN, wins, strict=True))}, (
        f"{table}\n\n{said} The library, loss on its own tasks, from that of the model: {'; '.join(taught)}."
    )


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

"""A plausible comparison that nobody ran, for tests of what reads comparisons."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

from adapterlab.compare.results import (
    UNTRAINED,
    Comparison,
    Difference,
    Exam,
    Inference,
    Memory,
    Recommendation,
    Run,
    Sample,
    Search,
    Standing,
    Trial,
)
from adapterlab.data.scoring import wilson

# label -> method, settings, true score, trainable, peak MiB, seconds a step, learning rate
METHODS: dict[str, tuple[str, dict[str, Any], float, int, int, float, float]] = {
    "lora r=8": ("lora", {"r": 8}, 0.62, 2_400_000, 1450, 0.61, 1e-3),
    "lora r=16": ("lora", {"r": 16}, 0.66, 4_800_000, 1490, 0.66, 1e-3),
    "dora": ("dora", {}, 0.67, 2_500_000, 1710, 0.93, 1e-3),
    "ia3": ("ia3", {}, 0.31, 70_000, 1390, 0.52, 1e-2),
    "prefix_tuning": ("prefix_tuning", {}, 0.12, 200_000, 1300, 0.40, 3e-2),
    "bitfit": ("bitfit", {}, 0.20, 30_000, 1280, 0.45, 3e-3),
}
# Twelve methods that stand beside each other in the usual tables.
CLASSIC: dict[str, tuple[str, dict[str, Any], float, int, int, float, float]] = {
    **{
        f"{method} r={r}": (method, {"r": r}, score + bonus, 300_000 * r, 1440 + r, 0.60 + r / 2000, 1e-3)
        for method, bonus in (("lora", 0.0), ("lora_plus", 0.01), ("rslora", 0.02))
        for r, score in ((8, 0.62), (16, 0.66), (512, 0.70))
    },
    "dora": METHODS["dora"],
    "pissa": ("pissa", {}, 0.69, 2_400_000, 1460, 0.62, 1e-3),
    "full": ("full", {}, 0.72, 134_515_008, 4200, 0.80, 1e-4),
}


def _exam(draw: random.Random, score: float, rows: int) -> Exam:
    right = [int(draw.random() < score) for _ in range(rows)]
    losses = [max(0.01, draw.gauss(3 * (1.05 - score), 0.5)) for _ in range(rows)]
    tokens = [2 + i % 3 for i in range(rows)]  # the same rows in every exam
    samples = [
        Sample(
            row=i,
            prompt=f"State the final answer to the following arithmetic problem: {i + 3} + <{i * 7}> =",
            reference=str(i * 8 + 3),
            answer=str(i * 8 + 3 if right[i] else i + 1) + (" & more" if i == 1 else ""),
            right=bool(right[i]),
        )
        for i in range(min(5, rows))
    ]
    correct = sum(right)
    return Exam(
        loss=sum(losses) / sum(tokens), losses=losses, tokens=tokens, score=correct / rows,
        interval=wilson(correct, rows), right=right, samples=samples,
    )  # fmt: skip


def _run(draw: random.Random, label: str, seed: int, steps: int, rows: int, base: Exam) -> Run:
    method, settings, score, trainable, peak, seconds, lr = {**CLASSIC, **METHODS}[label]
    floor = 2.2 * (1.05 - score)
    train = [(s, floor + 2.5 * math.exp(-4 * s / steps) + abs(draw.gauss(0, 0.05))) for s in range(1, steps + 1)]
    evals = [(s, floor + 0.1 + 2.5 * math.exp(-4 * s / steps)) for s in range(steps // 5, steps + 1, steps // 5)]
    best = _exam(draw, score, rows)
    return Run(
        label=label, key=label.replace(" ", "-").replace("=", ""), method=method, settings=settings, seed=seed,
        status="finished", attempts=1, lr=lr, trainable=trainable, total=134_515_008 + trainable,
        memory=Memory(loaded=900 << 20, peak=(peak + seed) << 20, mean=(peak - 120) << 20), steps=steps,
        tokens=steps * 16 * 40, train_seconds=seconds * steps, wall_seconds=seconds * steps * 1.3 + 20,
        best_step=evals[-1][0], best_loss=evals[-1][1], final_loss=evals[-1][1], train_loss=train[-1][1], best=best,
        final=best, general_loss=3.31 + 0.1 * score, forgetting=0.1 * score, adapter_bytes=trainable * 4 + 2000,
        inference=Inference(
            unmerged=1.2 if method == "lora" else 1.5, merged=None if method == "prefix_tuning" else 1.0,
            why_not_merged="it works inside the attention core" if method == "prefix_tuning" else "", base_seconds=0.11,
        ),
        step_flops=5.2e11, flops=5.2e11 * steps, train_curve=train, eval_curve=evals,
    )  # fmt: skip


def _search(label: str) -> Search:
    lr = {**CLASSIC, **METHODS}[label][-1]
    rates = [lr / 3, lr, lr * 3, lr * 9]
    first = [Trial(lr=r, steps=10, loss=1 + abs(math.log(r / lr)), kept=r in (lr / 3, lr)) for r in rates[:3]]
    first.append(Trial(lr=rates[3], steps=10, reason="TrainingError: the loss is nan at step 7"))
    second = [Trial(lr=lr / 3, steps=20, loss=0.9), Trial(lr=lr, steps=20, loss=0.8, kept=True)]
    return Search(label=label, auto=True, chosen=lr, rounds=[first, second])


def many(labels: int, *, seeds: int, steps: int, rows: int, seed: int = 0) -> tuple[dict[str, Any], list[Run]]:
    """Make runs of very many methods, which nobody has ranked yet, and the other facts of their comparison."""
    draw, known = random.Random(seed), list(METHODS)
    whole = fabricate("many", methods=(), seeds=1, rows=rows, failed=False, seed=seed)
    base = whole.runs[0]
    runs = [base]
    for i in range(labels):
        kind = known[i % len(known)]
        names = {"label": f"{kind} {i}", "key": f"method-{i}"}
        found = (_run(draw, kind, s, steps, rows, base.best) for s in range(seeds))
        runs += [run.model_copy(update=names) for run in found]
    facts = ("name", "started", "updated", "finished", "config", "conditions", "model", "data", "judge", "level")
    return {key: getattr(whole, key) for key in facts}, runs


def fabricate(
    name: str = "made-up",
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: int = 2,
    steps: int = 50,
    rows: int = 100,
    failed: bool = True,
    running: bool = False,
    judge: str = "score",
    fingerprint: str = "f" * 64,
    seed: int = 0,
) -> Comparison:
    """Make a comparison; `failed` adds a method whose runs failed, `running` one that is under way."""
    draw = random.Random(seed)
    base = _exam(draw, 0.03, rows)
    untrained = Run(
        label=UNTRAINED, key=UNTRAINED, method=UNTRAINED, seed=0, status="finished", attempts=1, trainable=0,
        total=134_515_008, best=base, final=base, general_loss=3.31, forgetting=0.0,
        adapter_bytes=0, wall_seconds=31.0,
        memory=Memory(loaded=900 << 20, peak=1000 << 20, mean=950 << 20),
        inference=Inference(unmerged=1.0, merged=1.0, base_seconds=0.11),
    )  # fmt: skip
    runs = [untrained, *(_run(draw, m, s, steps, rows, base) for m in methods for s in range(seeds))]
    reason = "NotTrainingError: 120 of 120 trainable tensors did not train within 3 steps: <gradient fine>"
    if failed:
        runs += [
            Run(label="lora r=512", key="lora-r512", method="lora", settings={"r": 512}, seed=s, status="failed",
                reason=reason, attempts=2)
            for s in range(seeds)
        ]  # fmt: skip
    if running:
        runs += [
            Run(label="vera", key="vera", method="vera", seed=0, status="running", attempts=1, lr=1e-2),
            Run(label="vera", key="vera", method="vera", seed=1),
        ]
    values = {m: sum(r.best.score or 0 for r in runs if r.label == m and r.best) / seeds for m in methods}
    values[UNTRAINED] = base.score or 0.0
    order = sorted(values, key=lambda m: -values[m])
    differences = [
        Difference(
            a=a, b=b, value=values[a] - values[b], interval=(values[a] - values[b] - 0.1, values[a] - values[b] + 0.1),
            p=0.5 if abs(values[a] - values[b]) < 0.1 else 0.0005,
            p_holm=1.0 if abs(values[a] - values[b]) < 0.1 else 0.01, distinct=abs(values[a] - values[b]) >= 0.1,
        )
        for a, b in combinations(order, 2)
    ]  # fmt: skip
    ranks: dict[str, int] = {}
    for i, m in enumerate(order):
        same = i and abs(values[m] - values[order[i - 1]]) < 0.1
        ranks[m] = ranks[order[i - 1]] if same else i + 1
    standings = [
        Standing(
            label=m, rank=ranks[m], value=values[m], interval=(values[m] - 0.07, values[m] + 0.07),
            tied=[o for o in order if o != m and ranks[o] == ranks[m]], finished=1 if m == UNTRAINED else seeds,
        )
        for m in order
    ]  # fmt: skip
    if failed:
        standings.append(Standing(label="lora r=512", rank=None, failed=seeds, reason=reason))
    return Comparison(
        name=name, started="2026-01-02T03:04:05+00:00", updated="2026-01-02T03:44:05+00:00", finished=not running,
        config={"model": "smollm2-135m", "methods": list(methods), "budget": {"steps": steps}, "seeds": seeds},
        versions={"python": "3.11.9", "torch": "2.13.0", "adapterlab": "0.1.0"}, platform="Linux-6.1-x86_64",
        git="0" * 40,
        conditions={"device": "cpu", "threads": 1, "processes": 2, "budget": f"{steps} steps", "batch": 16,
                    "evaluation rows": rows, "seeds": list(range(seeds)), "precision": "bf16"},
        model={"name": "smollm2-135m", "parameters": 134_515_008, "precision": "bf16"},
        data={"source": "reasoning-gym chain_sum", "fingerprint": fingerprint, "train_rows": 800, "eval_rows": rows},
        judge=judge, runs=runs, searches=[_search(m) for m in methods], standings=standings, differences=differences,
        recommendation=Recommendation(
            text="Take lora r=16 or dora for the best score: 66 % and 67 % of 100 questions, which cannot be told "
            "apart. prefix_tuning needs the least memory and the least time.",
            best=order[0], least_memory="bitfit" if "bitfit" in methods else order[0],
            least_time="prefix_tuning" if "prefix_tuning" in methods else order[0],
            undecided=[m for m in order[1:] if ranks[m] == ranks[order[0]]],
        ),
    )  # fmt: skip

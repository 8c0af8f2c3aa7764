"""Whether training on a bfloat16 base follows training on a float32 one: loss curves of LoRA, step by step.

    python benchmarks/numerics.py
    python benchmarks/numerics.py --quick

Both sides see the same rows in the same order and start from the same factors. The noise to compare with is the
difference of two float32 runs whose factors were drawn from other seeds. Attention, products and loss are the package's
own on these sides. A third side says what bfloat16 itself does: PEFT's LoRA with the attention, products and loss of
torch and transformers, from the same factors, on the same batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

EXACT, OURS, PEFT = "float32", "bfloat16", "bfloat16 of PEFT"
SIDES = {EXACT: "fp32", OURS: "bf16", PEFT: "bf16"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--lr", type=float, default=1e-3)


def plan(args: argparse.Namespace) -> list[Job]:
    common = {"model": bench.chosen_model(args), "steps": args.steps, "batch": args.batch, "lr": args.lr}
    return [
        Job("lora", side, pair, {**common, "precision": precision, "seed": pair, "peft": side == PEFT})
        for pair in range(max(2, args.pairs))  # one alone has no noise to compare with
        for side, precision in SIDES.items()
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al
    from adapterlab.train.config import Training
    from adapterlab.train.loop import Listener, Loop

    losses: list[float] = []

    class Curve(Listener):
        def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
            losses.append(record["loss"])

    model, rows = _model_and_rows(job)
    torch.manual_seed(job["seed"])
    host = al.attach(model, al.LoRA(r=8, alpha=16, targets="all-linear"))
    training = Training(steps=job["steps"], batch_size=job["batch"], lr=job["lr"], warmup=4, seed=0)
    loop = Loop(host, "default", rows, training, listeners=[Curve()])
    if job["peft"]:
        return {"losses": _with_peft(job, loop)}
    loop.run()
    return {"losses": losses}


def _with_peft(job: dict[str, Any], loop: Any) -> list[float]:
    """The losses of the run that a loop is about to make, made by PEFT and torch."""
    import torch
    from peft import LoraConfig, get_peft_model

    from adapterlab.data import Collator
    from adapterlab.optim import schedule

    start = {path: adapter.A.detach().clone() for path, adapter in loop.host.adapters("default").items()}
    peft = get_peft_model(
        _model_and_rows(job)[0],
        LoraConfig(r=8, lora_alpha=16, target_modules=[path.split(".")[-1] for path in start]),
    )
    modules = dict(peft.get_base_model().named_modules())
    for path, a in start.items():
        modules[path].lora_A["default"].weight.data.copy_(a)
    if (found := sum("lora_A" in name for name, _ in peft.named_parameters())) != len(start):
        raise SystemExit(f"PEFT adapts {found} modules and not the same {len(start)}.")
    training, losses = loop.training, []
    trained = [p for p in peft.parameters() if p.requires_grad]
    kept = {"weight_decay": training.weight_decay, "betas": training.betas, "eps": training.eps}
    optimizer = torch.optim.AdamW(trained, lr=training.lr, **kept)
    rates = schedule(optimizer, loop.total, kind=training.schedule, warmup=training.warmup_steps(loop.total), floor=0.0)
    collate = Collator(peft.config.pad_token_id or 0)
    peft.train()
    for step in range(loop.total):
        (indices,) = loop.sampler.step(step)
        loss = peft(**collate([loop.rows[i] for i in indices]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.clip or torch.inf)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _model_and_rows(job: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    import adapterlab as al
    from adapterlab.data import DataConfig, encode, load_data

    count = job["steps"] * job["batch"]
    if not isinstance(job["model"], str):
        model = bench.load(job["model"]).to(torch.float32 if job["precision"] == "fp32" else torch.bfloat16)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (count, 16), generator=draw).tolist()
        return model, [{"input_ids": row, "labels": row} for row in ids]
    model, tokenizer = al.load_model(job["model"], precision=job["precision"])
    task = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    data = DataConfig(task="chain_sum", task_args=task, limit=count, eval_size=0)
    return model, encode(load_data(data).train, tokenizer, data, window=None).rows


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    curves = {(job.side, job.pair): figures["losses"] for job, figures in done}
    seeds = sorted({pair for _, pair in curves if all((side, pair) in curves for side in SIDES)})
    pairs = {
        f"{OURS} - {EXACT}": [((OURS, s), (EXACT, s)) for s in seeds],
        f"{PEFT} - {EXACT}": [((PEFT, s), (EXACT, s)) for s in seeds],
        f"{EXACT}, between seeds": [((EXACT, a), (EXACT, b)) for a in seeds for b in seeds if a < b],
    }
    summary: dict[str, Any] = {"seeds": len(seeds)}
    for name, chosen in pairs.items():
        found = [_apart(curves[one], curves[other]) for one, other in chosen]
        if found:
            summary[name] = {key: bench.spread([one[key] for one in found]) for key in found[0]}
    rows = [
        [name, *(bench.shown(found[key], 4) for key in ("each step", "mean of the run", "last ten"))]
        for name, found in summary.items()
        if isinstance(found, dict)
    ]
    header = ["difference of two curves, nats a token", "each step, mean", "mean of the run", "last ten steps"]
    return summary, bench.markdown(header, rows)


def _apart(one: list[float], other: list[float]) -> dict[str, float]:
    """How far two curves are apart: at each step on average, in their means, and in the means of their last ten."""
    count = len(one)
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    return {
        "each step": sum(map(abs, gaps)) / count,
        "mean of the run": abs(sum(gaps)) / count,
        "last ten": abs(sum(gaps[-10:])) / min(10, count),
    }


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options)

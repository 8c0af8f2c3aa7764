"""The same LoRA job in adapterlab and in TRL's SFTTrainer with PEFT: speed, memory, and losses that must agree.

    python benchmarks/vs_trl.py              # five pairs on SmolLM2-135M and GSM8K
    python benchmarks/vs_trl.py --dtype float32   # for processors without bfloat16 instructions
    python benchmarks/vs_trl.py --quick      # a tiny random model: shows that everything works

Both sides get the same token rows with the same labels in the same order, the same base, float32 adapters of the same
rank on the same modules, AdamW with a linear schedule, no warm-up and clipping at 1. Everything else is what each does
by itself. TRL recomputes activations unless told not to (`gradient_checkpointing=True` is its default), and runs under
bfloat16 autocast, which a base in bfloat16 is faster without: all its modes are measured. With float32 there is no
autocast.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

CASE = "gsm8k"
NEAR = 0.01  # largest relative difference of the mean losses
LOCAL = Path("../../shared/data/gsm8k/train.jsonl")  # seen from this folder, where workers run
SIDES = {
    "adapterlab": {"ours": True, "recompute": False, "autocast": False},
    "TRL": {"ours": False, "recompute": False, "autocast": True},
    "TRL without autocast": {"ours": False, "recompute": False, "autocast": False},
    "adapterlab, recomputing": {"ours": True, "recompute": True, "autocast": False},
    "TRL, recomputing": {"ours": False, "recompute": True, "autocast": True},
    "TRL without autocast, recomputing": {"ours": False, "recompute": True, "autocast": False},
}
COMPARED = [
    ("adapterlab", "TRL"),
    ("adapterlab", "TRL without autocast"),
    ("adapterlab, recomputing", "TRL, recomputing"),
    ("adapterlab, recomputing", "TRL without autocast, recomputing"),
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=str(LOCAL) if (bench.HERE / LOCAL).exists() else "openai/gsm8k",
        help="file or hub id of GSM8K",
    )
    parser.add_argument("--steps", type=int, default=10, help="of each run; the first two are not timed")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the base")
    parser.add_argument("--padded", action="store_true", help="let adapterlab pad rows too, instead of its default")


def plan(args: argparse.Namespace) -> list[Job]:
    common = {
        "model": bench.chosen_model(args), "data": args.data, "steps": args.steps, "batch": args.batch,
        "max_length": args.max_length, "lr": args.lr, "warm": min(2, args.steps - 1), "r": 8, "alpha": 16,
        "packing": False if args.padded else None, "dtype": args.dtype,
    }  # fmt: skip
    sides = {name: side for name, side in SIDES.items() if args.dtype == "bfloat16" or not side["autocast"]}
    return [
        Job(CASE, name, pair, {**common, **side, "seed": pair})
        for pair in range(args.pairs)
        for name, side in sides.items()
    ]


def work(job: dict[str, Any]) -> Figures:
    tokenizer, rows = _rows(job)
    return (_ours if job["ours"] else _trl)(job, tokenizer, rows)


def _rows(job: dict[str, Any]) -> tuple[Any, list[dict[str, list[int]]]]:
    """The rows in the order of training, encoded by adapterlab for both sides."""
    from transformers import AutoTokenizer

    from adapterlab.data import DataConfig, encode, load_data
    from adapterlab.models import resolve

    count = job["steps"] * job["batch"]
    if not isinstance(job["model"], str):
        import torch

        draw = torch.Generator().manual_seed(bench.SEED)
        ids = torch.randint(3, job["model"]["vocabulary"], (count, 24), generator=draw).tolist()
        return _words(job["model"]["vocabulary"]), [{"input_ids": row, "labels": [-100] * 8 + row[8:]} for row in ids]
    tokenizer = AutoTokenizer.from_pretrained(str(resolve(job["model"])))
    hub = "main" if "/" in job["data"] and not Path(job["data"]).exists() else None
    settings = DataConfig(path=job["data"], name=hub, limit=count, eval_size=0, max_length=job["max_length"])
    return tokenizer, encode(load_data(settings).train, tokenizer, settings, window=None).rows


def _words(size: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))])}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), **special)


def _ours(job: dict[str, Any], tokenizer: Any, rows: list[dict[str, list[int]]]) -> Figures:
    import adapterlab as al
    from adapterlab.data import Collator
    from adapterlab.train.config import Training
    from adapterlab.train.loop import Listener, Loop

    model = bench.load(job["model"], dtype=job["dtype"])
    memory = bench.Memory(model)

    class Notes(Listener):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.ends: list[float] = []
            self.tokens = 0

        def started(self, loop: Loop) -> None:
            self.ends.append(time.perf_counter())

        def stepped(self, loop: Loop, record: dict[str, Any]) -> None:
            self.losses.append(record["loss"])
            self.ends.append(time.perf_counter())
            self.tokens = record["tokens"]

    training = Training(
        steps=job["steps"], batch_size=job["batch"], lr=job["lr"], schedule="linear", warmup=0, clip=1.0,
        seed=job["seed"], recompute="full" if job["recompute"] else "none", packing=job["packing"],
    )  # fmt: skip
    host = al.attach(model, al.LoRA(r=job["r"], alpha=job["alpha"], targets="all-linear"))
    notes = Notes()
    loop = Loop(host, "default", rows, training, collate=Collator(tokenizer.pad_token_id), listeners=[notes])
    order = [[i for part in loop.sampler.step(step) for i in part] for step in range(job["steps"])]
    loop.run()
    adapter = host.parameters("default")
    return _figures(job, memory, rows, order, notes.losses, notes.ends, adapter) | {
        "tokens_seen": notes.tokens,
        "loss": loop.loss.path,
        "batching": str(loop.batching),
    }


def _trl(job: dict[str, Any], tokenizer: Any, rows: list[dict[str, list[int]]]) -> Figures:
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from adapterlab.train.config import Training
    from adapterlab.train.sampler import Sampler

    disable_progress_bars()
    training = Training(steps=job["steps"], batch_size=job["batch"], seed=job["seed"])
    sampler = Sampler([len(row["input_ids"]) for row in rows], training.seed, training.batch_size, 1)
    order = [[i for part in sampler.step(step) for i in part] for step in range(job["steps"])]
    data = Dataset.from_list([rows[i] for step in order for i in step])
    model = bench.load(job["model"], dtype=job["dtype"])
    memory = bench.Memory(model)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=job["steps"], per_device_train_batch_size=job["batch"],
            learning_rate=job["lr"], lr_scheduler_type="linear", warmup_steps=0, logging_steps=1, save_strategy="no",
            report_to="none", gradient_checkpointing=job["recompute"], max_length=job["max_length"], packing=False,
            train_sampling_strategy="sequential", use_cpu=True, bf16=job["autocast"], seed=job["seed"],
            disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()],
            peft_config=LoraConfig(
                r=job["r"], lora_alpha=job["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )  # fmt: skip
        tokens = [0]
        collate = trainer.data_collator

        def counting(examples: Any) -> Any:
            made = collate(examples)
            tokens[0] += int(made["attention_mask"].sum())
            return made

        trainer.data_collator = counting
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    return _figures(job, memory, rows, order, losses, ends, adapter) | {
        "tokens_seen": tokens[0],
        "autocast": settings.bf16,
    }


def _figures(
    job: dict[str, Any],
    memory: bench.Memory,
    rows: Any,
    order: Any,
    losses: list[float],
    ends: list[float],
    adapter: Any,
) -> Figures:
    import torch

    seconds = [later - sooner for sooner, later in itertools.pairwise(ends)]
    used = seconds[job["warm"] :]
    chosen = [rows[i] for step in order for i in step]
    return {
        "losses": losses,
        "mean_loss": sum(losses) / len(losses),
        "seconds": seconds,
        "step": bench.statistics.median(used),
        "samples_per_second": job["batch"] * len(used) / sum(used),
        **memory.figures(),
        "tokens": sum(len(row["input_ids"]) for row in chosen),
        "labels": sum(label != -100 for row in chosen for label in row["labels"][1:]),
        "rows": order,
        "trainable": sum(p.numel() for p in adapter),
        "adapter_dtype": sorted({str(p.dtype) for p in adapter}),
        "threads": torch.get_num_threads(),
    }


def _suffix(args: argparse.Namespace) -> str:
    return "" if args.dtype == "bfloat16" else f"_{args.dtype}"


def check(done: list[tuple[Job, Figures]]) -> None:
    """Sides of one pair must have done the same job and come to the same losses."""
    pairs: dict[int, dict[str, Figures]] = {}
    for job, figures in done:
        pairs.setdefault(job.pair, {})[job.side] = figures
    for pair, sides in pairs.items():
        name, first = next(iter(sides.items()))
        for other, figures in sides.items():
            for what in ("rows", "tokens", "labels", "trainable", "adapter_dtype"):
                if figures[what] != first[what]:
                    raise SystemExit(f"Pair {pair} is no comparison: {what} of {name} and {other} differ.")
            if figures["tokens_seen"] != figures["tokens"]:
                raise SystemExit(
                    f"Pair {pair}: {other} trained on {figures['tokens_seen']} tokens; the rows have "
                    f"{figures['tokens']}."
                )
            apart = abs(figures["mean_loss"] / first["mean_loss"] - 1)
            if not apart <= NEAR:
                raise SystemExit(
                    f"Pair {pair}: the mean losses of {name} ({first['mean_loss']:.4f}) and {other} "
                    f"({figures['mean_loss']:.4f}) differ by {apart:.1%}, more than {NEAR:.0%}. One of them does "
                    "something else; the figures are worth nothing until that is found."
                )


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary: dict[str, Any] = {"sides": {}, "ratios": {}}
    table = []
    for side in dict.fromkeys(job.side for job, _ in done):
        runs = [figures for job, figures in done if job.side == side]
        found = {key: bench.spread([run[key] for run in runs]) for key in ("samples_per_second", "above", "mean_loss")}
        summary["sides"][side] = found
        mebibytes = {key: value / 2**20 if key != "n" else value for key, value in found["above"].items()}
        speed, memory = bench.shown(found["samples_per_second"]), bench.shown(mebibytes, 0)
        table.append([side, speed, memory, f"{found['mean_loss']['median']:.4f}"])
    first = done[0][1]
    summary["same"] = {
        **{key: first[key] for key in ("tokens", "labels", "trainable", "adapter_dtype")},
        "note": "Rows, order, tokens, labels, number and dtype of trained parameters were equal on both sides of every "
        "pair. Adapters are float32 on both sides: adapterlab makes them so on half-precision bases; PEFT casts them "
        "(autocast_adapter_dtype) and TRL leaves that on for bases that are not quantized. TRL runs the model under "
        "bfloat16 autocast, its default, or without; adapterlab runs the products in the dtype of their input.",
    }
    lines = []
    for ours, theirs in COMPARED:
        if not any(job.side == theirs for job, _ in done):
            continue
        speed = bench.ratios(done, (CASE, ours), (CASE, theirs), lambda run: run["samples_per_second"])
        memory = bench.ratios(done, (CASE, ours), (CASE, theirs), lambda run: run["above"])
        summary["ratios"][f"{ours} / {theirs}"] = {"samples_per_second": speed, "above": memory}
        lines.append([f"{ours} / {theirs}", f"{bench.shown(speed)} ×", f"{bench.shown(memory)} ×", ""])
    header = ["", "samples a second", "memory above the model, MiB", "mean loss"]
    return summary, bench.markdown(header, [*table, *lines])


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, check=check, suffix=_suffix)

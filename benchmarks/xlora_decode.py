"""How the time of a new token grows with the text before it, for X-LoRA with two caches and without.

    python benchmarks/xlora_decode.py
    python benchmarks/xlora_decode.py --quick

Each point is a process of its own: a random text of some tokens is read, then tokens are appended one by one. Sides:
the base with its cache, X-LoRA with a cache for each of its two passes, and X-LoRA that reads the whole text again for
every token, as HF PEFT and the authors' code do (PEFT itself is measured where it is installed). The logits of the two
X-LoRA sides are compared in each process.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

LENGTHS = (32, 64, 128, 256, 512, 1024)
BASE, TWO, WHOLE, PEFT = "base, one cache", "two caches", "whole text again", "PEFT"
SIDES = (BASE, TWO, WHOLE, PEFT)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens before the first new one")
    here = [side for side in SIDES if side != PEFT or importlib.util.find_spec("peft")]
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=here)
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of a point, timed after one to warm up")
    parser.add_argument("--adapters", type=int, default=4, help="LoRAs that are mixed, all linear layers, rank 8")


def plan(args: argparse.Namespace) -> list[Job]:
    model = bench.chosen_model(args)
    lengths = (16, 64) if args.quick else args.lengths
    settings = {"model": model, "tokens": args.tokens, "adapters": args.adapters, "rank": 8}
    return [
        Job(f"{length} tokens", side, pair, {**settings, "length": length, "side": side})
        for pair in range(args.pairs)
        for length in lengths
        for side in args.sides
    ]


def work(job: dict[str, Any]) -> Figures:
    import torch

    model = bench.load(job["model"], dtype="float32").eval()
    count = job["length"] + job["tokens"] + 1
    ids = bench.batch(model, 1, count)["input_ids"]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runner = _peft(model, job, Path(folder)) if job["side"] == PEFT else _ours(model, job)
        step = _growing(runner, ids, job) if job["side"] in (BASE, TWO) else _again(runner, ids, job)
        seconds = bench.timed(step, job["tokens"])
        apart = _apart(runner, ids, job["length"]) if job["side"] == TWO else None
    return {
        "token": bench.statistics.median(seconds),
        "seconds": seconds,
        "length": job["length"],
        "apart": apart,
        "threads": torch.get_num_threads(),
    }


def _ours(model: Any, job: dict[str, Any]) -> Any:
    """The model with random adapters and a classifier that weighs them, or as it is."""
    import torch

    import adapterlab as al

    if job["side"] == BASE:
        return model
    parts = {f"part{i}": {"name": "lora", "r": job["rank"]} for i in range(job["adapters"])}
    host = al.attach(model, al.XLoRA(adapters=parts, layerwise=True))
    torch.manual_seed(1)
    for value in host.tensors("default").values():
        value.add_(0.01 * torch.randn_like(value))
    return model


def _peft(model: Any, job: dict[str, Any], folder: Path) -> Any:
    """The same in PEFT."""
    import peft
    import torch

    places = {}
    for i in range(job["adapters"]):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=job["rank"], target_modules="all-linear", init_lora_weights=False)
        places[str(i)] = str(folder / str(i))
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(places[str(i)])
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=places, layerwise_scalings=True
    )
    return peft.get_peft_model(model, config).eval()


def _growing(model: Any, ids: Any, job: dict[str, Any]) -> Any:
    """Read one more token with what is in the caches."""
    from adapterlab.foreign.cache import cache_argument, cache_out

    name = str(cache_argument(model))
    held = {"cache": cache_out(model(ids[:, : job["length"]], use_cache=True)), "at": job["length"]}

    def step() -> None:
        at = held["at"]
        held["cache"] = cache_out(model(ids[:, at : at + 1], **{name: held["cache"]}, use_cache=True))
        held["at"] = at + 1

    return step


def _again(model: Any, ids: Any, job: dict[str, Any]) -> Any:
    """Read the whole text and one more token."""
    held = {"at": job["length"]}

    def step() -> None:
        held["at"] += 1
        model(input_ids=ids[:, : held["at"]], attention_mask=ids.new_ones(1, held["at"]), use_cache=False)

    return step


def _apart(model: Any, ids: Any, length: int) -> float:
    """Largest difference of the logits of one token with the caches and of the whole text."""
    from adapterlab.foreign.cache import cache_argument, cache_out

    past = cache_out(model(ids[:, :length], use_cache=True))
    one = model(ids[:, length : length + 1], **{str(cache_argument(model)): past}, use_cache=True).logits[:, -1]
    return float((one - model(ids[:, : length + 1], use_cache=False).logits[:, -1]).abs().max())


def check(done: list[tuple[Job, Figures]]) -> None:
    """Stop where the caches give other logits."""
    for job, figures in done:
        if (figures.get("apart") or 0.0) > 1e-3:
            raise SystemExit(f"{job.key}: with caches the logits differ by {figures['apart']:.3g} from a whole pass.")


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    lengths = sorted({figures["length"] for _, figures in done})
    sides = [side for side in SIDES if any(job.side == side for job, _ in done)]
    summary: dict[str, Any] = {}
    for length in lengths:
        points = [(job, figures) for job, figures in done if figures["length"] == length]
        summary[str(length)] = {
            side: bench.spread([figures["token"] for job, figures in points if job.side == side]) for side in sides
        }
    summary["largest difference of logits"] = max((f["apart"] for _, f in done if f["apart"] is not None), default=None)
    rows = [
        [f"{length:,}", *(bench.shown(_milliseconds(summary[str(length)][side]), 1) for side in sides)]
        for length in lengths
    ]
    draw({side: [summary[str(length)][side]["median"] for length in lengths] for side in sides}, lengths, file)
    return summary, bench.markdown(["tokens before", *(f"{side}, ms a token" for side in sides)], rows)


def _milliseconds(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value if key == "n" else 1e3 * value for key, value in found.items()}


def draw(curves: dict[str, list[float]], lengths: list[int], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is missing (pip install matplotlib).")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(4.8, 3.2))
    for side, seconds in curves.items():
        panel.plot(lengths, [1e3 * value for value in seconds], "o-", ms=3, label=side)
    panel.set(xlabel="tokens before the new one", ylabel="ms for a new token", yscale="log")
    panel.legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, check=check, peers=False)

"""What routing costs: a step with stacked experts against one with a LoRA of the same size, by experts, rank and top k.

    python benchmarks/experts.py
    python benchmarks/experts.py --experts 4 10 --ranks 4 --threads 1
    python benchmarks/experts.py --quick

Experts and LoRA of rank E r are attached to one model and take turns, step by step, so that a machine whose speed
drifts slows both. What is kept is counted: the bytes that a forward pass saves for the backward pass, parameters and
the base's own weights aside. The last column is one layer alone: tokens gathered by expert, a loop over small products,
against all experts in two products with zeros between.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

ROUTED, PLAIN = "experts", "lora"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="molora", help="with the settings experts, r and top_k (default molora)")
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 10, 16])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--top-k", nargs="+", type=int, default=[0, 2], help="0: all")
    parser.add_argument("--shape", default="2x256", help="rows x tokens")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one to warm up")


def plan(args: argparse.Namespace) -> list[Job]:
    shape = [int(side) for side in ("1x16" if args.quick else args.shape).split("x")]
    common = {"model": bench.chosen_model(args), "method": args.method, "shape": shape, "steps": args.steps}
    jobs = []
    for experts, r, top_k in itertools.product(args.experts, args.ranks, args.top_k):
        if top_k < experts:
            settings = {"experts": experts, "r": r, "top_k": top_k or None}
            jobs.append(Job(f"{experts} {r} {top_k}", ROUTED, 0, {**common, "settings": settings}))
    return jobs


def work(job: dict[str, Any]) -> Figures:
    import torch

    import adapterlab as al
    from adapterlab.registry import method

    model = bench.load(job["model"])
    batch = bench.batch(model, *job["shape"])
    given = job["settings"]
    host = al.attach(model, method(job["method"])(**given), ROUTED)
    host.attach(method(PLAIN)(r=given["experts"] * given["r"]), PLAIN)
    model.train()
    step, kept = _steps(host, batch), {}
    for side in (ROUTED, PLAIN):
        host.activate(side)
        kept[side] = _kept(model, batch)
    found = [[step(side) for side in (ROUTED, PLAIN)] for _ in range(1 + job["steps"])][1:]
    return {
        "seconds": found,
        "step": [ours / theirs for ours, theirs in found],
        "kept": kept,
        "trainable": {side: sum(p.numel() for p in host.parameters(side)) for side in kept},
        "gathered": _gathered(model.config.hidden_size, batch["input_ids"].numel(), **given)
        if given["top_k"]
        else None,
        "threads": torch.get_num_threads(),
    }


def _steps(host: Any, batch: Any) -> Any:
    """A function that makes a step of one side and returns how long it took."""
    drivers = {}
    for side in (ROUTED, PLAIN):
        host.activate(side)
        drivers[side] = bench.driver(host, side)

    def step(side: str) -> float:
        host.activate(side)
        return bench.timed(lambda: drivers[side](batch), 1, warm=0)[0]

    return step


def _kept(model: Any, batch: Any) -> int:
    """Bytes that the forward pass of the backbone saves, each storage once."""
    import torch

    from adapterlab.foreign.model import backbone_of

    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = backbone_of(model)(**inputs, use_cache=False)
    assert out is not None  # alive until here, so that no address is used twice
    return sum(found.values())


def _gathered(width: int, tokens: int, experts: int, r: int, top_k: int) -> list[float]:
    """Times of a layer's experts with tokens gathered by expert, against the node that computes all of them."""
    import torch

    from adapterlab.ops.experts import mixture, routed_low_rank, scores, selection

    torch.manual_seed(bench.SEED)
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    a, b, router = (
        torch.randn(size) / width**0.5 for size in ((experts, r, width), (experts, width, r), (experts, width))
    )
    trained = [x, *(tensor.requires_grad_() for tensor in (a, b, router))]

    def sparse() -> Any:
        z = scores(x, router)
        chosen = selection(z, top_k)
        w = mixture(z, chosen, renormalised=False).to(x.dtype)
        y = x.new_zeros(tokens, width)
        for e in range(experts):
            rows = chosen[:, e].nonzero()[:, 0]
            h = x[rows] @ a[e].to(x.dtype).T * w[rows, e, None]
            y = y.index_add(0, rows, h @ b[e].to(x.dtype).T)
        return y

    def dense() -> Any:
        return routed_low_rank(*trained, top_k=top_k)[0]

    assert torch.allclose(sparse(), dense(), rtol=0.05, atol=0.05)
    forms = [lambda form=form: torch.autograd.grad(form().sum(), trained) for form in (sparse, dense)]
    times = [[bench.timed(form, 1, warm=0)[0] for form in forms] for _ in range(12)][2:]
    return [one / other for one, other in times]


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary, rows = {}, []
    for job, figures in done:
        kept = figures["kept"]
        found = {
            "time": bench.spread(figures["step"]),
            "kept": kept[ROUTED] / kept[PLAIN],
            "gathered": bench.spread(figures["gathered"]) if figures["gathered"] else None,
        }
        summary[job.case] = found
        given = job.settings["settings"]
        rows.append([
            given["experts"], given["r"], given["top_k"] or "all", bench.shown(found["time"]), f"{found['kept']:.2f}",
            bench.shown(found["gathered"]),
        ])  # fmt: skip
    header = [
        "experts",
        "rank",
        "top k",
        "time / LoRA of rank E r",
        "kept / LoRA of rank E r",
        "gathered / dense, one layer",
    ]
    return summary, bench.markdown(header, rows)


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, peers=False)

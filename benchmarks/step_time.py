"""One optimizer step of every method: against HF PEFT where PEFT has the method, and against our own LoRA.

    python benchmarks/step_time.py                              # all methods
    python benchmarks/step_time.py --settings bitfit.bias_mode=add vblora.vector_length=64
    python benchmarks/step_time.py --methods lora ia3 --rest-shapes 2x256,4x512
    python benchmarks/step_time.py --quick

A step is forward, backward and AdamW on random tokens that all bear a label. PEFT's configuration is written by the
method's own codec, from an attached adapter: same modules, same rank, same options. Each run is a process of its own
that measures its shapes from the smallest to the largest, and our LoRA on the same model right after: a machine whose
speed drifts slows both. The headline methods run in pairs, ours and PEFT's in turns,
at all shapes; the others run `--rest-pairs` times at `--rest-shapes`, so that the whole ends in reasonable time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

OURS, PEFT = "adapterlab", "PEFT"
BASELINE = "lora"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=["*"], help="ids or patterns (default: all)")
    parser.add_argument("--headline", nargs="*", default=[BASELINE, "dora"], help="methods that run in --pairs")
    parser.add_argument("--shapes", default="2x256,4x512", help="rows x tokens of the headline methods")
    parser.add_argument("--rest-shapes", default="2x256", help="of the other methods")
    parser.add_argument("--rest-pairs", type=int, default=1, help="runs of the other methods")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each shape in a run, after one to warm up")
    parser.add_argument("--settings", nargs="*", default=[], help="of methods whose defaults do not fit: id.key=value")
    parser.add_argument("--rank", type=int, default=8, help="of the methods that have a field r")


def plan(args: argparse.Namespace) -> list[Job]:
    from adapterlab.cli._shared import settings as keyed
    from adapterlab.registry import ids, method

    if args.quick:
        args.shapes = args.rest_shapes = "1x8,2x16"
    chosen = sorted({BASELINE, *(id for pattern in args.methods for id in ids(pattern))})
    chosen = [id for id in chosen if method(id).trains]
    common = {"model": bench.chosen_model(args), "steps": args.steps, "rank": args.rank}
    given = keyed(args.settings, "--settings")
    # A method that inherits its codec is stored as another one, and that one is measured.
    stored = [id for id in chosen if vars(method(id)).get("hf") is not None]
    configs = bench.caller(__file__, args)({**common, "configs": stored, "settings": given})
    jobs = []
    for id in sorted(chosen, key=lambda id: (id not in args.headline, id != BASELINE, id)):
        main = id in args.headline
        settings = {**common, "method": id, "shapes": _shapes(args.shapes if main else args.rest_shapes)}
        if id in given:
            settings["settings"] = {id: given[id]}
        beside = {} if id == BASELINE else {"beside": BASELINE}
        for pair in range(args.pairs if main else args.rest_pairs):
            jobs.append(Job(id, OURS, pair, {**settings, **beside}))
            if configs.get(id):
                jobs.append(Job(id, PEFT, pair, {**settings, "config": configs[id]}))
    return jobs


def _shapes(text: str) -> list[list[int]]:
    try:
        shapes = [[int(side) for side in part.split("x")] for part in text.split(",")]
        return sorted(([rows, length] for rows, length in shapes), key=lambda shape: shape[0] * shape[1])
    except ValueError:
        raise SystemExit(f"{text!r} is no list of shapes; write rows x tokens, such as 2x256,4x512") from None


def work(job: dict[str, Any]) -> Figures:
    if "configs" in job:
        return {id: _config(job, id) for id in job["configs"]}
    return _measured(job, _peft if "config" in job else _ours)


def _method(job: dict[str, Any], id: str) -> Any:
    from adapterlab.registry import method

    cls = method(id)
    rank = {"r": job["rank"]} if "r" in cls.model_fields else {}
    return cls(**{**rank, **job.get("settings", {}).get(id, {})})


def _load(job: dict[str, Any], method: Any) -> Any:
    """The model, packed if the method asks for that."""
    from adapterlab.models.loading import QUANTIZATIONS

    base = getattr(method, "base", None)
    return bench.load(job["model"], quantize=base if base in QUANTIZATIONS else None)


def _config(job: dict[str, Any], id: str) -> Figures | None:
    """PEFT's configuration of a method; None where one of the two has no such adapter."""
    import adapterlab as al
    from adapterlab.errors import AdapterlabError
    from adapterlab.io.hf_peft import write

    try:
        method = _method(job, id)
        host = al.attach(_load(job, method), method)
    except AdapterlabError:
        return None  # the run of our side says why
    method.begin(host, "default", bench.RUN)
    written = write(host, "default", None, None)
    if written is None or method.hf is None:
        return None
    # A start that moves the base is stored as the LoRA of another rank; the method's own options say what trains.
    own = {key: value for key, value in method.hf.options(method).items() if key not in method.hf.subsets}
    return {**written[0], **own, "inference_mode": False}


def _measured(job: dict[str, Any], attach: Any) -> Figures:
    import torch

    model = _load(job, _method(job, job["method"]))
    memory = bench.Memory(model)
    batches = [bench.batch(model, *shape) for shape in job["shapes"]]
    model.train()
    step, trainable = attach(job, model, batches)
    shapes = {}
    for (rows, length), batch in zip(job["shapes"], batches, strict=True):
        memory.reset()
        seconds = bench.timed(lambda batch=batch: step(batch), job["steps"])
        shapes[f"{rows}x{length}"] = {"step": bench.statistics.median(seconds), "seconds": seconds, **memory.figures()}
    if "beside" in job:
        _beside(job, model, batches, shapes)
    return {"shapes": shapes, "trainable": trainable, "threads": torch.get_num_threads()}


def _beside(job: dict[str, Any], model: Any, batches: Any, shapes: dict[str, Any]) -> None:
    """Add the time that our baseline takes now; its memory would be blurred by what came before."""
    from adapterlab.hosts import host

    carrier = host(model)
    assert carrier is not None
    carrier.detach("default")
    step, _ = _ours({**job, "method": job["beside"]}, model, batches)
    for figures, batch in zip(shapes.values(), batches, strict=True):
        seconds = bench.timed(lambda batch=batch: step(batch), job["steps"])
        figures["baseline"] = bench.statistics.median(seconds)


def _ours(job: dict[str, Any], model: Any, batches: Any) -> tuple[Any, int]:
    import adapterlab as al

    method = _method(job, job["method"])
    host = al.attach(model, method)
    with contextlib.suppress(NotImplementedError):
        method.prepare(host, "default", batches[:1])
    step = bench.driver(host)
    return step, sum(p.numel() for p in host.parameters("default") if p.requires_grad)


def _peft(job: dict[str, Any], model: Any, batches: Any) -> tuple[Any, int]:
    import torch
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    options = dict(job["config"])
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[options.pop("peft_type")]
    known = {entry.name for entry in dataclasses.fields(kind)}
    unknown = {key for key, value in options.items() if key not in known and value not in (None, False)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    adapted = get_peft_model(model, kind(**{key: value for key, value in options.items() if key in known}))
    adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    steps = itertools.count()
    event = getattr(adapted.base_model, "update_and_allocate", None)  # the one event that PEFT's methods have

    def step(batch: Any) -> None:
        adapted(**batch, use_cache=False).loss.backward()
        optimizer.step()
        if event is not None:
            event(next(steps))
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    summary: dict[str, Any] = {"methods": {}, "errors": {j.key: f["error"] for j, f in done if "error" in f}}
    table = []
    for id in dict.fromkeys(job.case for job, _ in done):
        shapes = next(job.settings["shapes"] for job, _ in done if job.case == id)
        for name in (f"{rows}x{length}" for rows, length in shapes):
            found = _compared(done, id, name)
            if not any(found.values()):
                continue  # it failed; the note below the table says why
            summary["methods"].setdefault(id, {})[name] = found
            table.append([f"`{id}`", name.replace("x", " × "), *(bench.shown(found[key]) for key in found)])
    header = ["method", "rows × tokens", "time / PEFT", "memory / PEFT", "time / our LoRA", "memory / our LoRA"]
    notes = [f"{key}: failed ({error.strip().splitlines()[-1][:120]})" for key, error in summary["errors"].items()]
    return summary, "\n\n".join([bench.markdown(header, table), *notes])


def _compared(done: list[tuple[Job, Figures]], id: str, shape: str) -> dict[str, Any]:
    at = [(job, figures["shapes"][shape]) for job, figures in done if shape in figures.get("shapes", {})]
    lora = [figures for job, figures in at if job.case == BASELINE and job.side == OURS]
    own = [figures for job, figures in at if job.case == id and job.side == OURS]

    def against_lora(figure: str) -> dict[str, Any] | None:
        if not own or not lora:
            return None
        middle = bench.spread([run[figure] for run in lora])["median"]
        below = [run.get("baseline", middle) if figure == "step" else middle for run in own]
        return bench.spread([run[figure] / base for run, base in zip(own, below, strict=True)])

    return {
        "time / PEFT": bench.ratios(at, (id, OURS), (id, PEFT), lambda run: run["step"]),
        "memory / PEFT": bench.ratios(at, (id, OURS), (id, PEFT), lambda run: run["above"]),
        "time / our LoRA": against_lora("step"),
        "memory / our LoRA": against_lora("above"),
    }


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options, tolerant=True)

"""How fast the serving engine answers: the base alone, one LoRA, a LoRA for each request, and some of many registered.

    python benchmarks/serving.py
    python benchmarks/serving.py --vllm PYTHON
    python benchmarks/serving.py --quick

Each run takes one model and one engine, and another engine of the same base that has never had an adapter. A side is
one load: so many requests at the same time, prompts of random tokens, answers of a fixed length, greedy, and no prefix
kept; on the side `many` three times as many requests, of which so many are answered at the same time. Beside each side
the engine without adapters answers the same number of prompts by the base: a figure is a side's tokens per second over
those. Once a round `generate` of the base, and PEFT with all of its adapters on the model, answer them as one batch.
Up to the side `many` as many adapters are registered as there are requests, and all of them are loaded; its own are
drawn anew each time from all that are registered then, so that it reads adapters that are not loaded.

A run of its own mixes kinds of adapters: as many requests at once, of one kind or of all, with as many different
adapters either way. Another one answers the loads of the LoRAs by vLLM, with the interpreter of an environment that has
it, of the same base in the same precision.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _bench as bench
from _bench import Figures, Job

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `adapterlab serve` does, before torch is imported

BARE = "bare"  # the base in an engine without adapters
SIDES = {
    "base": "the base, where adapters are loaded",
    "one": "one LoRA for all",
    "each": "a LoRA of its own for each request",
}
PEFT = {
    "peft one": "PEFT, one LoRA for all",
    "peft each": "PEFT, a mixed batch: a LoRA of its own for each row",
}
WAVES = 3
TARGETS = {"all": "all-linear", "qv": ("q", "v")}
PEFT_TARGETS = {"all": "all-linear", "qv": ["q_proj", "v_proj"]}
CASES = {"all": "LoRA on all linear layers", "qv": "on q and v"}
MANY = "many"
MIXED = "mixed"
VLLM = "vllm"
INTERPRETER = "BENCHMARK_VLLM_PYTHON"
KINDS = {
    "lora": "LoRA",
    "ia3": "IA3",
    "adapter_houlsby": "Houlsby's bottlenecks",
    "prefix_tuning": "prefixes",
    "dora": "DoRA",
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--registered", type=int, default=2000, help="adapters that are registered")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each side in a run, after one to warm up")
    parser.add_argument("--dtype", default="bfloat16", help="of the base; float32 for processors without bfloat16")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter that has vLLM; without it, vLLM is left out")


def plan(args: argparse.Namespace) -> list[Job]:
    keys = ("requests", "prompt", "tokens", "rank", "registered", "rounds", "dtype")
    common = {"model": bench.chosen_model(args), **{key: getattr(args, key) for key in keys}}
    if args.quick:
        common |= {"requests": 5, "tokens": 8, "registered": 20, "rounds": 1}
    cases = [(case, "adapterlab", {"case": case}) for case in (*TARGETS, MIXED)]
    if args.vllm and not args.quick:
        os.environ[INTERPRETER] = args.vllm  # not a setting: settings are kept, and a path means nothing elsewhere
        cases += [(case, VLLM, {"case": case, "by": VLLM}) for case in TARGETS]
    return [Job(case, side, pair, {**common, **more}) for pair in range(args.pairs) for case, side, more in cases]


def work(job: dict[str, Any]) -> Figures:
    if job.get("by") == VLLM:
        return _by_vllm(job)
    return _mixed(job) if job["case"] == MIXED else _loras(job)


def _loras(job: dict[str, Any]) -> Figures:
    import torch

    from adapterlab.serve import Engine

    bare_model, model, other = _models(job)
    peft, by_peft = _with_peft(job)
    draw, count = random.Random(bench.SEED), job["requests"]
    prompts = bench.batch(other, count, job["prompt"])["input_ids"]
    figures: dict[str, list[float]] = {}
    times: list[float] = []

    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(bare_model, None, _settings(count)) as bare,
        Engine(model, None, _settings(count)) as engine,
    ):
        saved = itertools.cycle(_saved(other, _lora(job), Path(folder), count)["lora"])

        def register(upto: int) -> None:
            for number in range(len(times), upto):
                place, began = next(saved), time.perf_counter()
                engine.register(f"lora{number}", place)
                times.append(time.perf_counter() - began)

        def rates(side: str) -> dict[str, float]:
            return _beside(bare, engine, prompts, job, side, _names(side, count, job["registered"], draw))

        register(count)
        for number in range(job["rounds"] + 1):
            found: dict[str, float] = {}
            for side in SIDES:
                found |= rates(side)
            batch = count * job["tokens"]
            generated = batch / _generated(other, prompts, job["tokens"])
            for side, given in by_peft.items():
                found[f"{side} / generate"] = batch / _generated(peft, prompts, job["tokens"], **given) / generated
            found |= {f"{side} / generate": found[f"{side}, tokens/s"] / generated for side in SIDES}
            _note(figures, {**found, "generate, tokens/s": generated}, number)
        register(job["registered"])
        for number in range(job["rounds"] + 1):
            found = rates(MANY)
            found[f"{MANY} / generate"] = found[f"{MANY}, tokens/s"] / generated
            _note(figures, found, number)
        seen = engine.statistics()
    half = len(times) // 2
    return {
        **_medians(figures), "registering, first half, s": sum(times[:half]),
        "registering, second half, s": sum(times[half:]), "loads": seen.loads, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _by_vllm(job: dict[str, Any]) -> Figures:
    """Tokens per second of vLLM; the adapters of the side `many` are drawn from as many as are registered elsewhere."""
    from adapterlab.models import resolve

    count, draw = job["requests"], random.Random(bench.SEED)
    model = bench.load(job["model"], dtype=job["dtype"])
    prompts = bench.batch(model, count, job["prompt"])["input_ids"].tolist()
    sides = {side: _names(side, count, job["registered"], draw) for side in (*SIDES, MANY)}
    wanted = sorted({name for names in sides.values() for name in names if name is not None})
    with tempfile.TemporaryDirectory() as folder:
        saved = _saved(model, _lora(job), Path(folder), count, hf_peft=True)["lora"]
        places = zip(wanted, map(str, itertools.cycle(saved)), strict=False)
        keys = ("dtype", "tokens", "rank", "rounds")
        settings = {key: job[key] for key in keys} | {
            "model": str(resolve(job["model"])), "prompts": prompts, "running": count,
            "adapters": dict(places), "sides": sides,
        }  # fmt: skip
        command = [os.environ[INTERPRETER], str(bench.HERE / "_vllm_rates.py"), json.dumps(settings)]
        made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"vLLM: {made.stderr.strip()[-1500:]}")
    found = json.loads(made.stdout.strip().splitlines()[-1])
    rates = {f"{side}, tokens/s": bench.statistics.median(each) for side, each in found["rates"].items()}
    return {**rates, "version": found["vllm"]}


def _mixed(job: dict[str, Any]) -> Figures:
    """Tokens per second of requests of one kind, and of all kinds at once."""
    from adapterlab.serve import Engine

    bare_model, model, other = _models(job)
    count, kinds = job["requests"], [*KINDS]
    prompts = bench.batch(other, count, job["prompt"])["input_ids"]
    linear = {"r": job["rank"], "targets": "all-linear"}
    methods: dict[str, dict[str, Any]] = {id: linear if id in ("lora", "dora") else {} for id in kinds}
    names: dict[str, list[str | None]] = {id: [f"{id}{i % len(kinds)}" for i in range(count)] for id in kinds}
    names[MIXED] = [f"{kinds[i % len(kinds)]}0" for i in range(count)]
    figures: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(bare_model, None, _settings(count)) as bare,
        Engine(model, None, _settings(count)) as engine,
    ):
        for id, folders in _saved(other, methods, Path(folder), len(kinds)).items():
            for number, saved in enumerate(folders):
                engine.register(f"{id}{number}", saved)
        for number in range(job["rounds"] + 1):
            found: dict[str, float] = {}
            for side, given in names.items():
                found |= _beside(bare, engine, prompts, job, side, given)
            found |= {f"{MIXED} / {id}": found[MIXED] / found[id] for id in kinds}
            _note(figures, found, number)
        forms = {id: engine.adapter(f"{id}0").form for id in kinds}
    return {**_medians(figures), "forms": forms}


def _models(job: dict[str, Any]) -> Iterator[Any]:
    """One for an engine without adapters, one for an engine with some, and one for everything else."""
    return (bench.load(job["model"], dtype=job["dtype"]).eval() for _ in range(3))


def _settings(count: int) -> Any:
    from adapterlab.serve import EngineSettings

    running = max(count, 8)
    return EngineSettings(
        prefix_cache=False, max_running=running, step_tokens=256 + count, max_adapters=running, memory_gb=4
    )


def _beside(
    bare: Any, engine: Any, prompts: Any, job: dict[str, Any], side: str, names: list[str | None]
) -> dict[str, float]:
    """Figures of a side: its tokens per second, those of the base beside it, and their ratio."""
    own = len(prompts) * job["tokens"] / _served(bare, prompts, job, [None] * len(prompts))
    rate = len(names) * job["tokens"] / _served(engine, prompts, job, names)
    return {side: rate / own, f"{side}, tokens/s": rate, f"{BARE}, tokens/s": own}


def _note(figures: dict[str, list[float]], found: Mapping[str, float], number: int) -> None:
    """Keep the figures of a round that was not the first."""
    if number:
        for name, value in found.items():
            figures.setdefault(name, []).append(value)


def _medians(figures: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: bench.statistics.median(each) for name, each in figures.items()}


def _lora(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"lora": {"r": job["rank"], "targets": TARGETS[job["case"]]}}


def _saved(
    model: Any, methods: Mapping[str, dict[str, Any]], root: Path, count: int, hf_peft: bool = False
) -> dict[str, list[Path]]:
    """Folders of so many different adapters of each method, in this library's format or in HF PEFT's."""
    import torch

    import adapterlab as al
    from adapterlab.convert import export_peft
    from adapterlab.registry import method

    found: dict[str, list[Path]] = {}
    for id, settings in methods.items():
        for number in range(count):
            host = al.attach(model, method(id)(**settings), "a")
            with torch.no_grad():
                for parameter in host.parameters("a"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            place = root / f"{id}{number}"
            found.setdefault(id, []).append(export_peft(host, "a", place) if hf_peft else host.save(place, "a"))
            host.detach("a")
    return found


def _names(side: str, count: int, registered: int, draw: random.Random) -> list[str | None]:
    if side == MANY:
        return [f"lora{i}" for i in draw.sample(range(registered), WAVES * count)]
    return {"base": [None] * count, "one": ["lora0"] * count, "each": [f"lora{i}" for i in range(count)]}[side]


def _with_peft(job: dict[str, Any]) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A model with PEFT's adapters, and what `generate` is given for each side."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=job["rank"], target_modules=PEFT_TARGETS[job["case"]])
    names = [f"lora{number}" for number in range(job["requests"])]
    model: Any = get_peft_model(bench.load(job["model"], dtype=job["dtype"]), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    model.set_adapter(names[0])
    return model.eval(), {"peft one": {}, "peft each": {"adapter_names": names}}


def _generated(model: Any, prompts: Any, tokens: int, **given: Any) -> float:
    """Seconds of one batch of `generate`."""
    import torch

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens,
                min_new_tokens=tokens, pad_token_id=0, **given,
            )  # fmt: skip

    return bench.timed(run, 1, warm=0)[0]


def _served(engine: Any, prompts: Any, job: dict[str, Any], names: list[str | None]) -> float:
    """Seconds until all requests are answered."""
    from adapterlab.serve import Request, Sampling

    sampling = Sampling(temperature=0, max_tokens=job["tokens"], ignore_end=True)

    def run() -> None:
        asked = zip(itertools.cycle(prompts.tolist()), names, strict=False)
        requests = [Request(tuple(prompt), name, sampling) for prompt, name in asked]
        for handle in [engine.submit(request) for request in requests]:
            handle.result()

    return bench.timed(run, 1, warm=0)[0]


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    by_case = {
        case: [figures for job, figures in done if job.case == case and job.side != VLLM] for case in (*TARGETS, MIXED)
    }
    summary = {
        case: {
            name: bench.spread([figures[name] for figures in found])
            for name, value in found[0].items()
            if isinstance(value, float)
        }
        for case, found in by_case.items()
    }
    settings = done[0][0].settings
    half = settings["registered"] // 2
    for case in TARGETS:
        found = by_case[case]
        halves = [f["registering, second half, s"] / f["registering, first half, s"] for f in found]
        summary[case]["registering, second half / first half"] = bench.spread(halves)

    with_vllm = any(job.side == VLLM for job, _ in done)
    if with_vllm:
        for case in TARGETS:
            for side in (*SIDES, MANY):
                rate = f"{side}, tokens/s"
                ratio = bench.ratios(done, (case, "adapterlab"), (case, VLLM), lambda run, r=rate: run[r])
                summary[case][f"{side} / vllm"] = ratio

    def rows(named: Mapping[str, str], more: str = "", digits: int = 2) -> list[list[str]]:
        return [
            [text, *(bench.shown(summary[case][name + more], digits) for case in TARGETS)]
            for name, text in named.items()
        ]

    sides = {**SIDES, MANY: f"likewise, drawn from {settings['registered']:,} that are registered"}
    loras = [
        *rows(sides),
        ["tokens/s / those of `generate` on the base", "", ""],
        *rows({**sides, **PEFT}, " / generate"),
        *([["tokens/s / those of vLLM for the same", "", ""], *rows(sides, " / vllm")] if with_vllm else []),
        *rows({BARE: "the base, no adapters, tokens/s", "generate": "`generate`, tokens/s"}, ", tokens/s", 0),
        *rows({"registering, first half, s": f"registering adapters 1 to {half:,}, s"}),
        *rows({"registering, second half, s": f"adapters {half + 1:,} to {settings['registered']:,}, s"}),
        *rows({"registering, second half / first half": "second half / first half"}),
    ]
    mixed = summary[MIXED]
    kinds = [
        [text, bench.shown(mixed[id]), bench.shown(mixed[f"{MIXED} / {id}"])] for id, text in KINDS.items()
    ]  # fmt: skip
    kinds.append(["all of them in one batch", bench.shown(mixed[MIXED]), ""])
    table = bench.markdown(["tokens/s / those of the base, no adapters", *CASES.values()], loras)
    header = [f"{settings['requests']} requests at once, with {len(KINDS)} adapters"]
    header += ["tokens/s / those of the base, no adapters", "all in one batch / this kind alone"]
    return summary, f"{table}\n\n{bench.markdown(header, kinds)}"


if __name__ == "__main__":
    bench.main(__file__, plan=plan, work=work, report=report, options=options)

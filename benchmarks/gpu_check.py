"""What a GPU says in ten minutes: tests, steps against PEFT and TRL, the planner's error, decoding, products.

    python benchmarks/gpu_check.py            # on a machine with a CUDA device
    python benchmarks/gpu_check.py --quick    # a tiny model on the CPU: shows that everything works

The model has the shape of one of 1.5 billion parameters and random weights, so nothing is fetched. Each part runs in
processes of its own, with a limit of seconds each, and is written down when it ends: what fails or is stopped leaves
the others as they are. All limits together are ten minutes.

Steps: both sides train with batches of random tokens of one length that all bear a label, on a base in bfloat16, with
the same rank on the same modules, and neither recomputes activations. Theirs is `SFTTrainer` as it is, under its
bfloat16 autocast. `full` is not the same on both: ours keeps float32 masters of the weights, theirs rounds each update
to bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _bench as bench
import decoding
from _bench import Figures, Job

MODEL = {"vocabulary": 151936, "hidden": 1536, "inner": 8960, "layers": 28, "heads": 12}
LENGTHS, QUICK_LENGTHS = [[8, 512], [2, 2048]], [[2, 8], [1, 16]]
OURS, THEIRS = "adapterlab", "TRL"
MANY, RANK = 32, 16  # adapters of a batch, and their rank
METHODS = {"lora": {"r": RANK}, "dora": {"r": RANK}, "qlora": {"r": RANK, "dropout": 0.0}, "full": {}}
LIMITS = {"tests": 95, "step": 40, "plan": 75, "decoding": 55, "grouped": 20, "runs": 25}  # seconds of one run
WARM = 2  # steps before those that are timed
Product = Callable[[Any, Any, Any], Any]  # of x `[tokens, width]`, A `[adapters, r, width]`, B `[adapters, width, r]`


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(pairs=1)
    parser.add_argument("--steps", type=int, default=6, help=f"of each length, after {WARM} to warm up")


def plan(args: argparse.Namespace) -> list[Job]:
    if not args.quick and not _card():
        raise SystemExit(
            "This machine has no CUDA device, so nothing was measured; --quick shows that the script works."
        )
    common = {
        "model": bench.TINY if args.quick else MODEL, "lengths": QUICK_LENGTHS if args.quick else LENGTHS,
        "device": "cpu" if args.quick else "cuda", "steps": args.steps,
    }  # fmt: skip

    def job(part: str, pair: int = 0, named: str = OURS, **settings: Any) -> Job:
        limit = LIMITS[part] * (10 if args.quick else 1)  # a CPU is slower, and its time costs nothing
        return Job(part, named, pair, {**common, "part": part, "limit": limit, **settings})

    jobs = [job("tests")]
    for pair, id in itertools.product(range(args.pairs), METHODS):
        jobs += [job("step", pair, f"{id}, {side}", method=id, side=side) for side in (OURS, THEIRS)]
    rows, prompt = (2, 8) if args.quick else (MANY, 128)
    jobs.append(job("plan"))
    jobs += [job("decoding", pair, rows=rows, prompt=prompt, rank=RANK) for pair in range(args.pairs)]
    return [*jobs, *(job(part, pair) for part in ("grouped", "runs") for pair in range(args.pairs))]


def _card() -> bool:
    import torch

    return torch.cuda.is_available()


def work(job: dict[str, Any]) -> Figures:
    return PARTS[job["part"]](job)


# ---------------------------------------------------------------------- tests


def tests(job: dict[str, Any]) -> Figures:
    """Run the tests that need a GPU, and say which failed."""
    import pytest

    class Notes:
        def __init__(self) -> None:
            self.seen: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.seen[report.outcome].append(report.nodeid.rpartition("/")[2])

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                self.seen["failed"].append(
                    f"{report.nodeid.rpartition('/')[2]}: {str(report.longrepr).splitlines()[-1]}"
                )

    os.environ["ADAPTERLAB_TEST_DEVICE"] = job["device"]
    notes = Notes()
    where = ["--rootdir", str(bench.ROOT), "-c", str(bench.ROOT / "pyproject.toml"), str(bench.ROOT / "tests" / "gpu")]
    status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *where], [notes])
    if status != pytest.ExitCode.OK and not notes.seen["failed"]:
        raise RuntimeError(f"pytest ended with {status!r}")
    return {**{key: len(names) for key, names in notes.seen.items()}, "failures": notes.seen["failed"]}


# ---------------------------------------------------------------------- steps


def step(job: dict[str, Any]) -> Figures:
    """Train a few steps of each length on one side: median time of a step, and peaks of memory."""
    train = _ours if job["side"] == OURS else _theirs
    with _model(job) as model:
        return {f"{rows}x{length}": train(job, model, rows, length) for rows, length in job["lengths"]}


@contextlib.contextmanager
def _model(job: dict[str, Any]) -> Iterator[Any]:
    """The model, packed into four bits where the method wants that, which transformers does while it loads."""
    model = bench.load(job["model"], device=job["device"])
    if job["method"] != "qlora":
        yield model
        return
    import torch
    from transformers import AutoModelForCausalLM

    from adapterlab.models.loading import _quantization

    packing = _quantization("nf4", torch.bfloat16, torch.device(job["device"]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        yield AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **packing)


def _rows(model: Any, count: int, length: int) -> list[dict[str, list[int]]]:
    ids = bench.batch(model, count, length)["input_ids"].tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def _ours(job: dict[str, Any], model: Any, rows: int, length: int) -> Figures:
    import adapterlab as al
    from adapterlab.data import Collator
    from adapterlab.registry import method
    from adapterlab.train.config import Training
    from adapterlab.train.loop import Listener, Loop

    ends = []

    class Clock(Listener):
        def started(self, loop: Any) -> None:
            ends.append(bench.moment())

        def stepped(self, loop: Any, record: Any) -> None:
            ends.append(bench.moment())

    steps = WARM + job["steps"]
    training = Training(steps=steps, batch_size=rows, lr=1e-4, warmup=0, packing=False)
    memory = Peak(model)
    host = al.attach(model, method(job["method"])(**METHODS[job["method"]]))
    data = _rows(model, rows * steps, length)
    Loop(host, "default", data, training, collate=Collator(0), listeners=[Clock()]).run()
    trainable = sum(p.numel() for p in host.parameters("default") if p.requires_grad)
    found = memory.figures()
    host.detach("default")
    return {**_timed(ends), **found, "trainable": trainable}


def _theirs(job: dict[str, Any], model: Any, rows: int, length: int) -> Figures:
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from vs_trl import _words

    disable_progress_bars()
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(bench.moment())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(bench.moment())

    steps, memory = WARM + job["steps"], Peak(model)
    settings = METHODS[job["method"]]
    lora = LoraConfig(
        r=settings.get("r", 1), lora_alpha=2 * settings.get("r", 1), target_modules="all-linear",
        task_type="CAUSAL_LM", use_dora=job["method"] == "dora",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=rows, learning_rate=1e-4, warmup_steps=0,
            logging_steps=1, save_strategy="no", report_to="none", gradient_checkpointing=False, max_length=length,
            packing=False, use_cpu=job["device"] == "cpu", bf16=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(_rows(model, rows * steps, length)),
            processing_class=_words(model.config.vocab_size), callbacks=[Clock()],
            peft_config=None if job["method"] == "full" else lora,
        )  # fmt: skip
        trainer.train()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    found = memory.figures()
    if job["method"] != "full":
        trainer.model.unload()
    return {**_timed(ends), **found, "trainable": trainable}


def _timed(ends: list[float]) -> Figures:
    seconds = [later - sooner for sooner, later in itertools.pairwise(ends)]
    return {"seconds": seconds, "step": bench.statistics.median(seconds[WARM:])}


class Peak:
    """Peaks of memory from now on, the model included: of the allocator and of the device, or of the process."""

    def __init__(self, model: Any):
        import torch

        gc.collect()
        self.cuda = torch.cuda if model.device.type == "cuda" else None
        self.process = bench.Memory(model) if self.cuda is None else None
        if self.cuda is not None:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()

    def figures(self) -> Figures:
        if self.cuda is None:
            return {"live": None, "process": self.process.figures()["process_peak"]}
        free, total = self.cuda.mem_get_info()
        return {"live": self.cuda.max_memory_allocated(), "process": total - free}


# ---------------------------------------------------------------------- plan


def planned(job: dict[str, Any]) -> Figures:
    """What the planner says of the same steps, from the shape alone."""
    from adapterlab.plan.planning import plan as predicted

    config = bench.load({**job["model"]}, device="meta").config
    found: Figures = {}
    for id, (rows, length) in itertools.product(METHODS, job["lengths"]):
        method = {"name": id, **METHODS[id]}
        one = predicted(config, method, batch=rows, length=length, device=job["device"])
        found.setdefault(id, {})[f"{rows}x{length}"] = {"live": one.peak, "process": one.process}
    return found


# ---------------------------------------------------------------------- grouped products


def grouped(job: dict[str, Any]) -> Figures:
    """Low-rank products of many adapters in one batch: `grouped_mm`, a mask of blocks, and one product for each row."""
    import torch

    width, device = job["model"]["hidden"], job["device"]
    found: Figures = {}
    for tokens in (1, 4) if device == "cpu" else (1, 64, 512):
        draw = torch.Generator().manual_seed(0)
        make = functools.partial(torch.randn, generator=draw)
        made = make(MANY * tokens, width), make(MANY, RANK, width) / width**0.5, make(MANY, width, RANK)
        tensors = [t.to(device, torch.bfloat16).requires_grad_() for t in made]
        wanted = _each(tokens, device)(*(t.detach().float() for t in tensors))
        found[str(tokens)] = {}
        for name, form in FORMS.items():
            try:
                found[str(tokens)][name] = _both(
                    functools.partial(form(tokens, device), *tensors), wanted, job["steps"]
                )
            except (AttributeError, NotImplementedError, RuntimeError) as error:  # not on this device or release
                found[str(tokens)][name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return found


def _each(tokens: int, device: str) -> Product:
    import torch

    return lambda x, a, b: torch.bmm(torch.bmm(x.view(MANY, tokens, -1), a.mT), b.mT).flatten(0, 1)


def _grouped(tokens: int, device: str) -> Product:
    import torch
    from torch.nn import functional as F

    ends = torch.arange(tokens, MANY * tokens + 1, tokens, device=device, dtype=torch.int32)
    return lambda x, a, b: F.grouped_mm(F.grouped_mm(x, a.mT, offs=ends), b.mT, offs=ends)


def _masked(tokens: int, device: str) -> Product:
    import torch

    mask = torch.eye(MANY, device=device, dtype=torch.bfloat16).repeat_interleave(tokens, 0)
    mask = mask.repeat_interleave(RANK, 1)
    return lambda x, a, b: (x @ a.flatten(0, 1).T * mask.to(x.dtype)) @ b.movedim(0, 1).flatten(1).T


FORMS: dict[str, Callable[[int, str], Product]] = {"each": _each, "masked": _masked, "grouped": _grouped}


def _both(call: Callable[[], Any], wanted: Any, times: int) -> Figures:
    """Seconds without and with gradients, and the distance from the product in float32, relative to its size."""
    import torch

    with torch.no_grad():
        error = float((call().float() - wanted).norm() / wanted.norm())
        alone = bench.timed(call, 10 * times, warm=3)
    upper = torch.ones_like(wanted, dtype=torch.bfloat16)
    pair = bench.timed(lambda: call().backward(upper), 10 * times, warm=3)
    return {"error": error, "forward": bench.statistics.median(alone), "step": bench.statistics.median(pair)}


# ---------------------------------------------------------------------- products of runs


def runs(job: dict[str, Any]) -> Figures:
    """Updates of a server's step, each adapter's tokens behind each other: Triton's kernels, and stacks in torch."""
    import torch

    from adapterlab.ops.low_rank import low_rank_by_row
    from adapterlab.ops.segmented import Run, Runs, Update, by_column, formula

    width, device = job["model"]["hidden"], job["device"]
    found: Figures = {}
    for tokens in (1, 4) if device == "cpu" else (1, 64, 512):
        draw = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=draw) for shape in ((RANK, width), (width, RANK)) for _ in range(MANY)]
        factors = [t.to(device, torch.bfloat16) for t in made]
        updates = [Update(a, by_column(b)) for a, b in zip(factors[:MANY], factors[MANY:], strict=True)]
        x = torch.randn(MANY * tokens, width, generator=draw).to(device, torch.bfloat16)
        parts = Runs([Run(i * tokens, (i + 1) * tokens, i) for i in range(MANY)], len(x))
        a, b = torch.stack(factors[:MANY]), torch.stack([t.T for t in factors[MANY:]])
        wanted = torch.zeros(x.shape, device=device)
        formula(x, wanted, updates, parts)

        def stacked(x: Any, y: Any, a: Any = a, b: Any = b, tokens: int = tokens) -> None:
            y += low_rank_by_row(x.view(MANY, tokens, -1), a, b).flatten(0, 1)

        found[str(tokens)] = {}
        for name, make in {"stacks": lambda s=stacked: s, "Triton": lambda u=updates, p=parts: _triton(u, p)}.items():
            try:
                call, y = make(), torch.zeros_like(x)
                call(x, y)
                error = float((y.float() - wanted).norm() / wanted.norm())
                seconds = bench.timed(functools.partial(call, x, y), 10 * job["steps"], warm=3)
                found[str(tokens)][name] = {"error": error, "forward": bench.statistics.median(seconds)}
            except Exception as error:  # not on this device
                found[str(tokens)][name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return found


def _triton(updates: Any, parts: Any) -> Any:
    from adapterlab.ops.by_triton import ByTriton
    from adapterlab.ops.segmented import product

    return product(ByTriton(), updates, parts)


PARTS: dict[str, Callable[[dict[str, Any]], Figures]] = {
    "tests": tests, "step": step, "plan": planned, "decoding": decoding.work, "grouped": grouped, "runs": runs,
}  # fmt: skip


# ---------------------------------------------------------------------- report


def report(done: list[tuple[Job, Figures]], file: Path) -> tuple[dict[str, Any], str]:
    failed = {job.key: figures["error"] for job, figures in done if "error" in figures}
    of = {
        part: [(job, figures) for job, figures in done if job.case == part and job.key not in failed] for part in PARTS
    }
    summary: dict[str, Any] = {"failed": failed}
    sections = []
    for part, show in SHOWN.items():
        if of[part]:
            summary[part], table = show(of)
            sections.append(table)
    notes = [f"{key}: {error}" for key, error in failed.items()]
    return summary, "\n\n".join([*sections, *notes])


def _shown_tests(of: dict[str, Any]) -> tuple[Any, str]:
    found = of["tests"][0][1]
    text = ", ".join(f"{found[key]} {key}" for key in ("passed", "failed", "skipped"))
    return found, "\n".join([f"Tests: {text}.", *(f"- {name}" for name in found["failures"])])


def _shown_steps(of: dict[str, Any]) -> tuple[Any, str]:
    planned = of["plan"][0][1] if of["plan"] else {}
    lengths = [f"{rows}x{length}" for rows, length in of["step"][0][0].settings["lengths"]]
    summary: dict[str, Any] = {}
    table = []
    for id, shape in itertools.product(METHODS, lengths):
        at = [(job, figures[shape]) for job, figures in of["step"] if job.settings["method"] == id]
        pairs = [("step", f"{id}, {OURS}"), ("step", f"{id}, {THEIRS}")]
        ours = [figures for job, figures in at if job.settings["side"] == OURS]
        said = planned.get(id, {}).get(shape) if ours else None
        found = {
            "seconds": bench.spread([figures["step"] for figures in ours]) if ours else None,
            "time / TRL": bench.ratios(at, *pairs, lambda run: run["step"]),
            "memory / TRL": bench.ratios(at, *pairs, _memory),
            "error of live tensors": _error(said, ours, "live"),
            "error of all memory": _error(said, ours, "process"),
        }
        summary.setdefault(id, {})[shape] = found
        memory = f"{_memory(ours[0]) / 2**30:.2f}" if ours else "–"
        errors = [_percent(found[key]) for key in ("error of live tensors", "error of all memory")]
        ratios = [bench.shown(found[key]) for key in ("time / TRL", "memory / TRL")]
        table.append([f"`{id}`", shape.replace("x", " × "), bench.shown(found["seconds"], 3), memory, *ratios, *errors])
    header = [
        "method", "rows × tokens", "seconds a step", "memory, GiB", "time / TRL", "memory / TRL",
        "planner, live tensors", "planner, all memory",
    ]  # fmt: skip
    return summary, bench.markdown(header, table)


def _memory(run: Figures) -> float:
    return run["live"] or run["process"]


def _error(said: Figures | None, ours: list[Figures], what: str) -> float | None:
    """By how much the planner is off, as a share of what was measured."""
    measured = [figures[what] for figures in ours if figures[what]]
    return said[what] / bench.statistics.median(measured) - 1 if said and measured else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _shown_decoding(of: dict[str, Any]) -> tuple[Any, str]:
    sides = {"base": "the base itself, again", **decoding.SIDES}
    found = {side: bench.spread([figures[side] for _, figures in of["decoding"]]) for side in sides}
    rows = of["decoding"][0][0].settings["rows"]
    table = [[text, bench.shown(found[side])] for side, text in sides.items()]
    return found, bench.markdown([f"{rows} rows", "decoding speed / the base's"], table)


def _shown_grouped(of: dict[str, Any]) -> tuple[Any, str]:
    summary: dict[str, Any] = {}
    table = []
    for tokens, name in itertools.product(of["grouped"][0][1], ("grouped", "each")):
        runs = [figures[tokens] for _, figures in of["grouped"]]
        if any("step" not in run[form] for run in runs for form in (name, "masked")):
            table.append([tokens, name, str(runs[0][name]["error"]), "–"])
            continue
        found = {
            key: bench.spread([run[name][key] / run["masked"][key] for run in runs]) for key in ("forward", "step")
        }
        summary.setdefault(tokens, {})[name] = found
        table.append([tokens, name, bench.shown(found["forward"]), bench.shown(found["step"])])
    header = [f"tokens of each of {MANY} adapters", "form", "time / mask of blocks", "with gradients"]
    return summary, bench.markdown(header, table)


def _shown_runs(of: dict[str, Any]) -> tuple[Any, str]:
    summary: dict[str, Any] = {}
    table = []
    for tokens in of["runs"][0][1]:
        found = [figures[tokens] for _, figures in of["runs"]]
        if any("forward" not in run[form] for run in found for form in run):
            table.append([tokens, next(str(f["error"]) for f in found[0].values() if "forward" not in f)])
            continue
        summary[tokens] = bench.spread([run["Triton"]["forward"] / run["stacks"]["forward"] for run in found])
        table.append([tokens, bench.shown(summary[tokens])])
    return summary, bench.markdown([f"tokens of each of {MANY} adapters", "Triton's kernels, time / stacks"], table)


SHOWN: dict[str, Callable[[dict[str, Any]], tuple[Any, str]]] = {
    "tests": _shown_tests, "step": _shown_steps, "decoding": _shown_decoding, "grouped": _shown_grouped,
    "runs": _shown_runs,
}  # fmt: skip


if __name__ == "__main__":
    bench.main(
        __file__, plan=plan, work=work, report=report, options=options, peers=False, tolerant=True, gpu=True
    )  # fmt: skip

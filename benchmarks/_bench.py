"""What the benchmarks share: runs in processes of their own, kept as they finish; paired ratios; tables.

A benchmark hands `main` three functions: `plan` lists the runs, `work` does one of them in a fresh process and returns
plain figures, `report` makes a summary and a table of all. What was measured stays in `results/NAME.json`: an
interrupted benchmark goes on with the runs that are missing, and a second call only writes the table again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
RUN = 1000  # steps that a run has for methods with a schedule; those that are timed are its first
PEERS = {"peft": "0.21.2", "trl": "1.16"}
MODEL = "smollm2-135m"
TINY = {"vocabulary": 512, "hidden": 64, "layers": 2}
SEED = 0
_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "adapterlab")
_INTERPRETERS = ("--python", "--vllm")
_KEPT = ("code", "versions", "cpu", "gpu")  # conditions that each run has with it
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run: `settings` are all that `work` receives; case, side and pair say where its figures belong.

    A setting `limit` is the number of seconds after which the run is stopped and counts as failed.
    """

    case: str
    side: str
    pair: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        return f"{self.case} | {self.side} | {self.pair}"


@dataclass
class Runs:
    """Finished runs in a file. Those of another job, another code or other package versions do not count."""

    file: Path
    conditions: Mapping[str, Any]
    keep: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.exists():
            self.found = json.loads(self.file.read_text(encoding="utf-8"))["runs"]

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """List the jobs without a run that counts."""
        return [job for job in jobs if not self._counts(job)]

    def _counts(self, job: Job) -> bool:
        run = self.found.get(job.key)
        if run is None or run["settings"] != _plain(job.settings):
            return False
        return self.keep or all(run.get(key) == self.conditions.get(key) for key in _KEPT)

    def figures(self, jobs: Iterable[Job]) -> list[tuple[Job, Figures]]:
        """The figures of all jobs that are done; a failed run has one figure, `error`."""
        return [(job, self.found[job.key]["figures"]) for job in jobs if job.key in self.found]

    def add(self, job: Job, figures: Figures, load: Sequence[float]) -> None:
        made = {"settings": _plain(job.settings), "date": now(), "load": list(load)}
        self.found[job.key] = {**made, **{k: self.conditions[k] for k in _KEPT if k in self.conditions}}
        self.found[job.key]["figures"] = figures

    def save(self, jobs: Sequence[Job], summary: Mapping[str, Any]) -> None:
        """Write the file; runs that belong to no job any more are left out once all jobs are done."""
        done = not self.missing(jobs)
        wanted = {job.key for job in jobs}
        runs = {key: run for key, run in self.found.items() if key in wanted or not done}
        write(self.file, json.dumps({"conditions": self.conditions, "summary": summary, "runs": runs}, indent=1) + "\n")


def main(
    script: str,
    *,
    plan: Callable[[argparse.Namespace], list[Job]],
    work: Callable[[dict[str, Any]], Figures],
    report: Callable[[list[tuple[Job, Figures]], Path], tuple[dict[str, Any], str]],
    options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
    check: Callable[[list[tuple[Job, Figures]]], None] = lambda done: None,
    peers: bool = True,
    tolerant: bool = False,
    suffix: Callable[[argparse.Namespace], str] = lambda args: "",
    gpu: bool = False,
) -> None:
    """Run a benchmark, or one run of it.

    Args:
        script: file of the benchmark; its docstring is shown by --help.
        plan: the jobs, in the order of their runs.
        work: does the job with these settings; called in a process of its own.
        report: (figures of all jobs, file of the results) -> (summary, Markdown table).
        options: adds options of its own.
        check: raises SystemExit when figures contradict each other; called after each run.
        peers: whether PEFT and TRL are needed.
        tolerant: a failing run is noted and the others go on.
        suffix: of the results' name, for options that make another table.
        gpu: runs see the GPU, except with --quick; else there is none for them.
    """
    if sys.argv[1:2] == ["--worker"]:
        print("\n" + json.dumps(work(json.loads(sys.argv[2]))))
        return
    args = _arguments(sys.modules["__main__"].__doc__ or "", options)
    args.keep |= args.quick
    args.gpu = gpu and not args.quick
    args.python = _python(args.python) if peers else sys.executable
    name = Path(script).stem + suffix(args)
    file = (HERE / ".cache" / "quick" if args.quick else RESULTS) / f"{name}.json"
    if args.fresh:
        file.unlink(missing_ok=True)
    jobs = plan(args)  # which may add to the environment of its runs
    call = caller(script, args)
    runs = Runs(file, conditions(args, script), keep=args.keep)
    try:
        _measure(script, runs, jobs, call, check, tolerant)
    finally:
        if done := runs.figures(jobs):
            summary, table = report(done, file) if not runs.missing(jobs) else ({}, "")
            runs.save(jobs, summary)
    write(file.with_suffix(".md"), table + "\n")
    print(f"{table}\n\n{file}")


def _measure(
    script: str,
    runs: Runs,
    jobs: list[Job],
    call: Callable[[Mapping[str, Any]], Figures],
    check: Callable[[list[tuple[Job, Figures]]], None],
    tolerant: bool,
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    left = runs.missing(jobs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(jobs), completed=len(jobs) - len(left))
        for job in left:
            progress.update(bar, description=job.key)
            if not runs.keep and code(script) != runs.conditions["code"]:
                raise SystemExit(
                    "The sources have changed since this benchmark began, so its runs cannot be compared. Start it "
                    "again; --keep counts runs made with other code as well."
                )
            load = os.getloadavg()
            try:
                figures = call(job.settings)
            except RuntimeError as error:
                if not tolerant:
                    raise SystemExit(f"{job.key}: {error}") from None
                print(f"{job.key}: {error}", file=sys.stderr)
                figures = {"error": str(error).strip().splitlines()[-1]}
            runs.add(job, figures, load)
            runs.save(jobs, {})
            check(runs.figures(j for j in jobs if j not in runs.missing(jobs)))
            progress.advance(bar)


def _arguments(doc: str, options: Callable[[argparse.ArgumentParser], Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side, in turns (default 5)")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: shows that everything works")
    parser.add_argument("--python", help="interpreter that has PEFT and TRL; default: this one, or one made here")
    parser.add_argument("--threads", type=int, help="threads of each run; default: torch's choice")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are done")
    parser.add_argument("--keep", action="store_true", help="count runs made with other code or versions too")
    options(parser)
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs={args.pairs} leaves nothing to measure; give 1 or more")
    return args


def caller(script: str, args: argparse.Namespace) -> Callable[[Mapping[str, Any]], Figures]:
    """Return a function that does one job in a process of its own; it raises RuntimeError when that fails."""
    # What is measured are the sources whose checksum stands beside the figures, whatever is installed.
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not args.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the comparison is of CPUs
    if args.threads:
        environment |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}

    def call(settings: Mapping[str, Any]) -> Figures:
        command = [args.python, script, "--worker", json.dumps(_plain(settings))]
        limit = settings.get("limit")
        try:
            made = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE, timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"stopped after its limit of {limit} seconds") from None
        if made.returncode:
            raise RuntimeError(f"exit code {made.returncode}\n{made.stderr.strip()[-1500:]}")
        return json.loads(made.stdout.strip().splitlines()[-1])

    return call


# ---------------------------------------------------------------------- conditions


def conditions(args: argparse.Namespace, script: str) -> dict[str, Any]:
    """What the figures depend on besides the code that is compared."""
    asked = subprocess.run([args.python, __file__], capture_output=True, text=True, check=True)
    return {
        "date": now(),
        "cpu": {**_cpu(), "cores": os.cpu_count()},
        **({"gpu": _gpu()} if args.gpu else {}),
        "system": platform.platform(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": args.threads or "torch's choice",
        "versions": json.loads(asked.stdout),
        "git": _git(),
        "code": code(script),
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *_options()]),
    }


def circumstances() -> dict[str, Any]:
    """What a result came from where neither threads nor load matter: date, system, versions, revision."""
    return {"date": now(), "system": platform.platform(), "versions": versions(), "git": _git()}


def _options() -> list[str]:
    """What the command line asked for, without interpreters, whose paths say nothing elsewhere."""
    given = sys.argv[1:]
    for option in _INTERPRETERS:
        if option in given:
            at = given.index(option)
            del given[at : at + 2]
    return given


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu() -> dict[str, Any]:
    from adapterlab.foreign.processor import facts

    flags = facts().get("flags", "").split()
    return {"model": facts().get("model name", platform.processor()), "flags": [f for f in _FLAGS if f in flags]}


def _gpu() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    return {"name": found.name, "memory_bytes": found.total_memory, "cuda": torch.version.cuda}


def _git() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return made.stdout.strip() or None


def code(script: str) -> str:
    """Checksum of the library's sources and the benchmark's own."""
    files = [
        *sorted((ROOT / "src").rglob("*.py")),
        *sorted((ROOT / "src").rglob("*.c")),
        Path(__file__),
        Path(script).resolve(),
    ]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------- peers


def _python(given: str | None) -> str:
    """Find an interpreter with the peers in the wanted versions; without one, make it."""
    own = HERE / ".peers" / "bin" / "python"
    for python in [given] if given else [sys.executable, str(own)]:
        if not (lacking := _lacking(python)):
            return python
        if given:
            raise SystemExit(f"{given} lacks {lacking}. Install that there, or leave --python out.")
    _install(own)
    if lacking := _lacking(str(own)):
        raise SystemExit(f"{own.parents[1]} lacks {lacking} after the installation. Remove it and retry.")
    return str(own)


def _install(python: Path) -> None:
    """Make an environment with this package, the peers, and the versions of what both build on that are used here."""
    folder = python.parents[1]
    print(f"Installing PEFT {PEERS['peft']} and TRL {PEERS['trl']} into {folder} ...", flush=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["sh", "scripts/install.sh", str(folder), "reports"], cwd=ROOT, env=environment, check=True)
    pins = [f"{name}=={number}.*" for name, number in PEERS.items()]
    pins += [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers", "accelerate")]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)


def _lacking(python: str) -> str:
    try:
        found = json.loads(subprocess.run([python, __file__], capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return f"{python} does not run"
    right = {name: found.get(name, "").startswith(number) for name, number in PEERS.items()}
    right["adapterlab"] = "adapterlab" in found
    return ", ".join(f"{name} {PEERS.get(name, '')}".strip() for name, fits in right.items() if not fits)


# ---------------------------------------------------------------------- inside a run


class Memory:
    """Resident memory of this process beyond what it was when the model had been loaded."""

    def __init__(self, model: Any):
        for parameter in model.parameters():
            parameter.data.sum()  # weights that are mapped from a file count once they are touched
        gc.collect()
        self.before = peak()
        self.loaded = _resident()
        self.exact = self.reset()

    def reset(self) -> bool:
        """Let the peak begin anew; where the system cannot, it is the peak since the process began."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
        return True

    def above(self) -> int:
        """Peak since the reset above the loaded model, in bytes."""
        return max(0, peak() - self.loaded)

    def figures(self) -> Figures:
        return {
            "loaded": self.loaded,
            "above": self.above(),
            "process_peak": max(self.before, peak()),
            "peak_began_after_loading": self.exact,
        }


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Largest resident size of this process since it began, or since `Memory` began to look."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(most if sys.platform == "darwin" else most * 1024, _resident())


def load(
    model: str | Mapping[str, int],
    seed: int = SEED,
    quantize: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
) -> Any:
    """Load a model of the catalogue, or make a random Llama of some sizes; packed ones from the catalogue only."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if isinstance(model, str):
        from adapterlab.models import load_model, resolve

        if quantize:
            return load_model(model, precision="bf16", quantize=quantize)[0]
        return AutoModelForCausalLM.from_pretrained(str(resolve(model)), dtype=getattr(torch, dtype))
    hidden = model["hidden"]
    config = LlamaConfig(
        vocab_size=model["vocabulary"], hidden_size=hidden, intermediate_size=model.get("inner", 2 * hidden),
        tie_word_embeddings=True, num_hidden_layers=model["layers"], num_attention_heads=model.get("heads", 4),
        num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype))


def chosen_model(args: argparse.Namespace) -> str | dict[str, int]:
    """The model of a benchmark, fetched if it is not there."""
    if args.quick:
        return TINY
    from adapterlab.models import pull

    pull(MODEL)
    return MODEL


def batch(model: Any, rows: int, length: int) -> dict[str, Any]:
    """Random tokens that all bear a label, where the model is."""
    import torch

    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=draw).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def driver(host: Any, name: str = "default", lr: float = 1e-4) -> Callable[[Mapping[str, Any]], float]:
    """Return a function that trains one step on a batch, with every event of the method, and returns the loss."""
    from adapterlab.engine.attention import fast_attention
    from adapterlab.engine.float_products import fast_products
    from adapterlab.engine.loss import Loss
    from adapterlab.optim import adamw

    method = host.methods[name]
    loss = Loss(host.model)
    method.begin(host, name, RUN)
    optimizer = method.optimizer(host, name, lambda parameters: adamw(parameters, lr=lr))
    state = {"step": 0}

    def step(rows: Mapping[str, Any]) -> float:
        def value() -> Any:
            with host.state.collect() as extra:
                total = loss(rows) + sum(extra)
                penalty = method.penalty(host, name)
                return total if penalty is None else total + penalty

        method.before_step(host, name, state["step"], optimizer)
        with fast_attention(host.model), fast_products(host.model):
            found = method.gradient(host, name, value, lambda total: total.backward())
        method.after_backward(host, name, state["step"])
        optimizer.step()
        method.after_step(host, name, state["step"], optimizer)
        optimizer.zero_grad()
        state["step"] += 1
        return float(found)

    return step


def timed(function: Callable[[], Any], times: int, warm: int = 1) -> list[float]:
    """Seconds of each call after the warm-up."""
    seconds = []
    for index in range(warm + times):
        began = moment()
        function()
        if index >= warm:
            seconds.append(moment() - began)
    return seconds


def moment() -> float:
    """The time in seconds, once a GPU has done what it was asked for."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------------- statistics and tables


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and number of some values."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratios(
    done: Iterable[tuple[Job, Figures]],
    above: tuple[str, str],
    below: tuple[str, str],
    figure: Callable[[Figures], float],
) -> dict[str, Any] | None:
    """Spread of the paired ratios of two (case, side); None when no pair has both."""
    values: dict[tuple[str, str], dict[int, float]] = {above: {}, below: {}}
    for job, figures in done:
        if (job.case, job.side) in values and "error" not in figures:
            values[job.case, job.side][job.pair] = figure(figures)
    common = sorted(values[above].keys() & values[below].keys())
    return spread([values[above][i] / values[below][i] for i in common]) if common else None


def shown(found: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A spread as `0.52 (0.50–0.55)`."""
    if found is None:
        return "–"
    middle = f"{found['median']:.{digits}f}"
    return middle if found["n"] == 1 else f"{middle} ({found['low']:.{digits}f}–{found['high']:.{digits}f})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill(text: str, results: Path = RESULTS) -> str:
    """Put the table of each benchmark between its markers in a text.

    They are `<!-- benchmark NAME: begin (generated) -->` and `<!-- benchmark NAME: end -->`.

    Raises:
        SystemExit: a beginning has no end, or its benchmark has no results.
    """
    for name in re.findall(r"<!-- benchmark (\w+): begin \(generated\) -->", text):
        file = results / f"{name}.md"
        if not file.exists():
            raise SystemExit(f"There is no {file} for the table {name!r}. Make it with: python benchmarks/{name}.py")
        text = between(text, f"benchmark {name}", file.read_text(encoding="utf-8").strip())
    return text


def between(text: str, name: str, content: str) -> str:
    """Put generated content between its markers, where a text has them.

    They are `<!-- NAME: begin (generated) -->` and `<!-- NAME: end -->`.

    Raises:
        SystemExit: the beginning has no end.
    """
    begin, end = f"<!-- {name}: begin (generated) -->", f"<!-- {name}: end -->"
    if begin not in text:
        return text
    before, rest = text.split(begin, 1)
    if end not in rest:
        raise SystemExit(f"The text has {begin!r} and no {end!r}. Write it below the table.")
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def write(file: Path, text: str) -> None:
    """Write a file atomically."""
    from adapterlab.io.atomic import write_text

    write_text(file, text)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    print(json.dumps(versions()))

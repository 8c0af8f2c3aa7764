"""A whole training run: from a configuration to adapters in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import math
import operator
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.text import Text

from adapterlab import yaml_text
from adapterlab.core.usage import collapsed
from adapterlab.data import Report, fingerprint, load_data, render_sample
from adapterlab.data.formats import Columns
from adapterlab.data.report import Encoded
from adapterlab.data.streams import STREAMED
from adapterlab.data.views import Joined
from adapterlab.engine.attention import fast_attention
from adapterlab.errors import ConfigError, OutputError
from adapterlab.evaluate.prepared import beside, final
from adapterlab.evaluate.rows import collator_for, rows_for
from adapterlab.foreign.model import is_encoder_decoder
from adapterlab.foreign.private_transformers import forget_accelerate
from adapterlab.foreign.streams import steady_output
from adapterlab.foreign.versions import versions
from adapterlab.hosts import Host
from adapterlab.io.atomic import write_text
from adapterlab.models import load_model
from adapterlab.terminal import Terminal
from adapterlab.train import folder as files
from adapterlab.train.config import Provenance, TrainConfig, Training, flatten
from adapterlab.train.config import provenance as provenance_of
from adapterlab.train.course import Course, carried_out
from adapterlab.train.display import Display, config_table, proof_table, result_table
from adapterlab.train.fast_paths import fast_paths
from adapterlab.train.folder import RunFolder
from adapterlab.train.loop import Listener, Loop, Record, Row, nothing_to_train
from adapterlab.train.parallel import kind_of, loading, named
from adapterlab.train.ranks import agreed, check_fits, check_joined, check_start, launched_here, obeyed, on_cpu
from adapterlab.train.result import RunResult
from adapterlab.train.signals import Interrupted, Stopping, stop_on_signals
from adapterlab.train.trackers import Trackers, check_trackers
from adapterlab.train.watch import watched

NAME = "default"


@dataclass(frozen=True)
class Base:
    """A loaded model, for one run or several.

    Attributes:
        host: of the model.
        tokenizer: of the model.
    """

    host: Host
    tokenizer: Any


@dataclass(frozen=True)
class Job:
    """Everything a run trains with, loaded.

    Attributes:
        host: with the adapter attached.
        name: of the adapter.
        tokenizer: of the model.
        rows: to train on.
        eval_rows: to evaluate on; may be empty.
        data: what run.json says about the rows.
        report: of encoding the training rows.
        columns: which columns of the rows are used.
        seq2seq: whether the model has an encoder and a decoder.
        processes: how many train it.
    """

    host: Host
    name: str
    tokenizer: Any
    rows: Sequence[Row]
    eval_rows: Sequence[Row]
    data: Mapping[str, Any]
    report: Report
    columns: Columns
    seq2seq: bool = False
    processes: int = 1


def fit(
    config: TrainConfig | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    dry_run: bool = False,
    force: bool = False,
    provenance: Provenance | None = None,
    callbacks: Sequence[Listener] = (),
) -> RunResult | None:
    """Train an adapter as a configuration says, and leave adapters, metrics and a checkpoint in its output folder.

    Args:
        config: a `TrainConfig`, or its fields.
        resume: continue from the checkpoint in the output folder, exactly; start anew if there is none yet.
        overwrite: replace an earlier run in the output folder.
        quiet: print nothing.
        dry_run: load everything, show what would train, run one batch forward and backward, and write nothing.
        force: start even what cannot fit into memory.
        provenance: for every dotted key where its value came from, as `load_config` returns it.
        callbacks: told what happens; see `Listener`.

    Returns:
        The result; None after a dry run.

    Raises:
        ConfigError: a setting is wrong, or does not agree with the checkpoint.
        OutputError: the output folder cannot be used.
        DataError: there are no usable rows.
        TrainingError: training cannot go on, or something does not train.
        RankError: another process of the run ended before its time.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived at one of the processes; a checkpoint was saved.
    """
    config = config if isinstance(config, TrainConfig) else TrainConfig(**config)
    check_trackers(config.training.trackers)
    check_start(config.device)
    accelerator = make_accelerator(config)
    check_joined(accelerator)
    sources = sources_of(config, provenance)
    with contextlib.ExitStack() as held:
        held.enter_context(steady_output())
        watch = held.enter_context(watched(accelerator, config.output))
        options = {"--resume": resume, "--overwrite": overwrite, "--dry-run": dry_run}
        packages = {name: number for name, number in versions().items() if name != "python"}
        agreed(accelerator, {**config.flat(), **packages, **options})
        console = Terminal(quiet=quiet or not accelerator.is_main_process)
        console.print(config_table(config.flat(), sources, config.meanings() if dry_run else None))
        if dry_run:
            _try_out(config, accelerator, console, force=force)
            return None
        if accelerator.is_main_process:
            held.enter_context(files.claimed(config.output, resume=resume, overwrite=overwrite))
        accelerator.wait_for_everyone()
        done, state = left_behind(config, accelerator.num_processes) if resume else (None, None)
        agreed(accelerator, {"what --resume finds": _found(done, state)})
        if done is not None:
            console.print(f"The run in {config.output} is finished already; nothing is left to do.", highlight=False)
            console.print(result_table(done))
            return done
        job, loop = _loaded(config, accelerator, console, force=force, state=state)
        listeners = [*([] if console.quiet else [Display(console)]), *callbacks]
        run = recorded(config, job, loop, sources, state=state, listeners=listeners, explained=watch.explained)
        result = carried_out(run, operator.methodcaller("step"))
        console.print(result_table(result))
        return result


def sources_of(config: TrainConfig, provenance: Provenance | None) -> Provenance:
    """Say where the values of a configuration came from: as given, or from Python."""
    return dict(provenance or provenance_of(config, {"Python": config.model_dump(exclude_unset=True)}))


def left_behind(config: TrainConfig, processes: int = 1) -> tuple[RunResult | None, dict[str, Any] | None]:
    """Return what an earlier process left of a run: its result, or the state of its checkpoint, or neither.

    Raises:
        ConfigError: the checkpoint is one of another configuration.
        FormatError: it is damaged.
    """
    if done := _finished(config):
        return done, None
    checkpoint = config.output / files.CHECKPOINT
    state = files.read_state(checkpoint) if checkpoint.is_file() else None
    if state is not None:  # before anything is loaded; the data follow when they are read
        now = {**state["identity"], **config.flat(), "processes": processes}
        files.check_same(config.output, state["identity"], now)
    return None, state


def _found(done: RunResult | None, state: Mapping[str, Any] | None) -> str:
    """What every rank must find in the output folder."""
    if done is not None:
        return "a finished run"
    return "nothing" if state is None else f"a checkpoint of step {state['status']['step']}"


def _loaded(
    config: TrainConfig, accelerator: Accelerator, console: Terminal, *, force: bool, state: Mapping[str, Any] | None
) -> tuple[Job, Loop]:
    """Load everything and show what will train."""
    with _announced(config, accelerator, console, force=force):
        job = load(config, accelerator, state)
        summary = job.host.summary(job.name)
        # The files of a stream may be copies of each machine; what they say is in the fingerprint.
        data = {f"data {name}": fact for name, fact in job.data.items() if name != "files"}
        agreed(accelerator, {**data, "trainable scalars": summary.trainable, "scalars": summary.total})
        check_fits(accelerator.num_processes, len(job.rows))
        loop = loop_of(config, job, accelerator, prepare=state is None)
    console.print(proof_table(job.host.summary(job.name), _story(job, loop), _sample(job)))
    if not loop.total:
        console.print(f"{nothing_to_train(loop.method.id)} It is written as it is.", highlight=False)
    return job, loop


def _try_out(config: TrainConfig, accelerator: Accelerator, console: Terminal, *, force: bool) -> None:
    """Run one batch forward and backward, and write nothing."""
    job, loop = _loaded(config, accelerator, console, force=force, state=None)
    if not loop.method.trains:
        console.print("Nothing trains by gradients, so there are none to check.", style="green")
        return
    with fast_attention(job.host.model):
        job.host.verify(loop.batch(loop.sampler.step(0)[0][:2]))
    console.print("Every adapted module is reached, and every trainable tensor gets a gradient.", style="green")


@contextlib.contextmanager
def _announced(config: TrainConfig, accelerator: Accelerator, console: Terminal, *, force: bool) -> Iterator[None]:
    """Say what each process of the run needs, and refuse what cannot fit, before any loads the weights.

    The first one plans, as all are alike; the others wait for what it says.
    """
    from adapterlab.plan.before_run import ALONE, Start, announced

    count, refusal = accelerator.num_processes, None
    start = Start(count, launched_here(), named(accelerator, config.parallel)) if count > 1 else ALONE
    tell = functools.partial(console.print, highlight=False)
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            try:
                held.enter_context(announced(config, tell, force=force, make=not console.quiet, start=start))
            except ConfigError as error:
                refusal = error
        obeyed(accelerator, refusal)
        yield


def _open(config: TrainConfig, loop: Loop, run_folder: RunFolder, state: Mapping[str, Any] | None) -> None:
    """Continue from the state of a checkpoint, or make the folder ready for a new run."""
    text = yaml_text.written(config.plain())
    if state is not None:
        run_folder.resume(loop, state)
    if loop.accelerator.is_main_process:
        write_text(config.output / files.CONFIG, text) if state is not None else run_folder.begin(text)
    loop.accelerator.wait_for_everyone()


def recorded(
    config: TrainConfig,
    job: Job,
    loop: Loop,
    sources: Provenance,
    *,
    state: Mapping[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
    stopping: Stopping = stop_on_signals,
    explained: Callable[[BaseException], BaseException] = lambda error: error,
    **facts: Any,
) -> Course[Loop, Record, RunResult]:
    """A run that leaves everything in its folder, as a course; see `Loop.course`.

    Args:
        config: of the run.
        job: what it trains with.
        loop: ready to start.
        sources: of the configuration's values.
        state: of the checkpoint to go on from.
        listeners: to be told first.
        stopping: as for `Loop.course`.
        explained: from what ended this process to what ended the run.
        facts: more that run.json says.
    """
    paths = [dataclasses.asdict(path) for path in fast_paths(loop)]
    known = _facts(config, job, sources) | {"fast_paths": paths} | facts
    run_folder = RunFolder(config.output, _identity(config, job), known, NAME)
    trackers = [Trackers(config.flat())] if config.training.trackers else []
    loop.listeners = [*listeners, *trackers, run_folder]
    _open(config, loop, run_folder, state)
    main = loop.accelerator.is_main_process
    try:
        with beside(job.rows) if loop.accelerator.is_local_main_process else contextlib.nullcontext():
            yield from loop.course(stopping)
    except Interrupted:
        raise
    except BaseException as caught:
        error = explained(caught)
        if main:
            with contextlib.suppress(OutputError):  # on a full disk there is no room for a note either
                run_folder.note("failed", error=f"{type(error).__name__}: {error}")
            run_folder.abandon()
        if error is caught:
            raise
        raise error from caught
    result = _result(config, loop)
    if main:
        run_folder.note("finished", finished=now(), result=dataclasses.asdict(result), data=_data(loop, run_folder))
    return result


def _data(loop: Loop, run_folder: RunFolder) -> Any:
    """What run.json says about the rows, now that more of them were looked at."""
    data = dict(run_folder.facts["data"])
    if data["encoding"]["pending"] and (found := final(loop.rows)) is not None:
        report, columns = found
        columns = Columns(**data["columns"]).joined(columns).joined(Columns(unused=report.unshown))
        data |= {"encoding": dataclasses.asdict(report), "columns": dataclasses.asdict(columns)}
    return data


def load(config: TrainConfig, accelerator: Accelerator, state: Mapping[str, Any] | None = None) -> Job:
    """Load model and data, and attach the method.

    Args:
        config: of the run.
        accelerator: of the run.
        state: of the checkpoint to go on from: the adapter gets the structure that it has there, which data may have
            decided, and hub data sets are read at the commits that the run began with.

    Raises:
        ConfigError: the precision cannot be trained on the device.
        ModelError: the model is unknown or damaged.
        DataError: there are no usable rows.
        AttachError: the method cannot work on this model.
    """
    return attached(config, load_base(config, accelerator), state, processes=accelerator.num_processes)


def load_base(config: TrainConfig, accelerator: Accelerator) -> Base:
    """Load the model of a run; see `load`."""
    with loading(accelerator, config.parallel, config.device) as device:
        model, tokenizer = load_model(
            config.model, precision=config.precision, device=device, quantize=config.quantize,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
    if config.precision == "fp16" and next(model.parameters()).device.type == "cpu":
        raise ConfigError("precision=fp16 trains on a GPU only, and there is none. Set precision to bf16 or fp32.")
    return Base(Host(model), tokenizer)


def attached(
    config: TrainConfig,
    base: Base,
    state: Mapping[str, Any] | None = None,
    name: str = NAME,
    processes: int = 1,
) -> Job:
    """Load the data of a run, and attach its method to a model under a name; see `load`."""
    host, tokenizer = base.host, base.tokenizer
    commits = state["identity"].get(files.COMMITS) if state is not None else None
    splits = load_data(config.data, config.make_method().columns, commits)
    trained = rows_for(host.model, tokenizer, splits.train, config.data)
    if isinstance(trained.rows, STREAMED):
        trained = _of_stream(config.training, processes, trained)
    held = rows_for(host.model, tokenizer, splits.eval, config.data) if splits.eval else None
    unshown = trained.report.unshown + (held.report.unshown if held else ())
    columns = splits.columns.joined(Columns(unused=unshown))
    set_seed(config.training.seed)  # the start values of the adapter depend on the seed alone
    host.attach(config.make_method(), name, saved=state["adapter"] if state is not None else None)
    data = {
        "fingerprint": fingerprint(Joined([splits.train, splits.eval])),
        "format": splits.format,
        "source": splits.source,
        "eval_source": splits.eval_source,
        "commits": dict(splits.commits),
        "files": dict(splits.files),
        "train_rows": len(trained.rows),
        "eval_rows": len(held.rows) if held else 0,
        "columns": dataclasses.asdict(columns),
        "encoding": dataclasses.asdict(trained.report),
    }
    return Job(
        host, name, tokenizer, trained.rows, held.rows if held else [], data, trained.report, columns,
        is_encoder_decoder(host.model), processes,
    )  # fmt: skip


def _of_stream(training: Training, processes: int, encoded: Encoded) -> Encoded:
    """As many rows of a stream as the run needs."""
    count = (training.steps or 0) * training.batch_size * training.accumulation * processes
    encoded.rows.total = count  # type: ignore[attr-defined]
    return dataclasses.replace(encoded, report=dataclasses.replace(encoded.report, pending=count))


def make_accelerator(config: TrainConfig, *, beside: bool = False) -> Accelerator:
    """Make the accelerate object of a run; the one of an earlier run in this process is given up.

    Args:
        config: of the run.
        beside: that of an earlier run stays in use.
    """
    if not beside:
        forget_accelerate()
    trackers = list(config.training.trackers)
    return Accelerator(
        mixed_precision="fp16" if config.precision == "fp16" and torch.cuda.is_available() else "no",
        cpu=on_cpu(config.device),
        log_with=trackers or None,
        project_dir=str(config.output / files.TRACKERS) if trackers else None,
    )


def loop_of(config: TrainConfig, job: Job, accelerator: Accelerator, *, prepare: bool) -> Loop:
    """Make the loop of a run; without `prepare` its method does not look at the data again."""
    return Loop(
        job.host,
        job.name,
        job.rows,
        config.training,
        eval_rows=job.eval_rows,
        collate=collator_for(job.host.model, job.tokenizer),
        accelerator=accelerator,
        parallel=kind_of(accelerator, job.host.model, config.parallel, offload=config.cpu_offload),
        prepare=prepare,
    )


def _sample(job: Job) -> Text:
    shown: Text = render_sample(job.rows[0], job.tokenizer, seq2seq=job.seq2seq)
    return shown


def _story(job: Job, loop: Loop) -> dict[str, str]:
    """The lines of the table that is shown before training."""
    report, rows = job.report, len(job.rows)
    length = f"{report.mean_length:.0f} tokens on average, {report.max_length} at most"
    if report.pending:
        length += f", in the first {report.rows + report.dropped:,}; the others are tokenised meanwhile"
    unknown = f"; {report.unknown:,} tokens are unknown words" if report.unknown else ""
    cut = f"; {report.truncated} cut, {report.dropped} dropped" if report.truncated or report.dropped else ""
    return {
        "rows": f"{rows:,} to train on ({length}{cut}), {len(job.eval_rows):,} to evaluate on",
        "columns": str(job.columns),
        "trained tokens": f"{report.trained_tokens:,} of {report.tokens:,} ({100 * report.trained_share:.1f} %), "
        f"found by {report.mask_by}; {report.template}{unknown}",
        "loss": f"{loop.loss.path}: {loop.loss.why}",
        "steps": _steps(loop),
        "device": f"{loop.device}, {loop.parallel}",
        "fast paths": "\n".join(map(str, fast_paths(loop))),
    }


def _steps(loop: Loop) -> str:
    epochs = loop.sampler.epoch(loop.total)
    return f"{loop.total:,} of {loop.sampler.per_step} rows: {epochs:.2f} epochs" if loop.total else "none"


def _identity(config: TrainConfig, job: Job) -> dict[str, Any]:
    """What a resumed run must have in common with the checkpoint."""
    return {
        **config.flat(), files.COMMITS: job.data["commits"], files.STREAMED: job.data["files"],
        "data fingerprint": job.data["fingerprint"], "processes": job.processes,
    }  # fmt: skip


def _facts(config: TrainConfig, job: Job, sources: Provenance) -> dict[str, Any]:
    """What run.json says from the start."""
    return {
        "status": "running",
        "started": now(),
        "config": config.plain(),
        "provenance": sources,
        "seed": config.training.seed,
        "data": job.data,
        "model": {**dataclasses.asdict(job.host.summary(job.name)), "name": NAME},
        "versions": versions(),
        "platform": platform.platform(),
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """Revision of the working directory, marked when files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _result(config: TrainConfig, loop: Loop) -> RunResult:
    status, summary = loop.status, loop.host.summary(loop.name)
    return RunResult(
        folder=config.output,
        best=config.output / files.BEST if status.best_step is not None else None,
        last=config.output / files.LAST,
        steps=status.step,
        epochs=loop.sampler.epoch(status.step),
        train_loss=status.train_loss,
        eval_loss=status.eval_loss,
        best_loss=status.best_loss,
        best_step=status.best_step,
        stopped_early=status.step < loop.total,
        tokens=status.tokens,
        seconds=status.seconds,
        tokens_per_second=status.tokens / max(1e-9, status.seconds),
        memory=loop.meter.report(),
        proven=len(loop.proof.proven),
        trainable=summary.trainable,
        total=summary.total,
        outcome=loop.method.outcome(loop.host, loop.name)
        | ({"routers": said} if (said := collapsed(loop.load)) else {}),
    )


def _finished(config: TrainConfig) -> RunResult | None:
    """The result of a run with this configuration that has ended already."""
    facts = files.read_run(config.output)
    if facts.get("status") != "finished" or files.differences(dict(flatten(facts["config"])), config.flat()):
        return None
    result = dict(facts["result"])
    paths = {key: Path(result[key]) if result[key] else None for key in ("folder", "best", "last")}
    loss = math.nan if result["train_loss"] is None else result["train_loss"]  # JSON has no NaN
    return RunResult(**{**result, **paths, "train_loss": loss})

"""One job of a comparison, in a process of its own: `python -m adapterlab.compare.worker FOLDER`.

The job stands in FOLDER/job.json. Whatever was done before is kept: a finished job returns at once, an interrupted
training continues from its checkpoint, and rates that were tried are not tried again.

Where several processes train a run, this one starts them as a launcher does. Each of them comes here again, as a rank:
together they probe, search or train, and what they trained is examined by the first process alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import signal
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from adapterlab import registry
from adapterlab.compare import measuring
from adapterlab.compare.config import CompareConfig
from adapterlab.compare.exam import general_loss, recorded
from adapterlab.compare.halving import halve, spread
from adapterlab.compare.jobs import Job, JobFolder, Progress
from adapterlab.compare.lifeline import STOPPED, stop_with_parent
from adapterlab.compare.results import UNTRAINED, Exam, Memory, Run, Search, Trial
from adapterlab.compare.sharing import Shared, shared
from adapterlab.data import load_data, placed
from adapterlab.engine.summary import numel
from adapterlab.errors import AdapterlabError, AttachError, ConfigError, OutputError, RankError, TrainingError
from adapterlab.evaluate.examination import Paper, set_paper, sit
from adapterlab.evaluate.rows import collator_for, rows_for
from adapterlab.hosts import Host
from adapterlab.hosts import load as load_adapter
from adapterlab.io.atomic import write_json
from adapterlab.io.disk import alone
from adapterlab.json_text import parsed
from adapterlab.models import load_model
from adapterlab.plan import before_run
from adapterlab.train import folder as files
from adapterlab.train.config import TrainConfig
from adapterlab.train.course import Course
from adapterlab.train.launching import launch
from adapterlab.train.loop import Listener, Loop, Record, Status
from adapterlab.train.many import adapter_name, fit_many, in_the_base, leave
from adapterlab.train.memory import Meter
from adapterlab.train.parallel import kind_of
from adapterlab.train.ranks import check_joined, launched, rank
from adapterlab.train.result import RunResult
from adapterlab.train.run import NAME, fit, load, make_accelerator
from adapterlab.train.signals import Interrupted, Stopping
from adapterlab.train.together import Ending, Entrant, train_together
from adapterlab.train.watch import watched

TRIALS, TRAIN = "trials.json", "train"
_PROBE = 6  # steps that are timed; the first is for warming up
_RUN = 1000  # steps of the run whose first ones are timed: a method's schedule finds room in it
_LAST = 10  # training steps whose mean is the final training loss


class Watch(Listener):
    """Passes a loop's steps on to a job's progress."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def stepped(self, loop: Loop, record: Record) -> None:
        """Note the step."""
        self.progress.say(phase="training", step=record["step"], total=loop.total, loss=record["loss"])


def untrained(job: Job, folder: JobFolder, progress: Progress) -> dict[str, Any]:
    """Examine the base model as it is, and measure the training rows."""
    config = job.settings()
    model, tokenizer = _base(config)
    meter = Meter(next(model.parameters()).device)
    progress.say(now=True, phase="answering")
    paper = _paper(config, model, tokenizer)
    exam = recorded(paper, sit(paper, model, tokenizer), config.evaluation.samples)
    meter.sample()
    memory = meter.report()
    total = sum(map(numel, model.parameters()))
    general = general_loss(model, tokenizer)
    cost = None
    if config.evaluation.costs:
        cost = measuring.base_inference(model, measuring.sample_batch(model, tokenizer, paper.rows))
    run = Run(
        label=UNTRAINED, key=UNTRAINED, method=UNTRAINED, seed=0, status="finished", trainable=0, total=total,
        memory=_memory(memory), steps=0, tokens=0, train_seconds=0.0, wall_seconds=progress.elapsed,
        best=exam, final=exam, general_loss=general, forgetting=0.0, adapter_bytes=0, inference=cost,
    )  # fmt: skip
    length = _mean_tokens(config, model, tokenizer)
    return {"run": run.model_dump(mode="json"), "device": str(meter.device), "tokens_per_row": length}


def _mean_tokens(config: CompareConfig, model: Any, tokenizer: Any) -> float:
    """Mean length of the training rows, found as training finds it."""
    data = config.train_data()
    return rows_for(model, tokenizer, load_data(data).train, data).report.mean_length


class Session:
    """A loaded model with its rows, for trainings that leave no files; a context on all ranks of the job."""

    def __init__(self, job: Job, folder: JobFolder):
        assert job.contender is not None
        self.comparison, self.contender, self.steps = job.settings(), job.contender, job.steps
        self.output = folder.path / TRAIN
        self.config = self._config(1, 0.0)
        if launched() == 1:  # ranks hear of it when a run of the comparison itself begins
            before_run.check(self.config, print)
        self.accelerator = make_accelerator(self.config)
        check_joined(self.accelerator)
        self._watch = watched(self.accelerator, folder.path)

    def __enter__(self) -> Self:
        """Load."""
        self._watch.__enter__()
        self.loaded = load(self.config, self.accelerator)
        self.shares = self.comparison.shares and not in_the_base(self.loaded.host, NAME)
        self.loaded.host.detach(NAME)
        return self

    def __exit__(self, *why: Any) -> None:
        """Tell the other ranks how it ended."""
        self._watch.__exit__(*why)

    def _config(self, steps: int, lr: float) -> TrainConfig:
        seed = self.comparison.seeds[0]
        return TrainConfig(
            **self.comparison.train_fields(self.contender, steps=steps, seed=seed, lr=lr, output=self.output)
        )

    def train(self, steps: int, lr: float, *listeners: Listener, evaluate: bool = True) -> Status:
        """Train the method anew and take it off again."""
        try:
            return self._loop(steps, lr, NAME, self.accelerator, listeners, evaluate).run()
        finally:
            if launched() == 1:  # what ranks share is loaded anew
                leave(self.loaded.host, NAME)

    def train_each(self, steps: int, rates: Sequence[float], *listeners: Listener) -> list[Ending]:
        """Train the method anew with each of some rates, all on the one base at once, and take it off again."""
        room, needs = before_run.needed([self._config(steps, lr) for lr in rates], print)
        names = [adapter_name(number) for number in range(len(rates))]

        def course(lr: float, name: str, stopping: Stopping) -> Course[Loop, Record, Status]:
            accelerator = make_accelerator(self.config, beside=True)
            return self._loop(steps, lr, name, accelerator, listeners).course(stopping)

        entrants = [
            Entrant(name, functools.partial(course, lr, name), need, functools.partial(leave, self.loaded.host, name))
            for lr, name, need in zip(rates, names, needs, strict=True)
        ]
        return train_together(self.loaded.host, entrants, room=room)

    def _loop(
        self,
        steps: int,
        lr: float,
        name: str,
        accelerator: Accelerator,
        listeners: Sequence[Listener],
        evaluate: bool = True,
    ) -> Loop:
        config = self._config(steps, lr)
        warmup = config.training.warmup
        if isinstance(warmup, int):  # a shorter run has its part of it
            warmup = min(steps, math.ceil(warmup * steps / max(self.steps, steps)))
        training = config.training.model_copy(update={"eval_every": steps, "warmup": warmup})
        if launched() > 1:
            self.loaded = load(config, accelerator)
        else:
            set_seed(training.seed)
            self.loaded.host.attach(config.make_method(), name)
        host = self.loaded.host
        return Loop(
            host, name, self.loaded.rows, training, eval_rows=self.loaded.eval_rows if evaluate else (),
            collate=collator_for(host.model, self.loaded.tokenizer), accelerator=accelerator, listeners=listeners,
            parallel=kind_of(accelerator, host.model, config.parallel, offload=config.cpu_offload),
        )  # fmt: skip


def probe(job: Job, folder: JobFolder, progress: Progress) -> dict[str, Any]:
    """Time a few training steps."""
    assert job.contender is not None
    times: list[float] = []

    class Enough(Exception):
        pass

    class Clock(Listener):
        def stepped(self, loop: Loop, record: Record) -> None:
            times.append(loop.status.seconds)
            if len(times) == _PROBE:
                raise Enough

    rate = _rate(job)
    with Session(job, folder) as session, contextlib.suppress(Enough):
        session.train(_RUN, rate, Watch(progress), Clock(), evaluate=False)
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {"step_seconds": statistics.median(steps)}


def _rate(job: Job) -> float:
    assert job.contender is not None
    lr = job.contender.lr
    return registry.method(job.contender.method).typical_lr if lr == "auto" else float(lr)


def search(job: Job, folder: JobFolder, progress: Progress) -> dict[str, Any]:
    """Find a learning rate by successive halving; every trial is written down when it is done."""
    assert job.contender is not None
    file = folder.path / TRIALS
    done: dict[str, Any] = parsed(file.read_text(encoding="utf-8")) if file.is_file() else {}
    session: list[Session] = []
    settings = job.settings().search
    rates = spread(_rate(job), settings.rates, settings.factor)
    lengths = [max(1, round(job.steps * fraction)) for fraction in settings.fractions]
    with contextlib.ExitStack() as held:

        def trials(rates: Sequence[float], steps: int) -> list[Trial]:
            left = [rate for rate in rates if _key(rate, steps) not in done]
            if left and not session:
                session.append(held.enter_context(Session(job, folder)))
            for group in [left] if len(left) > 1 and session[0].shares else [[rate] for rate in left]:
                for trial in _tried(session[0], group, steps, Watch(progress)):
                    done[_key(trial.lr, steps)] = trial.model_dump()
                if rank() == 0:
                    write_json(file, done)
            return [Trial(**done[_key(rate, steps)]) for rate in rates]

        rounds = halve(rates, lengths, trials, extend=settings.extend, factor=settings.factor)
    chosen = next((t.lr for t in rounds[-1] if t.kept), None)
    return Search(label=job.label, auto=True, chosen=chosen, rounds=rounds).model_dump(mode="json")


def _key(rate: float, steps: int) -> str:
    return f"{rate!r} {steps}"


def _tried(session: Session, rates: Sequence[float], steps: int, watch: Watch) -> list[Trial]:
    """Train with some rates, on one base where there are several; a training that fails is a trial too."""
    if len(rates) > 1:
        endings = session.train_each(steps, rates, watch)
    else:
        endings = [_ended(lambda: session.train(steps, rates[0], watch))]
    found = []
    for rate, ending in zip(rates, endings, strict=True):
        error, many = ending.error, 1 if ending.why else len(rates)
        if error is not None and not isinstance(error, TrainingError):
            raise error
        loss = None if error else ending.value.eval_loss
        reason = f"{type(error).__name__}: {error}" if error else ""
        found.append(Trial(lr=rate, steps=steps, loss=loss, reason=reason, together=many))
    return found


def _ended(train: Callable[[], Status]) -> Ending:
    try:
        return Ending(NAME, train())
    except TrainingError as error:
        return Ending(NAME, error=error)


class WatchEach(Listener):
    """Passes the steps of runs that train together on to the progress of each one's job."""

    def __init__(self, folders: Sequence[JobFolder]):
        self.each = {adapter_name(number): Watch(Progress(folder)) for number, folder in enumerate(folders)}

    def stepped(self, loop: Loop, record: Record) -> None:
        """Note the step."""
        self.each[loop.name].stepped(loop, record)


def together(job: Job, folder: JobFolder, progress: Progress) -> dict[str, Any]:
    """Train several runs on one base; their own jobs find them trained, and examine them."""
    comparison, root = job.settings(), folder.path.parents[1]
    places = [JobFolder(member.folder(root)) for member in job.members]
    configs = []
    for member, place in zip(job.members, places, strict=True):
        assert member.contender is not None
        place.path.mkdir(parents=True, exist_ok=True)
        fields = comparison.train_fields(
            member.contender, steps=member.steps, seed=member.seed, lr=member.lr, output=place.path / TRAIN
        )
        configs.append(TrainConfig(**fields))
    endings = fit_many(configs, resume=True, quiet=True, callbacks=[WatchEach(places)])
    for place, ending in zip(places, endings, strict=True):
        if ending.error is None:
            Shared(runs=len(places), reason=ending.why).write(place)
        else:
            Shared(reason=_failed(place, ending.error)).write(place)
    return {"runs": len(places)}


def train(job: Job, folder: JobFolder, progress: Progress) -> None:
    """Train with one seed, unless that is done."""
    _trained(job, folder, progress)


def _trained(job: Job, folder: JobFolder, progress: Progress) -> RunResult:
    assert job.contender is not None
    output = folder.path / TRAIN
    fields = job.settings().train_fields(job.contender, steps=job.steps, seed=job.seed, lr=job.lr, output=output)
    return _fit(TrainConfig(**fields), progress)


def run(job: Job, folder: JobFolder, progress: Progress) -> dict[str, Any]:
    """Train with one seed, unless that was done together with others or by ranks, then examine what came out."""
    assert job.contender is not None
    comparison, contender = job.settings(), job.contender
    output = folder.path / TRAIN
    trained = _trained(job, folder, progress)
    gc.collect()
    progress.say(now=True, phase="answering")
    model, tokenizer = _base(comparison)
    paper = _paper(comparison, model, tokenizer)

    def examine() -> Exam:
        return recorded(paper, sit(paper, model, tokenizer), comparison.evaluation.samples)

    host = load_adapter(model, trained.adapter, "best")
    best = examine()
    general = general_loss(model, tokenizer)
    progress.say(now=True, phase="measuring")
    cost, step = None, None
    if comparison.evaluation.costs:
        with contextlib.suppress(AttachError):  # a method that kept no original values cannot be compared with the base
            cost = measuring.inference(host, "best", measuring.sample_batch(model, tokenizer, paper.rows))
        step = _step_flops(host, paper, tokenizer)
    final = _final(trained, host, best, examine)
    train, held = _curves(output)
    last = [loss for _, loss in train[-_LAST:]]
    mean = trained.tokens / max(1, trained.steps)
    mark = shared(folder) or Shared()
    alone = mark.runs == 1
    folder.clear(f"{TRAIN}/{files.CHECKPOINT.parent}")
    return Run(
        label=job.label, key=contender.key, method=contender.method, settings=contender.settings, seed=job.seed,
        status="finished", attempts=folder.attempts() + 1, lr=job.lr, together=mark.runs, alone=mark.reason,
        trainable=trained.trainable, total=trained.total, memory=_memory(trained.memory) if alone else None,
        steps=trained.steps, tokens=trained.tokens, train_seconds=trained.seconds if alone else None,
        wall_seconds=progress.elapsed, best_step=trained.best_step, best_loss=trained.best_loss,
        final_loss=trained.eval_loss, train_loss=statistics.fmean(last) if last else None,
        best=best, final=final, general_loss=general,
        adapter_bytes=measuring.folder_bytes(trained.adapter), inference=cost,
        step_flops=step and step * mean, flops=step and step * trained.tokens, train_curve=train, eval_curve=held,
    ).model_dump(mode="json")  # fmt: skip


def _base(config: CompareConfig) -> tuple[Any, Any]:
    """The base model and its tokenizer, on all the GPUs that trainings have."""
    several = config.processes_per_run > 1 and config.device != "cpu" and torch.cuda.device_count() > 1
    return load_model(
        config.model,
        precision=config.precision,
        device="auto" if config.spreads or several else config.device,
        quantize=config.quantize,
        trust_remote_code=config.trust_remote_code,
    )


def _paper(config: CompareConfig, model: Any, tokenizer: Any) -> Paper:
    return set_paper(config.data, model, tokenizer, **config.evaluation.model_dump(exclude={"costs"}))


def _fit(config: TrainConfig, progress: Progress) -> RunResult:
    """Train, or continue; a run that another version or place of the folder began is started anew."""
    if launched() == 1:  # for its reason: without it, the system would end the process for want of memory
        before_run.check(config, print)
    try:
        result = fit(config, resume=True, quiet=True, callbacks=[Watch(progress)])
    except ConfigError:
        if not (config.output / files.RUN).is_file():
            raise
        result = fit(config, overwrite=True, quiet=True, callbacks=[Watch(progress)])
    assert result is not None
    return result


def _final(trained: RunResult, host: Host, best: Exam, examine: Callable[[], Exam]) -> Exam:
    """The exam of the last checkpoint; the best one's where they are the same."""
    if trained.best_step in (None, trained.steps):
        return best
    host.detach("best")
    load_adapter(host.model, trained.last, "last")
    return examine()


def _step_flops(host: Host, paper: Paper, tokenizer: Any) -> float | None:
    """Work of training on one token, from one batch."""
    rows = paper.rows[:8]
    batch = collator_for(host.model, tokenizer)(rows)
    for column, allowed in host.methods["best"].columns.items():
        batch[column] = batch["input_ids"].new_full((len(rows),), (allowed or (0,))[0])
    device = next(host.model.parameters()).device
    found = measuring.step_flops(host, "best", placed(batch, device))
    return None if found is None else found / int(batch["attention_mask"].sum())


def _curves(output: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    lines = [parsed(line) for line in (output / files.METRICS).read_text(encoding="utf-8").splitlines()]
    train = [(line["step"], round(line["loss"], 6)) for line in lines if "loss" in line]
    return train, [(line["step"], round(line["eval_loss"], 6)) for line in lines if "eval_loss" in line]


def _memory(report: dict[str, Any]) -> Memory:
    loaded, peak, gpu = report["loaded"], report["peak"], report["gpu_peak"]
    return Memory(loaded=loaded, peak=peak, mean=report["mean"] or peak, gpu_peak=gpu)


WORK: dict[str, Callable[[Job, JobFolder, Progress], dict[str, Any]]] = {
    "untrained": untrained,
    "probe": probe,
    "search": search,
    "together": together,
    "run": run,
}


# What ranks do; a run's examination is not theirs.
OF_RANKS: dict[str, Callable[[Job, JobFolder, Progress], dict[str, Any] | None]] = {
    "probe": probe,
    "search": search,
    "run": train,
}


def main(path: str) -> int:
    """Do the job of a folder and return the exit status."""
    folder = JobFolder(Path(path))
    if launched() > 1:
        return _work(folder, OF_RANKS)
    with alone(folder.path, wait=120):  # a process whose parent died may need a moment to stop
        if folder.result() is not None:
            return 0
        job = folder.job()
        ranks, device = job.settings().processes_per_run, job.settings().device
        if ranks > 1 and job.kind in OF_RANKS:
            try:
                status = launch([path], ranks, device, module="adapterlab.compare.worker")
            except ConfigError as error:  # there are fewer GPUs
                _failed(folder, error)
                return 1
            if status or folder.result() is not None:
                return status
        return _work(folder, WORK)


def _work(folder: JobFolder, work: Mapping[str, Callable[[Job, JobFolder, Progress], dict[str, Any] | None]]) -> int:
    """Do the job of a folder, as the only process or as one of its ranks, of which the first one writes."""
    job, progress = folder.job(), Progress(folder, silent=rank() > 0)
    try:
        progress.say(now=True)
        result = work[job.kind](job, folder, progress)
        if result is not None and rank() == 0:
            progress.say(now=True, phase="finished")
            folder.finish(result)
    except Interrupted:
        if launched() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the others when the first one leaves
        return STOPPED
    except Exception as error:
        traceback.print_exc()
        if rank() == 0:
            _failed(folder, error)
        return 1
    return 0


def _failed(folder: JobFolder, error: BaseException) -> str:
    """Write down in a job's folder why it failed, and return it."""
    known = isinstance(error, AdapterlabError) and not isinstance(error, (OutputError, RankError))
    reason = f"{type(error).__name__}: {error}"
    folder.fail(reason, final=known)
    return reason


if __name__ == "__main__":
    if launched() == 1:  # ranks end with their launcher
        stop_with_parent()
    sys.exit(main(sys.argv[1]))

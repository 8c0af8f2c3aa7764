"""`compare`: run what is missing, keep what is done, and write down how it stands after every step."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

from adapterlab import registry
from adapterlab.compare import preparing
from adapterlab.compare.config import DATA, CompareConfig, Contender
from adapterlab.compare.jobs import JOB, LOG, Job, JobFolder
from adapterlab.compare.pools import LocalPool, Pool, RayPool
from adapterlab.compare.results import UNTRAINED, Comparison, Run, Search
from adapterlab.compare.sharing import Shared, dealt, shared
from adapterlab.compare.summary import summarise
from adapterlab.errors import ConfigError
from adapterlab.foreign.streams import steady_output
from adapterlab.io.atomic import write_json
from adapterlab.train.config import Training
from adapterlab.train.run import git_revision, now, versions

ATTEMPTS = 2  # failures are tried once more
_POLL = 0.3
_GROWTH = 3.0  # what training is taken to need, in units of the untrained model's process, until a run says better
_MARGIN = 1.2
_SHARES = "the rates of a round; runs of all seeds but the first, which alone say what each costs"
_ANY = 1000  # steps of a run that ends when its method says so, with a budget of time


@dataclass(frozen=True)
class Active:
    """A job under way.

    Attributes:
        name: for people.
        label: of the method with its settings.
        kind: untrained, probe, search or run.
        seed: of a run.
        phase: loading, training, answering, measuring.
        step: of `total`.
        loss: of the last step, or None.
        elapsed: seconds, earlier attempts included.
    """

    name: str
    label: str
    kind: str
    seed: int
    phase: str = "loading"
    step: int = 0
    total: int = 0
    loss: float | None = None
    elapsed: float = 0.0


class Watcher(Protocol):
    """Is shown how a comparison stands, a few times a second."""

    def update(self, comparison: Comparison, active: Sequence[Active]) -> None:
        """Show it."""


def compare(
    config: CompareConfig,
    *,
    engine: Literal["local", "ray"] = "local",
    overwrite: bool = False,
    retry: bool = False,
    watcher: Watcher | None = None,
) -> Comparison:
    """Compare methods; what an earlier start has done already is kept.

    Args:
        config: what to compare, and how.
        engine: processes of this machine, or a Ray cluster.
        overwrite: begin anew where the folder holds a comparison.
        retry: try failed runs of an earlier start again.
        watcher: is shown the progress.

    Returns:
        The comparison; it is in the folder too.

    Raises:
        ConfigError: a setting is wrong, or the folder holds another comparison.
        DataError: there is nothing to train or evaluate on, or it has changed.
        OutputError: the folder cannot be used.
        MissingDependencyError: Ray is asked for and not installed.
    """
    contenders = config.contenders()
    facts, judge, train, held = preparing.read_rows(config, contenders)
    preparing.check_attach(config, contenders)
    if engine not in ("local", "ray"):
        raise ConfigError(f"engine={engine!r} is unknown. Use local or ray.")
    with preparing.claimed(config, overwrite=overwrite), steady_output():
        preparing.write_rows(config, facts, train, held, overwrite=overwrite)
        pool = _pool(config, engine)
        work = _Work(config, contenders, pool, judge, facts, engine)
        if retry:
            work.forgive()
        try:
            return work.run(watcher)
        finally:
            pool.stop()


def _pool(config: CompareConfig, engine: str) -> Pool:
    import torch

    gpu = (config.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
    # A small model gains little from many threads, and runs of one thread share cores without loss.
    threads = config.threads or (cores if gpu or config.processes == 1 else max(1, min(4, cores // 2)))
    if engine == "ray":
        return RayPool(threads, gpu=gpu, size=config.processes)
    return LocalPool(config.processes or (1 if gpu else max(1, cores // threads)), threads)


class _Work:
    """The jobs of one comparison, decided anew from what lies in its folder whenever one has ended."""

    def __init__(
        self,
        config: CompareConfig,
        contenders: Sequence[Contender],
        pool: Pool,
        judge: Literal["score", "loss"],
        data: dict[str, Any],
        engine: str,
    ):
        self.config, self.contenders, self.pool, self.judge, self.data = config, contenders, pool, judge, data
        self.engine, self.root = engine, config.output
        self.training = Training(**config.training)
        self.running: dict[Path, tuple[Job, int]] = {}  # with the number of failures before
        self.results: dict[Path, dict[str, Any]] = {}
        self.plain, self.versions, self.git = config.plain(), versions(), git_revision()
        self._trained = False  # whether a training has said how much memory it takes
        for job in self.jobs():
            if (found := self.result(job)) is not None:
                self._learn_memory(found)

    # ------------------------------------------------------------------ running

    def run(self, watcher: Watcher | None) -> Comparison:
        """Run all jobs that are left."""
        ended: list[tuple[Path, int]] = []
        comparison = self.compare()
        while True:
            if self._start() or ended:
                comparison = self.compare()
                comparison.save(self.root)
            if watcher:
                watcher.update(comparison, self.active())
            if not self.running:
                break
            time.sleep(_POLL)
            ended = self.pool.finished()
            for folder, code in ended:
                self._ended(folder, code)
        comparison = self.compare(finished=True)
        comparison.save(self.root)
        return comparison

    def _start(self) -> bool:
        """Start what there is room for; say whether anything was."""
        started = False
        for job in self.todo() if self.pool.has_room() else ():
            folder = job.folder(self.root)
            write_json(folder / JOB, job.model_dump(mode="json"))
            self.running[folder] = (job, JobFolder(folder).attempts())
            self.pool.start(folder)
            started = True
            if not self.pool.has_room():
                break
        return started

    def _ended(self, folder: Path, code: int) -> None:
        job, before = self.running.pop(folder)
        place = JobFolder(folder)
        result = place.result()
        if result is not None:
            self._learn_memory(result)
        elif job.members:
            self._part(job, folder)
        elif place.attempts() == before:
            number = f"signal {-code}" if code < 0 else f"status {code}"
            reason = f"The process ended with {number} and no message; memory may have run out. Log: {folder / LOG}."
            place.fail(reason, final=False)

    def _part(self, together: Job, folder: Path) -> None:
        """Let runs whose common process failed go on by themselves."""
        reason = f"The process that trained {len(together.members)} runs together failed. Log: {folder / LOG}."
        for member in together.members:
            place = JobFolder(member.folder(self.root))
            if shared(place) is None:
                Shared(reason=reason).write(place)
        JobFolder(folder).forgive()

    def _learn_memory(self, result: dict[str, Any]) -> None:
        """Expect of the next process what the largest training has taken."""
        run = result.get("run", result)
        memory = run.get("memory")
        if not isinstance(self.pool, LocalPool) or not memory:
            return
        if run["method"] == UNTRAINED:
            self.pool.need = round(_GROWTH * memory["peak"])
        else:
            need = round(_MARGIN * memory["peak"])
            self.pool.need = max(self.pool.need, need) if self._trained else need
            self._trained = True

    def forgive(self) -> None:
        """Forget all failures."""
        for job in self.jobs():
            place = JobFolder(job.folder(self.root))
            place.forgive()
            if job.kind == "search" and (self.result(job) or {}).get("chosen", 0) is None:
                place.clear()
                del self.results[place.path]

    # ------------------------------------------------------------------ what is to be done

    def jobs(self) -> Iterator[Job]:
        """All jobs whose settings are known by now, in the order of the configuration."""
        base = Job(kind="untrained", config=self.plain)
        yield base
        if self.result(base) is None and not self.given_up(base):
            return  # says how long rows are and how much memory the model takes
        for contender in self.contenders:
            yield from self._jobs_of(contender)

    def _jobs_of(self, contender: Contender) -> Iterator[Job]:
        make = {"contender": contender, "config": self.plain}
        trains = registry.method(contender.method).trains
        if self.config.budget.minutes is not None and trains:
            yield Job(kind="probe", **make)
        steps = self.steps(contender)
        if steps is None:
            return
        if contender.lr == "auto" and trains:
            yield Job(kind="search", steps=steps, **make)
        lr = self.lr(contender)
        if lr is not None:
            yield from (Job(kind="run", seed=seed, steps=steps, lr=lr, **make) for seed in self.config.seeds)

    def todo(self) -> Iterator[Job]:
        """Jobs that can start now."""
        at_work = {job.folder(self.root) for job in self._at_work()}
        waiting: list[Job] = []
        left = [job for job in self.jobs() if self.result(job) is None and not self.given_up(job)]
        for job in left:
            if job.folder(self.root) in at_work:
                continue
            if self._may_share(job):
                waiting.append(job)
            else:
                yield job
        if any(job.kind in ("untrained", "probe", "search") for job in left):
            return  # others may join once their rates are known
        if len(waiting) == 1:
            yield waiting[0]
        for group in dealt(waiting, self.pool.size):
            members = tuple(job.model_copy(update={"config": {}}) for job in group)
            yield Job(kind="together", members=members, config=self.plain)

    def _may_share(self, job: Job) -> bool:
        """Whether a run trains with others: those of the first seed say what each costs, where that is asked."""
        measures = self.config.evaluation.costs and job.seed == self.config.seeds[0]
        if self.config.together == "never" or job.kind != "run" or measures:
            return False
        return shared(JobFolder(job.folder(self.root))) is None

    def steps(self, contender: Contender) -> int | None:
        """The budget in steps; None when it is not known (yet)."""
        budget = self.config.budget
        if budget.steps is not None:
            return budget.steps
        if budget.tokens is not None:
            base = self.result(Job(kind="untrained"))
            rows = self.training.batch_size * self.training.accumulation
            return max(1, round(budget.tokens / (rows * base["tokens_per_row"]))) if base else None
        if not registry.method(contender.method).trains:
            return _ANY
        probe = self.result(Job(kind="probe", contender=contender))
        return max(1, int(60 * (budget.minutes or 0) / probe["step_seconds"])) if probe else None

    def lr(self, contender: Contender) -> float | None:
        """The learning rate; None when it is not known (yet)."""
        if contender.lr != "auto":
            return float(contender.lr)
        if not registry.method(contender.method).trains:
            return self.training.min_lr  # there is no rate to look for
        found = self.result(Job(kind="search", contender=contender))
        return found["chosen"] if found else None

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a job found."""
        folder = job.folder(self.root)
        if folder not in self.results and (found := JobFolder(folder).result()) is not None:
            self.results[folder] = found
        return self.results.get(folder)

    def given_up(self, job: Job) -> str:
        """Why a job is not tried any more; empty when it may be."""
        failure = JobFolder(job.folder(self.root)).failure()
        return failure.reason if failure and (failure.final or failure.attempts >= ATTEMPTS) else ""

    # ------------------------------------------------------------------ how it stands

    def active(self) -> list[Active]:
        """The jobs under way."""
        found = []
        for job in self._at_work():
            state = JobFolder(job.folder(self.root)).progress()
            shown = {key: state[key] for key in ("phase", "step", "total", "loss", "elapsed") if key in state}
            found.append(Active(name=job.name, label=job.label, kind=job.kind, seed=job.seed, **shown))
        return found

    def _at_work(self) -> Iterator[Job]:
        """The jobs that processes do now; of those that train together each one."""
        for job, _ in self.running.values():
            yield from job.members or (job,)

    def compare(self, *, finished: bool = False) -> Comparison:
        """Put together what is there."""
        base = self.result(Job(kind="untrained")) or {}
        model = {"name": self.config.model, "precision": self.config.precision, "quantize": self.config.quantize}
        return summarise(
            list(self._runs()),
            judge=self.judge,
            level=self.config.level,
            name=self.root.name,
            started=self._since(),
            updated=now(),
            finished=finished,
            config=self.plain,
            versions=self.versions,
            platform=platform.platform(),
            git=self.git,
            conditions=self._conditions(base),
            model={**model, "parameters": (base.get("run") or {}).get("total")},
            data=self.data,
            searches=list(self._searches()),
        )

    def _runs(self) -> Iterator[Run]:
        base = Job(kind="untrained")
        found = self.result(base)
        yield Run(**found["run"]) if found else self._unfinished(base, key=UNTRAINED, method=UNTRAINED)
        for contender in self.contenders:
            names = {"key": contender.key, "method": contender.method, "settings": contender.settings}
            for seed in self.config.seeds:
                job = Job(kind="run", contender=contender, seed=seed)
                found = self.result(job)
                yield Run(**found) if found else self._unfinished(job, **names)

    def _unfinished(self, job: Job, **names: Any) -> Run:
        folder = job.folder(self.root)
        attempts = JobFolder(folder).attempts()
        reason = self.given_up(job) or (self._blocked(job.contender) if job.contender else "")
        at_work = any(job.folder(self.root) == folder for job in self._at_work())
        status = "failed" if reason else "running" if at_work else "waiting"
        lr = self.lr(job.contender) if job.contender else None
        return Run(label=job.label, seed=job.seed, status=status, reason=reason, attempts=attempts, lr=lr, **names)

    def _blocked(self, contender: Contender) -> str:
        """Why runs of a method can never start; empty when they can."""
        budget = self.config.budget
        if budget.tokens is not None and (reason := self.given_up(Job(kind="untrained"))):
            return f"The length of the rows is not known: {reason}"
        if budget.minutes is not None and (reason := self.given_up(Job(kind="probe", contender=contender))):
            return reason
        job = Job(kind="search", contender=contender)
        if contender.lr == "auto" and (reason := self.given_up(job)):
            return reason
        found = self.result(job) if contender.lr == "auto" else None
        if found and found["chosen"] is None:
            reasons = [t["reason"] for trials in found["rounds"] for t in trials if t["reason"]]
            return f"No learning rate works: {reasons[-1] if reasons else 'all trials failed'}"
        return ""

    def _searches(self) -> Iterator[Search]:
        for contender in self.contenders:
            if contender.lr != "auto" or not registry.method(contender.method).trains:
                yield Search(label=contender.label, auto=False, chosen=self.lr(contender))
            elif found := self.result(Job(kind="search", contender=contender)):
                yield Search(**found)

    def _conditions(self, base: dict[str, Any]) -> dict[str, Any]:
        return {
            "device": base.get("device"),
            "processor": platform.processor() or platform.machine(),
            "engine": self.engine,
            "runs at a time": self.pool.size,
            "threads of each run": self.pool.threads,
            "share a base": "nothing" if self.config.together == "never" else _SHARES,
            "budget": str(self.config.budget),
            "rows in a step": self.training.batch_size * self.training.accumulation,
            "training rows": self.data["train_rows"],
            "validation rows": self.data["validation_rows"],
            "evaluation rows": self.data["eval_rows"],
            "seeds": list(self.config.seeds),
            "learning rate": str(self.config.lr),
        }

    def _since(self) -> str:
        """When the comparison began, earlier starts included."""
        file = self.root / DATA / preparing.FACTS
        return datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")

"""`compare` and `work`: do what is missing in a comparison's folder, alone or with others, and keep what is done.

The folder is all the state there is. Whoever works on it derives from it what is left, claims a job there, and does it.
"""

from __future__ import annotations

import datetime
import platform
import signal
import socket
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from adapterlab import registry
from adapterlab.compare import claims, pools, preparing, slurm
from adapterlab.compare.claims import Claims
from adapterlab.compare.config import DATA, CompareConfig, Contender
from adapterlab.compare.jobs import JOB, LOG, Job, JobFolder
from adapterlab.compare.lifeline import STOPPED
from adapterlab.compare.pools import Ending, LocalPool, NoPool, Pool
from adapterlab.compare.preparing import Opened
from adapterlab.compare.results import UNTRAINED, Comparison, Run, Search
from adapterlab.compare.sharing import Shared, dealt, shared
from adapterlab.compare.summary import summarise
from adapterlab.errors import ConfigError, nearest
from adapterlab.foreign import processor
from adapterlab.foreign.streams import steady_output
from adapterlab.foreign.versions import versions
from adapterlab.io.atomic import write_json
from adapterlab.train.config import Training
from adapterlab.train.run import git_revision, now

Engine = Literal["local", "ray", "folder", "slurm"]
ENGINES: tuple[Engine, ...] = ("local", "ray", "folder", "slurm")
ATTEMPTS = 2  # failures are tried once more
_POLL = 0.3  # seconds between looks at what was started here
_LOOK = 2.0  # seconds between looks into the folder, at what others do
_PAUSE = 9  # times as long as the last summary took: of thousands of runs it takes a minute, and is due after each
_TOGETHER = 2  # lost attempts after which a run trains by itself: those it shared with may be to blame
_MOST_TASKS = 32  # where nothing says how many
_ASKED = (STOPPED, -signal.SIGTERM)  # exit statuses of a process that somebody asked to end
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
    engine: Engine = "local",
    overwrite: bool = False,
    retry: bool = False,
    submit: bool = False,
    wait: bool | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Compare methods; what an earlier start has done already is kept.

    Args:
        config: what to compare, and how.
        engine: who does it. local: processes of this machine; ray: tasks of a Ray cluster; folder: whoever calls `work`
            on the folder; slurm: the same, by tasks of an array, whose script is written into the folder.
        overwrite: begin anew where the folder holds a comparison.
        retry: try failed runs of an earlier start again.
        submit: hand the script to Slurm.
        wait: stay until all is done; None: with engines whose processes end with this one. Without, the comparison is
            returned as it stands.
        watcher: is shown the progress.

    Returns:
        The comparison; it is in the folder too.

    Raises:
        ConfigError: a setting is wrong, the folder holds another comparison, or runs need more than there is.
        DataError: there is nothing to train or evaluate on, or it has changed.
        OutputError: the folder cannot be used.
        MissingDependencyError: Ray is asked for and not installed.
        TrainingError: the Ray cluster went away.
    """
    contenders = config.contenders()
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r} is unknown. {nearest(engine, ENGINES)}")
    if submit and engine != "slurm":
        raise ConfigError(f"submit is for engine slurm; received engine={engine!r}.")
    facts, judge, train, held = preparing.read_rows(config, contenders)
    preparing.check_attach(config, contenders)
    with preparing.claimed(config, overwrite=overwrite), steady_output():
        preparing.write_rows(config, facts, train, held, overwrite=overwrite)
        pool = _pool(config, engine)
        opened = preparing.open_for_others(config, facts, engine, pool.size)
        script = slurm.write(config, pool.size) if engine == "slurm" else None
        with _Work(config, contenders, pool, judge, facts, opened) as work:
            if retry:
                work.forgive()
            if script and submit:
                slurm.submit(script)
            return work.run(watcher, wait=engine in ("local", "ray") if wait is None else wait)


def work(folder: Path, *, processes: int | None = None, say: Callable[[str], None] = print) -> Comparison | None:
    """Help with a comparison that `compare` opened, here or on another machine, until nothing is left to begin.

    Args:
        folder: of the comparison; all who work on it see it.
        processes: jobs at a time; None: as memory and cores allow.
        say: is told what starts and what ends.

    Returns:
        The comparison, where all is done by now; None where others still do the last jobs.

    Raises:
        ConfigError: this machine has other software than the one that opened the comparison, or fewer GPUs than a run
            needs, or the folder holds another comparison by now.
        DataError: the rows are others than there.
        OutputError: the folder holds no comparison, or cannot be written.
        FormatError: a file in it is damaged.
    """
    config, opened = preparing.opened(folder)
    opened.software.check(f"This machine ({socket.gethostname()})")
    contenders = config.contenders()
    facts, judge, _, _ = preparing.read_rows(config, contenders)
    preparing.check_rows(folder, facts)
    pool = _pool(config.model_copy(update={"processes": processes}), "local")
    with steady_output(), _Work(config, contenders, pool, judge, facts, opened, say) as helper:
        if not helper.help():
            return None
        comparison = helper.compare(finished=True)
        comparison.save(folder)
        return comparison


def _pool(config: CompareConfig, engine: str) -> Pool:
    if engine == "ray":
        from adapterlab.compare.ray_pool import RayPool

        return RayPool(config)
    if engine == "local":
        return pools.local(config)
    runs = len(config.contenders()) * len(config.seeds)
    return NoPool(config.processes or min(runs, _MOST_TASKS), config.threads or 0)


class _Work:
    """The jobs of one comparison, decided anew from what lies in its folder whenever one has ended.

    Args:
        config: of the comparison.
        contenders: its methods.
        pool: does what this process begins.
        judge: what ranks.
        data: facts on the rows.
        opened: what all who work on it have in common.
        say: is told what starts and what ends.
    """

    def __init__(
        self,
        config: CompareConfig,
        contenders: Sequence[Contender],
        pool: Pool,
        judge: Literal["score", "loss"],
        data: dict[str, Any],
        opened: Opened,
        say: Callable[[str], None] | None = None,
    ):
        self.config, self.contenders, self.pool, self.judge, self.data = config, contenders, pool, judge, data
        self.opened, self.root, self.say = opened, config.output, say or (lambda line: None)
        self.training, self.rows_per_step = Training(**config.training), config.rows_per_step
        self.claims = Claims()
        self.running: dict[Path, tuple[Job, int]] = {}  # with the number of failures before
        self.results: dict[Path, dict[str, Any]] = {}
        self._elsewhere: dict[Path, Job] = {}  # what others were doing at the last look
        self.plain, self.versions, self.git = config.plain(), versions(), git_revision()
        self._trained = False  # whether a training has said how much memory it takes
        for job in self.jobs():
            if (found := self.result(job)) is not None:
                self._learn_memory(found)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *why: object) -> None:
        """Let running jobs save what they have, and leave them to others."""
        try:
            self.pool.stop()
        finally:
            self.claims.close()

    # ------------------------------------------------------------------ running

    def run(self, watcher: Watcher | None, *, wait: bool) -> Comparison:
        """Start what there is room for, and look at what others do.

        Args:
            watcher: is shown the progress.
            wait: until nothing is left; else only until nothing runs here.
        """
        self._look_around()
        comparison, shown, look, ended = self.compare(), self._standing(), 0.0, False
        changed, due = False, 0.0
        while True:
            if ended or time.monotonic() >= look:
                self._look_around()
                started, standing = self._start(), self._standing()
                changed = changed or started or ended or standing != shown
                if changed and (began := time.monotonic()) >= due:
                    comparison, shown, changed = self.compare(), standing, False
                    comparison.save(self.root)
                    due = time.monotonic() + _PAUSE * (time.monotonic() - began)
                look = time.monotonic() + _LOOK
                if not self.running and not (wait and standing[1]):
                    break
            if watcher:
                watcher.update(comparison, self.active())
            time.sleep(_POLL)
            ended = self._look_after()
        self._look_around()
        comparison = self.compare(finished=not any(self._left()))
        comparison.save(self.root)
        if watcher:
            watcher.update(comparison, self.active())
        return comparison

    def help(self) -> bool:
        """Do what others leave; say whether all is done, and not only begun by others."""
        look, ended = 0.0, False
        while True:
            if ended or time.monotonic() >= look:
                self._check_opened()
                self._look_around()
                self._start()
                look = time.monotonic() + _LOOK
                left = list(self._left())
                if not self.running and all(self._is_elsewhere(job) for job in left):
                    return not left
            time.sleep(_POLL)
            ended = self._look_after()

    def _is_elsewhere(self, job: Job) -> bool:
        """Whether another process is sure to do a job, and no other job comes of it."""
        return job.kind == "run" and self.claims.is_alive(job.folder(self.root))

    def _check_opened(self) -> None:
        there = preparing.read_opened(self.root)
        there.software.check(f"This process ({socket.gethostname()})")
        if there.digest != self.opened.digest:
            raise ConfigError(f"{self.root} holds another comparison by now. Start helping anew to work on that one.")

    def _start(self) -> bool:
        """Start what there is room for; say whether anything was."""
        started = False
        for job in self.todo() if self.pool.has_room() else ():
            folders = self._folders(job)
            if not self.claims.take(folders):
                continue
            if not self._still_left(job):  # by now somebody else has done it
                self._release(folders)
                continue
            folder = folders[0]
            write_json(folder / JOB, job.model_dump(mode="json"))
            self.running[folder] = (job, JobFolder(folder).attempts())
            self.pool.start(folder)
            self.say(f"started: {job.name}")
            started = True
            if not self.pool.has_room():
                break
        return started

    def _folders(self, job: Job) -> list[Path]:
        """Folders that a job writes, its own first."""
        return [job.folder(self.root), *(member.folder(self.root) for member in job.members)]

    def _still_left(self, job: Job) -> bool:
        if job.members:
            return all(self._still_left(member) and self._may_share(member) for member in job.members)
        return self.result(job) is None and not self.given_up(job)

    def _release(self, folders: Sequence[Path], state: Literal["done", "free", "lost"] = "free", why: str = "") -> None:
        for folder in folders:
            self.claims.release(folder, state, why)

    def _look_after(self) -> bool:
        """See what became of what was started here; say whether anything ended."""
        ended = self.pool.finished()
        for folder, how in ended:
            self._ended(folder, how)
        for folder in self.claims.taken_away():
            for own, (job, _) in list(self.running.items()):
                if folder in self._folders(job):
                    self.say(f"left to others, who took it over: {job.name}")
                    self.pool.cancel(own)
                    del self.running[own]
                    self._release(self._folders(job))
        return bool(ended)

    def _ended(self, folder: Path, how: Ending) -> None:
        job, before = self.running.pop(folder)
        place, folders = JobFolder(folder), self._folders(job)
        result = place.result()
        if result is not None:
            self.say(f"finished: {job.name}")
            self._learn_memory(result)
            self._release(folders, "done")
            return
        self.say(f"ended early: {job.name}")
        lost = how if isinstance(how, str) else "its process was asked to end" if how in _ASKED else ""
        if job.members:
            self._part(job, folder)
        elif not lost and place.attempts() == before:
            number = f"signal {-int(how)}" if int(how) < 0 else f"status {how}"
            reason = f"The process ended with {number} and no message; memory may have run out. Log: {folder / LOG}."
            place.fail(reason, final=False)
        self._release(folders, "lost" if lost else "free", lost)

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
            need = round(_MARGIN * memory["peak"] * self.config.processes_per_run)
            self.pool.need = max(self.pool.need, need) if self._trained else need
            self._trained = True

    def forgive(self) -> None:
        """Forget all failures."""
        for job in self.jobs():
            place = JobFolder(job.folder(self.root))
            if self.given_up(job):
                claims.forgive(place.path)
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
        at_work = self._at_work()
        waiting: list[Job] = []
        left = list(self._left())
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
        for group in dealt(waiting, self.opened.places):
            members = tuple(job.model_copy(update={"config": {}}) for job in group)
            yield Job(kind="together", members=members, config=self.plain)

    def _left(self) -> Iterator[Job]:
        """Jobs that are not done, whoever is at them."""
        return (job for job in self.jobs() if self.result(job) is None and not self.given_up(job))

    def _may_share(self, job: Job) -> bool:
        """Whether a run trains with others: those of the first seed say what each costs, where that is asked."""
        measures = self.config.evaluation.costs and job.seed == self.config.seeds[0]
        if not self.config.shares or job.kind != "run" or measures:
            return False
        folder = job.folder(self.root)
        return shared(JobFolder(folder)) is None and len(claims.losses(folder)) < _TOGETHER

    def steps(self, contender: Contender) -> int | None:
        """The budget in steps; None when it is not known (yet)."""
        budget = self.config.budget
        if budget.steps is not None:
            return budget.steps
        if budget.tokens is not None:
            base = self.result(Job(kind="untrained"))
            return max(1, round(budget.tokens / (self.rows_per_step * base["tokens_per_row"]))) if base else None
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
        folder = job.folder(self.root)
        failure = JobFolder(folder).failure()
        if failure and (failure.final or failure.attempts >= ATTEMPTS):
            return failure.reason
        lost = claims.losses(folder)
        if len(lost) <= self.config.restarts:
            return ""
        return (
            f"The machine or worker that did this went away {len(lost)} times, and it goes on elsewhere "
            f"{self.config.restarts} times at most (restarts). The last time, {lost[-1]}. Log: {folder / LOG}."
        )

    # ------------------------------------------------------------------ how it stands

    def active(self) -> list[Active]:
        """The jobs under way."""
        found = []
        for folder, job in self._at_work().items():
            state = JobFolder(folder).progress()
            shown = {key: state[key] for key in ("phase", "step", "total", "loss", "elapsed") if key in state}
            found.append(Active(name=job.name, label=job.label, kind=job.kind, seed=job.seed, **shown))
        return found

    def _at_work(self) -> dict[Path, Job]:
        """The jobs that processes do now, here or elsewhere, by folder; of those that train together each one."""
        own = [one for job, _ in self.running.values() for one in (job.members or (job,))]
        here = {job.folder(self.root): job for job in own}
        return {**here, **{folder: job for folder, job in self._elsewhere.items() if folder not in here}}

    def _look_around(self) -> None:
        """See what others do: that takes a look into the folder of every job that is left."""
        left = {job.folder(self.root): job for job in self._left()}
        self._elsewhere = {folder: job for folder, job in left.items() if self.claims.held_elsewhere(folder)}

    def _standing(self) -> tuple[int, int, frozenset[Path]]:
        """How far it is: jobs known, jobs left, and those under way."""
        return sum(1 for _ in self.jobs()), sum(1 for _ in self._left()), frozenset(self._at_work())

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
        base, at_work = Job(kind="untrained"), self._at_work()
        found = self.result(base)
        yield Run(**found["run"]) if found else self._unfinished(base, at_work, key=UNTRAINED, method=UNTRAINED)
        for contender in self.contenders:
            names = {"key": contender.key, "method": contender.method, "settings": contender.settings}
            for seed in self.config.seeds:
                job = Job(kind="run", contender=contender, seed=seed)
                found = self.result(job)
                run = Run(**found) if found else self._unfinished(job, at_work, **names)
                yield run.model_copy(update={"lost": tuple(claims.losses(job.folder(self.root)))})

    def _unfinished(self, job: Job, at_work: Container[Path], **names: Any) -> Run:
        folder = job.folder(self.root)
        attempts = JobFolder(folder).attempts()
        reason = self.given_up(job) or (self._blocked(job.contender) if job.contender else "")
        status = "failed" if reason else "running" if folder in at_work else "waiting"
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
            "processor": processor.named(),
            "engine": self.opened.engine,
            "runs at a time": self.opened.places,
            "processes of each run": self.config.processes_per_run,
            "threads of each run": self.pool.threads * self.config.processes_per_run or "as the machine has",
            "share a base": _SHARES if self.config.shares else "nothing",
            "budget": str(self.config.budget),
            "rows in a step": self.rows_per_step,
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

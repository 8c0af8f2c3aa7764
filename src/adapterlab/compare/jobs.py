"""The jobs of a comparison and their folders: what is to be done, how far it is, what came out, why it failed.

<comparison>/
  compare.yaml            the exact configuration
  data/                   rows to train on, rows to choose by
  untrained/              the base model's exam
  probe/<key>/            how long a step takes (budgets in minutes only)
  lr/<key>/               the search for a learning rate
  together/<key>-seed<n>/ training of several runs on one base, named after the first
  runs/<key>/seed<n>/     training and exams; train/ is a run folder with its best and last adapter
  opened.json             by what it was opened, for those who help
  slurm.sh, slurm/        the script of an array of tasks, and what its tasks say
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from adapterlab.compare.config import CompareConfig, Contender
from adapterlab.compare.results import UNTRAINED
from adapterlab.errors import FormatError
from adapterlab.io.atomic import write_json
from adapterlab.json_text import parsed

Kind = Literal["untrained", "probe", "search", "together", "run"]
CONFIG, JOB, RESULT, FAILURE, PROGRESS, LOG = (
    "compare.yaml", "job.json", "result.json", "failure.json", "progress.json", "log.txt"
)  # fmt: skip


class Job(BaseModel):
    """What one process does.

    Attributes:
        kind: what is to be done.
        contender: the method; None for the untrained model.
        seed: of a run.
        steps: of a run, or of the longest round of a search.
        lr: of a run.
        config: the comparison's configuration as plain values.
        members: runs that train together; their own jobs examine them later.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    contender: Contender | None = None
    seed: int = 0
    steps: int = 1
    lr: float = 0.0
    config: dict[str, Any] = {}
    members: tuple[Job, ...] = ()

    @property
    def label(self) -> str:
        """Whose job it is."""
        return self.contender.label if self.contender else UNTRAINED

    @property
    def name(self) -> str:
        """What people read while it runs."""
        return {
            "untrained": "untrained model",
            "probe": f"{self.label}, speed",
            "search": f"{self.label}, learning rate",
            "together": f"{len(self.members)} runs together",
            "run": f"{self.label}, seed {self.seed}",
        }[self.kind]

    def folder(self, root: Path) -> Path:
        """Where it writes."""
        if self.members:
            first = self.members[0].folder(root)
            return root / "together" / f"{first.parent.name}-{first.name}"
        if self.contender is None:
            return root / UNTRAINED
        key = self.contender.key
        return {
            "probe": root / "probe" / key,
            "search": root / "lr" / key,
            "run": root / "runs" / key / f"seed{self.seed}",
        }[self.kind]

    def settings(self) -> CompareConfig:
        """The comparison's configuration."""
        return CompareConfig(**self.config)


@dataclass(frozen=True)
class Failure:
    """Why a job did not come to its end.

    Attributes:
        reason: for people.
        final: whether trying again cannot help.
        attempts: how often it was tried.
    """

    reason: str
    final: bool = False
    attempts: int = 1


class JobFolder:
    """The files of one job."""

    def __init__(self, path: Path):
        self.path = path

    def job(self) -> Job:
        """What is to be done."""
        found = self._read(JOB)
        if found is None:
            raise FormatError(f"{self.path / JOB} is not there: nobody has begun this job. Start the comparison again.")
        return Job(**found)

    def result(self) -> dict[str, Any] | None:
        """What came out; None before the end."""
        return self._read(RESULT)

    def failure(self) -> Failure | None:
        """Why the last attempt failed; None when it did not."""
        found = self._read(FAILURE)
        return None if found is None else Failure(**found)

    def attempts(self) -> int:
        """How many attempts have failed."""
        failure = self.failure()
        return failure.attempts if failure else 0

    def fail(self, reason: str, *, final: bool) -> None:
        """Write down that an attempt failed."""
        write_json(self.path / FAILURE, {"reason": reason, "final": final, "attempts": self.attempts() + 1})

    def forgive(self) -> None:
        """Forget that it failed, so that it is tried again."""
        (self.path / FAILURE).unlink(missing_ok=True)

    def finish(self, result: dict[str, Any]) -> None:
        """Write down what came out."""
        write_json(self.path / RESULT, result)
        self.forgive()

    def progress(self) -> dict[str, Any]:
        """How far it is: `phase`, `step`, `total`, `loss`, `elapsed` seconds; empty before it starts."""
        try:
            return dict(parsed((self.path / PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # absent, or just being replaced: the next look will find it
            return {}

    def clear(self, part: str = "") -> None:
        """Remove one of its folders, or all there is."""
        shutil.rmtree(self.path / part, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        """A file's content; None where it is not there, or is no more: other processes work here too."""
        file = self.path / name
        try:
            return dict(parsed(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise FormatError(f"{file} cannot be read ({error}). Remove {self.path} to do this part again.") from None


class Progress:
    """Says in a file how far a job is, at most once a second.

    Args:
        folder: of the job.
        silent: say nothing: another process of the job does.
    """

    def __init__(self, folder: JobFolder, *, silent: bool = False):
        self.folder, self.silent = folder, silent
        self.before = float(folder.progress().get("elapsed", 0.0))
        self.began, self.last = time.monotonic(), 0.0
        self.state: dict[str, Any] = {"phase": "loading", "step": 0, "total": 0, "loss": None}

    @property
    def elapsed(self) -> float:
        """Seconds that all attempts took, as far as they wrote it down."""
        return self.before + time.monotonic() - self.began

    def say(self, *, now: bool = False, **state: Any) -> None:
        """Note what changed."""
        self.state.update(state)
        if not self.silent and (now or time.monotonic() - self.last >= 1):
            self.last = time.monotonic()
            part = self.folder.path / f"{PROGRESS}.part"  # no fsync: nothing depends on it after a crash
            part.write_text(json.dumps({**self.state, "elapsed": round(self.elapsed, 2)}), encoding="utf-8")
            part.replace(self.folder.path / PROGRESS)

"""Runs that train together on one base: which ones, how they are dealt out, and what is written down of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from adapterlab.io.atomic import write_json
from adapterlab.json_text import parsed

if TYPE_CHECKING:
    from adapterlab.compare.jobs import Job, JobFolder

_FILE = "shared.json"


class Shared(BaseModel):
    """How a run trained, or is to train.

    Attributes:
        runs: that shared the base, itself among them; 1: by itself.
        reason: why it is by itself after all, else "".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: int = 1
    reason: str = ""

    def write(self, folder: JobFolder) -> None:
        """Write it down in the folder of a run."""
        write_json(folder.path / _FILE, self.model_dump())


def shared(folder: JobFolder) -> Shared | None:
    """Return what is written down of a run; None before it trained with others, or was found unable to."""
    file = folder.path / _FILE
    return Shared(**parsed(file.read_text(encoding="utf-8"))) if file.is_file() else None


def dealt(jobs: Sequence[Job], places: int) -> list[list[Job]]:
    """Deal runs out to so many processes, two at least to each, the like of each other as far apart as it goes.

    Args:
        jobs: neighbours are alike.
        places: processes at a time.

    Returns:
        Groups in which each run stands once; none where there are less than two runs.
    """
    count = min(places, len(jobs) // 2)
    return [list(jobs[start::count]) for start in range(count)]

"""Lines of text on how a comparison goes, where there is no terminal to draw on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adapterlab.compare.engine import Active
from adapterlab.compare.results import Comparison, Run


class Lines:
    """Writes a line whenever a job starts and whenever a run ends."""

    def __init__(self, write: Callable[[str], None]):
        self.write = write
        self.told: set[tuple[str, int, str]] = set()
        self.begun: set[str] = set()

    def update(self, comparison: Comparison, active: Sequence[Active]) -> None:
        """Say what is new."""
        ended = [run for run in comparison.runs if run.status in ("finished", "failed")]
        for run in ended:
            if (key := (run.label, run.seed, run.status)) not in self.told:
                self.told.add(key)
                self.write(f"[{len(ended)}/{len(comparison.runs)}] {_said(run, comparison)}")
        for job in active:
            if job.name not in self.begun:
                self.begun.add(job.name)
                self.write(f"started: {job.name}")


def _said(run: Run, comparison: Comparison) -> str:
    name = run.label if run.is_untrained else f"{run.label}, seed {run.seed}"
    if run.status == "failed" or run.best is None:
        return f"{name} failed: {run.reason.splitlines()[0] if run.reason else 'no reason'}"
    score = f"{run.best.score:.1%} right, " if comparison.judge == "score" and run.best.score is not None else ""
    rate = f", learning rate {run.lr:g}" if run.lr is not None else ""
    return f"{name}: {score}loss {run.best.loss:.4f}{rate}, {run.wall_seconds or 0:.0f} s"

"""The folder of a run: metrics, adapters, the checkpoint to continue from, and what the run was.

run.json          configuration and where it came from, versions, data, model summary, results
config.yaml       the same configuration, ready to be run again
metrics.jsonl     one line a step and one an evaluation
best/, last/      adapters
trackers/         what trackers such as tensorboard write
checkpoint/       the state for `--resume`; one file, replaced when the next one is complete
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapterlab import io
from adapterlab.errors import ConfigError, FormatError, OutputError
from adapterlab.io.atomic import check_free, explained, write_json
from adapterlab.io.links import check_links
from adapterlab.train.loop import Listener, Loop, Record
from adapterlab.train.signals import Interrupted

RUN, CONFIG, METRICS, BEST, LAST = "run.json", "config.yaml", "metrics.jsonl", "best", "last"
TRACKERS = "trackers"
CHECKPOINT = Path("checkpoint") / "state.pt"
# Settings that may differ when a run is resumed, because they cannot change what is trained.
_FREE = ("output", "trust_remote_code", "training.log_every", "training.save_every", "training.trackers")


def claim(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the output folder, or check that it may be used.

    Raises:
        FormatError: a link in it leads out of it.
        OutputError: it holds something and neither `resume` nor `overwrite` is asked for, it holds something else than
            a run, or it cannot be written.
    """
    check_links(folder)
    filled = folder.is_dir() and any(folder.iterdir())
    ours = (folder / RUN).is_file()
    if filled and (resume or overwrite) and not ours:
        raise OutputError(
            f"{folder} is not empty and holds no {RUN}: it is not a run's folder, and its content is left alone. "
            "Choose another output."
        )
    if filled and not (resume or overwrite):
        hint = " To continue the run in it: --resume (resume=True)." if ours else ""
        raise OutputError(
            f"The folder {folder} is not empty, and nothing is overwritten unless asked. Choose another output, or "
            f"pass --overwrite (overwrite=True).{hint}"
        )
    if not resume:
        check_free(folder, overwrite=overwrite)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()


def clear(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    with explained(folder):
        for name in (RUN, CONFIG, METRICS):
            (folder / name).unlink(missing_ok=True)
        for name in (BEST, LAST, TRACKERS, CHECKPOINT.parent.name):
            shutil.rmtree(folder / name, ignore_errors=True)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which settings of two flat configurations differ, those that cannot change the training left out."""
    return [
        f"  {key}: {_short(saved.get(key))} in the checkpoint, {_short(now.get(key))} now"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key) and key not in _FREE
    ]


def check_same(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run continues with what it began with.

    Raises:
        ConfigError: configuration or data are others than those of the checkpoint.
    """
    differing = differences(saved, now)
    if differing:
        raise ConfigError(
            f"The run in {folder} cannot be resumed, because it would not be the same run:\n"
            + "\n".join(differing)
            + f"\nUse its own settings (adapterlab train {folder / CONFIG} --resume), or another output."
        )


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of run.json, or nothing when there is none.

    Raises:
        FormatError: it is damaged.
    """
    file = folder / RUN
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} cannot be read ({error}). Start again with --overwrite.") from None


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before stays until this one is complete on the disk.

    Raises:
        OutputError: the disk is full or the file cannot be written. The checkpoint before is untouched.
    """
    part = file.with_suffix(".part")
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                torch.save(dict(state), stream)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def read_state(file: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        FormatError: it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own
        raise FormatError(
            f"The checkpoint {file} cannot be read ({str(error).splitlines()[0]}). Start again with --overwrite."
        ) from error
    return state


class RunFolder(Listener):
    """Writes a run's folder while it trains.

    Attributes:
        folder: of the run.
        identity: flat configuration and data fingerprint; a resumed run must have the same.
        facts: content of run.json.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Any]):
        self.folder, self.identity, self.facts = folder, dict(identity), dict(facts)
        self._saved = -1

    # ------------------------------------------------------------------ continuing

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """Put a loop into the state of the checkpoint and forget the metrics of later steps.

        Args:
            loop: a new one, with the structure of the checkpoint's adapter.
            state: what `read_state` found.

        Raises:
            ConfigError: configuration or data are others than those of the checkpoint.
        """
        check_same(self.folder, state["identity"], self.identity)
        loop.load_state_dict(state)
        self._saved = loop.status.step
        if loop.accelerator.is_main_process:
            metrics = self.folder / METRICS
            with explained(metrics):
                os.truncate(metrics, min(state["metrics"], metrics.stat().st_size))

    def _tidy(self) -> None:
        """Undo what a kill in the middle of replacing an adapter leaves behind."""
        for name in (BEST, LAST):
            for old in self.folder.glob(f".{name}.*.old"):
                shutil.rmtree(old) if (self.folder / name).exists() else old.rename(self.folder / name)
            for part in self.folder.glob(f".{name}.*.part"):
                shutil.rmtree(part)

    # ------------------------------------------------------------------ events

    def started(self, loop: Loop) -> None:
        """Note that the run is under way; without a checkpoint to continue from, start the metrics anew."""
        if loop.accelerator.is_main_process:
            self._tidy()
            self.note("running")
            if not loop.status.step:
                with explained(self.folder / METRICS):
                    (self.folder / METRICS).write_bytes(b"")

    def stepped(self, loop: Loop, record: Record) -> None:
        """Write a line."""
        self._line(loop, record)

    def evaluated(self, loop: Loop, record: Record, improved: bool) -> None:
        """Write a line, and the adapter if it is the best."""
        self._line(loop, record)
        if improved:
            self._adapter(loop, BEST)

    def settled(self, loop: Loop) -> None:
        """Save a checkpoint when it is time."""
        if loop.status.step % loop.training.save_every == 0:
            self.save(loop)

    def interrupted(self, loop: Loop) -> None:
        """Save a checkpoint, and raise with the folder in the message."""
        self.save(loop)
        if loop.accelerator.is_main_process:
            self.note("interrupted")
        raise Interrupted(loop.status.step, self.folder)

    def trained(self, loop: Loop) -> None:
        """Save a checkpoint at the end, so that a kill from here on costs nothing."""
        self.save(loop)

    def finished(self, loop: Loop) -> None:
        """Write the last adapter."""
        self._adapter(loop, LAST)

    # ------------------------------------------------------------------ writing

    def save(self, loop: Loop) -> None:
        """Write a checkpoint, unless this step has one."""
        if self._saved == loop.status.step:
            return
        state = {**loop.state_dict(), "identity": self.identity, "metrics": 0}
        if loop.accelerator.is_main_process:
            metrics = self.folder / METRICS
            with explained(metrics), metrics.open("ab") as stream:
                os.fsync(stream.fileno())
                state["metrics"] = stream.tell()
            write_state(self.folder / CHECKPOINT, state)
        self._saved = loop.status.step
        loop.accelerator.wait_for_everyone()

    def note(self, status: str, **more: Any) -> None:
        """Write run.json."""
        self.facts.update(status=status, **more)
        write_json(self.folder / RUN, _json(self.facts))

    def _line(self, loop: Loop, record: Record) -> None:
        if loop.accelerator.is_main_process:
            with explained(self.folder / METRICS), (self.folder / METRICS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(_json(record)) + "\n")

    def _adapter(self, loop: Loop, part: str) -> None:
        if loop.accelerator.is_main_process:
            status = loop.status
            notes = {"step": status.step, "train loss": status.train_loss, "evaluation loss": status.eval_loss}
            io.save(loop.host, self.folder / part, loop.name, overwrite=True, notes=_json(notes))
        loop.accelerator.wait_for_everyone()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json(value: Any) -> Any:
    """JSON has no NaN and no paths."""
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

"""The folder of a run: metrics, adapters, the checkpoint to continue from, and what the run was.

run.json          configuration and where it came from, versions, data, model summary, results
config.yaml       the same configuration, ready to be run again
metrics.jsonl     one line a step and one an evaluation; where tokens are routed, every `log_every` steps with `load`,
                  for each module by its path the share of the weight that each expert got in that step
best/, last/      adapters
trackers/         what trackers such as tensorboard write
logs/             what each process of the run but the first printed
checkpoint/       the state for `--resume`; one file with its checksum, replaced when the next one is complete, and
                  beside it a folder with what is split among processes, a file for each; see `train.parts`

Where a run takes the place of an earlier one, all this is written into .adapterlab-next/ until there is a first
checkpoint or adapter: until then the earlier results stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterlab import io
from adapterlab.core.usage import LOAD, Load
from adapterlab.errors import ConfigError, FormatError, OutputError
from adapterlab.io import successor
from adapterlab.io.atomic import new_file, write_json, write_text
from adapterlab.io.disk import alone, content, explained, remove, tidy
from adapterlab.io.finite import not_finite
from adapterlab.io.links import check_links
from adapterlab.json_text import parsed
from adapterlab.train import parts as split
from adapterlab.train.loop import Listener, Loop, Record
from adapterlab.train.ranks import LOGS
from adapterlab.train.signals import Interrupted

RUN, CONFIG, METRICS, BEST, LAST = "run.json", "config.yaml", "metrics.jsonl", "best", "last"
TRACKERS = "trackers"
CHECKPOINT = Path("checkpoint") / "state.pt"
_RESULTS = (RUN, CONFIG, METRICS, BEST, LAST, CHECKPOINT.parent.name)  # what the next run in the folder replaces
_SEAL = b"\nsha256 %s\n"
# Settings that may differ when a run is resumed, because they cannot change what is trained.
_FREE = (
    "output", "trust_remote_code", "training.log_every", "training.save_every", "training.trackers", "parallel",
    "cpu_offload",
)  # fmt: skip
_PROCESSES = "processes"
COMMITS, STREAMED = "data commits", "data files"  # of hub data sets, of streams; in early checkpoints there are none
# Where another number of processes goes on, a step has to have as many rows.
_STEP = ("training.batch_size", "training.accumulation", _PROCESSES)


@contextlib.contextmanager
def claimed(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Keep the output folder for one run as long as the context lasts.

    Raises:
        FormatError: a link in it leads out of it.
        OutputError: another process writes it, it holds something and neither `resume` nor `overwrite` is asked for, it
            holds something else than a run, or it cannot be written.
    """
    if folder.is_file():
        raise OutputError(f"{folder} is a file; an output folder is needed. Choose another path.")
    check_links(folder)
    made = not folder.exists()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder):
            for place in (folder, folder / CHECKPOINT.parent):
                if place.is_dir() and not place.is_symlink():
                    tidy(place)
            successor.recover(folder, _RESULTS)
            _check_usable(folder, resume=resume, overwrite=overwrite)
            yield
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # nothing came of it


def _check_usable(folder: Path, *, resume: bool, overwrite: bool) -> None:
    filled, ours = bool(content(folder)), (folder / RUN).is_file()
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


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which settings of two flat configurations differ, those that cannot change the training left out."""
    free = {*_FREE, _PROCESSES}
    for key in (COMMITS, STREAMED):
        known = bool(saved.get(key)) and key in now
        saved, now = _spread(key, saved, known), _spread(key, now, known)
    if saved.get(_PROCESSES, now.get(_PROCESSES)) != now.get(_PROCESSES):
        product = " × ".join(_STEP)
        saved, now = ({**s, product: math.prod(s[key] for key in _STEP)} for s in (saved, now))
        free |= {*_STEP}
    return [
        f"  {key}: {_short(saved.get(key))} in the checkpoint, {_short(now.get(key))} now"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key) and key not in free
    ]


def _spread(key: str, side: Mapping[str, Any], known: bool) -> dict[str, Any]:
    """Give each file or data set a line of its own; none where the other side does not know them."""
    own = side[key] if known else {}
    rest = {k: v for k, v in side.items() if k != key}
    return {**rest, **{f"{key.removesuffix('s')} {name}": fact for name, fact in own.items()}}


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
        return dict(parsed(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} cannot be read ({error}). Start again with --overwrite.") from None


def read_load(folder: Path) -> dict[int, Load]:
    """Return what the experts of a run were used, by the step; nothing where its method routes no tokens.

    Raises:
        FormatError: the metrics are damaged.
    """
    file = folder / METRICS
    if not file.is_file():
        return {}
    try:
        lines = [parsed(line) for line in file.read_text(encoding="utf-8").splitlines() if f'"{LOAD}"' in line]
        return {line["step"]: line[LOAD] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} cannot be read ({error}). Train again with --overwrite.") from None


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before stays until this one is complete on the disk.

    Behind what torch writes, which torch reads without it, stands the checksum of all that.

    Raises:
        OutputError: the disk is full or the file cannot be written. The checkpoint before is untouched.
    """
    with new_file(file) as stream:
        torch.save({**state, "sealed": True}, stream)
        stream.write(_SEAL % stream.hexdigest().encode())


def read_state(file: Path) -> dict[str, Any]:
    """Read a checkpoint, after checking that it is what was written.

    Raises:
        FormatError: it is damaged, or was saved with values that are not finite.
    """
    try:
        sealed = _check_seal(file)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if state.pop("sealed", False) and not sealed:  # checkpoints of early versions have no checksum
            raise ValueError("its checksum is gone")
    except Exception as error:  # torch.load has no error type of its own
        raise FormatError(
            f"The checkpoint {file} cannot be read ({str(error).splitlines()[0]}). Start again with --overwrite."
        ) from error
    split_off = {entry["way"][-1] for entry in state.get(split.PARTS, {}).get("tensors", ())}
    if (key := not_finite({k: v for k, v in state["adapter"].items() if k not in split_off})) is not None:
        raise FormatError(
            f"The checkpoint {file} holds values that are not finite, first in {key}: training had failed before it "
            "was saved. Start again with --overwrite, and a lower training.lr."
        )
    return state


def _check_seal(file: Path) -> bool:
    """Compare a checkpoint with the checksum at its end; say whether there is one."""
    length = len(_SEAL % (b"0" * 64))
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END) - length
        stream.seek(max(0, size))
        seal = stream.read()
        if not seal.startswith(_SEAL.partition(b"%")[0]):
            return False
        stream.seek(0)
        digest, left = hashlib.sha256(), size
        while left:
            left -= len(block := stream.read(min(left, 1 << 20)))
            digest.update(block)
    if seal != _SEAL % digest.hexdigest().encode():
        raise ValueError("it is damaged: its checksum differs")
    return True


class RunFolder(Listener):
    """Writes a run's folder while it trains.

    Attributes:
        folder: of the run.
        identity: flat configuration and data fingerprint; a resumed run must have the same.
        facts: content of run.json.
        called: name under which adapters are saved; None: the loop's.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Any], called: str | None = None):
        self.folder, self.identity, self.facts, self.called = folder, dict(identity), dict(facts), called
        self._work = folder  # where files go
        self._outdated: list[Path] = []  # of trackers, which write into the folder from the start
        self._saved = -1

    # ------------------------------------------------------------------ beginning and continuing

    def begin(self, config: str) -> None:
        """Make room for a new run; the results of an earlier one stay until the new one has any.

        Args:
            config: text of config.yaml.

        Raises:
            OutputError: it cannot be written.
        """
        with explained(self.folder):
            remove(self.folder / LOGS)
        if any((self.folder / name).exists() for name in (CHECKPOINT, BEST, LAST)):
            self._outdated = [path for path in (self.folder / TRACKERS).rglob("*") if path.is_file()]
            self._work = successor.begin(self.folder)
        else:
            with explained(self.folder):
                for name in (*_RESULTS, TRACKERS):
                    remove(self.folder / name)
        try:
            self.note("running")  # first of all: it says that the folder is a run's
            write_text(self._work / CONFIG, config)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Leave the earlier results in their place, after an error before there were any new ones."""
        if self._work != self.folder:
            remove(self._work)

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """Put a loop into the state of the checkpoint and forget the metrics of later steps.

        Args:
            loop: a new one, with the structure of the checkpoint's adapter.
            state: what `read_state` found.

        Raises:
            ConfigError: configuration or data are others than those of the checkpoint.
        """
        check_same(self.folder, state["identity"], self.identity)
        loop.load_state_dict(split.filled(self.folder / CHECKPOINT.parent, state, loop.tensor_at))
        self._saved = loop.status.step
        if loop.accelerator.is_main_process:
            metrics = self.folder / METRICS
            with explained(metrics):
                os.truncate(metrics, min(state["metrics"], metrics.stat().st_size))

    def _arrived(self) -> None:
        """There is a first result: now the earlier ones go."""
        if self._work != self.folder:
            successor.arrive(self.folder, _RESULTS)
            self._work = self.folder
            for path in self._outdated:
                remove(path)

    # ------------------------------------------------------------------ events

    def started(self, loop: Loop) -> None:
        """Note that the run is under way; without a checkpoint to continue from, start the metrics anew."""
        if loop.accelerator.is_main_process:
            self.note("running")
            if not loop.status.step:
                with explained(self._work / METRICS):
                    (self._work / METRICS).write_bytes(b"")

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
        loop.accelerator.wait_for_everyone()  # a launcher ends the others when the first one leaves
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
        state, parts = loop.parallel.taken_apart({**loop.state_dict(), "identity": self.identity, "metrics": 0})
        written = self._write_parts(loop, parts) if parts else []
        if loop.accelerator.is_main_process:
            home = self._work / CHECKPOINT.parent
            if parts:
                state[split.PARTS] = split.listed(home, parts, written)
            metrics = self._work / METRICS
            with explained(metrics), metrics.open("ab") as stream:
                os.fsync(stream.fileno())
                state["metrics"] = stream.tell()
            write_state(self._work / CHECKPOINT, state)
            split.tidy(home, loop.status.step if parts else None)
            self._arrived()
        self._saved = loop.status.step
        loop.accelerator.wait_for_everyone()

    def _write_parts(self, loop: Loop, parts: Mapping[split.Way, Tensor]) -> list[split.Written]:
        """Write this process's part of a checkpoint where the first one writes the rest, and return what each wrote."""
        home = Path(loop.parallel.gathered(str(self._work))[0]) / CHECKPOINT.parent
        found = split.write(home, loop.status.step, loop.accelerator.process_index, parts)
        return loop.parallel.gathered(found)

    def note(self, status: str, **more: Any) -> None:
        """Write run.json."""
        self.facts.update(status=status, **more)
        write_json(self._work / RUN, _json(self.facts))

    def _line(self, loop: Loop, record: Record) -> None:
        if loop.accelerator.is_main_process:
            with explained(self._work / METRICS), (self._work / METRICS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(_json(record)) + "\n")

    def _adapter(self, loop: Loop, part: str) -> None:
        loop.check_weights()
        main = loop.accelerator.is_main_process
        if main or loop.parallel.saves_together:
            status = loop.status
            notes = {"step": status.step, "train loss": status.train_loss, "evaluation loss": status.eval_loss}
            io.save(
                loop.host, self._work / part, loop.name, overwrite=True, kind=None, called=self.called,
                notes=_json(notes), writes=main,
            )  # fmt: skip
        if main:
            self._arrived()
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

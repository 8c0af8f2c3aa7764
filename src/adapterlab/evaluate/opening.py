"""What a name on the command line stands for: a training run, a saved adapter, or a base model."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterlab.data.origin import pinned
from adapterlab.errors import FormatError, nearest
from adapterlab.io.links import check_links
from adapterlab.json_text import parsed
from adapterlab.models import check
from adapterlab.models.catalogue import public_name
from adapterlab.paths import user_path

if TYPE_CHECKING:
    from adapterlab.hosts import Host

RUN_FILE = "run.json"
_ADAPTER_FILES = ("method.json", "adapter_config.json")


@dataclass(frozen=True)
class Place:
    """A run, adapter or model that was named, with what is needed to load it.

    Attributes:
        kind: which of the three.
        base: name of the base model.
        adapter: folder of the adapter; None for a base model.
        run: folder of the run; None for the others.
        data: the run's data settings as they were written down, hub data sets at the commits that it read; empty for
            the others.
        precision: the run's, else "bf16".
        quantize: the run's, or None.
        trust_remote_code: whether code that the base brings may run; asked for by the caller, never by a folder.
    """

    kind: Literal["run", "adapter", "model"]
    base: str
    adapter: Path | None = None
    run: Path | None = None
    data: dict[str, Any] | None = None
    precision: str = "bf16"
    quantize: str | None = None
    trust_remote_code: bool = False

    @property
    def base_model(self) -> str:
        """What the base is known as, whichever of its names was given: two of the same base have the same."""
        name = public_name(self.base)
        folder = user_path(name)
        return str(folder.resolve()) if folder.is_dir() else name.lower()

    @property
    def system(self) -> str | None:
        """The system message that a run was trained with."""
        return (self.data or {}).get("system")

    @property
    def folders(self) -> list[Path]:
        """What is read when it is opened, as far as that lies in folders of the user."""
        found = [self.adapter, self.run, user_path(self.base)]
        return [folder for folder in found if folder is not None and folder.is_dir()]

    @property
    def label(self) -> str:
        """A short name, usable as an adapter's name: that of the run or adapter folder."""
        folder = self.run or self.adapter
        text = folder.resolve().name if folder else Path(self.base).name
        return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-") or "adapter"


@dataclass(frozen=True)
class Opened:
    """A loaded model.

    Attributes:
        model: of transformers, in eval mode.
        tokenizer: its tokenizer.
        host: the host of its adapters; None for a plain base model.
    """

    model: Any
    tokenizer: Any
    host: Host | None


def locate(
    target: str | Path, *, model: str | None = None, checkpoint: str = "best", trust_remote_code: bool = False
) -> Place:
    """Say what a name stands for, without loading it.

    Args:
        target: a run folder, an adapter folder, or the name of a base model.
        model: another base model than the one the run or adapter names.
        checkpoint: which adapter of a run: "best" or "last".
        trust_remote_code: run the code that the base model brings.

    Raises:
        FormatError: a run or adapter folder is damaged, lacks the checkpoint, or does not name its base model.
        ModelError: it is neither a folder nor the name of a model.
    """
    found = _find(target, model, checkpoint)
    return dataclasses.replace(found, trust_remote_code=trust_remote_code)


def _find(target: str | Path, model: str | None, checkpoint: str) -> Place:
    folder = user_path(target)
    if (folder / RUN_FILE).is_file():
        check_links(folder)
        return _run(folder, model, checkpoint)
    if folder.is_dir() and (folder / "config.json").is_file():
        return Place("model", model or str(target))
    if any((folder / name).is_file() for name in _ADAPTER_FILES):
        return Place("adapter", model or _base_of(folder), folder)
    if folder.is_dir() and (parts := _checkpoints(folder)):
        raise FormatError(
            f"{folder} holds {' and '.join(parts)}, but no {RUN_FILE}, so what was trained on is not known. Name the "
            f"adapter folder itself: {folder / parts[0]}."
        )
    check(model or target)
    return Place("model", model or str(target))


def open_target(place: Place, *, device: str | None = None, precision: str | None = None) -> Opened:
    """Load what `locate` found.

    Args:
        place: what to load.
        device: where to put it; by default cuda, else mps, else cpu.
        precision: of the base weights; by default that of the run, else "bf16".

    Raises:
        ModelError: the base model is unknown or damaged.
        FormatError: the adapter is damaged or was made for another base model.
    """
    from adapterlab.hosts import load
    from adapterlab.models import load_model

    model, tokenizer = load_model(
        place.base, precision=precision or place.precision, device=device, quantize=place.quantize,
        trust_remote_code=place.trust_remote_code,
    )  # fmt: skip
    host = load(model, place.adapter, place.label) if place.adapter else None
    return Opened(model, tokenizer, host)


def _run(folder: Path, model: str | None, checkpoint: str) -> Place:
    config = _config(folder)
    there = _checkpoints(folder)
    if checkpoint not in there:
        raise FormatError(
            f"The run {folder} has no checkpoint {checkpoint!r}. "
            + (f"{nearest(checkpoint, there)} Choose it with --checkpoint." if there else "It holds no adapter yet.")
        )
    return Place(
        "run",
        base=model or str(config["model"]),
        adapter=folder / checkpoint,
        run=folder,
        data=config["data"],
        precision=config.get("precision", "bf16"),
        quantize=config.get("quantize"),
    )


def _config(folder: Path) -> dict[str, Any]:
    """The resolved settings of a run."""
    file = folder / RUN_FILE
    advice = "Restore the file, or name the adapter folder itself, such as " + str(folder / "best") + "."
    try:
        facts: Any = parsed(file.read_text(encoding="utf-8"))
        config: Any = facts["config"]
        if not isinstance(config["model"], str) or not isinstance(config["data"], dict):
            raise TypeError("config.model should be a name and config.data a mapping")
        commits = dict(facts["data"].get("commits", {})) if "data" in facts else {}
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} cannot be read as JSON: {error}. {advice}") from None
    except (KeyError, TypeError) as error:
        raise FormatError(f"{file} does not describe a run ({type(error).__name__}: {error}). {advice}") from None
    return {**config, "data": pinned(config["data"], commits)}


def _checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if any((p / name).is_file() for name in _ADAPTER_FILES))


def _base_of(folder: Path) -> str:
    from adapterlab.io import read_info

    info = read_info(folder)
    base = info.copy or info.base_model
    if not base:
        raise FormatError(f"The adapter in {folder} does not name its base model. Give it: --model NAME.")
    return base

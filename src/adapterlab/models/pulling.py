"""From a model name to a folder on disk."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from adapterlab.errors import ConfigError, ModelError, nearest
from adapterlab.models.catalogue import DEFAULT, by_hub_id, catalogue
from adapterlab.models.folder import check_folder
from adapterlab.models.progress import bars
from adapterlab.models.source import Hub, Source
from adapterlab.paths import user_path

_FETCHING = ContextVar("fetching", default=True)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")


def pull(
    name: str | Path, *, revision: str | None = None, force: bool = False, verify: bool = False, progress: bool = True
) -> Path:
    """Make a model available on disk.

    An alias wins over a folder of the same name; write `./name` for the folder.

    Args:
        name: a local folder, a hub id (`org/name`) or a catalogue alias.
        revision: branch, tag or commit of a hub repository.
        force: fetch again even when it is there.
        verify: hash all files of a copy that is there, and fetch it again if one differs.
        progress: whether to show progress bars on stderr.

    Returns:
        The folder it lies in.

    Raises:
        ModelError: the name is unknown, the folder is not a base model, or fetching failed.
        OutputError: the disk is full or cannot be written.
    """
    found = _find(str(name), revision)
    if isinstance(found, Path):
        return check_folder(found)
    source, folder = found
    where = source.present(folder)
    if not _FETCHING.get():
        return where or _refuse_to_fetch(name)
    with bars(progress) as display:
        if where and not force and verify:
            force = bool(source.damaged(where, display))
        if where and not force:
            return where
        try:
            return source.fetch(folder, display, force=force)
        except ModelError as error:
            if not isinstance(source, Hub):
                raise
            raise ModelError(f"{error}\n{_without_hub(source.repo)}") from error


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Let names of models that files give mean only what is on this machine, while the block runs."""
    before = _FETCHING.set(False)
    try:
        yield
    finally:
        _FETCHING.reset(before)


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """Find the folder to load a model from, fetching it first when it is not on disk.

    A hub id also finds a copy that the catalogue has from elsewhere, unless the hub's own is on disk.

    Args:
        name: a local folder, a hub id or a catalogue alias.
        revision: branch, tag or commit of a hub repository.
    """
    entry = by_hub_id(str(name)) if revision is None and not user_path(name).exists() else None
    if entry is not None and (copy := Hub(entry.hub).present(entry.folder) or entry.where()) is not None:
        return copy
    return pull(name, revision=revision)


def check(name: str | Path) -> None:
    """Check that a name has one of the three forms, without fetching anything.

    Raises:
        ModelError: it has none.
    """
    _find(str(name), None)


def _find(name: str, revision: str | None) -> Path | tuple[Source, Path]:
    """Tell which of the three forms a name has."""
    entry = catalogue().get(name)
    folder = user_path(name)
    if entry is not None and revision is None:
        return entry.source, entry.folder
    if entry is not None and isinstance(entry.source, Hub):
        return Hub(entry.source.repo, revision), entry.folder
    if revision is not None and (entry is not None or folder.exists()):
        raise ConfigError(f"revision={revision!r} has no meaning for {name!r}, which is not on the hub. Leave it out.")
    if folder.exists():
        return folder
    if _HUB_ID.fullmatch(name):
        return Hub(name, revision), folder
    beside = _beside(name) if os.sep in name else []
    close = nearest(name, beside) if beside else nearest(name.lower(), catalogue())
    raise ModelError(
        f"There is no model {name!r}: it is no folder on this machine, no alias of the catalogue and no hub id. "
        f"{close} A model is named by a local folder (./path/to/model), a hub id (org/name) or an alias; list the "
        "aliases with: adapterlab models."
    )


def _beside(name: str) -> list[str]:
    """Folders beside a path that is not there, named as it is."""
    with contextlib.suppress(OSError):
        return [str(Path(name).with_name(one.name)) for one in user_path(name).parent.iterdir() if one.is_dir()]
    return []


def _refuse_to_fetch(name: str | Path) -> Path:
    raise ModelError(
        f"The adapter needs the model {str(name)!r}, which is not on this machine, and loading an adapter asks no "
        f"network: the name comes from its files. If you want that model, fetch it first: adapterlab pull {name}."
    )


def _without_hub(repo: str) -> str:
    if (entry := by_hub_id(repo)) is not None and not isinstance(entry.source, Hub):
        return f"Without the hub it is there under the alias {entry.alias!r}, from the package index."
    close = nearest(repo.rsplit("/", 1)[-1].lower(), catalogue())
    return (
        f"{repo!r} is no folder on this machine either. A local folder with config.json, weights and tokenizer works "
        f"without the hub, and so does the alias {DEFAULT!r}, which comes from the package index. {close}"
    )

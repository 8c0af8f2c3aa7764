"""What rows came from, for a run that goes on later: the commit of a hub data set, the files of a stream."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterlab.errors import DataError

WHOLE = 1 << 30  # bytes of a file up to which all of it is hashed
_BLOCK, _BLOCKS = 1 << 18, 64  # of a larger one: that many pieces, from its beginning to its end
_DIGITS = 16  # of a digest, for people to compare
_REACH = 10.0  # seconds for the hub to answer
_COMMIT = re.compile(r"[0-9a-f]{40}")
Stat = tuple[int, int, int]


# ---------------------------------------------------------------------- the hub


class Commits:
    """The commit that is read of each hub data set: asked once, and the same again where a run goes on.

    Attributes:
        before: those that an earlier process read, by what was asked for.
        found: those that are read now.
    """

    def __init__(self, before: Mapping[str, str] | None = None):
        self.before, self.found = dict(before or {}), dict[str, str]()

    def of(self, path: str, name: str | None, revision: str | None) -> str | None:
        """Return the commit to read; None: neither the hub nor the cache of `datasets` says which it is.

        Args:
            path: hub id of a data set.
            name: its configuration.
            revision: branch, tag or commit; None: the default branch.

        Raises:
            DataError: the hub does not have it (any more), or the cache has another one and the hub does not answer.
        """
        asked = _asked(path, revision)
        if asked not in self.found and (commit := _commit(path, name, revision, self.before.get(asked))) is not None:
            self.found[asked] = commit
        return self.found.get(asked)


def pinned(data: Mapping[str, Any], commits: Mapping[str, str]) -> dict[str, Any]:
    """Return data settings that read the commits which a run read, whatever the hub has now.

    Args:
        data: the run's settings, as they were written down.
        commits: that it read, by what was asked for.
    """
    revision = commits.get(_asked(str(data.get("path")), data.get("revision")), data.get("revision"))
    sources = data.get("sources") and [pinned(source, commits) for source in data["sources"]]
    own = {key: value for key, value in {"revision": revision, "sources": sources}.items() if value}
    return {**data, **own}


def _asked(path: str, revision: str | None) -> str:
    return f"{path}@{revision}" if revision else path


def _commit(path: str, name: str | None, revision: str | None, before: str | None) -> str | None:
    wanted = before or revision
    try:
        return _on_hub(path, wanted)
    except DataError:
        raise
    except Exception:  # no connection, no such repository, no leave to read it: `datasets` says so when it loads
        cached = _cached(path, name)
    if before is None and wanted is not None and not _COMMIT.fullmatch(wanted):
        wanted = _known(path, wanted) or wanted
    if wanted is None or cached is None or cached == wanted:
        return cached or before
    raise _other(path, wanted, cached, "the hub does not answer, and the cache of `datasets` holds")


def _on_hub(path: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().dataset_info(path, revision=revision, timeout=_REACH).sha
    except RevisionNotFoundError:
        now = HfApi().dataset_info(path, timeout=_REACH).sha
        raise DataError(
            f"The data set {path!r} has no revision {revision!r} on the hub (any more); its default branch is at "
            f"{now}. A run that began with that revision cannot go on with other rows: start again with --overwrite, "
            "or set data.revision to a branch, tag or commit that is there."
        ) from None


def _other(path: str, wanted: str, found: str, why: str) -> DataError:
    return DataError(
        f"Revision {wanted} of the data set {path!r} is to be read, as when the run began or as data.revision says, "
        f"but {why} commit {found}, whose rows may be others. Connect to the hub, or start a run of its own with "
        f"data.revision={found}."
    )


def _cached(path: str, name: str | None) -> str | None:
    """The commit that `datasets` takes without a connection: the newest in its cache."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, last = path.split("/")
    home = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(last)])
    found = [folder for folder in home.glob(f"{name or '*'}/*/*") if folder.is_dir() and _COMMIT.fullmatch(folder.name)]
    return max(found, key=lambda folder: folder.stat().st_mtime).name if found else None


def _known(path: str, revision: str) -> str | None:
    """The commit that a branch or tag was at when the hub was asked last, as its client's cache says."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(path, "README.md", repo_type="dataset", revision=revision)
    return Path(card).parent.name if isinstance(card, str) else None


def check_loaded(path: str, files: Sequence[Mapping[str, str]], commit: str | None) -> None:
    """Check that a table of the cache is of the commit that was to be read: `datasets` takes another when it must.

    Args:
        path: hub id of the data set.
        files: the table's files, as `datasets` names them.
        commit: that was to be read; None: any.

    Raises:
        DataError: it is another one.
    """
    found = {folder.name for file in files if _COMMIT.fullmatch((folder := Path(file["filename"]).parent).name)}
    if commit is not None and (others := found - {commit}):
        raise _other(path, commit, min(others), "the hub did not give it, and the cache of `datasets` holds")


# ---------------------------------------------------------------------- files


class Files:
    """The local files of a stream, which must stay what they are from the beginning of a run to its end.

    Attributes:
        facts: of each file its size and a digest; of a large one, of which a sample is hashed, its time too.
    """

    def __init__(self, listed: Callable[[], Sequence[Path]]):
        self._listed = listed
        self._stats = self._seen()
        self.facts = {str(file): _facts(file) for file in self._stats}

    def check(self) -> None:
        """Check that the files are as they were.

        Raises:
            DataError: one is another, is gone, or was added.
        """
        if (seen := self._seen()) == self._stats:
            return
        now = {str(file): _facts(file) for file in seen}
        lines = [
            f"  {file}: {self.facts.get(file, 'not there')} at the beginning, {now.get(file, 'not there')} now"
            for file in dict.fromkeys([*self.facts, *now])
            if self.facts.get(file) != now.get(file)
        ]
        if lines:
            raise DataError(
                "Files changed while their rows are streamed, so the rows to come would be others:\n"
                + "\n".join(lines)
                + "\nPut them back and continue with --resume, or start again with --overwrite."
            )
        self._stats = seen  # touched, or replaced by a copy

    def _seen(self) -> dict[Path, Stat]:
        found = {}
        for file in self._listed():
            stat = file.stat()
            found[file] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        return found


def _facts(file: Path) -> str:
    stat, digest = file.stat(), hashlib.blake2b()
    with file.open("rb") as stream:
        if stat.st_size <= WHOLE:
            while block := stream.read(1 << 20):
                digest.update(block)
            return f"{stat.st_size:,} bytes, digest {digest.hexdigest()[:_DIGITS]}"
        for i in range(_BLOCKS):
            stream.seek((stat.st_size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    when = datetime.datetime.fromtimestamp(stat.st_mtime, datetime.UTC).isoformat(timespec="milliseconds")
    return f"{stat.st_size:,} bytes of {when}, digest {digest.hexdigest()[:_DIGITS]}"

"""Adapters that exist already as parts of another one: from folders, from those on the model, or fresh ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from adapterlab.core.adapter import Copy
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.errors import AdapterlabError, ConfigError, FormatError
from adapterlab.io.folder import CONFIG, METHOD, read_info
from adapterlab.models.catalogue import public_name
from adapterlab.paths import user_path
from adapterlab.registry import method as method_by_id

Entry = str | dict[str, Any]  # of a setting: a folder, the name of an attached adapter, or settings with a `name`
_IN_A_RUN = ("best", "last")  # adapters of a run's folder; the first that is there is taken


class Part(NamedTuple):
    """An adapter that becomes a part of another one.

    Attributes:
        name: of the part.
        method: what it is.
        tensors: by the keys of `Carrier.tensors`; None for one that starts anew.
    """

    name: str
    method: Method
    tensors: dict[str, Tensor] | None


def compose(host: Carrier, name: str, method: Method, entries: Mapping[str, Entry]) -> None:
    """Attach existing adapters as parts of another one, with their values, and let it keep their settings.

    Heads and other modules that they trained whole are left behind: each task has its own.

    Args:
        host: of the model.
        name: of the adapter that consists of them.
        method: of that one; its setting `adapters` becomes what the entries stand for.
        entries: by the name of the part; see `Entry`.

    Raises:
        FormatError: a folder holds no adapter, or one that does not fit the model.
        ConfigError: an entry is neither.
        AttachError: an adapter became another one as a part.
    """
    settled, values = {}, {}
    for part in _parts(host, name, entries):
        saved = None if part.tensors is None else {f"{part.name}/{key}": t for key, t in part.tensors.items()}
        host.compose(name, part.name, part.method, saved)
        settled[part.name] = {"name": part.method.id, **part.method.model_dump(mode="json")}
        values.update(saved or {})
    host.load_state_dict(name, {**host.tensors(name), **values})
    host.settle(name, method.replace(adapters=settled))


def compose_saved(
    host: Carrier, name: str, method: Method, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]
) -> None:
    """Attach the parts with the structure that the tensors of the whole have; the values are copied in afterwards.

    Args:
        host: of the model.
        name: of the adapter that consists of them.
        method: of that one.
        entries: settings of the parts, as `compose` let them be kept; or what `compose` takes, where a run goes on by
            its own settings, or the parts are in folders of their own.
        tensors: of the whole, by the keys of `Carrier.tensors`.
    """
    if any(isinstance(entry, str) for entry in entries.values()):
        return compose(host, name, method, entries)
    for part, entry in entries.items():
        host.compose(name, part, _made(part, entry), tensors)


def opened(host: Carrier, name: str, entries: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each part with the name of its adapter on the model, where one from a folder stays for its turn alone.

    A folder is an adapter's or a run's, whose best adapter is taken, or the last where nothing was evaluated.

    Args:
        host: of the model.
        name: of the adapter that consists of them.
        entries: folders, or names of adapters on the model, by the name of the part.

    Raises:
        FormatError: a folder holds no adapter, or one that does not fit the model, or two are of different models.
    """
    from adapterlab.hosts import load

    _check_bases({p: e for p, e in entries.items() if e not in host.methods or e == name})
    for part, entry in entries.items():
        if entry in host.methods and entry != name:
            yield part, entry
            continue
        passing = f"{name}-{part}-from-its-folder"
        try:
            load(host.model, _adapter_in(entry), passing, active=False)
        except AdapterlabError as error:
            raise type(error)(f"adapters[{part!r}]: {error}") from None
        try:
            yield part, passing
        finally:
            host.detach(passing)


def _adapter_in(entry: str) -> Path:
    """The folder of an adapter, or that of the one to use in a run's folder."""
    folder = user_path(entry)
    places = (folder, *(folder / inner for inner in _IN_A_RUN))
    return next((place for place in places if _holds_adapter(place)), folder)


def _holds_adapter(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (METHOD, CONFIG))


def _check_bases(entries: Mapping[str, str]) -> None:
    """Require that adapters from folders do not name different base models.

    Raises:
        FormatError: they do.
    """
    folders = {part: place for part, entry in entries.items() if _holds_adapter(place := _adapter_in(entry))}
    bases = {part: base for part, place in folders.items() if (base := read_info(place).base_model)}
    first = next(iter(bases), None)
    for part, base in bases.items():
        if first is not None and public_name(base).lower() != public_name(bases[first]).lower():
            raise FormatError(
                f"adapters[{first!r}] was made for the base model {bases[first]!r} and adapters[{part!r}] for "
                f"{base!r}: a change of one means nothing in the other. Choose adapters of one model; if these are "
                f"names of the same one, let base_model say so in {folders[part]}."
            )


def _parts(host: Carrier, name: str, entries: Mapping[str, Entry]) -> Iterator[Part]:
    for part, entry in entries.items():
        if not isinstance(entry, str):
            yield Part(part, _made(part, entry), None)
            continue
        for _, source in opened(host, name, {part: entry}):
            taken = _taken(host, part, source)
        yield taken


def _taken(host: Carrier, part: str, source: str) -> Part:
    copies = tuple(f"adapter.{path}." for path, adapter in host.adapters(source).items() if isinstance(adapter, Copy))
    tensors = {key: value for key, value in host.state_dict(source).items() if not key.startswith(copies)}
    return Part(part, host.methods[source].replace(modules_to_save=()), tensors)


def _made(part: str, entry: Entry) -> Method:
    fields = {} if isinstance(entry, str) else dict(entry)
    id = fields.pop("name", None)
    if not isinstance(id, str):
        raise ConfigError(
            f"adapters[{part!r}] is {entry!r}: give the folder of an adapter, the name of one on the model, or the "
            "settings of a new one with the id of a method as its name."
        )
    return method_by_id(id)(**fields)

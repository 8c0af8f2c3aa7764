"""Saving an adapter to a folder and putting it back on a model.

adapter_model.safetensors   the tensors, under HF PEFT's names where PEFT has the method
adapter_config.json         PEFT's view, when there is one
method.json                 ours: id, fields, adapted modules, base model, checksum
README.md                   a model card
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapterlab.core.codec import WITHIN
from adapterlab.core.method import Method
from adapterlab.engine.allowance import Allowance
from adapterlab.engine.attachments import Attachments
from adapterlab.engine.standpoint import seen_as_whole
from adapterlab.errors import AttachError, ConfigError, FormatError, TargetError, TrainingError
from adapterlab.foreign.model import base_copy, base_modules, base_name, base_revision, is_adapter_path
from adapterlab.foreign.sharding import gathered, leads, whole
from adapterlab.io import adapter_hub, hf_peft, misfit
from adapterlab.io.atomic import Kind, new_folder, write_json, write_text
from adapterlab.io.beside import add_beside
from adapterlab.io.card import model_card
from adapterlab.io.files import check_there, contents, read_json, read_tensors
from adapterlab.io.finite import not_finite
from adapterlab.io.info import AdapterInfo
from adapterlab.io.links import check_links
from adapterlab.json_text import digest
from adapterlab.models.catalogue import public_name
from adapterlab.models.pulling import nothing_fetched
from adapterlab.paths import user_path
from adapterlab.registry import method as method_by_id

FORMAT = 1
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
METHOD = "method.json"
STATE = "model.safetensors"  # where trainers keep the state of a model
_TIMES, _ALWAYS = 4, 1 << 22  # what is saved may be made anew a few times, and small things always
_LOADING: ContextVar[tuple[Path, ...]] = ContextVar("loading", default=())
CARD = "README.md"
ADAPTER = Kind("an adapter", (METHOD, CONFIG), (TENSORS, CONFIG, METHOD, CARD), listing=METHOD)


def save(
    host: Attachments,
    folder: str | Path,
    name: str | None = None,
    *,
    overwrite: bool = False,
    kind: Kind | None = ADAPTER,
    base_model: str | None = None,
    called: str | None = None,
    notes: dict[str, Any] | None = None,
    writes: bool | None = None,
) -> Path:
    """Write one adapter to a folder, atomically.

    On a sharded model every process must call it: together they gather the tensors, and the first one writes.

    Args:
        host: of the model.
        folder: where to; its parents are made.
        name: of the adapter; needed when there are several.
        overwrite: replace an adapter that is there.
        kind: what else may be replaced; None: whatever is there.
        base_model: name of the base model to record; default: what the model's configuration says.
        called: name of the adapter to record; default: its own.
        notes: facts for the model card, such as data and results.
        writes: whether this process does; default: the first of those that gathered.

    Raises:
        AttachError: the model was changed after attaching, and part of the adapter is gone.
        OutputError: the folder is not empty, holds something else than an adapter, or cannot be written, or the model
            is sharded by FSDP1, whose slices cannot be gathered; what was there stays as it was.
        TrainingError: the adapter holds values that are not finite.
    """
    name = host.only(name)
    found, folder = gather(host, name, base_model), user_path(folder)
    if not (found.leads if writes is None else writes):
        return folder
    if called is not None:
        found.info["name"] = called
    with new_folder(folder, overwrite=overwrite, kind=kind) as work:
        found.write(work, folder)
        card = model_card(host, name, found.info["base_model"], found.config is not None, notes or {})
        write_text(work / CARD, card)
    return folder


@dataclass(frozen=True)
class Contents:
    """What the folder of an adapter holds.

    Attributes:
        tensors: all of it, under PEFT's names where PEFT has the method.
        config: PEFT's view, or None.
        info: ours, without the checksum.
        leads: this process writes it, of several that gathered it.
        parts: what PEFT keeps in folders inside, by their names.
        places: PEFT's option that says where these are.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    info: dict[str, Any]
    leads: bool
    parts: dict[str, Contents] = field(default_factory=dict)
    places: str = ""

    def write(self, work: Path, home: Path, *, by_peft: bool = False) -> None:
        """Fill a folder that is not yet anybody's.

        Args:
            work: the folder; it is there.
            home: where it will stand.
            by_peft: leave it as PEFT would, without our own file.
        """
        for name, part in self.parts.items():
            (work / name).mkdir()
            part.write(work / name, home / name, by_peft=by_peft)
        write_tensors(work / TENSORS, self.tensors)
        if self.config is not None:
            places = {self.places: {name: str(home / name) for name in self.parts}} if self.parts else {}
            write_json(work / CONFIG, {**self.config, **places})
        if by_peft:
            return
        info = {**self.info, "sha256": _sha256(work / TENSORS)}
        write_json(work / METHOD, {**info, "seal": _seal(info)})


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, each by itself: shared memory is written for each name."""
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
        file,
        {"format": "pt", **(metadata or {})},
    )


def gather(host: Attachments, name: str, base_model: str | None = None) -> Contents:
    """Put together what saving an adapter writes; on a sharded model every process must call it.

    Raises:
        AttachError: the model was changed after attaching, and part of the adapter is gone.
        OutputError: the model is sharded by FSDP1 or ZeRO-3, whose slices cannot be gathered here.
        TrainingError: the adapter holds values that are not finite.
    """
    host.check_intact(name)
    base_model = base_model or base_name(host.model)
    held = list(host.tensors(name).values())
    with gathered(host.model, held):
        found = _contents(host, name, public_name(base_model) if base_model else None, leads(held))
    add_beside(host, name, found.config, found.info, found.tensors)
    if found.leads:
        for made in (found, *found.parts.values()):
            check_finite(name, made.tensors)
    return found


def _contents(host: Attachments, name: str, base_model: str | None, leading: bool) -> Contents:
    method, revision = host.methods[name], base_revision(host.model)
    written = hf_peft.write(host, name, base_model, revision) if method.hf is not None else None
    parts, places = {}, ""
    if written is not None and method.hf is not None and method.hf.folders is not None:
        for i, key in enumerate(host.part_methods(name)):
            parts[str(i)] = _contents(seen_as_whole(host, key), key, base_model, leading)
        places = method.hf.folders[1]
        if any(part.config is None for part in parts.values()):  # PEFT has no such part
            written, parts = None, {}
    config, tensors = written or (None, host.tensors(name))
    tensors = {key: whole(value) for key, value in tensors.items() if _lasts(method, key)}
    info = {
        "format": FORMAT,
        "method": method.id,
        "fields": method.model_dump(mode="json"),
        "name": name.rpartition("/")[2],
        "base_model": base_model,
        "base_revision": revision,
        "base_copy": base_copy(host.model),
        "modules": list(host.adapters(name)),
        **({"files": list(parts)} if parts else {}),
    }
    return Contents(tensors, config, info, leading, parts, places)


def _lasts(method: Method, key: str) -> bool:
    return not set(method.scaffold).intersection(key.split("."))


def read_info(folder: str | Path) -> AdapterInfo:
    """Read what a folder says about its adapter.

    Raises:
        FormatError: it holds no adapter, or a damaged one.
    """
    folder = user_path(folder)
    check_links(folder, METHOD, CONFIG, TENSORS)
    if (folder / METHOD).is_file():
        info = read_json(folder / METHOD)
        if info.get("format") != FORMAT:
            raise FormatError(
                f"{folder / METHOD} has format {info.get('format')!r}, and this version reads format {FORMAT}. Update "
                "adapterlab, or remove the file to load the folder as a PEFT adapter."
            )
        try:
            return AdapterInfo(
                folder, info["method"], dict(info["fields"]), info["base_model"], info["base_revision"], info["name"],
                "adapterlab", tuple(info["modules"]), info["sha256"], info.get("seal"), info.get("base_copy"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            fault = f"lacks {error}" if isinstance(error, KeyError) else f"has fields of a wrong type ({error})"
            raise FormatError(f"{folder / METHOD} {fault}: the file is damaged. Save the adapter again.") from None
    if (hub := adapter_hub.described(folder)) is not None:
        cls, name = adapter_hub.find_method(adapter_hub.options_of(hub)), str(hub.get("name") or "default")
        return AdapterInfo(folder, cls.id, {}, hub.get("model_name") or None, None, name, "adapterhub")
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        cls = hf_peft.find_method(config)
        assert cls.hf is not None
        fields = cls.hf.settings(config)
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        return AdapterInfo(folder, cls.id, fields, base, revision, "default", "peft")
    if is_adapted_state(folder / STATE):
        raise FormatError(
            f"{folder / STATE} is the state of a model with adapters, whole, and nothing there says which method they "
            "are of. Attach with the settings of that run, model.load_state_dict(safetensors.torch.load_file(...)), "
            "and host.save to make an adapter folder of it. Trainer writes this of a model that is none of "
            "transformers; AdapterlabCallback puts adapter folders into its checkpoints."
        )
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise FormatError(
        f"{folder} holds no adapter: neither {METHOD} nor {CONFIG} is there ({there or 'it is empty'}). Give the "
        "folder that `host.save` or PEFT's `save_pretrained` wrote; in a run folder it is best/ or last/."
    )


@dataclass(frozen=True)
class Saved:
    """An adapter out of a folder, read and found whole, before it is on a model.

    Attributes:
        info: what the folder says about it.
        tensors: all of it, under the names of the file.
        kind: of adapters that differ in the numbers of their tensors alone; "" where that cannot be told.
    """

    info: AdapterInfo
    tensors: dict[str, Tensor]
    kind: str = ""


def read(folder: str | Path) -> Saved:
    """Read an adapter.

    Raises:
        FormatError: the folder holds none, or a damaged one.
    """
    info = read_info(folder)
    tensors = _tensors(info)
    return Saved(info, tensors, _kind(info, tensors))


def _kind(info: AdapterInfo, tensors: Mapping[str, Tensor]) -> str:
    if info.written_by == "adapterhub":
        return ""
    by_peft = info.written_by == "peft"
    said = read_json(info.folder / CONFIG) if by_peft else [info.method, info.fields, info.modules]
    shapes = {key: [str(value.dtype), *value.shape] for key, value in tensors.items()}
    return digest([info.written_by, said, shapes])


def load(
    target: Attachments, folder: str | Path | Saved, name: str | None = None, *, active: bool | None = None
) -> None:
    """Attach a saved adapter; see `adapterlab.hosts.load`."""
    saved = folder if isinstance(folder, Saved) else read(folder)
    info, tensors = saved.info, saved.tensors
    name = name or info.name
    active = not target.methods if active is None else active
    if info.written_by == "adapterhub":
        return _load_hub(target, info, tensors, name, active)
    paths = info.modules or _adapted(info, tensors)
    try:
        method = _method(info, tensors, target)
        check_seal(info)
        if info.written_by == "peft":
            hf_peft.check_computes(method, target, info.folder)
        # Tensors in our own names tell a method its structure; PEFT's are renamed once the method stands.
        own, like = (tensors, None) if method.hf is None else (None, hf_peft.like(method, target, tensors))
        with nothing_fetched(), _within(info.folder), Allowance(_accounted_for(target, method, tensors)):
            target.attach(method, name, active=active, saved=own, like=like)
    except (TargetError, ConfigError, AttachError) as error:
        if isinstance(error, AttachError) and name in target.methods:
            raise
        raise FormatError(misfit.refused(info, target, paths, str(error))) from None
    try:
        _fill(target, name, info, method, tensors)
    except BaseException:
        target.detach(name)
        raise


def _load_hub(target: Attachments, info: AdapterInfo, tensors: dict[str, Tensor], name: str, active: bool) -> None:
    """Attach an adapter of AdapterHub's library."""
    config, cls = adapter_hub.described(info.folder), method_by_id(info.method)
    assert cls.hub is not None
    assert config is not None
    left = adapter_hub.plain(target, config, tensors)
    try:
        method = cls(**cls.hub.settings(target, adapter_hub.options_of(config), left))
        with nothing_fetched(), Allowance(_accounted_for(target, method, tensors)):
            target.attach(method, name, active=active)
    except (TargetError, ConfigError, AttachError) as error:
        if isinstance(error, AttachError) and name in target.methods:
            raise
        raise FormatError(f"The adapter of AdapterHub in {info.folder} does not go onto this model: {error}") from None
    try:
        found = cls.hub.inward(target, name, left)
        adapter_hub.check_used(info.folder, left)
        target.load_state_dict(name, found)
    except AttachError as error:
        target.detach(name)
        raise FormatError(f"The adapter of AdapterHub in {info.folder} is of another model: {error}") from None
    except BaseException:
        target.detach(name)
        raise


def _adapted(info: AdapterInfo, tensors: dict[str, Tensor]) -> list[str]:
    """The modules that a PEFT file has tensors for; none where PEFT stores the method as a whole."""
    codec = method_by_id(info.method).hf if info.written_by == "peft" else None
    return [] if codec is None or codec.pack is not None else list(hf_peft.modules(method_by_id(info.method), tensors))


def _accounted_for(host: Attachments, method: Method, tensors: dict[str, Tensor]) -> int:
    """Numbers that attaching may make: what the file holds, and what the method derives from the base beside it."""
    held = sum(value.numel() for value in tensors.values())
    modules = base_modules(host.model) if method.derived else ()
    base = sum(p.numel() for _, module in modules for p in module._parameters.values() if p is not None)
    return round(_TIMES * held + method.derived * base) + _ALWAYS


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    """Refuse an adapter that needs itself: methods may load others that their settings name."""
    around = _LOADING.get()
    if folder.resolve() in around:
        raise FormatError(f"The adapter in {folder} names itself among the adapters that it needs: it is damaged.")
    before = _LOADING.set((*around, folder.resolve()))
    try:
        yield
    finally:
        _LOADING.reset(before)


def _fill(target: Attachments, name: str, info: AdapterInfo, method: Method, tensors: dict[str, Tensor]) -> None:
    if info.modules and (fault := misfit.of_places(info, target, target.adapters(name))):
        raise FormatError(fault)
    if method.hf is None:
        return
    tensors = hf_peft.read(method, target, name, tensors)
    if fault := misfit.of_tensors(info, target, name, tensors):
        raise FormatError(fault)
    target.load_state_dict(name, tensors)


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that an adapter may be saved.

    Raises:
        TrainingError: it holds values that are not finite.
    """
    if (key := not_finite(tensors)) is not None:
        raise TrainingError(
            f"The adapter {name!r} holds values that are not finite, first in {key}, and is not saved. Training it "
            "went wrong: lower the learning rate, or load what was saved before."
        )


def check_seal(info: AdapterInfo) -> None:
    """Check that settings are those that were saved: valid ones may still give the tensors another meaning.

    Raises:
        FormatError: they are others.
    """
    if info.seal is not None and info.seal != _seal(vars(info)):
        raise FormatError(
            f"{info.folder / METHOD} is not what was saved: method, fields, modules or sha256 have changed. Copy the "
            'folder again. If it was edited on purpose, remove "seal" from it too.'
        )


def _seal(info: Mapping[str, Any]) -> str:
    """The checksum of what decides an adapter's meaning; names may be edited."""
    meaning = [info[key] for key in ("method", "fields", "modules", "sha256")]
    plain = json.loads(json.dumps(meaning))  # keys are text then, as they are when the file is read
    return digest(plain)


def _method(info: AdapterInfo, tensors: dict[str, Tensor], host: Attachments) -> Method:
    """The method with its settings; for a PEFT folder the targets are what its tensors are called."""
    try:
        cls = method_by_id(info.method)
    except ConfigError as error:
        raise FormatError(f"{info.folder}: {error}") from None
    fields = dict(info.fields)
    if cls.hf is not None and cls.hf.folders is not None and not any("/" in key for key in tensors):
        fields[cls.hf.folders[0]] = _folders_of_parts(info.folder, fields.get(cls.hf.folders[0]))
    if info.written_by == "peft":
        assert cls.hf is not None
        if cls.hf.pack is None:
            paths = hf_peft.modules(cls, tensors)
            bare = hf_peft.holding(cls, fields, host)
            beside = {*bare, *hf_peft.tables(cls, paths)}
            targets = tuple(path for path in paths if path not in beside)
            fields["targets"] = targets or (("none",) if bare else ("no module",))
            leaves = [f"{path}.{leaf}" for path, names in bare.items() for leaf in names]
            fields |= hf_peft.used_patterns(fields, [*targets, *leaves])
        fields["modules_to_save"] = _saved_modules(info.folder, tensors, host)
    try:
        return cls(**fields)
    except ConfigError as error:
        raise FormatError(
            f"{info.folder}: the settings of this {info.method} adapter are not valid.\n{error}"
        ) from None


def _folders_of_parts(folder: Path, parts: Any) -> dict[str, str]:
    """Where PEFT keeps the parts of an adapter: inside, or where they were when it put them together.

    What PEFT saves out of the whole is no adapter: names that hold the number of another part are left out.

    Raises:
        FormatError: such a part is all there is.
    """
    found: dict[str, str] = {}
    for i, (part, given) in enumerate(parts.items() if isinstance(parts, dict) else ()):
        inside = folder / str(i)
        check_links(folder, inside.name)
        cut = _has_key(inside / TENSORS, lambda key: key.startswith(WITHIN))
        elsewhere = user_path(given) if isinstance(given, str) else inside
        there = any((elsewhere / name).is_file() for name in (METHOD, CONFIG))
        if cut and not there:
            raise FormatError(
                f"The part {part!r} of the adapter in {folder} was put together from {given}, which is not there, and "
                f"what PEFT left in {inside} lacks tensors: it drops those whose names hold the number of another "
                "part. Put the adapter that it was made from there."
            )
        whole = not cut and (inside / CONFIG).is_file()
        found[str(part)] = str(inside if whole or not there else elsewhere)
    return found


def _saved_modules(folder: Path, tensors: dict[str, Tensor], host: Attachments) -> tuple[str, ...]:
    """PEFT lists names such as `classifier`; keep those that have tensors, and what was kept tied to them."""
    config = read_json(folder / CONFIG)
    names = config.get("modules_to_save") or ()
    found = [name for name in names if any(f".{name}." in key for key in tensors)]
    tied = hf_peft.saved_with(host, found, tensors) if config.get("ensure_weight_tying") else []
    return (*found, *tied)


def _tensors(info: AdapterInfo) -> dict[str, Tensor]:
    if info.written_by == "adapterhub":
        return adapter_hub.tensors(info.folder)
    file = info.folder / TENSORS
    check_there(file)
    data = contents(file)
    if info.sha256 and _sha256(file, data) != info.sha256:
        raise FormatError(
            f"{file} is not the file that was saved: its SHA-256 differs from the one in {METHOD}. It is damaged, or "
            f"another program rewrote it; in that case remove {METHOD} to load the folder as a PEFT adapter."
        )
    tensors = read_tensors(file, data)
    return hf_peft.unnamed(method_by_id(info.method), tensors, file) if info.written_by == "peft" else tensors


def is_adapted_state(file: Path) -> bool:
    """Say whether a file of tensors has some of adapters under the names that a model with adapters gives them."""
    return _has_key(file, is_adapter_path)


def _has_key(file: Path, wanted: Callable[[str], bool]) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return any(wanted(key) for key in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _sha256(file: Path, data: bytes | None = None) -> str:
    if data is not None:
        return hashlib.sha256(data).hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

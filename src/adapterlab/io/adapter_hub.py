"""Folders of AdapterHub's library `adapters`: reading and writing by the codecs of the methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterlab.core.adapter import Copy
from adapterlab.core.hub import FUSE, VERSION, fuse
from adapterlab.core.method import Method
from adapterlab.engine.attachments import Attachments
from adapterlab.errors import FormatError
from adapterlab.foreign.adapter_hub import check_known
from adapterlab.foreign.model import config_of
from adapterlab.io.beside import trained_beside
from adapterlab.io.files import check_there, read_json, read_tensors
from adapterlab.io.links import check_links
from adapterlab.registry import ids
from adapterlab.registry import method as method_by_id

CONFIG, TENSORS = "adapter_config.json", "adapter.safetensors"
SETUP = "adapter_setup.json"  # of several adapters together, which lie in folders of this one
_FUSION_CONFIG, _FUSION_TENSORS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
_FUSION = "adapter_fusion_layer"
_GROUPS = ("adapters", "loras", "prefix_tunings", "prefix_gates", "shared_parameters", _FUSION)
_VERSION = "adapters.1.3.0"  # of the library that the form is that of


def is_hub(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration is of AdapterHub's library."""
    return "peft_type" not in config and isinstance(config.get("config"), Mapping)


def described(folder: Path) -> dict[str, Any] | None:
    """Read what a folder of the library's says, of one adapter or of a fusion of several; None: it is no such folder.

    Raises:
        FormatError: it is one, and damaged, or puts adapters together in another way.
    """
    if (folder / SETUP).is_file():
        return _fusion(folder)
    if not (folder / CONFIG).is_file() or not is_hub(config := read_json(folder / CONFIG)):
        return None
    return config


def _fusion(folder: Path) -> dict[str, Any]:
    """The same as one configuration: of the fusion, with those of the adapters as its option `adapters`."""
    check_links(folder, SETUP)
    names = _fused(folder, read_json(folder / SETUP).get("adapter_setup"))
    fusion = ",".join(names)
    check_links(folder, *names, fusion, *(f"{name}/{file}" for name in names for file in (CONFIG, TENSORS)))
    check_links(folder, f"{fusion}/{_FUSION_CONFIG}", f"{fusion}/{_FUSION_TENSORS}")
    adapters = {name: read_json(folder / name / CONFIG) for name in names}
    config = read_json(folder / fusion / _FUSION_CONFIG)
    if not isinstance(config.get("config"), Mapping) or not all(is_hub(one) for one in adapters.values()):
        raise FormatError(f"{folder} lacks configurations of AdapterHub that {SETUP} speaks of. Copy it again.")
    options = {**config["config"], **fuse({name: options_of(one) for name, one in adapters.items()}), "fusion": fusion}
    return {**config, "config": options, "name": "default"}


def _fused(folder: Path, setup: Any) -> list[str]:
    """Names of the adapters that a setup fuses, each of them a folder.

    Raises:
        FormatError: it is another setup, or a name leads out of the folder.
    """
    try:
        names = [child["children"][0] for child in setup["children"] if child["type"] == "single"]
        fuses = setup["type"] == "Fuse" and 0 < len(names) == len(setup["children"])
        inside = all(isinstance(name, str) and Path(name).name == name != ".." for name in names)
    except (KeyError, TypeError, IndexError):
        fuses = inside = False
    if not fuses or not inside:
        raise FormatError(
            f"{folder / SETUP} puts adapters of AdapterHub together in another way than Fuse of single ones, in "
            "folders of their names. Load each adapter by itself, and put them together with al.Stack, al.Average or "
            "al.Parallel."
        )
    return names


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder of the library's.

    Raises:
        FormatError: they are not there, or damaged.
    """
    config = described(folder)
    options = config["config"] if config is not None else {}
    files = [folder / TENSORS]
    if options.get("architecture") == FUSE:
        parts = [folder / name / TENSORS for name in options["adapters"]]
        files = [*parts, folder / options["fusion"] / _FUSION_TENSORS]
    for file in files:
        check_there(file)
    return {key: value for file in files for key, value in read_tensors(file).items()}


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the adapter, and the version of the library."""
    return {**config["config"], VERSION: config.get(VERSION, "")}


def find_method(options: Mapping[str, Any]) -> type[Method]:
    """Return the method that a configuration describes; the one with the most conditions wins.

    Raises:
        FormatError: there is none.
    """
    classes = [method_by_id(i) for i in ids()]
    fitting = [cls for cls in classes if "hub" in vars(cls) and cls.hub is not None and cls.hub.claims(options)]
    if not fitting:
        known = ", ".join(sorted(cls.id for cls in classes if "hub" in vars(cls) and cls.hub is not None))
        shown = {key: options.get(key) for key in ("architecture", "mh_adapter", "output_adapter", "composition_mode")}
        raise FormatError(f"No method here reads this adapter of AdapterHub ({shown}). Exchanged are: {known}.")
    return max(fitting, key=lambda cls: len(cls.hub.when) if cls.hub else 0)


def plain(host: Attachments, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names that codecs know: without the adapter's name, and modules as they are called here."""
    name, found = str(config["config"].get("fusion", config.get("name"))), {}
    for key, value in tensors.items():
        key = f".{key}"
        for group in _GROUPS:
            key = key.replace(f".{group}.{name}.", f".{group}.")
        found[_here(host, key[1:])] = value
    return found


def _here(host: Attachments, key: str) -> str:
    """Name a module as this model does; the library's model may have had a head around it, or none."""
    prefix = getattr(host.model, "base_model_prefix", "")
    first = key.partition(".")[0]
    children = {child for child, _ in host.model.named_children()}
    if prefix and first not in children and prefix in children and first != prefix:
        return f"{prefix}.{key}"
    return key.removeprefix(f"{prefix}.") if first == prefix and prefix not in children else key


def written(host: Attachments, name: str) -> dict[str, dict[str, Any]]:
    """Return an adapter as files of AdapterHub's library by path: objects of JSON, and tensors by key.

    Raises:
        FormatError: the library has no such adapter.
    """
    method = host.methods[name]
    kind = check_known(host.model)
    if method.hub is None or "hub" not in vars(type(method)):
        raise FormatError(f"AdapterHub's library has no {method.id}. Use our own form, or HF PEFT's.")
    options, found = method.hub.outward(host, name, method)
    copies = [path for path, part in host.adapters(name).items() if isinstance(part, Copy)]
    if beside := [*copies, *trained_beside(host)]:
        raise FormatError(
            f"AdapterHub keeps heads apart from adapters, and {', '.join(beside)} train beside this one. Use our own "
            "form, or HF PEFT's."
        )
    model = config_of(host.model)
    frame = {
        "hidden_size": model.hidden_size,
        "model_class": type(host.model).__name__,
        "model_name": getattr(model, "_name_or_path", ""),
        "model_type": kind,
        "version": _VERSION,
    }
    options, values = {**method.hub.written(method), **options}, {key: value.detach() for key, value in found.items()}
    if options.get("architecture") == FUSE:
        return _setup(frame, options, values)
    return {
        CONFIG: {**frame, "config": options, "name": name},
        TENSORS: {_named(key, name): value for key, value in values.items()},
    }


def _setup(frame: dict[str, Any], options: dict[str, Any], values: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Divide a fusion into the folders that the library wants."""
    del options["architecture"]
    adapters = options.pop("adapters")
    fusion, own = ",".join(adapters), {key: value for key, value in values.items() if f".{_FUSION}." in key}
    children = [{"type": "single", "children": [name]} for name in adapters]
    files: dict[str, dict[str, Any]] = {
        SETUP: {
            "adapter_setup": {"type": "Fuse", "children": children},
            "head_setup": None,
            "version": frame["version"],
        },
        f"{fusion}/{_FUSION_CONFIG}": {**frame, "config": options, "name": fusion, "adapter_names": list(adapters)},
        f"{fusion}/{_FUSION_TENSORS}": {_named(key, fusion): value for key, value in own.items()},
    }
    for name, config in adapters.items():
        files[f"{name}/{CONFIG}"] = {**frame, "config": config, "name": name}
        files[f"{name}/{TENSORS}"] = {key: value for key, value in values.items() if f".adapters.{name}." in key}
    return files


def _named(key: str, name: str) -> str:
    """Put the adapter's name behind the last part that says what kind of adapter it is."""
    key = f".{key}"
    group = max(_GROUPS, key=lambda g: key.rfind(f".{g}."))
    outer, _, leaf = key.rpartition(f".{group}.")
    return f"{outer}.{group}.{name}.{leaf}"[1:]


def check_used(folder: Path, left: Mapping[str, Tensor]) -> None:
    """Require that nothing of a file is left over.

    Raises:
        FormatError: something is.
    """
    if left:
        raise FormatError(
            f"The adapter in {folder} has tensors that its configuration does not speak of, or that have no place in "
            f"this model: {', '.join(sorted(left)[:4])}. Use it with the library `adapters` itself."
        )

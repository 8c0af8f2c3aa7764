"""Folders of AdapterHub's library `adapters`: reading and writing by the codecs of the methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterlab.core.adapter import Copy
from adapterlab.core.method import Method
from adapterlab.engine.attachments import Attachments
from adapterlab.errors import FormatError
from adapterlab.foreign.adapter_hub import check_known
from adapterlab.foreign.model import config_of
from adapterlab.io.beside import trained_beside
from adapterlab.registry import ids
from adapterlab.registry import method as method_by_id

TENSORS = "adapter.safetensors"
_GROUPS = ("adapters", "loras", "prefix_tunings")
_VERSION = "adapters.1.3.0"  # of the library that the form is that of


def is_hub(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration is of AdapterHub's library."""
    return "peft_type" not in config and isinstance(config.get("config"), Mapping)


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the adapter, and the version of the library, on which their meaning may depend."""
    return {**config["config"], "version": config.get("version", "")}


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
    name, found = str(config.get("name")), {}
    for key, value in tensors.items():
        for group in _GROUPS:
            key = key.replace(f".{group}.{name}.", f".{group}.")
        found[_here(host, key)] = value
    return found


def _here(host: Attachments, key: str) -> str:
    """Name a module as this model does; the library's model may have had a head around it, or none."""
    prefix = getattr(host.model, "base_model_prefix", "")
    first = key.partition(".")[0]
    children = {child for child, _ in host.model.named_children()}
    if prefix and first not in children and prefix in children and first != prefix:
        return f"{prefix}.{key}"
    return key.removeprefix(f"{prefix}.") if first == prefix and prefix not in children else key


def written(host: Attachments, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter as a configuration and tensors of AdapterHub's library.

    Raises:
        FormatError: the library has no such adapter.
    """
    method = host.methods[name]
    kind = check_known(host.model)
    if method.hub is None or "hub" not in vars(type(method)):
        raise FormatError(f"AdapterHub's library has no {method.id}. Use our own form, or HF PEFT's.")
    options, tensors = method.hub.outward(host, name, method)
    copies = [path for path, part in host.adapters(name).items() if isinstance(part, Copy)]
    if beside := [*copies, *trained_beside(host)]:
        raise FormatError(
            f"AdapterHub keeps heads apart from adapters, and {', '.join(beside)} train beside this one. Use our own "
            "form, or HF PEFT's."
        )
    model = config_of(host.model)
    config = {
        "config": {**method.hub.written(method), **options},
        "hidden_size": model.hidden_size,
        "model_class": type(host.model).__name__,
        "model_name": getattr(model, "_name_or_path", ""),
        "model_type": kind,
        "name": name,
        "version": _VERSION,
    }
    return config, {_named(key, name): value.detach() for key, value in tensors.items()}


def _named(key: str, name: str) -> str:
    """Put the adapter's name behind the last part that says what kind of adapter it is."""
    group = max(_GROUPS, key=lambda g: key.rfind(f".{g}."))
    outer, _, leaf = key.rpartition(f".{group}.")
    return f"{outer}.{group}.{name}.{leaf}"


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

"""HF PEFT's folder format: writing and reading adapters by the codecs of their methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapterlab.core.adapter import Copy
from adapterlab.core.codec import PREFIX, HFCodec
from adapterlab.core.patterns import matches
from adapterlab.core.rows import Rows
from adapterlab.engine.substitute import Substitute
from adapterlab.errors import FormatError, nearest
from adapterlab.foreign.model import base_modules
from adapterlab.foreign.peft_task import CLASSIFYING, class_of, computes_prompts, task_of
from adapterlab.io.beside import trained_beside
from adapterlab.registry import ids
from adapterlab.registry import method as method_by_id

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.core.method import Method
    from adapterlab.engine.attachments import Attachments


def write(
    host: Attachments, name: str, base_model: str | None, revision: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return an adapter as PEFT's configuration and tensors, or None when PEFT has no such adapter.

    Args:
        host: of the model.
        name: of the adapter; its method has a codec.
        base_model: name for `base_model_name_or_path`.
        revision: of the base model.
    """
    method = host.methods[name]
    codec = method.hf
    assert codec is not None
    parts = host.adapters(name)
    copies = {path: part for path, part in parts.items() if isinstance(part, Copy)}
    config = {
        "peft_type": codec.peft_type,
        **_task(host, parts),
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        **({"modules_to_save": list(copies) or None} if codec.copies else {}),
        **codec.options(method),
    }
    if not codec.copies and (copies or trained_beside(host)):
        return None
    if codec.pack is not None:
        equal = computes_prompts(host.model, config["task_type"]) and not (codec.differs and codec.differs(host))
        packed = codec.pack(host, name) if equal else None
        if packed is None:
            return None
        of_copies = {
            f"{codec.prefix}{p}.{k}": v.detach() for p, c in copies.items() for k, v in c.copy.state_dict().items()
        }
        return {**config, **packed[0]}, {**packed[1], **of_copies}
    rows = {path: part for path, part in parts.items() if isinstance(part, Rows)}
    if _biased(rows):
        return None
    beside = {**copies, **(rows if codec.tokens else {})}
    adapted = {path: part for path, part in parts.items() if path not in beside}
    whole = {path: part for path, part in adapted.items() if not isinstance(part, Substitute) and not _lent(part)}
    if codec.tokens and rows:
        config[codec.tokens[1]] = {path: part.ids.tolist() for path, part in rows.items() if not _lent(part)}
    if any(part.site.transposed for part in whole.values()):
        if not codec.transposed:
            return None
        config["fan_in_fan_out"] = True
    owned = [path.rpartition(".")[0] for path in host.patches[name]] if codec.owned else []
    config["target_modules"] = short_names([*whole, *owned], [s.path for s in host.all_sites()])
    for option, attribute in codec.subsets.items():
        chosen = [path for path, part in adapted.items() if getattr(part, attribute)]
        config[option] = [n for n in config["target_modules"] if any(_named(n, path) for path in chosen)]
        if any(_named(n, path) for n in config[option] for path in adapted if path not in chosen):
            config |= {"target_modules": sorted(adapted), option: sorted(chosen)}
    tensors = host.tensors(name) | _repeated(rows, codec)
    if codec.outward is not None:
        made = codec.outward(method, adapted)
        if made is None:
            return None
        config |= made[0]
        own = {f"adapter.{path}.{tensor}" for path, part in adapted.items() for tensor in part.state_dict()}
        tensors = {key: value for key, value in tensors.items() if key not in own}
        tensors |= {f"adapter.{path}.{k}": value for path, group in made[1].items() for k, value in group.items()}
    return config, {_peft_key(key, parts, codec): value.detach() for key, value in tensors.items()}


def like(method: Method, host: Attachments, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the modules' tensors by the keys of `Host.tensors`, before anything is attached.

    Of what PEFT stores as a whole they keep PEFT's names. None when the structure of the method's adapters does not
    depend on them.
    """
    codec = method.hf
    if codec is None or (codec.inward is None and codec.unpack is None):
        return None
    if codec.inward is None or any(key.startswith(("adapter.", "shared.", "base.")) for key in tensors):
        return dict(tensors)  # saved under our own names
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if (found := codec.locate(key)) is not None:
            groups.setdefault(found[0], {})[found[1]] = value
    sites = {site.path: site for site in host.all_sites()}
    return {
        f"adapter.{path}.{ours}": value
        for path, group in groups.items()
        if path in sites
        for ours, value in codec.inward(method, sites[path], group).items()
    }


def read(method: Method, host: Attachments, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename PEFT's tensors to those of an attached adapter.

    Tensors of the base that PEFT stores beside embeddings are compared with the base and left out.

    Raises:
        FormatError: a base tensor differs, for example because the vocabulary was resized.
    """
    assert method.hf is not None
    own = host.tensors(name)
    if own.keys() <= tensors.keys():
        return {key: tensors[key] for key in own}  # saved under our own names
    parts = host.adapters(name)
    if path := _biased(parts):
        raise FormatError(
            f"The rows of tokens that this adapter trains are also those of {path}, whose bias PEFT leaves out as soon "
            "as such rows train. Use it with PEFT itself, or train a new one."
        )
    if method.hf.unpack is not None:
        return method.hf.unpack(host, name, tensors) | _copies(parts, method.hf.prefix, tensors)
    ours = {_peft_key(key, parts, method.hf): key for key in own if not _only_ours(key, parts, method.hf)}
    found = (like(method, host, tensors) or {}) if method.hf.inward is not None else {}
    for key, value in tensors.items():
        if ours.get(key) in found:
            continue
        if key in ours:
            found[ours[key]] = value
        elif (
            _is_read_inward(key, parts, method.hf)
            or _is_second_copy(key, tensors)
            or _is_repeated_row(key, tensors, parts, method.hf)
            or _is_repeated(key, tensors, method.hf)
        ):
            continue
        elif not _is_base_copy(host, key, value):
            found[key] = value  # reported as not in this adapter, with everything else that does not fit
    return found


def _is_read_inward(key: str, parts: Mapping[str, Any], codec: HFCodec) -> bool:
    """Say whether `inward` has made other tensors of one with this key."""
    found = codec.locate(key) if codec.inward is not None else None
    return found is not None and found[0] in parts and not isinstance(parts[found[0]], Copy)


def _lent(part: Any) -> bool:
    """Say whether an adapter's rows are those of another one, at a module that is tied to its own."""
    return isinstance(part, Rows) and part.values is not part._parameters.get("rows")


def _repeated(rows: Mapping[str, Any], codec: HFCodec) -> dict[str, Tensor]:
    """Rows of tied tables once more, by the key of each module: PEFT stores them so where they are all there is."""
    return {} if codec.tokens else {f"adapter.{path}.rows": part.values for path, part in rows.items() if _lent(part)}


def _is_repeated_row(key: str, tensors: Mapping[str, Tensor], parts: Mapping[str, Any], codec: HFCodec) -> bool:
    """Say whether a tensor is that of a table which is tied to another one, with the same rows."""
    path, tensor, suffix = codec.locate(key) or ("", "", "")
    part = parts.get(path)
    if part is None or tensor != "rows" or not _lent(part):
        return False
    found = tensors.get(f"{PREFIX}{part.lender.site.path}.{suffix}")
    return found is not None and torch.equal(found, tensors[key])


def _biased(parts: Mapping[str, Any]) -> str | None:
    """Return a module with trained rows and a bias, which PEFT leaves out there, or None."""
    found = (path for path, part in parts.items() if isinstance(part, Rows) and part.site.bias is not None)
    return next(found, None)


def _copies(parts: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained copies of whole modules, by our keys."""
    names = {
        f"adapter.{path}.copy.{leaf}": f"{prefix}{path}.{leaf}"
        for path, part in parts.items()
        if isinstance(part, Copy)
        for leaf in part.copy.state_dict()
    }
    return {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}


def check_computes(method: Method, host: Attachments, folder: Path) -> None:
    """Check that an adapter of PEFT's means the same here on this model.

    Raises:
        FormatError: it does not.
    """
    if method.hf is not None and method.hf.differs is not None and (why := method.hf.differs(host)):
        raise FormatError(
            f"The adapter in {folder} computes something else in PEFT than {method.id} does here: {why}. Use it with "
            "PEFT itself, or train a new one."
        )


def saved_with(host: Attachments, names: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return further modules with tensors of their own that hold a parameter together with one of these."""
    parts = dict(base_modules(host.model))
    held = {path: {id(p) for p in module._parameters.values() if p is not None} for path, module in parts.items()}
    shared = {p for path, own in held.items() for p in own if any(_named(name, path) for name in names)}
    return [
        path
        for path, own in held.items()
        if own & shared and f"{PREFIX}{path}.weight" in tensors and not any(_named(name, path) for name in names)
    ]


def unnamed(method: type[Method], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Give tensors the names of PEFT's files where they have those of a model's state: with the adapter's name inside.

    Raises:
        FormatError: they are of several adapters.
    """
    assert method.hf is not None
    read = {key: method.hf.unnamed(key) for key in tensors}
    names = {found[1] for found in read.values() if found is not None}
    if len(names) > 1:
        raise FormatError(
            f"The file in {folder} holds {len(names)} adapters, {', '.join(sorted(names))}: it is the state of a model "
            "that had them all. Save each by itself: PEFT's save_pretrained(folder, selected_adapters=[name])."
        )
    plain = {(found[0] if (found := read[key]) is not None else key): value for key, value in tensors.items()}
    if names:  # beside its modules a model's state has what they replace
        plain = {key: value for key, value in plain.items() if ".original_module." not in key}
    if any(key.startswith("base_model.") for key in plain):
        return plain
    return {PREFIX + key if method.hf.pack is None else key: value for key, value in plain.items()}


def modules(method: type[Method], tensors: Iterable[str]) -> dict[str, str]:
    """Return the modules that PEFT's keys adapt: path -> suffix of one of the keys."""
    assert method.hf is not None
    located = [found for key in tensors if (found := method.hf.locate(key)) is not None]
    inside = next((path for path, _, _ in located if ".base_layer." in path), None)
    if inside is not None:
        outer, _, part = inside.partition(".base_layer.")
        raise FormatError(
            f"This PEFT adapter adapts {outer!r} as a whole and {part!r} inside of it, as PEFT does with torch's own "
            "attention; no method here does. Load it with PEFT itself and merge it there."
        )
    return {path: suffix for path, _, suffix in located}


def tables(method: type[Method], found: Mapping[str, str]) -> list[str]:
    """Return those of PEFT's modules that have nothing but trained rows of tokens, for a method of other modules.

    Args:
        method: with its codec.
        found: what `modules` returned.
    """
    codec = method.hf
    return [
        path for path, suffix in found.items() if codec is not None and codec.tokens and suffix == codec.tensors["rows"]
    ]


def holding(method: type[Method], fields: Mapping[str, Any], host: Attachments) -> dict[str, tuple[str, ...]]:
    """Return the modules that hold bare parameters among what a PEFT adapter adapts; see `Host.holding`."""
    field = method.hf.parameters[0] if method.hf is not None and method.hf.parameters else None
    return host.holding(fields[field]) if field is not None else {}


def used_patterns(fields: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return the tables of patterns (`rank_pattern`, ...) without keys that match no module: PEFT ignores those."""
    return {
        name: {k: v for k, v in table.items() if any(matches(k, path) for path in paths)}
        for name, table in fields.items()
        if name.endswith("_pattern") and isinstance(table, Mapping)
    }


def short_names(paths: Iterable[str], all_paths: Sequence[str]) -> list[str]:
    """Return the shortest list of names from which suffix matching finds exactly these modules.

    Args:
        paths: the adapted modules.
        all_paths: every module of the model.
    """
    wanted = set(paths)
    names = sorted({path.rpartition(".")[2] for path in wanted})
    matched = {path for path in all_paths if path.rpartition(".")[2] in names}
    return names if matched == wanted else sorted(wanted)


def _named(name: str, path: str) -> bool:
    """Say whether PEFT's suffix matching finds a module by a name."""
    return path == name or path.endswith("." + name)


def _peft_key(key: str, parts: Mapping[str, Any], codec: HFCodec) -> str:
    group, _, rest = key.partition(".")
    if group == "base":
        module, _, leaf = rest.rpartition(".")
        if codec.owned:
            return f"{PREFIX}{module}.{codec.owned}.{leaf}"
        # PEFT keeps the module it replaced under `base_layer`.
        return f"{PREFIX}{module}.base_layer.{leaf}" if module in parts else PREFIX + rest
    if group == "shared":
        return codec.shared[rest]
    path = _part_of(rest, parts)
    tensor = rest[len(path) + 1 :]
    if isinstance(parts[path], Copy):
        return f"{PREFIX}{path}.{tensor.removeprefix('copy.')}"
    return f"{PREFIX}{path}.{codec.suffix(tensor, parts[path].site.kind)}"


def _only_ours(key: str, parts: Mapping[str, Any], codec: HFCodec) -> bool:
    """Say whether a tensor of a module has no name of its own in PEFT's files: `inward` makes it of others."""
    if codec.inward is None or not key.startswith("adapter."):
        return False
    path = _part_of(key.removeprefix("adapter."), parts)
    of_copy = not path or isinstance(parts[path], Copy)
    return not of_copy and key.removeprefix(f"adapter.{path}.") not in codec.tensors


def _part_of(tensor: str, parts: Mapping[str, Any]) -> str:
    """The innermost module that a tensor's name lies in, "" for none: looked up, because models may have thousands."""
    path = tensor.rpartition(".")[0]
    while path and path not in parts:
        path = path.rpartition(".")[0]
    return path


def _is_second_copy(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """With `bias="all"` PEFT also stores the two biases inside the wrapper of a saved module; one is not used."""
    plain = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return plain != key and plain in tensors


def _is_repeated(key: str, tensors: Mapping[str, Tensor], codec: HFCodec) -> bool:
    """Say whether a module's tensor is one that all modules share and that the file has at the root too."""
    leaf = key.rpartition(".")[2]
    return any(root != key and root.rpartition(".")[2] == leaf and root in tensors for root in codec.shared.values())


def _base_tensor(host: Attachments, path: str) -> Tensor | None:
    """A parameter of the base by any of its names: a tied one has several, and counts under the first alone."""
    place, _, leaf = path.rpartition(".")
    try:
        found = host.module(place)._parameters.get(leaf)
    except AttributeError:
        return None
    return host.base_parameters().get(path, found)


def _is_base_copy(host: Attachments, key: str, value: Tensor) -> bool:
    path = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    base = _base_tensor(host, path)
    if base is None:
        return False
    if base.shape != value.shape or not (base.detach().to(value.dtype).cpu() == value.cpu()).all():
        raise FormatError(
            f"The adapter brings its own copy of the base tensor {path} {tuple(value.shape)}, which differs from this "
            f"model's {tuple(base.shape)}: it was trained on a changed base (a resized vocabulary, for example). Load "
            "that base model, or resize this one's embeddings first."
        )
    return True


def _task(host: Attachments, parts: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's options for what the model is for, from which it and its automatic classes choose what to load."""
    task = task_of(host.model)
    # PEFT looks for a trained copy of the head in the files of these tasks and cannot load one that has none.
    if task in CLASSIFYING and not any(isinstance(part, Copy) and part.site.is_head for part in parts.values()):
        task = None
    return {"task_type": task, "auto_mapping": class_of(host.model) if task is None else None}


def find_method(config: Mapping[str, Any]) -> type[Method]:
    """Return the method that a PEFT configuration describes; the one with the most conditions wins.

    A method that inherits its codec writes in that form, and the method it inherits from reads it.

    Raises:
        FormatError: no method of the registry stores itself under this type.
    """
    classes = [method_by_id(i) for i in ids()]
    fitting = [cls for cls in classes if "hf" in vars(cls) and cls.hf is not None and cls.hf.claims(config)]
    if not fitting:
        types = {cls.hf.peft_type for cls in classes if cls.hf is not None}
        kind = str(config.get("peft_type"))
        raise FormatError(f"No method here reads PEFT adapters of type {kind!r}. {nearest(kind, types)}")
    return max(fitting, key=lambda cls: (len(cls.hf.when) if cls.hf else 0, -len(cls.id)))

"""How HF PEFT stores a method, as data: each method declares how PEFT names its options and tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterlab.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.core.carrier import Carrier
    from adapterlab.core.site import Site
    from adapterlab.settings import Settings

PREFIX = "base_model.model."
WITHIN = "base_model.lora_model.model."  # instead, where PEFT saves a part of an adapter out of the whole
Rename = str | tuple[str, Mapping[Any, Any]]

# Options that say where PEFT puts adapters or how it prints them. The tensors' own names say where they belong.
_PLACEMENT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "modules_to_save",
    "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class HFCodec:
    """How HF PEFT stores a method.

    Attributes:
        peft_type: PEFT's name of the method.
        fields: our field -> PEFT's option, or (option, {our value: PEFT's value}).
        tensors: our tensor -> suffix of PEFT's key, or {kind of module: suffix}.
        older: suffixes that earlier versions of PEFT wrote -> what `inward` finds such a tensor under.
        shared: our `<key>.<tensor>` of `Carrier.share` -> PEFT's key; PEFT may repeat such a tensor at every module.
        when: options that select this method among those that share the type; one that a file lacks is off.
        accepts: other options -> values that mean nothing here and may be present.
        subsets: options that list some of the adapted modules -> attribute of our adapters that says which.
        parameters: (field of ours, PEFT's option) that lists bare parameters. PEFT does not name what holds them among
            its modules, and wraps it once for each; what the inner wrappers hold is called `base_layer.<tensor>`.
        tokens: (field of ours, PEFT's option) that lists rows of tables of tokens, or a dictionary of such lists, for
            methods that adapt other modules: PEFT does not name the tables among its modules.
        owned: what PEFT's keys have between the path of a module and the name of its parameter, for methods that train
            a module's own parameters in place; PEFT names these modules.
        copies: PEFT also trains copies of whole modules beside it (`modules_to_save`).
        ignores: options that may have any value.
        implies: fields of ours that every adapter of PEFT's has at this value.
        derived: PEFT's configuration -> fields of ours that it says by several options together, or by its version; it
            raises a `FormatError` for versions whose adapters are something else. Their options are in `ignores`.
        transposed: PEFT adapts GPT-2's `Conv1D` too; without, nothing is written for PEFT where one is adapted.
        prefix: what PEFT's keys of modules begin with.
        pack: for methods that PEFT stores as a whole instead of by module: (host, name) -> (further options, tensors by
            PEFT's keys), or None for what PEFT does not have.
        unpack: its inverse: (host, name, PEFT's tensors) -> tensors by the keys of `Carrier.tensors`.
        folders: (field of ours, PEFT's option) with folders of the parts by name, where PEFT keeps each part of an
            adapter as an adapter of its own. They are written inside, called by their numbers; `unpack` finds the parts
            loaded.
        differs: for methods whose PEFT form computes something else on some models: host -> why, or "".
        outward: for adapters whose tensors are not PEFT's: (method, adapters by path) -> (further options, tensors by
            path and name), or None for what PEFT does not have.
        inward: its inverse for one module: (method, site, tensors by name) -> ours by name.
    """

    peft_type: str
    fields: Mapping[str, Rename]
    tensors: Mapping[str, str | Mapping[str, str]]
    older: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, Any] = field(default_factory=dict)
    accepts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    subsets: Mapping[str, str] = field(default_factory=dict)
    parameters: tuple[str, str] | None = None
    tokens: tuple[str, str] | None = None
    owned: str = ""
    copies: bool = True
    ignores: Collection[str] = ()
    implies: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    transposed: bool = True
    prefix: str = PREFIX
    pack: Callable[[Carrier, str], tuple[dict[str, Any], dict[str, Tensor]] | None] | None = None
    unpack: Callable[[Carrier, str, Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    folders: tuple[str, str] | None = None
    differs: Callable[[Carrier], str] | None = None
    outward: Callable[[Any, Mapping[str, Any]], tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None] | None = (
        None
    )
    inward: Callable[[Any, Site, dict[str, Tensor]], dict[str, Tensor]] | None = None

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Say whether a PEFT configuration is of this method."""
        return config.get("peft_type") == self.peft_type and all(
            config.get(k, False) == v for k, v in self.when.items()
        )

    def suffix(self, tensor: str, kind: str) -> str:
        """PEFT's suffix for one of our tensors on one kind of module."""
        outer, base, leaf = tensor.rpartition("base_layer.")
        found = self.tensors[leaf]
        return outer + base + (found if isinstance(found, str) else found[kind])

    def locate(self, key: str) -> tuple[str, str, str] | None:
        """Read PEFT's key of a module's tensor: (path of the module, our tensor, PEFT's suffix); None for others."""
        names = {s: ours for ours, t in self.tensors.items() for s in ([t] if isinstance(t, str) else t.values())}
        names |= self.older
        suffix = next((s for s in names if key.endswith("." + s)), None)
        if suffix is None:
            return None
        path, tensor = key.removeprefix(PREFIX).removesuffix("." + suffix), names[suffix]
        while path.endswith(".base_layer"):
            path, tensor = path.removesuffix(".base_layer"), "base_layer." + tensor
        return path, tensor, suffix

    def unnamed(self, key: str) -> tuple[str, str] | None:
        """Read a key as PEFT's models have it, with the adapter's name inside: (the key in a file, that name)."""
        if self.locate(key) is not None:
            return None
        parts = key.split(".")
        if "modules_to_save" in parts[:-2]:
            at = parts.index("modules_to_save")
            return ".".join(parts[:at] + parts[at + 2 :]), parts[at + 1]
        shared = {root.rpartition(".")[2] for root in self.shared.values()}
        for at in range(1, len(parts)):
            without = ".".join(parts[:at] + parts[at + 1 :])
            for plain in (without, without.removesuffix(".weight")):
                found = self.locate(plain)
                begins = plain.count(".") - found[2].count(".") if found is not None else len(parts)
                if at > begins or (plain.rpartition(".")[2] in shared and at == plain.count(".") + 1):
                    return plain, parts[at]
        return None

    def options(self, method: Settings) -> dict[str, Any]:
        """Write the method's fields as PEFT options."""
        options = dict(self.when)
        for ours, theirs in self.fields.items():
            name, table = theirs if isinstance(theirs, tuple) else (theirs, None)
            value = getattr(method, ours)
            options[name] = table[value] if table else value
        if self.parameters and (bare := getattr(method, self.parameters[0])):
            options[self.parameters[1]] = list(bare)
        return options

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read PEFT options as fields of the method.

        Raises:
            FormatError: options that this method does not have, all of them at once.
        """
        settings = {**self.implies, **(self.derived(config) if self.derived else {})}
        known = {*_PLACEMENT, *self.when, *self.ignores}
        refused = []
        if self.parameters:
            known.add(self.parameters[1])
            settings[self.parameters[0]] = tuple(config.get(self.parameters[1]) or ())
        if self.tokens:
            known.add(self.tokens[1])
            settings[self.tokens[0]] = config.get(self.tokens[1]) or ()
        for ours, theirs in self.fields.items():
            name, table = theirs if isinstance(theirs, tuple) else (theirs, None)
            known.add(name)
            if name not in config:
                continue
            value = config[name]
            if table is None:
                settings[ours] = value
            elif (match := [k for k, v in table.items() if v == value and type(v) is type(value)]) != []:
                settings[ours] = match[0]
            elif value not in self.accepts.get(name, ()):
                refused.append(f"{name}={value!r} (supported: {', '.join(repr(v) for v in table.values())})")
        for name, value in config.items():
            if name not in known and value not in (None, False, {}, [], "") and value not in self.accepts.get(name, ()):
                refused.append(f"{name}={value!r}")
        if refused:
            raise FormatError(
                f"This PEFT adapter ({self.peft_type}) uses options that adapterlab does not reproduce, so its outputs "
                "would differ: " + "; ".join(refused) + ". Load it with PEFT itself and merge it there, or retrain."
            )
        return settings

"""How AdapterHub's library, `adapters`, stores a method: each method declares it in its own file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterlab.core.codec import Rename
from adapterlab.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterlab.core.carrier import Carrier

Options = Mapping[str, Any]
VERSION = "version"  # among the options: of the library that wrote them, for what depends on it
FUSE = "fuse"  # how a fusion of adapters calls its architecture here; the library keeps them in several folders


@dataclass(frozen=True)
class HubCodec:
    """How AdapterHub's library stores a method.

    Its keys are given without the adapter's name, and with the names that modules have in our model.

    Attributes:
        options: what a configuration holds, with the values that it has where no field says otherwise.
        when: options that select the method; one that a file lacks has the value of `options`.
        fields: our field -> the library's option, or (option, {our value: the library's}).
        ignores: options that may have any value: how something began, or what another option switches off.
        derived: (host, options, tensors by key) -> further fields, such as sizes and places.
        outward: (host, key of the adapter, its method) -> (further options, tensors by key). It raises a `FormatError`
            for what the library does not have.
        inward: (host, key of the adapter, tensors by key) -> ours by the keys of `Carrier.tensors`. It takes what it
            reads out of the tensors; what is left then is refused.
    """

    options: Options
    when: Options
    fields: Mapping[str, Rename]
    derived: Callable[[Carrier, Options, Mapping[str, Tensor]], dict[str, Any]]
    outward: Callable[[Carrier, str, Any], tuple[dict[str, Any], dict[str, Tensor]]]
    inward: Callable[[Carrier, str, dict[str, Tensor]], dict[str, Tensor]]
    ignores: Collection[str] = ()

    def claims(self, options: Options) -> bool:
        """Say whether a configuration is of this method."""
        given = {**self.options, "architecture": None, **options}  # without one it is a bottleneck
        return all(given.get(key) == value for key, value in self.when.items())

    def settings(self, host: Carrier, options: Options, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read a configuration as fields of the method.

        Raises:
            FormatError: it has options that change outputs and are not reproduced, all of them at once.
        """
        found: dict[str, Any] = {}
        refused, known = [], {VERSION, *self.when, *self.ignores}
        for ours, theirs in self.fields.items():
            option, table = theirs if isinstance(theirs, tuple) else (theirs, None)
            known.add(option)
            value = options.get(option, self.options.get(option))
            if table is None:
                found[ours] = value
            elif (match := [k for k, v in table.items() if value in (v if isinstance(v, tuple) else (v,))]) != []:
                found[ours] = match[0]
            else:
                refused.append(f"{option}={value!r}")
        refused += [f"{k}={v!r}" for k, v in options.items() if k not in known and v != self.options.get(k)]
        if refused:
            raise FormatError(
                "This adapter of AdapterHub uses options that adapterlab does not reproduce, so its outputs would "
                f"differ: {'; '.join(refused)}. Use it with the library `adapters` itself, or retrain."
            )
        return {**found, **self.derived(host, options, tensors)}

    def written(self, method: Any) -> dict[str, Any]:
        """Write the method's fields as the library's options."""
        options = {**self.options, **self.when}
        for ours, theirs in self.fields.items():
            option, table = theirs if isinstance(theirs, tuple) else (theirs, None)
            value = getattr(method, ours)
            if table is not None:
                value = table[value][0] if isinstance(table[value], tuple) else table[value]
            options[option] = value
        return {key: value for key, value in options.items() if (key, value) != ("architecture", None)}


@dataclass(frozen=True)
class UnionCodec(HubCodec):
    """How the library stores a composite: as a union of what its parts are there.

    Attributes:
        parts: by the name of the part.
    """

    parts: Mapping[str, HubCodec] = field(default_factory=dict)

    def claims(self, options: Options) -> bool:
        """Say whether it is a union of just these parts."""
        configs = options.get("configs") or ()
        every = [[c for c in configs if codec.claims(c)] for codec in self.parts.values()]
        return super().claims(options) and len(configs) == len(every) and all(len(found) == 1 for found in every)


def union(
    parts: Mapping[str, HubCodec], fields: Callable[[Mapping[str, dict[str, Any]]], dict[str, Any]]
) -> UnionCodec:
    """Make the codec of a composite.

    Args:
        parts: by the name of the part.
        fields: settings of the parts by name -> fields of the composite. It raises a `FormatError` for what the parts
            cannot be there.
    """

    def read(host: Carrier, options: Options, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        configs = {part: next(c for c in options["configs"] if codec.claims(c)) for part, codec in parts.items()}
        return fields({part: codec.settings(host, configs[part], tensors) for part, codec in parts.items()})

    def outward(host: Carrier, key: str, method: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        configs, tensors = [], {}
        for part, codec in parts.items():
            inner = method_of(host, f"{key}/{part}")
            options, found = codec.outward(host, f"{key}/{part}", inner)
            configs.append({**codec.written(inner), **options})
            tensors.update(found)
        return {"configs": configs}, tensors

    def inward(host: Carrier, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {part: codec.inward(host, f"{key}/{part}", tensors) for part, codec in parts.items()}
        return {f"{part}/{ours}": value for part, own in found.items() for ours, value in own.items()}

    return UnionCodec(
        options={"architecture": "union", "configs": None},
        when={"architecture": "union"},
        fields={},
        ignores=("configs",),
        derived=read,
        outward=outward,
        inward=inward,
        parts=parts,
    )


def fuse(adapters: Mapping[str, Options]) -> dict[str, Any]:
    """The options that say what is fused: those of the adapters, by name."""
    return {"architecture": FUSE, "adapters": dict(adapters)}


def method_of(host: Carrier, key: str) -> Any:
    """The method of an adapter, or of a part of a composite."""
    top = key.partition("/")[0]
    return host.methods[key] if key == top else host.part_methods(top)[key]


def taken(tensors: dict[str, Tensor], key: str) -> Tensor:
    """Take a tensor out of a file.

    Raises:
        FormatError: it is not there.
    """
    if key not in tensors:
        near = sorted(tensors)[:3]
        raise FormatError(
            f"The adapter has no tensor {key}, which its configuration speaks of (it has {', '.join(near) or 'none'}). "
            "It is of another model, or damaged: load the base that it was trained on, or get it again."
        )
    return tensors.pop(key)

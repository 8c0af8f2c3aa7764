"""A prefix, an adapter and LoRA behind gates, in the form of AdapterHub's library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import HubCodec, Options, taken, union
from adapterlab.errors import FormatError
from adapterlab.foreign.model import is_causal
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
from adapterlab.methods.low_rank import _hub as _low_rank_hub
from adapterlab.methods.low_rank import _hub_places
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning

_SHARED = "shared_gating"  # one gate for keys and values
_QUERIES_AND_VALUES = {
    "selfattn_lora": True, "intermediate_lora": False, "output_lora": False, "attn_matrices": ["q", "v"],
    "leave_out": [],
}  # fmt: skip
_ALPHA = 2  # what the library writes; with a gate it has no effect


def codec() -> HubCodec:
    """Make the codec of the three; the gate of the prefix is in the part `view`."""
    plain = [cast(HubCodec, method.hub) for method in (PrefixTuning, AdapterPfeiffer, LoRA)]
    prefix, adapter, lora = (
        dataclasses.replace(part, when={**part.when, "use_gating": True}, ignores={*part.ignores} - {_SHARED})
        for part in plain
    )

    def factors(host: Carrier, key: str, method: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        layers = tuple({type(layer) for layer in host.adapters(key).values()})
        options, tensors = _low_rank_hub.outward(host, key, method, layers)
        return {**options, "alpha": _ALPHA}, tensors

    lora = dataclasses.replace(lora, when={**lora.when, **_QUERIES_AND_VALUES}, outward=factors)
    return _with_gates(union({"prefix": prefix, "adapter": adapter, "lora": lora}, _fields))


def _fields(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a union that is the three as they are here."""
    prefix, adapter, lora = parts["prefix"], dict(parts["adapter"]), parts["lora"]
    m = adapter.pop("m")
    usual = {"activation": "relu", "dropout": 0.0, "scale": 1.0, "reads": "normed"}
    if adapter != usual or prefix["dropout"] or lora["dropout"]:
        raise FormatError(
            "A gated adapter has no form here but relu on the normalised sum, unscaled; and no dropout is in any part. "
            f"This one: {adapter}. Use it with the library `adapters` itself."
        )
    return {"length": prefix["length"], "init": "zeros", "r": lora["r"], "m": m, "padding": True}


def _with_gates(plain: HubCodec) -> HubCodec:
    """Add the gates of prefix and LoRA, which the codecs of these do not know."""

    def read(host: Carrier, options: Options, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        _check_causality(host)
        return plain.derived(host, options, tensors)

    def outward(host: Carrier, key: str, method: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        _check_causality(host)
        if not method.padding:
            raise FormatError(
                "AdapterHub's gates are means over padding too, and those of this adapter over real tokens alone "
                "(padding=True). Keep our own form, or train one so."
            )
        options, tensors = plain.outward(host, key, method)
        own = host.tensors(key)
        return options, {**tensors, **{theirs: own[ours] for ours, theirs in _gates(host, key).items()}}

    def inward(host: Carrier, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        gates = {ours: taken(tensors, theirs) for ours, theirs in _gates(host, key).items()}
        return {**plain.inward(host, key, tensors), **gates}

    return dataclasses.replace(plain, derived=read, outward=outward, inward=inward)


def _gates(host: Carrier, key: str) -> dict[str, str]:
    """The library's names of the tensors of gates by ours."""
    stems = {f"view/adapter.{path}.gate": f"{path}.prefix_tuning.prefix_gates" for path in host.adapters(f"{key}/view")}
    for path in host.adapters(f"{key}/lora"):
        stems[f"lora/adapter.{path}.gate"] = _hub_places.key(path, "gate")
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in stems.items() for leaf in ("weight", "bias")}


def _check_causality(host: Carrier) -> None:
    if is_causal(host.model):
        raise FormatError(
            "In a causal model AdapterHub's gates are means over all tokens, later ones too, and those here are each "
            "token's own, so they are not exchanged there. Use them with the library `adapters` itself."
        )

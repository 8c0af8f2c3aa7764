"""Bottleneck adapters in the form of AdapterHub's library."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import Rename
from adapterlab.core.hub import HubCodec, Options, method_of, taken
from adapterlab.core.site import Site
from adapterlab.errors import FormatError
from adapterlab.foreign.adapter_hub import check_known, holder
from adapterlab.methods.bottleneck._bottleneck import Projections, feed_forwards, norm_behind

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"),
    "silu": ("swish", "silu"),
    "tanh": "tanh",
}
Names = Mapping[str, str]  # the library's names of tensors by ours
DENSE: Names = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
    "scale": "scaling",
    "gate.weight": "gate.weight",
    "gate.bias": "gate.bias",
}
PHM = (
    "phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init",
    "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
)  # fmt: skip
# The library's options with its defaults.
_OPTIONS: dict[str, Any] = {
    "mh_adapter": False, "output_adapter": True, "original_ln_before": False, "original_ln_after": True,
    "ln_before": False, "ln_after": False, "init_weights": "bert", "init_weights_seed": None, "is_parallel": False,
    "scaling": 1.0, "use_gating": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "inv_adapter": None, "inv_adapter_reduction_factor": None, "cross_adapter": False, "leave_out": [], "dropout": 0.0,
    "phm_layer": False, "phm_dim": 4, "factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True,
    "factorized_phm_rule": False, "phm_c_init": "normal", "phm_init_range": 0.0001, "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1, "phm_bias": True, "stochastic_depth": 0.0,
    "architecture": None,
}  # fmt: skip


def codec(
    when: Options,
    derived: Callable[[Carrier, Options, Mapping[str, Tensor]], dict[str, Any]],
    outward: Callable[[Carrier, str, Any], dict[str, Any]],
    start: str = "bert",
    names: Names = DENSE,
    fields: Mapping[str, Rename] | None = None,
    ignores: Collection[str] = PHM,
    shared: Names | None = None,
) -> HubCodec:
    """Make the codec of one kind of bottleneck adapters.

    Args:
        when: options that select it.
        derived: (host, options, tensors) -> further fields.
        outward: (host, key of the adapter, its method) -> further options.
        start: the library's name of how they begin.
        names: of the tensors of one adapter.
        fields: further ones.
        ignores: further options that may have any value.
        shared: names of what all adapters share, which the library keeps at the backbone.
    """
    return HubCodec(
        options={**_OPTIONS, "init_weights": start},
        when={"architecture": None, "phm_layer": False, **when},
        fields={"activation": ("non_linearity", ACTIVATIONS), **(fields or {})},
        ignores=("reduction_factor", "scaling", "dropout", "init_weights", "init_weights_seed", *ignores,
                 "inv_adapter_reduction_factor", "residual_before_ln", "adapter_residual_before_ln",
                 "original_ln_before", "cross_adapter", "leave_out"),
        derived=lambda host, options, tensors: {**_read(options, tensors, names), **derived(host, options, tensors)},
        outward=lambda host, key, method: _outward(host, key, outward(host, key, method), names, shared or {}),
        inward=lambda host, key, tensors: _inward(host, key, tensors, names, shared or {}),
    )  # fmt: skip


def _read(options: Options, tensors: Mapping[str, Tensor], names: Names) -> dict[str, Any]:
    """The width, from the tensors, and the factor and dropout."""
    widths = {len(value) for key, value in tensors.items() if key.endswith(f".{names['down_bias']}")}
    scale = options.get("scaling", 1.0)
    learned = scale == "learned"
    if len(widths) != 1 or not (learned or isinstance(scale, float | int)):
        raise FormatError(
            f"Its bottlenecks have the widths {sorted(widths)}, and scaling={scale!r}; here all of an adapter have one "
            "width, and scaling is a number or 'learned'. Use it with the library `adapters` itself."
        )
    found = {"m": widths.pop(), "dropout": options.get("dropout", 0.0)}
    return {**found, **({"learn_scale": True} if learned else {"scale": scale})}


def places(host: Carrier, key: str) -> dict[str, Projections]:
    """The projections of an adapter, by what the library calls their places."""
    check_known(host.model)
    parts = {path: part for path, part in host.adapters(key).items() if isinstance(part, Projections)}
    return {place(host, part.site): part for part in parts.values()}


def place(host: Carrier, site: Site) -> str:
    """Where the library keeps the adapter of a sublayer."""
    return holder(host.model, site.path, f"{site.stack}.{site.layer}", site.role == "o")


def chosen(host: Carrier, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> list[Site]:
    """Those of some sublayers that a file has tensors for."""
    return [site for site in sites if f"{place(host, site)}.{DENSE['down']}" in tensors]


def reads(host: Carrier, options: Options) -> dict[str, Any]:
    """What the library's adapter reads: where no norm follows the sum, its norm is left out and the sum is read."""
    if options.get("leave_out") or options.get("residual_before_ln", True) is not True or options.get("cross_adapter"):
        raise FormatError(
            "Its options leave_out, cross_adapter and residual_before_ln=False have no form here. Use it with the "
            "library `adapters` itself."
        )
    if not options.get("original_ln_before", False):
        return {"reads": "output"}
    return {"reads": "normed" if _norm_follows(host) else "sum"}


def written(host: Carrier, method: Any) -> dict[str, Any]:
    """The library's option for what an adapter reads."""
    refuse_unless(method.targets is None, method, "it stands at places of its own (targets)")
    return {"original_ln_before": method.reads == "sum" or (_norm_follows(host) and method.reads == "normed")}


def _norm_follows(host: Carrier) -> bool:
    sites = host.all_sites()
    return all(norm_behind(site, sites) is not None for site in feed_forwards(sites))


def _keys(where: str, part: Projections, names: Names) -> dict[str, str]:
    return {ours: f"{where}.{names[ours]}" for ours in part.state_dict()}


def _at_backbone(host: Carrier, leaf: str) -> str:
    path = host.path_of(host.backbone)
    return f"{path}.{leaf}" if path else leaf


def _outward(
    host: Carrier, key: str, options: dict[str, Any], names: Names, shared: Names
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = places(host, key)
    method, first = method_of(host, key), next(iter(found.values()))
    shapes = {tuple(weight.shape) for part in found.values() for weight in part.weights()[::2]}
    m, width = first.weights()[0].shape
    scale = "learned" if "scale" in first.state_dict() else float(method.scale)
    reduction = width / m if int(width // (width / m)) == m else width / (m + 0.5)
    tensors = {
        theirs: part.state_dict()[ours]
        for where, part in found.items()
        for ours, theirs in _keys(where, part, names).items()
    }
    tensors |= {_at_backbone(host, theirs): host.tensors(key)[f"shared.{ours}"] for ours, theirs in shared.items()}
    if shapes != {(m, width), (width, m)}:
        raise FormatError("AdapterHub's bottlenecks read and write the model's width, and these differ among modules.")
    return {"reduction_factor": reduction, "scaling": scale, "dropout": method.dropout, **options}, tensors


def _inward(host: Carrier, key: str, tensors: dict[str, Tensor], names: Names, shared: Names) -> dict[str, Tensor]:
    found = {
        f"adapter.{part.site.path}.{ours}": taken(tensors, theirs)
        for where, part in places(host, key).items()
        for ours, theirs in _keys(where, part, names).items()
    }
    return found | {f"shared.{ours}": taken(tensors, _at_backbone(host, theirs)) for ours, theirs in shared.items()}


def refuse_unless(own: bool, method: Any, what: str) -> None:
    """Refuse to write what the library does not have.

    Raises:
        FormatError: it does not.
    """
    if not own:
        raise FormatError(
            f"AdapterHub's library has no form of this {method.id} adapter: {what}. Keep our own form, or train one "
            "that it has."
        )

"""Where AdapterHub's library puts what it calls LoRA, and (IA)³ with it: beside linear layers, by options for roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.errors import FormatError
from adapterlab.foreign.adapter_hub import feed_forward_roles

OPTIONS: dict[str, Any] = {
    "selfattn_lora": True, "intermediate_lora": False, "output_lora": False, "leave_out": [], "r": 8, "alpha": 8,
    "dropout": 0.0, "attn_matrices": ["q", "v"], "composition_mode": "add", "init_weights_seed": None,
    "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None, "dtype": None,
}  # fmt: skip
PLACES = ("selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices", "leave_out")
_GROUP = ".loras."


def targets(host: Carrier, tensors: Mapping[str, Any]) -> dict[str, Site]:
    """The modules that a file has tensors for, by path.

    Raises:
        FormatError: this model has no such module.
    """
    sites = {site.path: site for site in host.all_sites()}
    paths = dict.fromkeys(key.partition(_GROUP)[0] for key in tensors if _GROUP in key)
    if missing := [path for path in paths if path not in sites]:
        raise FormatError(
            f"The adapter has tensors for {missing[0]}, which {type(host.model).__name__} lacks: it is of another "
            "model. Load the base that it was trained on."
        )
    return {path: sites[path] for path in paths}


def as_targets(sites: Mapping[str, Site]) -> Targets:
    """The same as a setting."""
    return Targets(include=tuple(sites) or ("no module",))


def key(path: str, leaf: str) -> str:
    """The library's key for a tensor of a module."""
    return f"{path}{_GROUP}{leaf}"


def options(host: Carrier, adapted: Mapping[str, Site], fused: str = "qkv") -> dict[str, Any]:
    """Say which modules are adapted as the library's options.

    Args:
        host: of the model.
        adapted: the modules by path.
        fused: which of q, k and v of a fused module.

    Raises:
        FormatError: it has no options that mean just these.
    """
    feed_forward = feed_forward_roles(host.model)
    roles = {str(site.role) for site in adapted.values()}
    matrices = [role for role in "qkv" if role in roles or ("qkv" in roles and role in fused)]
    found = {"selfattn_lora": bool(matrices), "attn_matrices": matrices}
    found |= {option: role in roles for option, role in feed_forward.items()}
    meant = {site.path for site in _usual(host) if site.role in roles}
    if meant != set(adapted):
        odd = sorted(meant ^ set(adapted))
        raise FormatError(
            "AdapterHub's LoRA is beside q, k, v and the feed-forward projections of every layer; "
            f"this adapter differs, for example at {odd[0]}. Keep our own form, or HF PEFT's."
        )
    return found


def _usual(host: Carrier) -> list[Site]:
    """What the options can name, cross-attention among it."""
    wanted = {"q", "k", "v", "qkv", *feed_forward_roles(host.model).values()}
    return [s for s in host.all_sites() if s.kind == "linear" and s.layer is not None and s.role in wanted]

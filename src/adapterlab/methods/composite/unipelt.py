"""Prefix, low-rank updates and an adapter in every layer, each behind a learned gate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import HubCodec
from adapterlab.core.method import Composite, Method
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.core.targets import Targets
from adapterlab.engine.attention import prepend
from adapterlab.errors import AttachError
from adapterlab.foreign.model import is_causal
from adapterlab.methods.bottleneck._bottleneck import After, AroundNorm
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
from adapterlab.methods.composite import _hub
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.registry import register

GATED = "its gate depends on the input"
_INPUT = "hidden_states"  # what attention modules of transformers call their input


@register
class UniPELT(Composite):
    """Give every layer a prefix, LoRA and an adapter, and let a gate for each say how much of it is used.

    A gate reads h_t `[d]` at token t: g_t = σ(w · h_t + b). In a stack without causality G is the mean of g_t over the
    real tokens of a row, the same for all of them; with `padding=True` over all tokens, as in AdapterHub's library. In
    a causal stack G_t = g_t: the mean would show later tokens to earlier ones, and would be another one with a cache.

    Prefix: K ← [G P_K ; K], V ← [G P_V ; V], gate on the attention's input (G_t of the query). LoRA on queries and
    values: y = W x + G · B A x, a gate on each module's own input in the place of alpha / r. Adapter behind the
    feed-forward sublayer: G · (W_u relu(W_d z + b_d) + b_u), gate on what it reads, z.

    Where it attaches: every attention module (prefix), queries and values or the fused module that holds them (LoRA),
    and behind every feed-forward sublayer as `adapter_pfeiffer` does.

    Start: w from a normal distribution with deviation 0.02, b = 0, so that gates are half open; the parts as they start
    by themselves.

    Trainable parameters: 2 l n_kv hd for each attention module, r (in + out) for each module with LoRA, 2 m d + m + d
    for each adapter, and in + 1 for each gate.

    Inference: not mergeable, since gates depend on the input. G = 0 does not switch a prefix off: its keys keep a part
    of the softmax. In a causal stack attention computes with vectors of twice the width.

    What the gates opened to, in the last pass of training, is told with the result of a run.

    Rate: 5e-4, LoRA's.

    Reference: "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv 2110.07577.

    Example:
        >>> from adapterlab.methods.composite.unipelt import UniPELT
        >>> UniPELT(length=5, r=4).reduction
        16.0
    """

    formula: ClassVar[str] = "prefix, LoRA and adapter, in + 1 for each gate"
    starts_at_base: ClassVar[bool] = False

    length: int = Field(10, ge=1, description="number of key-value pairs l of the prefix")
    init: Literal["words", "normal", "zeros"] = Field("words", description="start of the prefix, as in prefix_tuning")
    hidden: int | None = Field(
        None, ge=1, description="width of the network that makes the prefix; none by default, 512 in the paper"
    )
    r: int = Field(8, ge=1, description="rank of LoRA")
    m: int | None = Field(None, ge=1, description="width of the bottleneck; default: the model's width / reduction")
    reduction: float = Field(16.0, ge=1, description="width of the model over that of the bottleneck, when m is unset")
    padding: bool = Field(False, description="let the gates of a stack without causality count padding too")

    hub: ClassVar[HubCodec | None] = _hub.codec()

    def parts(self, host: Carrier) -> dict[str, Method]:
        """The gated parts, and what shows the attention's input to the gate of the prefix."""
        roles = {site.role for site in host.all_sites()}
        targets = Targets(include=("q", "v") if "q" in roles else ("qkv",))
        prefix = GatedPrefix(length=self.length, init=self.init, hidden=self.hidden, offset=0)
        return {
            "view": Views(),
            "prefix": prefix,
            "lora": GatedLoRA(r=self.r, alpha=self.r, targets=targets),
            "adapter": GatedAdapter(m=self.m, reduction=self.reduction),
        }

    def attach(self, host: Carrier, name: str) -> None:
        """Compose the parts and connect the gates."""
        super().attach(host, name)
        self._connect(host, name)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Likewise."""
        super().attach_saved(host, name, tensors)
        self._connect(host, name)

    def _connect(self, host: Carrier, name: str) -> None:
        """Tell gates and prefixes whose tokens they see, and whether these are causal."""
        for key in host.part_methods(name):
            for path, adapter in host.adapters(key).items():
                stack, layer = adapter.site.stack, adapter.site.layer
                causal = stack is not None and is_causal(host.model.get_submodule(stack))
                for part in adapter.modules():
                    if isinstance(part, Gate):
                        part.connect(host.state, f"{name}:{stack}.{layer}", causal, self.padding)
                if isinstance(adapter, View | GatedPrefix.Layer):
                    adapter.connect(host.state, f"{name}:{path}", causal)

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """How far the gates of each part were open."""
        found: dict[str, list[float]] = defaultdict(list)
        for key in host.part_methods(name):
            what = "prefix" if key.endswith("/view") else key.rpartition("/")[2]
            for adapter in host.adapters(key).values():
                gates = [part for part in adapter.modules() if isinstance(part, Gate) and part.opened is not None]
                found[what] += [float(gate.opened) for gate in gates if gate.opened is not None]
        shown = {what: values for what, values in found.items() if values}
        return {
            **super().outcome(host, name),
            **{
                f"gates of {what}": f"{sum(v) / len(v):.2f} ({min(v):.2f} to {max(v):.2f})" for what, v in shown.items()
            },
        }


class Gate(nn.Module):
    """How much of a part is used: σ(w · h_t + b), for each token or as the mean over a row.

    Attributes:
        opened: mean of the last pass of training.
    """

    opened: Tensor | None

    def __init__(self, site: Site, width: int):
        super().__init__()
        self.weight, self.bias = site.parameter(1, width), site.parameter(1)
        nn.init.normal_(self.weight, std=0.02)
        self.opened, self.state, self.key, self.causal, self.padding = None, State(), "", False, False

    def connect(self, state: State, key: str, causal: bool, padding: bool) -> None:
        """Learn where the real tokens of the layer are told, and whether they alone count."""
        self.state, self.key, self.causal, self.padding = state, key, causal, padding

    def forward(self, h: Tensor) -> Tensor:
        """Return G `[..., tokens, 1]`, or `[..., 1, 1]` where it is a row's."""
        g = torch.sigmoid(F.linear(h.to(self.weight.dtype), self.weight, self.bias))
        if not self.causal:
            g = over_tokens(g, None if self.padding else self.state.taps.get(self.key))
        if self.training:
            self.opened = g.detach().mean()
        return g


class View(Adapter):
    """Leaves the gate of the prefix, and which tokens are real, before an attention module runs."""

    not_linear: ClassVar[str] = GATED
    rowwise: ClassVar[bool] = False
    tokenwise: ClassVar[bool | None] = False

    def __init__(self, site: Site, width: int):
        super().__init__(site)
        self.gate = Gate(site, width)

    def connect(self, state: State, key: str, causal: bool) -> None:
        """Learn where to leave it."""
        self.state, self.key, self.causal = state, key, causal

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Look at the arguments, then run the attention as it is."""
        given = self.site.bound(args, kwargs)
        h: Tensor = given[_INPUT]
        if not self.causal:
            self.state.taps[self.gate.key] = real_tokens(given.get("attention_mask"), h)
        self.state.taps[self.key] = self.gate(h)
        return run(*args, **kwargs)


class Views(Method):
    """A `View` at every attention module with a prefix."""

    id: ClassVar[str] = "unipelt_views"

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the attention modules.

        Raises:
            AttachError: what one of them reads cannot be told.
        """
        queries = [s for s in host.all_sites() if s.kind == "linear" and s.role in ("q", "qkv")]
        for site in PrefixTuning().modules(host):
            width = next((s.shape[1] for s in queries if s.path.startswith(f"{site.path}.")), None)
            if width is None or _INPUT not in site.arguments:
                raise AttachError(
                    f"{site.path} ({type(site.module).__name__}) has no queries that can be told by their name, or "
                    f"takes no {_INPUT}, so a gate cannot read what it reads. Choose prefix_tuning, lora or "
                    "adapter_pfeiffer by itself."
                )
            host.wrap(name, site, View(site, width))


class GatedPrefix(PrefixTuning):
    """Prefix tuning whose keys and values a gate multiplies."""

    class Layer(PrefixTuning.Layer):
        """The prefix of one attention module."""

        rowwise: ClassVar[bool] = False

        def connect(self, state: State, key: str, causal: bool) -> None:
            """Learn where the gate is left."""
            self.state, self.key, self.causal = state, key, causal

        def around(
            self, run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: Any
        ) -> Any:
            """Attend to the prefix as far as the gate is open."""
            gate = self.state.taps.pop(self.key)[:, None].to(q.dtype)  # [batch, 1, tokens or 1, 1]
            p_k, p_v = (t.to(q.dtype) for t in self.pairs().split(1))
            if not self.causal:
                found = prepend(self.site.module, q, k, v, mask, gate * p_k, gate * p_v, kwargs)
                return run(q, *found[:3], **found[3])
            # Each query has a gate of its own: dimensions behind the others hold it, and the prefix is there alone. A
            # prefix further out may have added such dimensions already.
            width, before = p_k.shape[-1], q.shape[-1]
            q = torch.cat([q, gate * q[..., :width]], -1)
            k, v = (F.pad(t, (0, width)) for t in (k, v))
            p_k, p_v = (F.pad(t, (before, 0)) for t in (p_k, p_v))
            kwargs = {**kwargs, "scaling": width**-0.5 if kwargs.get("scaling") is None else kwargs["scaling"]}
            k, v, mask, kwargs = prepend(self.site.module, q, k, v, mask, p_k, p_v, kwargs)
            y, *rest = run(q, k, v, mask, **kwargs)
            own, others, prefix = y.split([width, before - width, width], -1)
            return (torch.cat([own + gate.transpose(1, 2) * prefix, others], -1), *rest)


class GatedLoRA(LoRA):
    """LoRA with a gate in the place of its scale."""

    class Layer(LoRA.Layer):
        """The factors at one module."""

        not_linear: ClassVar[str] = GATED
        tokenwise: ClassVar[bool | None] = False

        def __init__(self, method: LoRA, site: Site):
            super().__init__(method, site)
            self.gate = Gate(site, site.shape[1])

        def added(self, x: Tensor) -> Tensor:
            """G · B A x."""
            return self.gate(x) * super().added(x)

        def low_rank(self) -> None:
            """It is no fixed product of two factors."""
            return None


class Gated(After):
    """An adapter whose share a gate multiplies."""

    tokenwise: ClassVar[bool | None] = False

    def make(self, method: Any, width: int, m: int, out: int) -> None:
        """Make the projections and the gate."""
        super().make(method, width, m, out)
        self.gate = Gate(self.site, width)

    def share(self, z: Tensor) -> Tensor:
        """G · (W_u f(W_d z + b_d) + b_u)."""
        return (self.gate(z) * super().share(z)).to(z.dtype)


class GatedAtNorm(Gated):
    """The same at the norm behind a residual sum."""

    around = AroundNorm.around  # type: ignore[assignment]


class GatedAdapter(AdapterPfeiffer):
    """A Pfeiffer adapter with a gate."""

    Layer: ClassVar[Callable[..., Gated]] = Gated
    AtNorm: ClassVar[Callable[..., Gated]] = GatedAtNorm


def over_tokens(g: Tensor, real: Tensor | None) -> Tensor:
    """Mean of `[..., tokens, 1]` over the real tokens `[..., tokens]` (all, if it is not told): `[..., 1, 1]`."""
    if real is None or real.shape != g.shape[:-1]:
        return g.mean(-2, keepdim=True)
    weight = real[..., None].to(g.dtype)
    return (g * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp(min=1)


def real_tokens(mask: Tensor | None, h: Tensor) -> Tensor | None:
    """Read from an attention mask of any form which tokens of h `[batch, tokens, d]` somebody may look at."""
    if mask is None or mask.shape[-1] != h.shape[1]:
        return None
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() and mask.dim() > 2 else mask.bool()
    seen = seen if seen.dim() == 2 else seen.flatten(1, -2).any(1)
    return seen.expand(len(h), -1)

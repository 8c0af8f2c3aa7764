"""Prefix tuning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter, Front
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.hub import HubCodec
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.engine.attention import prepend
from adapterlab.engine.positions import Positions, position_sites
from adapterlab.errors import AttachError, FormatError
from adapterlab.foreign.cache import cache_argument
from adapterlab.foreign.model import attention_limits, config_of, head_width, is_encoder_decoder, vocabulary
from adapterlab.foreign.roles import role_of
from adapterlab.methods.prompt import _hub
from adapterlab.methods.prompt._virtual_tokens import (
    PROMPT,
    SIZES,
    peft_prompt,
    peft_sizes,
    recorded_keys_and_values,
    word_ids,
)
from adapterlab.registry import register


@register
class PrefixTuning(Method):
    """Give every attention layer P trained key-value pairs in front of the real ones.

    K ← [P_K ; K], V ← [P_V ; V] before key-value heads are repeated; every query sees the prefix. Prefix keys are used
    as they are: under rotary positions they count as rotated already. With `hidden = m` a network makes the pairs
    while training: tanh(E W1ᵀ + b1) W2ᵀ + b2, with one E `[P, d]` and W1 `[m, d]` for all layers and W2
    `[2 · n_kv · hd, m]` for each.

    Where it attaches: inside every attention module. An encoder-decoder gets three independent prefixes: encoder
    self-attention, decoder self-attention, and cross-attention in front of the encoder's keys. Layers that borrow
    another layer's keys get none. Real tokens start at position `offset`, by default P, as if the prefix had been read;
    models with relative biases or image patches know no such shift, and under linear ones (ALiBi) the prefix stands at
    0 to P − 1. Where attention has a sliding window, every query still sees the prefix; with `window=True` the window
    passes over it as over tokens, which is what HF PEFT does.

    Start: not the base's output; with `init="words"` the model behaves as if it had read P words first. Even a prefix
    of zeros draws attention to itself.

    Trainable parameters: 2 P L n_kv hd; with `hidden` in training: P d + d m + m + (m + 1) 2 L n_kv hd.

    Inference: not mergeable; each layer attends to P more keys. Rows share one copy.

    Rate: 5e-3 for pairs that train themselves, from HF PEFT's comparison; the authors take 5e-5 to 8e-5 with `hidden`.

    Reference: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.

    Example:
        >>> from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
        >>> PrefixTuning(length=10).first_position
        10
    """

    formula: ClassVar[str] = "2 P L n_kv hd"
    starts_at_base: ClassVar[bool] = False

    length: int = Field(20, ge=1, description="number of virtual tokens P")
    init: Literal["words", "normal", "zeros"] = Field(
        "words", description="start: keys and values of real words, standard normal numbers, or zeros"
    )
    words: tuple[int, ...] = Field(
        (), description="token ids to start from, cut or tiled to the length; default: drawn from the vocabulary"
    )
    hidden: int | None = Field(None, ge=1, description="width m of the network that makes the prefix; none by default")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the prefix")
    offset: int | None = Field(
        None, ge=0, description="position of the first real token; default: the length, as HF PEFT has it"
    )
    window: bool = Field(False, description="let a sliding window of attention pass over the prefix too")
    targets: Targets | None = Field(
        None, description="attention modules, or layers, that get a prefix; default: every attention module"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "PREFIX_TUNING",
        fields={"length": "num_virtual_tokens"},
        tensors={},
        prefix="base_model.",
        ignores=(*SIZES, "prefix_projection", "encoder_hidden_size", "init_weights"),
        implies={"init": "zeros", "window": True},
        pack=lambda host, name: _pack(host, name),
        unpack=lambda host, name, tensors: _unpack(host, name, tensors),
        differs=lambda host: _differs(host),
    )

    hub: ClassVar[HubCodec | None] = HubCodec(
        options={
            "architecture": "prefix_tuning", "encoder_prefix": True, "cross_prefix": True, "leave_out": [],
            "flat": True, "prefix_length": 30, "bottleneck_size": 512, "non_linearity": "tanh", "dropout": 0.0,
            "use_gating": False, "shared_gating": True, "init_weights_seed": None,
        },
        when={"architecture": "prefix_tuning"},
        fields={"length": "prefix_length", "dropout": "dropout"},
        ignores=("flat", "bottleneck_size", "non_linearity", "shared_gating", "init_weights_seed"),
        derived=lambda host, options, tensors: _hub.read(options),
        outward=lambda host, key, method: _hub.outward(host, key, method),
        inward=lambda host, key, tensors: _hub.inward(host, key, tensors),
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_start(self) -> PrefixTuning:
        if self.words and (self.hidden is not None or self.init != "words"):
            raise ValueError("`words` need init='words' and no `hidden`: a network starts from its own random weights")
        return self

    @property
    def first_position(self) -> int:
        """Position of the first real token."""
        return self.length if self.offset is None else self.offset

    def attach(self, host: Carrier, name: str) -> None:
        """Attend everywhere, shift the positions, then start from words."""
        networks: dict[str, nn.Module] = {}
        modules = self.modules(host)
        for site in modules:
            adapter = self.Layer(self, site)
            if self.hidden is not None:
                # Layers of one kind share a network: encoder, decoder and cross-attention have one each.
                kind = re.sub(r"\d+", "N", site.path)
                if kind not in networks:
                    width = (getattr(site.module, "config", None) or config_of(host.model)).hidden_size
                    networks[kind] = host.share(name, f"network{len(networks)}", _Network(self, site, width))
                adapter.refer("network", networks[kind])
            host.attend(name, site.module, adapter)
        if self.first_position:
            for site in position_sites(host):
                host.wrap(name, site, Positions(site, self.first_position))
        if self.hidden is None and self.init == "words":
            self.start_from_words(host, name, modules)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach without looking for a good start."""
        start = {} if self.hidden is not None else {"init": "zeros", "words": ()}
        self.replace(**start).attach(host, name)

    def modules(self, host: Carrier) -> list[Site]:
        """Return the attention modules that get a prefix."""
        paths = {host.path_of(m) for m in host.attentions if not getattr(m, "is_kv_shared_layer", False)}
        found = [site for site in host.all_sites() if site.path in paths]
        if self.targets is None:
            return found
        chosen = [site.path for site in host.sites(self.targets)]
        kept = [site for site in found if any(f"{site.path}.".startswith(f"{path}.") for path in chosen)]
        if not kept:
            raise AttachError(
                f"targets={list(self.targets.include)} names no attention module, nor a module around one. Attention "
                f"modules here: {', '.join(sorted(paths)[:4])}."
            )
        return kept

    @torch.no_grad()
    def start_from_words(self, host: Carrier, name: str, modules: list[Site]) -> None:
        """Copy the keys and values that the frozen model computes for words; images and sound start at random."""
        ids = word_ids(host, self.words, self.length)
        if ids is None:
            return
        kept = recorded_keys_and_values(host, [site.module for site in modules], ids)
        adapters = host.adapters(name)
        for site, (k, v) in zip(modules, kept, strict=True):
            prefix: Any = adapters[site.path].get_parameter("prefix")
            prefix.copy_(torch.stack([k[0], v[0]]))

    class Layer(Adapter):
        """The prefix of one attention module: `prefix` `[2, n_kv, P, hd]`, keys then values."""

        not_linear: ClassVar[str] = "it adds keys and values inside the attention"
        network: nn.Module

        def __init__(self, method: PrefixTuning, site: Site):
            super().__init__(site)
            self.p, self.window, self.first = method.dropout, method.window, method.first_position
            self.sizes = (method.length, *kv_shape(site.module))
            length, heads, width = self.sizes
            if method.hidden is None:
                self.prefix = site.parameter(2, heads, length, width)
                if method.init != "zeros":
                    nn.init.normal_(self.prefix)
            else:
                self.out = nn.Linear(method.hidden, 2 * heads * width, device=site.device, dtype=site.dtype)

        def pairs(self) -> Tensor:
            """Keys and values `[2, n_kv, P, hd]`."""
            if "prefix" in self._parameters:
                return self.prefix
            length, heads, width = self.sizes
            made: Tensor = self.out(self.network())
            return made.view(length, 2, heads, width).permute(1, 2, 0, 3)

        def serving(self) -> Front | None:
            """The prefix, unless a subclass does something else with it."""
            plain = type(self).around is PrefixTuning.Layer.around
            return Front(keys=self.pairs()[0], values=self.pairs()[1]) if plain else None

        def around(
            self, run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: Any
        ) -> Any:
            """Run the attention with the prefix in front."""
            prefix = F.dropout(self.pairs(), self.p) if self.training and self.p else self.pairs()
            window = kwargs.get("sliding_window") if self.window else None
            pairs = (prefix[:1], prefix[1:])
            k, v, mask, kwargs = prepend(self.site.module, q, k, v, mask, *pairs, kwargs, window, self.first)
            return run(q, k, v, mask, **kwargs)


class _Network(nn.Module):
    """The part of the network that layers share: tanh(E W1ᵀ + b1) `[P, m]`."""

    def __init__(self, method: PrefixTuning, site: Site, width: int):
        super().__init__()
        assert method.hidden is not None
        made: dict[str, Any] = {"device": site.device, "dtype": site.dtype}
        self.embedding = nn.Embedding(method.length, width, **made)
        self.inner = nn.Linear(width, method.hidden, **made)

    def forward(self) -> Tensor:
        """Compute the hidden layer for all virtual tokens."""
        return torch.tanh(self.inner(self.embedding.weight))


def kv_shape(module: nn.Module) -> tuple[int, int]:
    """Return the number of key-value heads of an attention module, and their width.

    Raises:
        AttachError: keys and values differ in shape, or their shape cannot be found.
    """
    config = getattr(module, "config", None)
    width = head_width(module)
    outs = {role_of(n): c.out_features for n, c in module.named_children() if isinstance(c, nn.Linear)}
    if width is not None and "k" in outs and outs["k"] == outs.get("v", outs["k"]):
        return outs["k"] // width, width
    heads = getattr(config, "num_key_value_heads", None) or getattr(module, "num_heads", None)
    if heads is None and width is not None and (queries := getattr(config, "num_attention_heads", None)):
        # One layer makes queries, keys and values, which are as many.
        joined = [c for c in module.children() if isinstance(c, nn.Linear) and c.out_features == 3 * queries * width]
        heads = queries if joined else None
    if width is None or heads is None or "k" in outs:
        raise AttachError(
            f"{type(module).__name__} has keys and values of a shape that is not known here, so no prefix can be put "
            "before them. Exclude the module, or choose a method that wraps linear layers."
        )
    return heads, width


def _layers(host: Carrier, name: str) -> dict[str, PrefixTuning.Layer]:
    return {path: a for path, a in host.adapters(name).items() if isinstance(a, PrefixTuning.Layer)}


def _differs(host: Carrier) -> str:
    """Say why PEFT's prefix computes something else on a model, or "".

    PEFT puts the same prefix into every layer, as if tokens had been read into the cache.
    """
    if is_encoder_decoder(host.model):
        return (
            "in an encoder-decoder it reaches the decoder's self-attention alone, and layers share it, so it cannot be "
            "read as three prefixes"
        )
    if cache_argument(host.backbone) is None:
        return f"{type(host.backbone).__name__} takes no cache, through which it comes, so that it does nothing there"
    if "attention_chunk_size" in attention_limits(host.model):
        return "attention in chunks shows it to the first chunk alone"
    return ""


def _pack(host: Carrier, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return PEFT's sizes and its one tensor `[P, 2 · L · n_kv · hd]`, or None for what PEFT does not have."""
    method, layers = host.methods[name], _layers(host, name)
    assert isinstance(method, PrefixTuning)
    shapes = {layer.sizes for layer in layers.values()}
    whole = len(layers) == len(host.attentions) and len(shapes) == 1 and method.first_position == method.length
    passes = method.window or not attention_limits(host.model)
    if not whole or not passes or vocabulary(host.model)[0] is None:
        return None
    (length, heads, width), *_ = shapes
    flat = [layer.pairs().detach().permute(2, 0, 1, 3).reshape(length, -1) for layer in layers.values()]
    sizes = {**peft_sizes(1, heads * width, heads, len(layers)), "prefix_projection": False}
    # PEFT keeps the result of the network alone and ignores what stands beside it; training goes on from the rest.
    beside = host.tensors(name) if method.hidden is not None else {}
    return sizes, {**beside, PROMPT: torch.cat(flat, 1)}


def _unpack(host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut PEFT's tensor into the layers."""
    found, layers = peft_prompt(tensors), _layers(host, name)
    length, heads, width = next(iter(layers.values())).sizes
    expected = (length, 2 * len(layers) * heads * width)
    if tuple(found.shape) != expected:
        raise FormatError(f"{PROMPT} is {tuple(found.shape)}, and this model needs {expected}.")
    parts = found.view(length, len(layers), 2, heads, width).permute(1, 2, 3, 0, 4)
    return {f"adapter.{path}.prefix": part for path, part in zip(layers, parts, strict=True)}

"""A narrow network beside the frozen one, so that no gradient enters the frozen one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches, Method
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.engine.wrapping import adapters_of
from adapterlab.errors import AttachError, ConfigError, DataError
from adapterlab.foreign.cache import (
    accompany,
    cache_argument,
    cache_in,
    cache_out,
    companion,
    plain_mask,
    without_cache,
)
from adapterlab.foreign.model import input_table, is_encoder_decoder
from adapterlab.methods.side_network._narrow_copy import cut_layer, narrow_stack, residual_dims
from adapterlab.registry import register

_OWN = {"input_ids", "inputs_embeds", "token_type_ids", "encoder_hidden_states", "return_dict"}


@register
class LST(Method):
    """Train a narrow copy of the model that reads the frozen model's layers through gates, and answers for it.

    s = W_in h_0 + b_in; for each kept layer i: c = W_i h_i + b_i, s ← Block_i(μ_i s + (1 − μ_i) c), μ_i = sigmoid(α_i /
    tau); y = W_up drop(norm(s)) + b_up goes to the frozen head. h_i `[batch, time, d]` is what layer i of the base
    returns.

    The side network has the base's own kind of blocks, every width divided by r, the number of heads kept. The base
    runs without gradients, so none of its activations is stored for the backward pass.

    Where it attaches: around the model without its head (encoder-decoders: around both stacks, the side decoder reads
    the side encoder), with a tap at each kept layer.

    Start: W_in, W_i and W_up random, α = 0; the side blocks are cut out of the base's by importance (`init`). The first
    output differs from the base's, unless `residual` adds y to the base's output, with W_up = b_up = 0.

    Trainable parameters: kept (block / r² + d d' + d' + 1) + 2 d d' + d + d' + norms, with d' = d / r.

    Inference: not mergeable; the side network keeps a key-value cache of its own.

    Head dimensions are chosen within each head and in rotary pairs, and one set of residual dimensions serves all
    layers. Other adapters inside the model get no gradient while this one is live.

    Rate: 3e-3, as in the authors' runs on T5.

    Reference: "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", arXiv 2206.06522.

    Example:
        >>> from adapterlab.methods.side_network.lst import LST
        >>> LST(r=4, keep=(1, 3)).kept(4)
        (1, 3)
    """

    formula: ClassVar[str] = "kept (block / r² + d d' + d' + 1) + 2 d d' + d + d' + norms"
    starts_at_base: ClassVar[bool] = False

    r: int = Field(8, ge=1, description="divisor of the widths of the side network")
    tau: float = Field(0.1, gt=0, description="temperature of the gates")
    keep: tuple[int, ...] | None = Field(
        None, description="layers that have a side block, from 0; of each stack of an encoder-decoder; None: all"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the projection back to the base's width")
    init: Literal["magnitude", "fisher", "random"] = Field(
        "magnitude", description="how weights are chosen for the side blocks: by size, by squared gradients, or not"
    )
    samples: int = Field(1024, ge=1, description="rows of data for `fisher`")
    bias: bool = Field(True, description="biases of W_in and W_up, as in the authors' runs")
    residual: bool = Field(False, description="add to the base's output instead of replacing it")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Halve the widths only, so that something is left of them."""
        return {"r": 2}

    def kept(self, count: int) -> tuple[int, ...]:
        """Layers with a side block, out of `count`.

        Raises:
            ConfigError: one does not exist.
        """
        kept = tuple(range(count)) if self.keep is None else tuple(sorted(set(self.keep)))
        if not kept or kept[0] < 0 or kept[-1] >= count:
            raise ConfigError(f"LST: keep = {self.keep} is not within the layers 0-{count - 1} of the model.")
        return kept

    def attach(self, host: Carrier, name: str) -> None:
        """Build the side network of each stack and put taps on the kept layers."""
        for stack in _stacks(host):
            site = host.site(stack)
            inside = {id(module) for module in stack.modules()}
            layers = [host.site(layer) for layer in host.layers if id(layer) in inside]
            kept = self.kept(len(layers))
            for i in sorted({0, *kept}):
                host.wrap(name, layers[i], Tap(layers[i], host.state, name))
            host.wrap(name, stack, Ladder(self, site, layers, kept, host.state, name))
        if self.init != "random":
            self._cut(host, name, lambda module: Site("", module).weight().float().abs())

    def attach_saved(self, host: Carrier, name: str, tensors: Any) -> None:
        """Attach without cutting: the values follow. Adapters from before W_in and W_up had biases stay without."""
        bias = any(key.endswith(".into.bias") for key in tensors)
        self.replace(init="random", bias=bias).attach(host, name)

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """With `init="fisher"`, choose the weights of the side blocks by squared gradients of the loss on data.

        Raises:
            AttachError: the base's weights are packed and have no gradients.
            DataError: there are no rows.
        """
        if self.init != "fisher":
            return
        modules = [s.module for s in host.all_sites() if s.kind in ("linear", "embedding") and not s.is_head]
        packed = next((s for s in host.all_sites() if s.quantized), None)
        if packed is not None:
            raise AttachError(
                f"LST: init='fisher' needs gradients of {packed.path}, which is quantized. Use init='magnitude'."
            )
        importance = self._fisher(host, modules, batches)
        transposed = {id(m): Site("", m).transposed or Site("", m).kind == "embedding" for m in modules}
        self._cut(host, name, lambda m: importance[id(m)].T if transposed[id(m)] else importance[id(m)])

    def _fisher(self, host: Carrier, modules: list[nn.Module], batches: Batches) -> dict[int, Tensor]:
        """Sums of squared gradients of the loss of single rows, for each module's weight as it is stored."""
        weights: dict[int, Any] = {id(module): module.weight for module in modules}
        before = {key: weight.requires_grad for key, weight in weights.items()}
        sums = {key: torch.zeros_like(weight, dtype=torch.float32) for key, weight in weights.items()}
        rows = ({k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(_rows(batch)))
        count = 0
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            with host.using(), torch.enable_grad():
                for row in itertools.islice(rows, self.samples):
                    grads = torch.autograd.grad(host.model(**row).loss, list(weights.values()), allow_unused=True)
                    for key, grad in zip(weights, grads, strict=True):
                        if grad is not None:
                            sums[key] += grad.float() ** 2
                    count += 1
        finally:
            for key, weight in weights.items():
                weight.requires_grad_(before[key])
        if not count:
            raise DataError("LST: init='fisher' needs rows of data and received none. Give some, or init='magnitude'.")
        return sums

    def _cut(self, host: Carrier, name: str, score: Callable[[nn.Module], Tensor]) -> None:
        """Fill the side blocks with the important rows and columns of the base's."""
        table = input_table(host.model)
        for ladder in host.adapters(name).values():
            if not isinstance(ladder, Ladder):
                continue
            wide = [host.model.get_submodule(path) for path in ladder.paths]
            if isinstance(table, nn.Embedding):
                importance = score(table)
            else:
                first = next(m for m in wide[0].modules() if isinstance(m, nn.Linear))
                importance = score(first).T
            dims = residual_dims(importance, ladder.into.out_features)
            for rung, layer, path in zip(ladder.rungs, wide, ladder.paths, strict=True):
                config = ladder.site.module.config
                first_layer = host.model.get_submodule(ladder.first)
                cut_layer(rung.block, layer, first_layer, dims, config, score, path)


class Tap(Adapter):
    """Notes what goes into a layer of the base and what comes out."""

    not_linear: ClassVar[str] = "it feeds a side network"
    rowwise: ClassVar[bool] = False

    def __init__(self, site: Site, state: State, name: str):
        super().__init__(site)
        self.state, self.key = state, f"{name}:{site.path}"

    def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = run(x, *args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        self.state.taps[self.key] = (x.detach(), y.detach())
        return out


class Rung(nn.Module):
    """A side block that mixes its input with a layer of the base.

    The mixing is outside the block, hence outside its recomputation when activations are checkpointed.
    """

    def __init__(self, block: nn.Module, wide: int, narrow: int, tau: float):
        super().__init__()
        self.block, self.tau = block, tau
        self.down = nn.Linear(wide, narrow)
        self.alpha = nn.Parameter(torch.zeros(1))  # one element: FSDP shards no scalars
        self.start: Tensor | None = None  # of the first block: its input, in place of the side network's embeddings
        self.tap: Tensor | None = None

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(super().__getattr__("block"), key)  # models look at their blocks' attributes

    def forward(self, s: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block on μ s + (1 − μ)(W h + b)."""
        mu = torch.sigmoid(self.alpha / self.tau)
        s = s if self.start is None else self.start
        return self.block(mu * s + (1 - mu) * self.down(self.tap), *args, **kwargs)


class Ladder(Adapter):
    """The side network of one stack; stands around the stack."""

    not_linear: ClassVar[str] = "it replaces the output by that of a side network"
    rowwise: ClassVar[bool] = False

    def __init__(
        self, method: LST, site: Site, layers: Sequence[Site], kept: Sequence[int], state: State, name: str
    ) -> None:
        super().__init__(site)
        self.state, self.key, self.residual, self.p = state, f"{name}:{site.path}", method.residual, method.dropout
        self.name = name
        self.paths, self.first = [layers[i].path for i in kept], layers[0].path
        where = layers[0].path.removeprefix(site.path).removeprefix(".").rpartition(".")[0]
        self.side = narrow_stack(site.module, where, method.r, kept, site)
        self.where = where
        stack: Any = site.module
        wide, narrow = stack.config.hidden_size, self.side.config.hidden_size
        blocks = self.side.get_submodule(where)
        for i, block in enumerate(list(blocks)):
            blocks[i] = Rung(block, wide, narrow, method.tau)
        self.into = nn.Linear(wide, narrow, bias=method.bias)
        # The encoder of two answers to the side decoder only, in the side network's width.
        self.up = None if _is_encoder_of_two(site.module) else nn.Linear(narrow, wide, bias=method.bias)
        if method.residual and self.up is not None:
            for parameter in self.up.parameters():
                nn.init.zeros_(parameter)
        self.to(site.device, site.dtype)

    @property
    def rungs(self) -> list[Any]:
        """The side blocks with their gates."""
        return list(self.side.get_submodule(self.where))

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the base without gradients, then the side network on what the taps noted."""
        self._check_alone()
        kwargs = self.site.bound(args, kwargs)
        as_tuple = kwargs.pop("return_dict", None) is False
        given = without_cache({k: v for k, v in kwargs.items() if k not in _OWN and not k.startswith("output_")})
        past = companion(cache_in(kwargs), self.key)
        if "attention_mask" in given:
            given["attention_mask"] = plain_mask(kwargs, self.site.module.config, past)
        self._split(kwargs, given)
        with torch.no_grad():
            out = run(**kwargs, return_dict=True)
        lead, name = cache_out(out), cache_argument(self.side)
        if lead is not None and name is not None:
            given |= {"use_cache": True, name: past.cache if past is not None else None}
        elif "use_cache" in given:
            given["use_cache"] = False
        found = self._climb(given)
        if lead is not None and past is None:
            accompany(lead, self.key, cache_out(found), given.get("attention_mask"))
        self._answer(out, found.last_hidden_state)
        return out.to_tuple() if as_tuple else out

    def _check_alone(self) -> None:
        """Refuse to replace the answer of another live side network."""
        live = [n for n, a in adapters_of(self.site.module).items() if isinstance(a, Ladder) and n in self.state.active]
        if len(live) > 1 and not self.residual and self.state.segments is None and live[0] != self.name:
            raise AttachError(
                f"LST: the side network {self.name!r} would replace the answer of {live[0]!r}, which is live too. Make "
                "one of them active with host.activate or host.using, or attach the later one with residual=True."
            )

    def _climb(self, given: dict[str, Any]) -> Any:
        """Run the side network; the taps are let go of afterwards."""
        seen = {path: self.state.taps.pop(f"{self.name}:{path}") for path in {self.first, *self.paths}}
        start = self.into(seen[self.first][0].to(self.dtype))
        if "inputs_embeds" in self.site.arguments:
            given = {**given, "inputs_embeds": start}
        try:
            self.rungs[0].start = start
            for rung, path in zip(self.rungs, self.paths, strict=True):
                rung.tap = seen[path][1].to(self.dtype)
            return self.side(**given)
        finally:
            for rung in self.rungs:
                rung.start = rung.tap = None

    def _split(self, kwargs: dict[str, Any], given: dict[str, Any]) -> None:
        """Take the side encoder's output off the encoder's, behind which it travels."""
        both = kwargs.get("encoder_hidden_states")
        if both is None:
            return
        wide, narrow = self.into.in_features, self.into.out_features
        if both.shape[-1] != wide + narrow:
            raise AttachError(
                f"LST: the decoder needs an encoder output of width {wide} + {narrow} (base and side) and received "
                f"{both.shape[-1]}: it was computed without this adapter. Run the encoder while the adapter is live."
            )
        kwargs["encoder_hidden_states"] = both[..., :wide]
        given["encoder_hidden_states"] = both[..., wide:].to(self.dtype)

    def _answer(self, out: Any, s: Tensor) -> None:
        """Put the side network's answer in the place of the base's."""
        base = out.last_hidden_state
        if self.up is None:
            out.last_hidden_state = torch.cat([base, s.to(base.dtype)], -1)
            return
        y = self.up(F.dropout(s, self.p, self.training)).to(base.dtype)
        out.last_hidden_state = base + y if self.residual else y
        pooler: Any = getattr(self.site.module, "pooler", None)
        if pooler is not None:
            out.pooler_output = pooler(out.last_hidden_state)


def _stacks(host: Carrier) -> list[nn.Module]:
    """The backbone, or encoder and decoder."""
    if not hasattr(getattr(host.model, "config", None), "num_attention_heads"):
        raise AttachError(
            f"LST: the side network is built from a transformer's configuration, which {type(host.model).__name__} "
            "has not. Choose a method that wraps single modules, such as a bottleneck adapter."
        )
    if is_encoder_decoder(host.model):
        return [host.model.get_encoder(), host.model.get_decoder()]
    return [host.backbone]


def _is_encoder_of_two(stack: Any) -> bool:
    return bool(is_encoder_decoder(stack) and not stack.config.is_decoder)


def _rows(batch: Any) -> int:
    return len(next(iter(batch.values())))

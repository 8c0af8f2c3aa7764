"""Low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from adapterlab.core import hub_places
from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.hub import HubCodec
from adapterlab.core.patterns import Pattern, check_patterns, look_up
from adapterlab.core.rows import Tokens, train_rows, with_ids
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, TargetError
from adapterlab.methods.low_rank import _expert_factors, _hub
from adapterlab.methods.low_rank import _peft_forms as _lora_forms
from adapterlab.methods.low_rank._factors import Factors, LowRank
from adapterlab.methods.low_rank._starts import Place, Start
from adapterlab.registry import register


@register
class LoRA(LowRank):
    """Freeze the weight and learn an additive update that is a product of two thin matrices.

    y = W x + b + s · B A drop(x), with s = alpha / r (`scale="linear"`) or alpha / √r (`scale="sqrt"`, rsLoRA).
    A `[r, in]`, B `[out, r]`. For an embedding table `[V, d]`, `in = V` and `out = d`: y = E[ids] + s · B A[:, ids].

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too), embeddings, and convolutions, whose
    kernels count as `[out, in / groups · prod(k)]`.

    Fused modules: with `blocks`, each block of rows (q, k, v) of a module with that many rows has factors of its own,
    as in the original MergedLinear; the blocks need not be equal, and `enable` leaves some out.

    Stacked weights of experts, which no linear layer holds: `parameters` names them, such as `mlp.experts.down_proj`
    `[E, out, in]`; each expert has factors of its own, and the module computes with W + s · B A. With `targets="none"`
    they alone are adapted. Any other bare matrix works too.

    Tokens: with `tokens` the rows of these in the input embedding, and in a head that is tied to it, train whole.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's. Other values of `init` may put a part of
    the base weight into the factors; the base then holds the rest while the adapter is live. The original weight is
    kept beside it, and saving converts to an ordinary LoRA of rank 2r on the original base.

    Trainable parameters: r (in + out) for each module; r (n in + out of the n enabled blocks) for fused ones;
    E r (in + out) for stacked ones.

    Inference: W + s B A can be merged, at no cost.

    The factors are float32 on half-precision and quantized bases; the products run in the dtype of x, so that x is
    never copied, and the gradients arrive in float32.

    Rate: 5e-4, as in the authors' runs on GLUE with RoBERTa (4e-4 to 5e-4); 1e-4 to 2e-4 for models of billions.

    Reference: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; the square-root scale:
    "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.

    Example:
        >>> from adapterlab.methods.low_rank.lora import LoRA
        >>> LoRA(r=4, targets=["q", "v"]).scaling("model.layers.0.self_attn.q_proj")
        4.0
    """

    formula: ClassVar[str] = "r (in + out)"

    r: int = Field(8, ge=1, description="rank of the update")
    alpha: float = Field(16.0, gt=0, description="scale numerator; twice the rank is a common choice")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input; embeddings have none")
    scale: Literal["linear", "sqrt"] = Field("linear", description="alpha / r, or alpha / √r, which suits large ranks")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="base biases to train as well: none, all, or those of adapted modules"
    )
    lora_bias: bool = Field(False, description="give B a trainable bias, scaled like the update")
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks for modules whose path ends in a match of the key"
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="likewise for alpha"
    )
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="rows of each block of a fused module, such as those of q, k and v"
    )
    enable: tuple[bool, ...] = Field((), description="which of the blocks are adapted; default: all")
    parameters: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="names of bare parameters to adapt as well, such as mlp.experts.gate_up_proj"
    )

    tokens: Tokens | dict[str, Tokens] = Field(
        (),
        description="ids or texts of tokens whose rows train whole beside the update, such as new ones; "
        "{embed: [...], head: [...]} for several tables",
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LORA",
        fields={
            "r": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "scale": ("use_rslora", {"linear": False, "sqrt": True}),
            "bias": "bias",
            "lora_bias": "lora_bias",
            "rank_pattern": "rank_pattern",
            "alpha_pattern": "alpha_pattern",
        },
        tensors={
            "A": {"embedding": "lora_embedding_A", **dict.fromkeys(("linear", "conv", "block"), "lora_A.weight")},
            "B": {"embedding": "lora_embedding_B", **dict.fromkeys(("linear", "conv", "block"), "lora_B.weight")},
            "bias": "lora_B.bias",
            "rows": "token_adapter.trainable_tokens_delta",
        },
        parameters=("parameters", "target_parameters"),
        tokens=("tokens", "trainable_token_indices"),
        # How the factors began does not matter once they are trained, unless the base was changed with them.
        accepts={"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")},
        outward=_lora_forms.outward,
        inward=_lora_forms.inward,
    )

    hub: ClassVar[HubCodec | None] = HubCodec(
        options={**hub_places.OPTIONS, "init_weights": "lora"},
        when={"architecture": "lora", "composition_mode": "add"},
        fields={"dropout": "dropout"},
        ignores=("r", "alpha", "init_weights", "init_weights_seed", *hub_places.PLACES),
        derived=lambda host, options, tensors: _hub.read(host, options, tensors),
        outward=lambda host, key, method: _hub.outward(host, key, method, (LoRA.Layer, Blocks)),
        inward=lambda host, key, tensors: _hub.inward(host, key, tensors),
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.enable and (len(self.enable) != len(self.blocks) or not any(self.enable)):
            raise ValueError(f"enable={self.enable} should say yes or no for each of blocks={self.blocks}, one yes")
        if self.blocks and (type(self).Layer is not LoRA.Layer or self.init.moves_base or self.init.needs_data):
            raise ValueError("blocks work with plain LoRA and init='kaiming' or 'gaussian' only")
        if self.init.moves_base and not type(self).Layer.additive:  # type: ignore[attr-defined]
            raise ValueError(f"init={self.init.name!r} changes the base weight, which {self.id} computes from")
        _expert_factors.check(self, plain=type(self).Layer is LoRA.Layer)
        return self

    def rank(self, path: str) -> int:
        """Rank at one module."""
        return int(look_up(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """The factor s at one module."""
        alpha = look_up(self.alpha_pattern, path, self.alpha)
        return alpha / (self.rank(path) if self.scale == "linear" else math.sqrt(self.rank(path)))

    def settled(self, host: Carrier) -> Self:
        """Ids in place of texts of tokens."""
        found: Self = with_ids(self, host)
        return found

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets and what holds bare parameters or rows of tokens, then own the biases that are asked for."""
        if self.targets.include != _expert_factors.NONE:
            super().attach(host, name)
        adapted = host.adapters(name)
        tables: dict[str, Iterable[str]] = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        check_patterns(self.id, tables, [*adapted, *_expert_factors.attach(self, host, name)])
        if self.blocks and not any(isinstance(layer, Blocks) for layer in adapted.values()):
            rows = sorted({layer.site.shape[0] for layer in adapted.values()})
            raise TargetError(f"lora: blocks={self.blocks} make {sum(self.blocks)} rows; the targets have {rows}.")
        if self.tokens:
            train_rows(host, name, self.tokens)
        # Modules that are copied whole bring their own bias.
        for path in host.base_parameters(self.modules_to_save) if self.bias != "none" else ():
            module, _, leaf = path.rpartition(".")
            if leaf == "bias" and (self.bias == "all" or module in adapted):
                host.own(name, path)

    def place(self, site: Site) -> Place:
        """Rank and scale at one module."""
        return Place(site, self.rank(site.path), self.scaling(site.path))

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        """Make the factors for one site, block by block where it is a fused module."""
        fused = self.blocks and site.kind == "linear" and site.shape[0] == sum(self.blocks)
        return Blocks(self, site) if fused else super().build(site, host, name)

    class Layer(Factors):
        """The two factors at one module."""

        casts: ClassVar[bool] = False

        def __init__(self, method: LoRA, site: Site):
            super().__init__(method, site)
            embedding = site.kind == "embedding"
            self.p = 0.0 if embedding else method.dropout
            self.bias = site.parameter(site.shape[0]) if method.lora_bias and not embedding else None
            if self.bias is not None and site.grouped:
                raise AttachError(
                    f"lora_bias does not work with the groups of {site.path}: exclude it, or leave it off."
                )

        @property
        def added_bias(self) -> Tensor | None:
            """S · bias, if B has one."""
            return None if self.bias is None else self.scale * self.bias


class Blocks(LoRA.Layer):
    """A pair of factors for each enabled block of rows of a fused module.

    A `[n r, in]` has those of the n blocks below each other, B `[rows of the n blocks, r]` likewise.
    """

    def __init__(self, method: LoRA, site: Site):
        super().__init__(method, site)
        self.blocks, self.enable = method.blocks, method.enable or (True,) * len(method.blocks)
        r, n = method.rank(site.path), sum(self.enable)
        start = method.init.start(Place(site, n * r, self.scale))
        rows = sum(size for size, on in zip(self.blocks, self.enable, strict=True) if on)
        self.begin(Start(start.A, start.B.new_zeros(rows, r)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and the B `[out, n r]` that has the blocks' own where they belong and zeros elsewhere."""
        return self.A, _lora_forms.spread(self.B, self.blocks, self.enable)

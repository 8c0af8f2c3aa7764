"""Low-rank adaptation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Delta
from adapterlab.core.host import Host
from adapterlab.core.method import LayerMethod
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.core.wrapping import Base
from adapterlab.errors import TargetError, nearest
from adapterlab.io.hf_peft import HFCodec
from adapterlab.ops.low_rank import autocasts, low_rank_linear
from adapterlab.registry import register


@register
class LoRA(LayerMethod):
    """Freeze the weight and learn an additive update that is a product of two thin matrices.

    y = W x + b + s · B A drop(x), with s = alpha / r (`scale="linear"`) or alpha / √r (`scale="sqrt"`, rsLoRA).
    A `[r, in]`, B `[out, r]`. For an embedding table `[V, d]`, `in = V` and `out = d`: y = E[ids] + s · B A[:, ids].

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) and embeddings.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: W + s B A can be merged, at no cost.

    The factors are float32 on half-precision and quantized bases; the products run in the dtype of x, so that x is
    never copied, and the gradients arrive in float32.

    Reference: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; the square-root scale:
    "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.

    Example:
        >>> from adapterlab.methods.lora import LoRA
        >>> LoRA(r=4, targets=["q", "v"]).scaling("model.layers.0.self_attn.q_proj")
        4.0
    """

    family: ClassVar[str] = "weight delta"
    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models"
    year: ClassVar[int] = 2021
    arxiv: ClassVar[str] = "2106.09685"
    formula: ClassVar[str] = "r (in + out)"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")

    r: int = Field(8, ge=1, description="rank of the update")
    alpha: float = Field(16.0, gt=0, description="scale numerator; twice the rank is a common choice")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input; embeddings have none")
    scale: Literal["linear", "sqrt"] = Field("linear", description="alpha / r, or alpha / √r, which suits large ranks")
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming", description="start of A: uniform ±1/√in, or normal with standard deviation 1/r"
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="base biases to train as well: none, all, or those of adapted modules"
    )
    lora_bias: bool = Field(False, description="give B a trainable bias, scaled like the update")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks for modules whose path ends in a match of the key"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="likewise for alpha"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LORA",
        fields={
            "r": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "scale": ("use_rslora", {"linear": False, "sqrt": True}),
            "init": ("init_lora_weights", {"kaiming": True, "gaussian": "gaussian"}),
            "bias": "bias",
            "lora_bias": "lora_bias",
            "rank_pattern": "rank_pattern",
            "alpha_pattern": "alpha_pattern",
        },
        tensors={
            "A": {"linear": "lora_A.weight", "embedding": "lora_embedding_A"},
            "B": {"linear": "lora_B.weight", "embedding": "lora_embedding_B"},
            "bias": "lora_B.bias",
        },
        # How the factors began does not matter once they are trained, unless the base was changed with them.
        accepts={"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")},
    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _readable(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{key!r} is not a valid regular expression ({error})") from None
        return value

    def rank(self, path: str) -> int:
        """Rank at one module."""
        return int(_pattern(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """The factor s at one module."""
        alpha = _pattern(self.alpha_pattern, path, self.alpha)
        return alpha / (self.rank(path) if self.scale == "linear" else math.sqrt(self.rank(path)))

    def attach(self, host: Host, name: str) -> None:
        """Wrap the targets, then own the biases that the option asks for."""
        super().attach(host, name)
        adapted = host.adapters(name)
        self._check_patterns(adapted)
        # Modules that are copied whole bring their own bias.
        copied = host.sites(Targets(include=self.modules_to_save)) if self.modules_to_save else []
        left_out = {id(p) for site in copied for p in site.module.parameters()}
        for path, p in list(host.model.named_parameters()) if self.bias != "none" else []:
            module, _, leaf = path.rpartition(".")
            wanted = leaf == "bias" and (self.bias == "all" or module in adapted)
            if wanted and id(p) not in left_out and not host.is_adapter_path(path):
                host.own(name, path)

    def _check_patterns(self, adapted: Iterable[str]) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                if not any(matches(key, path) for path in adapted):
                    names = {path.rpartition(".")[2] for path in adapted}
                    raise TargetError(
                        f"lora: {field} names {key!r}, which no adapted module has. {nearest(key, names)}"
                    )

    class Layer(Delta):
        """The two factors at one module."""

        def __init__(self, method: LoRA, site: Site):
            super().__init__(site)
            out, in_ = site.shape
            r = method.rank(site.path)
            self.scale = method.scaling(site.path)
            self.A, self.B = site.parameter(r, in_), site.parameter(out, r)
            embedding = site.kind == "embedding"
            self.p = 0.0 if embedding else method.dropout
            self.bias = site.parameter(out) if method.lora_bias and not embedding else None
            if embedding:
                nn.init.normal_(self.B)
            elif method.init == "gaussian":
                nn.init.normal_(self.A, std=1 / r)
            else:
                nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

        def factors(self) -> tuple[Tensor, Tensor]:
            """The A and B that every product uses; variants make others of their tensors."""
            return self.A, self.B

        def delta(self) -> Tensor:
            """ΔW = s · B A `[out, in]`."""
            a, b = self.factors()
            return self.scale * (b @ a)

        def forward(self, x: Tensor) -> Tensor:
            """S · (B A drop(x) + bias) in the dtype of x (of the factors for token ids)."""
            return self.product(F.dropout(x, self.p) if self.training and self.p else x)

        def product(self, x: Tensor) -> Tensor:
            """S · (B A x + bias), without dropout."""
            dtype = x.dtype if x.is_floating_point() else self.dtype
            a, b = self.factors()
            h = self.site.op(x, a.to(dtype))
            y = self.site.mix(h, b.to(dtype))
            return self.scale * (y if self.bias is None else y + self.bias.to(dtype))

        def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Fuse with the base product when nothing stands between, else add to what `run` returns."""
            if isinstance(run, Base) and self.fuses(x):
                weight: Any = self.site.module.weight
                weight = weight.T if self.site.transposed else weight
                return low_rank_linear(x, weight, self.site.bias, *self.factors(), self.scale)
            return super().around(run, x, *args, **kwargs)

        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            """W + ΔW; the bias of B joins the base's."""
            weight, bias = super().merged(weight, bias)
            if self.bias is None:
                return weight, bias
            shift = self.scale * self.bias.to(weight.dtype)
            return weight, shift if bias is None else bias + shift

        def added(self, x: Tensor) -> Tensor:
            """The factors follow the dtype of x, which is therefore not copied."""
            share: Tensor = self(x)
            return share

        def fuses(self, x: Tensor) -> bool:
            """Whether base and update can be one node: a plain frozen linear layer, and no dropout now."""
            trained = any(p.requires_grad for p in self.site.module._parameters.values() if p is not None)
            plain = self.site.plain and x.dtype == self.site.module.weight.dtype and not trained
            return plain and self.bias is None and not (self.training and self.p) and not autocasts(x)


def matches(key: str, path: str) -> bool:
    """Say whether a pattern matches the end of a path, at a dot."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _pattern(table: dict[str, Any], path: str, default: float) -> float:
    """Look a module up in a table of patterns; the first that matches counts."""
    return next((value for key, value in table.items() if matches(key, path)), default)

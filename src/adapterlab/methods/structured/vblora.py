"""Low-rank adaptation from a bank of vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adapterlab.core.adapter import Adapter, Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod, MakeOptimizer
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, TrainingError
from adapterlab.registry import register

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_LOGITS = ("logits_A", "logits_B")


@register
class VBLoRA(LayerMethod):
    """Compose the factors of all low-rank updates from one bank of short vectors.

    y = W x + b + B A drop(x), A `[r, in]`, B `[out, r]`. Each piece of length b of a row of A or a column of B is a mix
    of the k bank rows with the largest logits: Σ softmax(top-k logits)_i V_i, V `[h, b]` shared by all modules.

    Where it attaches: linear layers (GPT-2's `Conv1D` too) whose sizes are multiples of b.

    Start: V uniform ±`bank_bound`, logits normal: close to the base, not equal to it.

    Trainable parameters: h b once and r h (in + out) / b for each module. With `save_topk` k indices and k − 1 weights
    are stored instead of h logits, from which training cannot go on.

    Inference: W + B A can be merged, at no cost.

    Rate: 1e-3 for the bank, as in the authors' runs; logits train at `logits_lr_factor` times that. One rate for all
    fails.

    Reference: "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv 2405.15179.

    Example:
        >>> from adapterlab.methods.structured.vblora import VBLoRA
        >>> VBLoRA(vector_length=64, targets=["q", "v"]).num_vectors
        256
    """

    formula: ClassVar[str] = "Σ r h (in + out) / b + h b once"
    starts_at_base: ClassVar[bool] = False

    r: int = Field(4, ge=1, description="rank of the updates")
    num_vectors: int = Field(256, ge=1, description="vectors h in the bank")
    vector_length: int = Field(256, ge=1, description="their length b, a divisor of all targets' sizes")
    topk: int = Field(2, ge=1, description="vectors k in a mix")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    bank_bound: float = Field(0.02, gt=0, description="the bank starts uniform between minus this and this")
    logits_std: float = Field(0.1, ge=0, description="standard deviation of the first logits; the paper has 0.01")
    logits_lr_factor: float = Field(10.0, gt=0, description="learning rate of the logits over that of the bank")
    save_topk: bool = Field(False, description="store the chosen mixes only: small, and for inference alone")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "VBLORA",
        fields={
            "r": "r",
            "num_vectors": "num_vectors",
            "vector_length": "vector_length",
            "topk": "topk",
            "dropout": "vblora_dropout",
            "bank_bound": "init_vector_bank_bound",
            "logits_std": "init_logits_std",
            "save_topk": "save_only_topk_weights",
        },
        tensors={f"logits_{f}{form}": f"vblora_logits_{f}{form}" for f in "AB" for form in ("", _INDICES, _WEIGHTS)},
        shared={"bank.vectors": "base_model.vblora_vector_bank"},
        accepts={"bias": ("none",)},
        outward=lambda method, layers: _outward(method, layers),
        inward=lambda method, site, tensors: _inward(method, tensors),
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk = {self.topk} is more than num_vectors = {self.num_vectors}; choose fewer")
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Vectors that divide small layers, and a start that is not too small to measure."""
        return {"num_vectors": 16, "vector_length": 8, "bank_bound": 0.3}

    def attach(self, host: Carrier, name: str) -> None:
        """Share the bank, then wrap the targets.

        Raises:
            AttachError: the vectors' length does not divide the size of a target.
        """
        sites = host.sites(self.targets, self.kinds)
        common = math.gcd(*(size for site in sites for size in site.shape))
        if common % self.vector_length:
            odd = next(site for site in sites if any(size % self.vector_length for size in site.shape))
            raise AttachError(
                f"vblora: vector_length = {self.vector_length} does not divide the sizes {odd.shape} of {odd.path}. "
                f"Choose a divisor of {common}, which all targets share, or exclude the module."
            )
        bank = host.share(name, "bank", _Bank(self, sites[0]))
        for site in sites:
            layer = self.Layer(self, site)
            layer.refer("bank", bank)
            host.wrap(name, site, layer)

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """The logits have a rate of their own."""
        return {leaf: {"lr_factor": self.logits_lr_factor} for leaf in _LOGITS}

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """Make sure that the logits are all there.

        Raises:
            TrainingError: the adapter was loaded from the mixes alone.
        """
        named = host.named_parameters(name)
        if any(bool(p.isinf().any()) for key, p in named.items() if key.rpartition(".")[2] in _LOGITS):
            raise TrainingError(
                "vblora: this adapter was saved with save_topk, so the logits of the vectors it does not use are lost "
                "and training cannot go on. Start from a checkpoint saved with save_topk=False."
            )
        return super().optimizer(host, name, make)

    class Layer(Delta):
        """The logits of one module: `logits_A` `[r, in / b, h]`, `logits_B` `[out / b, r, h]`."""

        bank: _Bank

        casts: ClassVar[bool] = False

        def __init__(self, method: VBLoRA, site: Site):
            super().__init__(site)
            (out, in_), b, h = site.shape, method.vector_length, method.num_vectors
            self.k, self.p = method.topk, method.dropout
            self.logits_A = site.parameter(method.r, in_ // b, h)
            self.logits_B = site.parameter(out // b, method.r, h)
            for logits in (self.logits_A, self.logits_B):
                nn.init.normal_(logits, std=method.logits_std)

        def mixes(self, logits: Tensor) -> Tensor:
            """Mix the chosen vectors: `[..., h]` -> `[..., b]`."""
            top, chosen = logits.topk(self.k, dim=-1)
            vectors = F.embedding(chosen, self.bank.vectors.to(logits.device))
            return (top.softmax(-1).unsqueeze(-2) @ vectors).squeeze(-2)

        def factors(self) -> tuple[Tensor, Tensor]:
            """A `[r, in]` and B `[out, r]`."""
            return self.mixes(self.logits_A).flatten(1), self.mixes(self.logits_B).transpose(1, 2).flatten(0, 1)


class _Bank(nn.Module):
    def __init__(self, method: VBLoRA, site: Site):
        super().__init__()
        self.vectors = site.parameter(method.num_vectors, method.vector_length)
        nn.init.uniform_(self.vectors, -method.bank_bound, method.bank_bound)


def _outward(method: VBLoRA, layers: Mapping[str, Adapter]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Logits as they are, or the k indices and k − 1 weights of each mix."""
    logits = {path: layer.state_dict() for path, layer in layers.items()}
    if not method.save_topk:
        return {}, logits
    kinds = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
    small = next(dtype for limit, dtype in kinds if method.num_vectors < limit)
    found: dict[str, dict[str, Tensor]] = {}
    for path, group in logits.items():
        for name, value in group.items():
            top, chosen = value.topk(method.topk, dim=-1)
            found.setdefault(path, {})[name + _INDICES] = chosen.to(small)
            found[path][name + _WEIGHTS] = top.softmax(-1)[..., :-1]
    return {}, found


def _inward(method: VBLoRA, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make logits of stored mixes: the log of their weights, minus infinity for vectors that are not in them."""
    found = {key: value for key, value in tensors.items() if not key.endswith((_INDICES, _WEIGHTS))}
    for key, chosen in tensors.items():
        if key.endswith(_INDICES):
            name = key.removesuffix(_INDICES)
            weights = tensors[name + _WEIGHTS]
            # Rounding may make the last weight slightly negative, which has no logarithm.
            weights = torch.cat([weights, (1 - weights.sum(-1, keepdim=True)).clamp(min=0)], -1)
            empty = weights.new_full((*weights.shape[:-1], method.num_vectors), -torch.inf)
            found[name] = empty.scatter(-1, chosen.long(), weights.log())
    return found

"""Decoupled low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import LayerMethod
from adapterlab.core.patterns import Pattern, check_patterns, look_up
from adapterlab.core.site import Site
from adapterlab.registry import register

_LEAST = 1e-4  # norms below count as this, here and in PEFT
_COPY = ("A0", "B0", "lam0")


def _outward(method: Any, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Write the frozen copy as more rank: PEFT starts at B = 0 and has none."""
    written = {path: layer.joined() for path, layer in layers.items()}
    copied = method.start == "copy"
    ranks = {path: len(tensors["A"]) for path, tensors in written.items()}
    r = 2 * method.r if copied else method.r
    return {"r": r, "rank_pattern": {path: found for path, found in ranks.items() if found != r}}, written


def _inward(method: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the copy apart again where our settings say that there is one; PEFT's own files have none."""
    own = {key: tensors.pop(key) for key in ("strengths", "B_own") if key in tensors}
    r = method.rank(site.path)
    if method.start == "zero" or not own or len(tensors["A"]) != 2 * r:
        return tensors
    (b, b0), (a, a0), (lam, lam0) = tensors["B"].split(r, 1), tensors["A"].split(r), own["strengths"].split(1)
    b, b0 = b * lam.sign(), -b0 * lam0.sign()
    if "B_own" in own:
        b, b0 = (b, own["B_own"]) if bool(lam.abs() > lam0.abs()) else (own["B_own"], b0)
    return {"A": a, "B": b, "lam": lam, "A0": a0, "B0": b0, "lam0": lam0, "w": tensors["w"]}


def _weakened(b: Tensor, share: Tensor) -> Tensor:
    """B whose normalised columns count for a share of what they would: ±1 keeps B, less puts the norms below the least.

    A column c shorter than that is divided by the least norm, and not by its own.
    """
    if bool(share.abs() == 1):
        return b * share
    return b * (share * _LEAST / torch.linalg.vector_norm(b, dim=0).clamp_min(_LEAST))


@register
class DeLoRA(LayerMethod):
    """A low-rank update of normalised directions with a trained strength, which bounds how far the weight may move.

    y = W x + b + ΔW x − ΔW₀ x, ΔW = λ / r · Σ_i (b_i / ‖b_i‖) (a_i / ‖a_i‖)ᵀ diag(w), with rows a_i of A `[r, in]`,
    columns b_i of B `[out, r]` and a number λ that train, and w `[in]`, the norms of the columns of W, kept.
    ‖ΔW‖ <= λ max(w), whatever the rate. Norms below 1e-4 count as 1e-4.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too).

    Start: with `copy`, as in the paper, A and B are random and ΔW₀ is a frozen copy of what they give, so the first
    output equals the base's. With `zero`, as in HF PEFT, B = 0 and ΔW₀ = 0; the first step of B then throws ΔW to its
    bound, since only directions count.

    Trainable parameters: r (in + out) + 1 for each module.

    λ has a rate of its own and is not decayed.

    Inference: W + ΔW − ΔW₀ can be merged, at no cost. Converts exactly to a LoRA of rank 2r (r with `zero`).

    Rate: 1e-2, as in the authors' runs; λ has half of it.

    Reference: "Decoupling Angles and Strength in Low-rank Adaptation", arXiv 2503.18225.

    Example:
        >>> from adapterlab.methods.low_rank.delora import DeLoRA
        >>> DeLoRA(r=4, rank_pattern={"v_proj": 2}).rank("model.layers.0.self_attn.v_proj")
        2
    """

    formula: ClassVar[str] = "r (in + out) + 1"

    r: int = Field(8, ge=1, description="number of directions")
    strength: float = Field(8.0, gt=0, description="λ to start from: 4 to 12 for classifiers, 8 for language models")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    start: Literal["copy", "zero"] = Field("copy", description="subtract a frozen copy of a random start, or B = 0")
    strength_lr_factor: float = Field(0.5, gt=0, description="learning rate of λ over that of A and B")
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks for modules whose path ends in a match of the key"
    )
    strength_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="likewise for the strength"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "DELORA",
        fields={
            "r": "r",
            "strength": "delora_lambda",
            "dropout": "module_dropout",
            "rank_pattern": "rank_pattern",
            "strength_pattern": "lambda_pattern",
        },
        tensors={
            "A": "delora_A",
            "B": "delora_B",
            "lam": "delora_lambda",
            "w": "delora_w_norm",
            # What a rank of 2r cannot hold to the bit; PEFT passes over it.
            "strengths": "delora_own_lambda",
            "B_own": "delora_own_B",
        },
        implies={"start": "zero"},
        accepts={"init_weights": (True, False), "bias": ("none",)},
        transposed=False,
        outward=_outward,
        inward=_inward,
    )

    def rank(self, path: str) -> int:
        """Number of directions at one module."""
        return int(look_up(self.rank_pattern, path, self.r))

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets.

        Raises:
            TargetError: a pattern matches none of them.
        """
        super().attach(host, name)
        tables = {"rank_pattern": [*self.rank_pattern], "strength_pattern": [*self.strength_pattern]}
        check_patterns(self.id, tables, host.adapters(name))

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """λ has a rate of its own, and is not decayed: that would leave the frozen copy alone."""
        return {"lam": {"lr_factor": self.strength_lr_factor, "weight_decay": 0.0}}

    class Layer(Delta):
        """A `[r, in]`, B `[out, r]`, `lam` `[1]` and `w` `[in]` of one module, and what they were at the start."""

        w: Tensor
        A0: Tensor | None
        B0: Tensor | None
        lam0: Tensor | None

        def __init__(self, method: DeLoRA, site: Site):
            super().__init__(site)
            (out, in_), r = site.shape, method.rank(site.path)
            self.p = method.dropout
            self.A, self.B, self.lam = site.parameter(r, in_), site.parameter(out, r), site.parameter(1)
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
            nn.init.constant_(self.lam, look_up(method.strength_pattern, site.path, method.strength))
            self.register_buffer("w", torch.linalg.vector_norm(site.unmerged.weight().detach().to(self.A), dim=0))
            for key in _COPY:
                self.register_buffer(key, None)
            if method.start == "copy":
                nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
                self.A0, self.B0, self.lam0 = (
                    self.A.detach().clone(),
                    self.B.detach().clone(),
                    self.lam.detach().clone(),
                )

        def strengths(self, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
            """What each direction is multiplied by, λ / (r ‖b_i‖ ‖a_i‖) `[r]`."""
            norms = [torch.linalg.vector_norm(t, dim=dim).clamp_min(_LEAST) for t, dim in ((a, 1), (b, 0))]
            return lam / (len(a) * norms[0] * norms[1])

        def factors(self) -> tuple[Tensor, Tensor]:
            """A diag(w) and B Ξ λ / r; with a frozen copy, its own below and beside them."""
            a: Tensor = self.A
            b = self.B * self.strengths(self.A, self.B, self.lam)
            if self.A0 is not None and self.B0 is not None and self.lam0 is not None:
                a = torch.cat([a, self.A0])
                b = torch.cat([b, -self.B0 * self.strengths(self.A0, self.B0, self.lam0)], 1)
            return a * self.w, b

        def joined(self) -> dict[str, Tensor]:
            """The tensors of one adapter of rank 2r without a copy that computes the same, by name.

            One λ stands for both, the stronger; the weaker half's B is weakened and kept beside as it is.
            """
            tensors = {"A": self.A, "B": self.B, "lam": self.lam, "w": self.w}
            if self.A0 is None or self.B0 is None or self.lam0 is None:
                return tensors
            now, then = self.lam.abs(), self.lam0.abs()
            most = torch.maximum(now, then)
            halves = [_weakened(self.B, self.lam / most), _weakened(self.B0, -self.lam0 / most)]
            own = {} if bool(now == then) else {"B_own": self.B0 if bool(now > then) else self.B}
            both = {"A": torch.cat([self.A, self.A0]), "B": torch.cat(halves, 1), "lam": 2 * most}
            return {**tensors, **both, **own, "strengths": torch.cat([self.lam, self.lam0])}

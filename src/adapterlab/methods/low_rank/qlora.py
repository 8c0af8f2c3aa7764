"""LoRA on a base in four bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import MakeOptimizer
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, require
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class QLoRA(LoRA):
    """Train LoRA on all linear layers of a base kept in NF4 with doubly quantized scales, with a frugal optimizer.

    y = dequant(W4) x + b + s · B A drop(x). W4: blocks of 64 entries with one of 16 normal quantiles each, and one
    scale; the scales in 8 bits, in blocks of 256: 4.127 bits a weight.

    Where it attaches: every linear layer of the backbone; fewer lose quality. Load the base with quantize=nf4. A target
    that is stored in another way is refused, unless `base` is "any".

    Start: B = 0, so the first output equals that of the base in four bits.

    Trainable parameters: r (in + out) for each module.

    Memory: on a GPU the optimizer's moments are paged out to main memory when they do not fit; elsewhere they are in
    8 bits (tensors below 4096 entries stay in 32). Both need bitsandbytes; `moments="plain"` needs nothing.

    Inference: keep the adapter beside the base in four bits, or merge with quantized="dequantize"; the result is a
    plain weight, exact for what was trained.

    Cost of a step: on a CPU the 8-bit AdamW of bitsandbytes updates tensors one by one; `moments="plain"` takes the
    usual one, for 8 bytes a number.

    Rate: 2e-4, as in the authors' runs; 1e-4 from 33 billion parameters on.

    Reference: "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    Example:
        >>> from adapterlab.methods.low_rank.qlora import QLoRA
        >>> QLoRA().r, QLoRA().dropout
        (64, 0.05)
    """

    r: int = Field(64, ge=1, description="rank of the update")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input")
    base: Literal["nf4", "any"] = Field("nf4", description="refuse linear layers that are not in NF4, or take any")
    moments: Literal["auto", "paged", "8bit", "plain"] = Field(
        "auto", description="the optimizer's moments: paged on a GPU and 8bit elsewhere, or one of these, or plain"
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Take models of plain weights, too."""
        return {"r": 8, "base": "any"}

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        """Check how the weight is stored, then make the factors."""
        state: Any = getattr(site.module._parameters.get("weight"), "quant_state", None)
        kind = getattr(state, "quant_type", None)
        if self.base == "nf4" and site.kind == "linear" and (kind != "nf4" or not state.nested):
            stored = f"{kind} with scales in full precision" if kind else str(site.module.weight.dtype)
            raise AttachError(
                f"qlora trains on a base in NF4 with double quantization, and {site.path} is stored as {stored}. Load "
                "the base with quantize='nf4' (in transformers: BitsAndBytesConfig(load_in_4bit=True, "
                "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)), or set base='any'."
            )
        return super().build(site, host, name)

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """Make the usual AdamW, or one of bitsandbytes with its settings.

        Raises:
            MissingDependencyError: bitsandbytes is not installed.
        """
        plain = super().optimizer(host, name, make)
        cuda = all(p.device.type == "cuda" for p in host.parameters(name))
        kind = self.moments if self.moments != "auto" else "paged" if cuda else "8bit"
        if kind == "plain":
            return plain
        require("bitsandbytes", "quantized", f"for moments={kind!r} of qlora (moments='plain' needs nothing)")
        import bitsandbytes.optim as bnb

        shared = ("params", "lr", "betas", "eps", "weight_decay")
        groups = [{key: group[key] for key in shared if key in group} for group in plain.param_groups]
        made: Optimizer = (bnb.PagedAdamW32bit if kind == "paged" else bnb.AdamW8bit)(groups, lr=groups[0]["lr"])
        return made

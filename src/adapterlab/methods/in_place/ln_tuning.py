"""LN tuning: train only the normalisation layers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Method
from adapterlab.core.targets import Targets
from adapterlab.errors import AttachError
from adapterlab.registry import register


@register
class LNTuning(Method):
    """Train the weights, and biases where there are, of the normalisation layers in place: y = γ ⊙ norm(x) + β.

    Where it attaches: every norm of the model that has a weight, those of queries and keys and the last one included,
    or those that `targets` means, such as `["input_layernorm", "post_attention_layernorm"]`. The paper trains those
    inside the blocks, and in its full version the embedding, the head and what connects the images as well: name these
    in `modules_to_save`.

    Start: the base's values, so the first output equals the base's.

    Trainable parameters: the width of each norm, twice where it has a bias.

    Inference: the values are in the model already.

    Rate: 1e-3, that of biases alone, which are as few; HF PEFT's comparison has 1e-4, its default for all methods.

    Reference: "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv 2312.11420.

    Example:
        >>> from adapterlab.methods.in_place.ln_tuning import LNTuning
        >>> LNTuning(targets=["input_layernorm"]).targets.include
        ('input_layernorm',)
    """

    formula: ClassVar[str] = "the sum of the widths of the norms, twice with a bias"

    targets: Targets | None = Field(None, description="norms that train; null: all")
    keep_base: bool = Field(
        True, description="store the original values, so that the adapter can be switched off and removed"
    )

    hf: ClassVar[HFCodec | None] = HFCodec(
        "LN_TUNING",
        fields={},
        tensors={"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
        owned="ln_tuning_layers",
    )

    def attach(self, host: Carrier, name: str) -> None:
        """Own what the norms have."""
        for path in self.parameters(host):
            host.own(name, path, keep=self.keep_base)

    def parameters(self, host: Carrier) -> list[str]:
        """Names of the parameters that train.

        Raises:
            AttachError: there are none.
        """
        norms = [s for s in host.all_sites() if s.kind == "norm"]
        if self.targets is not None:
            norms = host.sites(self.targets, ("norm",))
        inside = {id(p) for site in norms for p in site.module._parameters.values() if p is not None}
        found = [path for path, p in host.base_parameters(self.modules_to_save).items() if id(p) in inside]
        if not found:
            where = "" if self.targets is None else f" at targets={list(self.targets.include)}"
            raise AttachError(
                f"{type(host.model).__name__} has no normalisation layer with a weight to train{where}. List its "
                "modules with: adapterlab targets MODEL, or choose another method."
            )
        return found

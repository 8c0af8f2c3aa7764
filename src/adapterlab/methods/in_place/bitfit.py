"""BitFit: train only the biases."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.errors import AttachError
from adapterlab.registry import register


@register
class BitFit(Method):
    """Train the bias vectors in place and freeze the matrices: y = W x + (b₀ + b).

    Where it attaches: every parameter that is a bias (linear layers, norms, experts, pooler), or those of the modules
    that `targets` means. A model without biases (Llama, Mistral) is refused, unless `bias_mode="add"` gives each
    target a new one (default targets: all linear layers of the backbone).

    Start: the base's biases; new ones are 0. Either way the first output equals the base's.

    Trainable parameters: the sum of the bias lengths; with `add`, out for each module.

    Inference: owned biases are in the model already; new ones are added to the module's bias, or become it.

    New heads belong in `modules_to_save`. Without rotary positions a key bias adds the same to all scores of a query,
    so its true gradient is zero.

    Rate: 1e-3, as in the authors' script, about ten times that of full fine-tuning, and without weight decay.

    Reference: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
    arXiv 2106.10199; added biases: "BEFT: Bias-Efficient Fine-Tuning of Language Models in
    Low-Data Regimes", arXiv 2509.15974.

    Example:
        >>> from adapterlab.methods.in_place.bitfit import BitFit
        >>> BitFit(targets=["q", "up"]).targets.include
        ('q', 'up')
    """

    formula: ClassVar[str] = "sum of the bias lengths; with added biases: out"

    bias_mode: Literal["existing", "add"] = Field(
        "existing", description="train the biases that exist, or give the targets new ones"
    )
    targets: Targets | None = Field(None, description="modules whose biases train; null: all")
    norm_gain: bool = Field(False, description="train the weights of normalisation layers as well")
    keep_base: bool = Field(
        True, description="store the original values, so that the adapter can be switched off and removed"
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Add biases where there are none."""
        has = any(path.endswith((".bias", "_bias")) for path, _ in model.named_parameters())
        return {} if has else {"bias_mode": "add"}

    def attach(self, host: Carrier, name: str) -> None:
        """Own the biases, or add new ones; then own the gains if asked."""
        base = host.base_parameters(self.modules_to_save)
        if self.bias_mode == "add":
            for site in host.sites(self.targets or Targets(include=("all-linear",)), ("linear",)):
                host.wrap(name, site, self.Layer(site))
        else:
            for path in self._biases(host, base):
                host.own(name, path, keep=self.keep_base)
        norms = {id(s.module._parameters["weight"]) for s in host.all_sites() if s.kind == "norm" and self.norm_gain}
        for path in [path for path, p in base.items() if id(p) in norms]:
            host.own(name, path, keep=self.keep_base)

    def _biases(self, host: Carrier, base: dict[str, nn.Parameter]) -> list[str]:
        sites = host.all_sites() if self.targets is None else host.sites(self.targets)
        inside = {id(p) for site in sites for p in site.module._parameters.values() if p is not None}
        found = [path for path, p in base.items() if id(p) in inside and path.endswith((".bias", "_bias"))]
        if not found:
            where = "" if self.targets is None else f" at targets={list(self.targets.include)}"
            raise AttachError(
                f"{type(host.model).__name__} has no bias{where}, so bitfit would train nothing. Set bias_mode='add' "
                "to give linear layers new biases, or choose another method."
            )
        return found

    class Layer(Adapter):
        """A new bias at one module."""

        def __init__(self, site: Site):
            super().__init__(site)
            self.b = site.parameter(1, site.shape[0])

        def added(self, x: Tensor) -> Tensor:
            """B for each position of a linear layer's input."""
            return self.b[0].expand(*x.shape[:-1], -1)

        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            """The new bias joins the old one, or becomes it."""
            b = self.b[0].to(weight.dtype)
            return weight, b if bias is None else bias + b

"""Layer freezing: train chosen blocks and freeze the rest."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.errors import AttachError, TargetError, nearest
from adapterlab.registry import register


@register
class Freeze(Method):
    """Train the last (or first) few blocks in place, or named modules in them; the rest stays frozen.

    Where it attaches: `layers` blocks (n > 0: the last n, n < 0: the first |n|, 0: none), in them the first-level
    modules that `modules` names (`self_attn`, `mlp`, ...; empty: all), and outside the blocks the modules that
    `extra_modules` names (`norm`, `embed_tokens`, ...). Names are compared whole, part by part of the path.

    Trainable parameters: the sum over the trained tensors.

    With `interleaved` the n blocks are spread evenly: of L blocks those at L/n − 1, 2L/n − 1, ... train (LLaMA Pro's
    inserted blocks). Training the last blocks saves activations too; training the first ones does not, because the
    backward pass still crosses every block above.

    Rate: 5e-5, that of full fine-tuning.

    Reference: "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", arXiv 1911.03090.
    """

    formula: ClassVar[str] = "sum over the trained tensors"

    layers: int = Field(2, description="number of blocks to train: positive the last ones, negative the first ones")
    modules: tuple[str, ...] = Field((), description="first-level modules inside those blocks; empty means all")
    extra_modules: tuple[str, ...] = Field((), description="modules outside the blocks to train as well")
    interleaved: bool = Field(False, description="spread the trained blocks evenly over the model")
    keep_base: bool = Field(
        True, description="store the original values, so that the adapter can be switched off and removed"
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Train one block and freeze another."""
        return {"layers": 1}

    def attach(self, host: Carrier, name: str) -> None:
        """Own the parameters of the chosen modules."""
        chosen = [self._inside(block) for block in self.blocks(host.layers)]
        parts = [part for block in chosen for part in block] + self._outside(host)
        if not parts:
            raise AttachError(
                f"freeze with layers={self.layers} and no extra_modules trains nothing. Set layers to the number of "
                "blocks to train, or name modules outside the blocks."
            )
        wanted = {id(p) for part in parts for p in part.parameters()}
        for path, parameter in host.base_parameters().items():
            if id(parameter) in wanted:
                host.own(name, path, keep=self.keep_base)

    def blocks(self, every: list[nn.Module]) -> list[nn.Module]:
        """Return the blocks that train.

        Raises:
            AttachError: there are fewer blocks, or they cannot be spread evenly.
        """
        count = abs(self.layers)
        if count > len(every):
            raise AttachError(f"freeze: layers={self.layers}, but the model has {len(every)} blocks.")
        if self.interleaved and count:
            if len(every) % count:
                raise AttachError(f"freeze: interleaved needs layers={count} to divide the {len(every)} blocks evenly.")
            stride = len(every) // count
            return every[stride - 1 :: stride]
        return every[len(every) - count :] if self.layers > 0 else every[:count]

    def _inside(self, block: nn.Module) -> list[nn.Module]:
        if not self.modules:
            return [block]
        children = dict(block.named_children())
        for entry in self.modules:
            if entry not in children:
                raise TargetError(f"freeze: modules names {entry!r}, which no block has. {nearest(entry, children)}")
        return [children[entry] for entry in self.modules]

    def _outside(self, host: Carrier) -> list[nn.Module]:
        outside = [s for s in host.all_sites() if s.layer is None and s.path]
        chosen: list[nn.Module] = []
        for entry in self.extra_modules:
            found = [s.module for s in outside if f".{s.path}".endswith(f".{entry}")]
            if not found:
                names = {s.path.rpartition(".")[2] for s in outside}
                raise TargetError(
                    f"freeze: extra_modules names {entry!r}, which is not outside the blocks. {nearest(entry, names)}"
                )
            chosen += found
        return chosen

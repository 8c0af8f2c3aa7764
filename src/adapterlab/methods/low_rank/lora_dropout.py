"""LoRA whose columns of A and rows of B are dropped at random."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.methods.low_rank._starts import Initialiser
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class LoRADropout(LoRA):
    """Delete random inputs of A and outputs of B in training, never ranks; average several draws at test time.

    y = W x + b + s · m_B ⊙ B A (m_A ⊙ x), entries of m_A `[in]` and m_B `[out]` are 1 with probability 1 − p. One draw
    a module and forward pass, shared by all tokens and rows; a share 2p − p² of ΔW is deleted. s as in LoRA.

    A step averages the loss over `draws` draws. They are forward passes of their own: four cost what four steps do.

    Where it attaches: as LoRA. `dropout` is LoRA's own, of single numbers, and can be set besides.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: outside of training the masks are replaced by their mean, ΔW = (1 − p)² s B A, which can be merged. The
    paper averages the outputs of several draws instead: `method.ensemble(host, name, compute)`.

    Rate: 5e-4, LoRA's.

    Reference: "LoRA Dropout as a Sparsity Regularizer for Overfitting Control", arXiv 2404.09610.

    Example:
        >>> from adapterlab.methods.low_rank.lora_dropout import LoRADropout
        >>> LoRADropout(p=0.5).kept
        0.25
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    hf: ClassVar[HFCodec | None] = None

    p: float = Field(0.5, ge=0, lt=1, description="probability that a column of A or a row of B is deleted")
    draws: int = Field(1, ge=1, description="draws that a training step and an ensemble average over; about 4")
    rescale: bool = Field(False, description="divide what is left by its probability, so that the mean is s B A")

    @field_validator("init")
    @classmethod
    def _at_base(cls, value: Initialiser) -> Initialiser:
        if value.moves_base:
            raise ValueError(
                f"init={value.name!r} takes from the base what a draw then deletes; choose kaiming, gaussian or eva"
            )
        return value

    @property
    def kept(self) -> float:
        """Mean of the product of two masks."""
        return 1.0 if self.rescale else (1 - self.p) ** 2

    def gradient(
        self, host: Carrier, name: str, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Average the loss over the draws, one after the other."""
        values = []
        for _ in range(self.draws):
            value = loss() / self.draws
            backward(value)
            values.append(value.detach())
        return torch.stack(values).sum()

    def ensemble(self, host: Carrier, name: str, compute: Callable[[], Tensor], draws: int | None = None) -> Tensor:
        """Average an output of the model over draws of the masks.

        Args:
            host: of the model.
            name: of the adapter, which must not be merged.
            compute: runs the model, for example `lambda: model(**batch).logits`.
            draws: how many; default: the method's.
        """
        count = draws or self.draws
        with self.masked(host, name):
            return torch.stack([compute() for _ in range(count)]).mean(0)

    @contextlib.contextmanager
    def masked(self, host: Carrier, name: str) -> Iterator[None]:
        """Draw masks outside of training too, inside the context."""
        layers = [a for a in host.adapters(name).values() if isinstance(a, LoRADropout.Layer)]
        try:
            for layer in layers:
                layer.masks = True
            yield
        finally:
            for layer in layers:
                layer.masks = False

    class Layer(LoRA.Layer):
        """The factors, of which a draw deletes a part."""

        def __init__(self, method: LoRADropout, site: Site):
            super().__init__(method, site)
            self.rate, self.kept, self.masks = method.p, method.kept, False
            self.gain = 1 / (1 - method.p) if method.rescale else 1.0

        def factors(self) -> tuple[Tensor, Tensor]:
            """A without some columns and B without some rows, or both as on average."""
            if not (self.training or self.masks):
                return self.A, self.kept * self.B
            columns, rows = (self._mask(size) for size in (self.A.shape[1], self.B.shape[0]))
            return self.A * columns, self.B * rows[:, None]

        def _mask(self, size: int) -> Tensor:
            drawn = torch.rand(size, device=self.A.device) >= self.rate
            return drawn.to(self.dtype) * self.gain

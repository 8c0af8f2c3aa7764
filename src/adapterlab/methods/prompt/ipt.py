"""Intrinsic prompt tuning."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches
from adapterlab.errors import AttachError, ConfigError
from adapterlab.methods.prompt._input_prompt import InputPrompt, layer_of
from adapterlab.methods.prompt._sources import descend, mixed, opened, prompts_of, training
from adapterlab.registry import register


@register
class IPT(InputPrompt):
    """Learn the small space in which the prompts of many tasks lie, then train a few numbers in it for a new task.

    Prompt of a task: E = reshape(W3 tanh(W2 z + b2) + b3) `[P, d]`, with z `[k]` of the task, W2 `[h, k]` and W3
    `[P d, h]` of all tasks.

    Where it attaches: around the backbone, or the encoder of an encoder-decoder, as prompt tuning; poolers, padding and
    caches as there.

    It has two phases. In the first, `host.learn_from({"prompt of a task": batches, ...}, steps=...)`, an auto-encoder
    learns from trained prompts of one length: z = W1 vec(E) + b1, W1 `[k, P d]`, and the loss is
    CE(model with E*) + `alpha` · mean((E* − E)²) with E* decoded from z, on a batch of one task a step. Without
    batches (`{"a": (), "b": ()}`) it is the second term alone, of all prompts in every step. W1 is dropped then. In the
    second an adapter for a new task takes W2 and W3 from `source`, the first one, and trains z alone.

    Start: not the base's output: z from N(0, 0.02²), as in the authors' code.

    Trainable parameters: k; kept frozen beside it h k + h + P d (h + 1).

    Inference: not mergeable; P more positions. Decoded it is a plain prompt, and so HF PEFT gets it; training can go on
    from that one as prompt tuning.

    Prompts of classification and of generation share little: a space of one kind serves the other badly. Large prompts
    dominate the mean square. The authors smooth labels by 0.1; here the model's own loss is taken.

    Rate: 1e-2 for z with Adam, where the authors take 1e-5 for 100,000 steps; 3e-5 in the first phase.

    Reference: "Exploring Universal Intrinsic Task Subspace via Prompt Tuning", arXiv 2110.07867.

    Example:
        >>> from adapterlab.methods.prompt.ipt import IPT
        >>> IPT(length=100, size=5).hidden
        768
    """

    formula: ClassVar[str] = "k"

    size: int = Field(50, ge=1, description="numbers of a task k")
    hidden: int = Field(768, ge=1, description="width h of the decoder")
    source: str | None = Field(
        None, description="adapter of this method whose space to use: its name here, or its folder"
    )
    random: bool = Field(False, description="a random space that nothing was learned from, to compare with")
    alpha: float = Field(200.0, ge=0, description="weight of the reconstruction in the first phase")

    @model_validator(mode="after")
    def _one_space(self) -> Self:
        if self.random and self.source is not None:
            raise ValueError(f"random and source={self.source!r} are two spaces: leave one out")
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """A random space: learning one needs trained prompts."""
        return {"size": 32, "hidden": 64, "random": True}

    def attach(self, host: Carrier, name: str) -> None:
        """Make z and the decoder, which is zero until it is learned or taken from the source."""
        layer = self.Layer(self, host, name)
        if self.random:
            layer.decoder.reset()
        if self.source is not None:
            self.take_from_source(host, name, layer)
        self.put(host, name, layer)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach without the source: the space was saved with the adapter."""
        layer = self.Layer(self, host, name)
        layer.decoder.made = any(bool(t.any()) for key, t in tensors.items() if key.endswith("decoder.outer.weight"))
        self.put(host, name, layer)

    def take_from_source(self, host: Carrier, name: str, layer: IPT.Layer) -> None:
        """Copy the decoder of another adapter."""
        assert self.source is not None
        with opened(host, self.source, name) as key:
            other = next((a for a in host.adapters(key).values() if isinstance(a, IPT.Layer)), None)
            mine, theirs = (x and tuple(map(tuple, (p.shape for p in x.decoder.parameters()))) for x in (layer, other))
            if other is None or mine != theirs:
                raise AttachError(
                    f"source={self.source!r} should be an {self.id} adapter with a decoder of shapes {mine}, and is "
                    f"{host.methods[key].id} with {theirs}. Name another, or change length, size and hidden."
                )
            layer.decoder.load_state_dict(other.decoder.state_dict())
            layer.decoder.made = other.decoder.made

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Refuse to search in a space that was never learned."""
        layer = layer_of(host, name)
        assert isinstance(layer, IPT.Layer)
        if not layer.decoder.made:
            raise ConfigError(
                f"{name!r} has no space to search in yet. host.learn_from({{name of a trained prompt: its batches, "
                "...}, steps=...) learns one, source='folder' takes that of another adapter, and random=True a random "
                "one for comparison."
            )

    def learn_from(
        self, host: Carrier, name: str, tasks: Mapping[str, Batches], *, steps: int, lr: float | None = None
    ) -> list[float]:
        """Train the auto-encoder on the prompts of the tasks, and drop its encoder."""
        layer = layer_of(host, name)
        assert isinstance(layer, IPT.Layer)
        prompts = torch.stack(prompts_of(host, tasks, self.length)).to(layer.z)
        encoder = nn.Linear(prompts[0].numel(), self.size, device=prompts.device, dtype=prompts.dtype)
        layer.decoder.reset()
        layer.decoder.requires_grad_(True)

        def coded(index: int | slice) -> Tensor:
            return layer.decoder(encoder(prompts[index].flatten(-2))).view(prompts[index].shape)

        def reconstruction(_: int) -> Callable[[], Tensor]:
            return lambda: self.alpha * self.apart(coded(slice(None)), prompts)

        def whole(task: int, source: str, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
            def compute() -> Tensor:
                made = coded(task)
                distance = self.alpha * self.apart(made, prompts[task])
                return self.task_loss(host, name, layer, made, batch) + distance

            return compute

        each: Any = map(reconstruction, range(steps))
        lists = {source: list(batches) for source, batches in tasks.items()}
        if any(lists.values()):
            each = itertools.starmap(whole, mixed(lists, steps))
        try:
            with training(host.model):
                trained = [*encoder.parameters(), *layer.decoder.parameters()]
                found = descend(trained, each, steps, lr=lr or 3e-5, clip=0.1)
        finally:
            layer.decoder.requires_grad_(False)
        with torch.no_grad():
            layer.z.copy_(encoder(prompts.flatten(1)).mean(0))
        return found

    @staticmethod
    def apart(made: Tensor, wanted: Tensor) -> Tensor:
        """mean((E* − E)²)."""
        return (made - wanted).square().mean()

    @staticmethod
    def task_loss(host: Carrier, name: str, layer: IPT.Layer, prompt: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's own loss with a prompt `[P, d]` in the place of the one that z stands for."""
        layer.shown = prompt
        try:
            with host.using(name):
                loss: Tensor = host.model(**batch).loss
                return loss
        finally:
            layer.shown = None

    class Layer(InputPrompt.Layer):
        """`z` `[k]` and the frozen `decoder`.

        Attributes:
            shown: a prompt that is computed with instead, in the first phase.
        """

        shown: Tensor | None = None

        def __init__(self, method: IPT, host: Carrier, name: str):
            super().__init__(method, host, name)
            self.z = self.site.parameter(method.size)
            nn.init.normal_(self.z, std=0.02)
            made: dict[str, Any] = {"device": self.site.device, "dtype": self.site.dtype}
            self.decoder = Decoder(method.size, method.hidden, self.length * self.table.embedding_dim, made)

        def vectors(self) -> Tensor:
            """The prompt that z stands for, `[P, d]`."""
            return self.decoder(self.z).view(self.length, -1) if self.shown is None else self.shown


class Decoder(nn.Module):
    """W3 tanh(W2 z + b2) + b3, frozen; zeros until it is made.

    Attributes:
        made: it was learned, taken or drawn.
    """

    made: bool = False

    def __init__(self, size: int, hidden: int, out: int, made: dict[str, Any]):
        super().__init__()
        self.inner, self.outer = nn.Linear(size, hidden, **made), nn.Linear(hidden, out, **made)
        for p in self.requires_grad_(False).parameters():
            nn.init.zeros_(p)

    def reset(self) -> None:
        """Give it torch's default start."""
        self.made = True
        self.inner.reset_parameters()
        self.outer.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """Decode `[..., k]` to `[..., P d]`."""
        found: Tensor = self.outer(self.bent(self.inner(z)))
        return found

    @staticmethod
    def bent(x: Tensor) -> Tensor:
        """The nonlinearity."""
        return x.tanh()

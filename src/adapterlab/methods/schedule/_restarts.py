"""Low-rank adaptation that is merged and begun anew several times in a run, so that the sum has a higher rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.site import Site
from adapterlab.errors import ConfigError, NotTrainingError
from adapterlab.methods.low_rank._starts import Initialiser, Place
from adapterlab.methods.low_rank.lora import LoRA

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Restarts(LoRA):
    """A run of several links, one after another: LoRA, merged when the next one begins.

    Link i of n trains s · B A on W + s (B₁ A₁ + ... + B_i−1 A_i−1). All links but the last are kept in float32 beside
    the model. Where the weight can be replaced, it is W plus their sum, rounded once, however many there are;
    elsewhere (packed and tied weights, or `in_base` off) the sum is computed beside it. The last link stays live.

    Subclasses say what is kept of a link that ends (`kept`), what the optimizer forgets (`forget`) and how the learning
    rate goes (`rate`). All draws depend on `seed` and the link alone.
    """

    hf: ClassVar[HFCodec | None] = None

    links: int = Field(3, ge=1, description="number of updates of rank r that are trained one after another")
    in_base: bool = Field(
        True, description="put links that ended into the base weight; off: compute them beside it, as for packed ones"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the links' starts")

    @field_validator("init")
    @classmethod
    def _anew(cls, value: Initialiser) -> Initialiser:
        if value.moves_base or value.needs_data:
            raise ValueError(f"init={value.name!r} cannot begin a link in the middle; choose kaiming or gaussian")
        return value

    @model_validator(mode="after")
    def _weights_alone(self) -> Self:
        if self.lora_bias:
            raise ValueError(
                "lora_bias=True has no place in links, which are matrices; leave it out, or train bias=all"
            )
        return self

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Restart in a run of a few steps."""
        return {"links": 2}

    @property
    def kept(self) -> float:
        """What of a link that ends stays in the factors, instead of being merged and begun anew."""
        return 0.0

    def forget(self, optimizer: Optimizer, p: nn.Parameter) -> None:
        """Treat what the optimizer knows of a factor when a link begins; the default leaves nothing."""
        optimizer.state.pop(p, None)

    # ------------------------------------------------------------------ the run

    def first(self, steps: int) -> int:
        """Number of steps before the first link."""
        return 0

    def starts(self, steps: int) -> list[int]:
        """Return the step (counted from 0) at which each link begins."""
        first = self.first(steps)
        return [first + i * (steps - first) // self.links for i in range(self.links)]

    def place_in(self, step: int, steps: int) -> tuple[int, int, int]:
        """Return the link of a step (-1 before the first), the place in it, and its length."""
        bounds = [0, *self.starts(steps), steps]
        link = sum(step >= start for start in bounds[1:-1]) - 1
        return link, step - bounds[link + 1], bounds[link + 2] - bounds[link + 1]

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Fit the links into the run.

        Raises:
            ConfigError: it has fewer steps.
        """
        left = steps - self.first(steps)
        if left < self.links:
            before = f" after the {steps - left} before the first" if left < steps else ""
            fewer = f"1 to {left} links" if left > 0 else "a shorter start"
            raise ConfigError(
                f"{self.id}: links={self.links} need a step each, and of this run's {steps} {max(left, 0)} are left "
                f"for them{before}. Choose {fewer}, or train longer."
            )
        for layer in self.layers(host, name).values():
            layer.steps = steps

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Let the next link begin when it is time.

        Raises:
            NotTrainingError: it is not known how long the run is.
        """
        layers = self.layers(host, name)
        steps = next((layer.steps for layer in layers.values()), None)
        if steps is None:
            raise NotTrainingError(
                f"The {self.id} adapter {name!r} does not know how many steps the run has. Call "
                f"host.methods[{name!r}].begin(host, {name!r}, steps) before the first one; adapterlab's loop and "
                "AdapterlabCallback do it by themselves."
            )
        if step == 0:
            for layer in layers.values():
                if bool(layer.B_past.any()):  # of an earlier run
                    layer.make_room(len(layer.A_past) + (self.links - 1) * len(layer.A))
        link, place, _ = self.place_in(step, steps)
        if link > 0 and place == 0:
            self.restart(host, name, link, optimizer)

    @torch.no_grad()
    def restart(self, host: Carrier, name: str, link: int, optimizer: Optimizer) -> None:
        """End a link and begin another one (counted from 0)."""
        layers = self.layers(host, name)
        with self.drawing([layer.A.device for layer in layers.values()], link):
            for layer in layers.values():
                layer.pass_on(self.links - 1 - link, self.kept)
                for p in (layer.A, layer.B):
                    self.forget(optimizer, p)
        host.refresh(name)

    @contextlib.contextmanager
    def drawing(self, devices: Sequence[torch.device], link: int) -> Iterator[None]:
        """Let random numbers depend on the seed and the link alone inside the context, on every process and device."""
        with torch.random.fork_rng(sorted({d.index or 0 for d in devices if d.type == "cuda"})):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, link]).generate_state(1)[0]))
            yield

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with room for the links there are."""
        self.attach(host, name)
        for path, layer in self.layers(host, name).items():
            if (past := tensors.get(f"adapter.{path}.A_past")) is not None:
                layer.make_room(len(past))

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """The rank that the sum may have."""
        ranks = {len(layer.A) + len(layer.A_past) for layer in self.layers(host, name).values()}
        return {"links": f"{self.links} of rank {self.r}; their sum has a rank up to {max(ranks, default=0)}"}

    def layers(self, host: Carrier, name: str) -> dict[str, Restarts.Layer]:
        """Return the adapter's parts by path."""
        return {path: a for path, a in host.adapters(name).items() if isinstance(a, Restarts.Layer)}

    class Layer(LoRA.Layer):
        """The link that trains and those that ended.

        Attributes:
            A_past: `[k r, in]`, with zeros where a link is still to come.
            B_past: `[out, k r]`.
            in_base: the base weight holds the sum of those.
            steps: of the run, once they are known.
        """

        A_past: Tensor
        B_past: Tensor

        def __init__(self, method: Restarts, site: Site):
            super().__init__(method, site)
            self.register_buffer("A_past", self.A.new_zeros(0, site.shape[1]).detach())
            self.register_buffer("B_past", self.B.new_zeros(site.shape[0], 0).detach())
            self.make_room((method.links - 1) * len(self.A))
            self.in_base = method.in_base and not (site.quantized or site.tied)
            self.steps: int | None = None

        def make_room(self, rank: int) -> None:
            """Give the links that ended so many rows and columns in all, new ones last."""
            more = rank - len(self.A_past)
            self.A_past, self.B_past = F.pad(self.A_past, (0, 0, 0, more)), F.pad(self.B_past, (0, more))

        def settle(self, host: Carrier, name: str) -> None:
            """Let the base weight hold the links that ended."""
            if self.in_base:
                host.replace(name, f"{self.site.path}.weight", self.folded)

        def past(self) -> Tensor:
            """The sum of the links that ended `[out, in]`."""
            return self.scale * (self.B_past @ self.A_past)

        def folded(self, stored: Tensor) -> Tensor:
            """The base weight with them, both as the module stores it: added in float32 and rounded once."""
            precise = torch.promote_types(stored.dtype, torch.float32)
            weight = self.site.matrix(stored).to(self.A.device, precise) + self.past().to(precise)
            return self.site.stored(weight).to(stored.device, stored.dtype)

        def pass_on(self, after: int, kept: float) -> None:
            """Count the link to those that ended, but for a share; `after` more will follow it there."""
            r, end = len(self.A), len(self.A_past) - after * len(self.A)
            self.A_past[end - r : end] = self.A
            self.B_past[:, end - r : end] = (1 - kept) * self.B
            if kept:
                self.B.mul_(kept)
                return
            start = self.init.start(Place(self.site, r, self.scale))
            self.A.copy_(start.A)
            self.B.copy_(start.B)

        def every_link(self) -> tuple[Tensor, Tensor]:
            """The factors of the whole change of the original weight, at the scale of one link."""
            return torch.cat([self.A, self.A_past]), torch.cat([self.B, self.B_past], 1)

        def factors(self) -> tuple[Tensor, Tensor]:
            """What is not in the base weight."""
            return (self.A, self.B) if self.in_base else self.every_link()

        def change(self) -> tuple[Tensor, Tensor] | None:
            """All links."""
            return self.every_link()

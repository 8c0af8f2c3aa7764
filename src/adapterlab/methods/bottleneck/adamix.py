"""A mixture of bottleneck adapters that is routed at random and becomes one adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.data.encoding import IGNORED
from adapterlab.errors import TrainingError
from adapterlab.foreign.model import is_causal, is_encoder_decoder
from adapterlab.methods.bottleneck._bottleneck import Activation, After, Hosted, Pair, Weights
from adapterlab.registry import register


class Experts(Adapter):
    """Tensors that have a first dimension for experts until they are merged."""

    down: nn.Parameter

    def merge(self) -> None:
        """Become one adapter."""
        if self.down.dim() == 3:
            for key, value in list(self.named_parameters()):
                setattr(self, key, nn.Parameter(value.detach().mean(0)))


@register
class AdaMix(Hosted):
    """Train M experts for each projection of a bottleneck adapter, drawn at random, and average their weights at last.

    In training y = h + s · (W_u^(j) f(W_d^(i) h + b_d^(i)) + b_u^(j)), f = GELU, s = 1; i and j are drawn from 1..M
    independently, in each layer and forward pass, for the whole batch. W_d `[M, m, d]`; W_u `[M, d, m]`, or one `[1, d,
    m]` that all share (`share_up`). The loss of a batch is L + c · ½ (KL(p ‖ q) + KL(q ‖ p)), where p are the model's
    answers, q those of a second pass with other draws, and each divergence has a gradient in its second distribution
    alone; it is a mean over the answers that have a label (all, where there are none).

    With `host="lora"` the projections are LoRA's, y = W x + s · W_u^(j) W_d^(i) x with s = α / r, 32 / 4 in the
    authors' runs, and the mean of the experts is an ordinary LoRA.

    Outside of training the experts' mean is computed, W̄ = Σ_i W^(i) / M, and so for biases. After training it is all
    that is left: an ordinary adapter, which is what is saved. `method.merge(host, name)` does it earlier.

    Where it attaches: the feed-forward block, or its second projection where it is not a module of its own; the second
    pass is made around the whole model, with a loss that needs the logits of all positions. LoRA: queries and values,
    or the fused module that holds them.

    Start: W_d and W_u of every expert from a normal distribution with deviation `init_std`, biases 0; W_u of LoRA 0.

    Trainable parameters: M (m d + m) + m d + d for each block, M (2 m d + m + d) with `share_up=False`; at the end
    2 m d + m + d. LoRA: M m in + m out for each module, at the end m (in + out).

    Inference: not mergeable into the base, since f is not linear; what one bottleneck adapter costs. LoRA merges.

    Cost of a step: two forward and backward passes.

    Rate: 3e-4, as in the authors' runs with RoBERTa.

    Reference: "AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", arXiv 2205.12410.

    Example:
        >>> from adapterlab.methods.bottleneck.adamix import AdaMix
        >>> AdaMix(experts=8).m
        16
    """

    formula: ClassVar[str] = "M (m d + m) + m d + d for each block, while it trains"
    starts_at_base: ClassVar[bool] = False

    experts: int = Field(4, ge=1, description="number M of experts for a projection")
    share_up: bool = Field(True, description="one second projection for all experts")
    share_down: bool = Field(False, description="one first projection for all experts")
    consistency: float = Field(
        1.0, ge=0, description="factor c of the divergence between two passes; 100 for generation"
    )
    m: int | None = Field(16, ge=1, description="width of the bottleneck; None: the model's width / reduction")
    activation: Activation = Field("gelu", description="nonlinearity between the projections")
    init_std: float = Field(0.02, ge=0, description="deviation of the projections at the start")

    def attach(self, host: Carrier, name: str) -> None:
        """Attach the experts, and what compares two passes."""
        super().attach(host, name)
        if self.consistency:
            host.wrap(name, host.model, Consistency(host.site(host.model), host.state, self.consistency))

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach what was saved: experts, or the adapter that they have become."""
        self.attach(host, name)
        if any(key.endswith(".down") and value.dim() == 2 for key, value in tensors.items()):
            self.merge(host, name)

    def merge(self, host: Carrier, name: str) -> None:
        """Put the mean of the experts in their place."""
        for adapter in list(host.adapters(name).values()):
            if isinstance(adapter, Consistency):
                host.unwrap(name, adapter.site)
            elif isinstance(adapter, Experts):
                adapter.merge()

    def finish(self, host: Carrier, name: str) -> None:
        """Leave one adapter."""
        self.merge(host, name)

    def start(self, down: Tensor, up: Tensor) -> None:
        """Normal; LoRA's second projection stays zero."""
        for weight in (down, up) if self.host == "adapter" else (down,):
            nn.init.normal_(weight, std=self.init_std)

    class Layer(Experts, After):
        """The experts at one block, or their mean."""

        def make(self, method: Any, width: int, m: int, out: int) -> None:
            """Make the experts of both projections."""
            down, up = counts(method)
            self.down, self.down_bias = self.site.parameter(down, m, width), self.site.parameter(down, m)
            self.up, self.up_bias = self.site.parameter(up, out, m), self.site.parameter(up, out)
            method.start(self.down, self.up)

        def weights(self) -> Weights:
            """Those of two experts that are drawn, or outside of training the mean of all."""
            if self.down.dim() == 2:
                return self.down, self.down_bias, self.up, self.up_bias
            pick = drawn if self.training else mean
            (down, down_bias), (up, up_bias) = pick(self.down, self.down_bias), pick(self.up, self.up_bias)
            return down, down_bias, up, up_bias

    class Product(Experts, Pair):
        """The experts of LoRA at one module, or their mean."""

        def make(self, method: Any, width: int, m: int, out: int) -> None:
            """Make the experts of both projections."""
            down, up = counts(method)
            self.down, self.up = self.site.parameter(down, m, width), self.site.parameter(up, out, m)
            method.start(self.down, self.up)

        def factors(self) -> tuple[Tensor, Tensor]:
            """Those of the mean, which is what merges."""
            if self.down.dim() == 2:
                return self.down, self.up
            (down,), (up,) = mean(self.down), mean(self.up)
            return down, up

        def product(self, x: Tensor) -> Tensor:
            """In training with two experts that are drawn."""
            if self.down.dim() == 2 or not self.training:
                return super().product(x)
            (down,), (up,) = drawn(self.down), drawn(self.up)
            return self.site.mix(self.site.op(x, down), self.scale * up)


class Consistency(Adapter):
    """In training a second pass of the model, whose answers must be those of the first."""

    not_linear: ClassVar[str] = "it compares two passes of the whole model"
    tokenwise: ClassVar[bool | None] = True

    def __init__(self, site: Site, state: State, factor: float):
        super().__init__(site)
        self.state, self.factor = state, factor
        self.shifted = is_causal(site.module) and not is_encoder_decoder(site.module)

    def train(self, mode: bool = True) -> Consistency:
        """Be passed over outside of training."""
        self.idle = not mode
        return super().train(mode)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model twice where somebody collects the loss."""
        out = run(*args, **kwargs)
        if self.state.losses is None:
            return out
        p, q = logits_of(out), logits_of(run(*args, **kwargs))
        p, q = answers(p, q, self.site.bound(args, kwargs).get("labels"), self.shifted)
        if len(p):
            self.state.emit(self.factor * divergence(p, q))
        return out


def counts(method: Any) -> tuple[int, int]:
    """How many experts there are for the first and the second projection."""
    return (1 if method.share_down else method.experts), (1 if method.share_up else method.experts)


def drawn(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one expert, at random."""
    one = torch.randint(len(tensors[0]), (1,), device=tensors[0].device)
    return tuple(tensor.index_select(0, one)[0] for tensor in tensors)


def mean(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of the mean expert."""
    return tuple(tensor.mean(0) for tensor in tensors)


def logits_of(out: Any) -> Tensor:
    """The answers of a model.

    Raises:
        TrainingError: it returns none.
    """
    found = getattr(out, "logits", None)
    if not isinstance(found, Tensor):
        raise TrainingError(
            f"adamix compares the logits of two passes, and the model returns {type(out).__name__} without logits. Set "
            "consistency=0, or train a model with a head."
        )
    return found


def answers(p: Tensor, q: Tensor, labels: Tensor | None, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return the logits `[n, classes]` that have a label; where they are shifted, position t answers for t + 1."""
    if labels is None or p.dim() < 3 or labels.shape != p.shape[:-1]:
        return p.flatten(0, -2), q.flatten(0, -2)
    if shifted:
        p, q, labels = p[:, :-1], q[:, :-1], labels[:, 1:]
    return p[labels != IGNORED], q[labels != IGNORED]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """½ (KL(p ‖ q) + KL(q ‖ p)), the mean over rows of logits; each first distribution is taken as given."""
    first, second = (t.float().log_softmax(-1) for t in (p, q))
    kl = functools.partial(F.kl_div, reduction="batchmean", log_target=True)
    return 0.5 * (kl(second, first.detach()) + kl(first, second.detach()))

"""A mixture of the scales of (IA)³ with a router for each module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.hub import HubCodec
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.core.targets import matcher
from adapterlab.errors import AttachError
from adapterlab.foreign.model import head_width
from adapterlab.methods.mixture._experts import Routed, refuse_tied
from adapterlab.methods.multiplicative.ia3 import IA3
from adapterlab.ops.experts import weighted_scales
from adapterlab.registry import register

BY_HEAD = ("q", "k", "v", "qkv")  # roles whose outputs are split into heads


@register
class MoV(IA3):
    """Rescale keys, values and inner activations by vectors of which a router takes a mean for each token.

    u' = u ⊙ Σ_e p_e l_e, p = softmax(R u), for u = W_k x + b, u = W_v x + b and the u that W_down receives; l `[E, d]`,
    R `[E, d]`. The router reads what is scaled, not what the module receives. Keys and values are routed head by head:
    the heads share R `[E, d_head]`, and each has weights of its own. With `top_k` the smaller weights are set to 0,
    without scaling up the others, and a vector of ones gets what is left, so that the start stays the base's (the
    authors' code shrinks u by it). No balancing loss. With one expert it is (IA)³, and merges.

    Where it attaches: linear layers (GPT-2's `Conv1D` and quantized ones too) whose weight is not tied. The default
    takes, of the roles k, v, qkv and down, those that the model has; a fused qkv is scaled as a whole.

    Start: l = 1, so the first output equals the base's with any router; R from a normal distribution with deviation
    0.02, which alone makes the experts differ: with R = 0 they would stay equal for ever.

    Trainable parameters: E d + E d_router for each module: d is out, or in for feed-forward modules, d_router the width
    of a head at keys and values, or d.

    Inference: not mergeable with more than one expert, since the weights depend on the token. It sees one token at a
    time, so caches, padding and mixed batches change nothing.

    The router runs in float32 whatever the dtype of x; what is multiplied is l − 1, so that small changes survive in
    half precision. The backward pass makes the mean of the vectors again: it keeps u and p.

    Rate: 5e-3, as (IA)³, whose scales start at one too and are not decayed; the authors take 3e-4 with Adafactor for
    500,000 steps.

    Reference: "Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning",
    arXiv 2309.05444.

    Example:
        >>> from adapterlab.methods.mixture.mov import MoV
        >>> MoV(experts=30, targets=["v", "down"]).feedforward
        ('down',)
    """

    formula: ClassVar[str] = "E (d + d_router) for each module, E d with one expert"
    hf: ClassVar[HFCodec | None] = None
    hub: ClassVar[HubCodec | None] = None

    experts: int = Field(10, ge=1, description="number of vectors; with one the method is (IA)³")
    top_k: int | None = Field(None, ge=1, description="vectors used for a token; None: all, which works better")
    router_scope: Literal["head", "tensor"] = Field(
        "head", description="what of keys and values has weights of its own: each head, or the whole vector"
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k is not None and self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}; lower it, or leave it out")
        return self

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        """Make the vectors and the router for one site.

        Raises:
            AttachError: the weight is tied to another module, or nothing says how wide a head is.
        """
        refuse_tied(self.id, site)
        if self.experts == 1:
            return super().build(site, host, name)
        on_input = any(matcher(entry)(site) for entry in self.feedforward)
        by_head = self.router_scope == "head" and site.role in BY_HEAD and not on_input
        return Vectors(self, site, host.state, on_input, _heads(site, host) if by_head else 1)


class Vectors(Routed):
    """The vectors `[E, d]` and the router of one module.

    Attributes:
        on_input: the input is scaled instead of the output.
        heads: how many parts of the vector are routed each by itself.
    """

    def __init__(self, method: MoV, site: Site, state: State, on_input: bool, heads: int):
        width = site.shape[1 if on_input else 0]
        super().__init__(site, state)
        self.on_input, self.heads = on_input, heads
        self.l = site.parameter(method.experts, width)
        self.route(method.experts, width // heads, top_k=method.top_k)
        nn.init.ones_(self.l)
        nn.init.normal_(self.router, std=0.02)

    def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scale the input or the output."""
        return run(self.scaled(x), *args, **kwargs) if self.on_input else self.scaled(run(x, *args, **kwargs))

    def scaled(self, u: Tensor) -> Tensor:
        """U ⊙ Σ_e p_e l_e, head by head."""
        apart = u.unflatten(-1, (self.heads, -1))
        scales = self.l.unflatten(1, (self.heads, -1))
        return weighted_scales(apart, self.weights(apart), scales).flatten(-2)


def _heads(site: Site, host: Carrier) -> int:
    """Heads whose keys or values a module makes.

    Raises:
        AttachError: no module around it says how wide a head is.
    """
    around = [s for s in host.all_sites() if s.path and site.path.startswith(f"{s.path}.")]
    found = (head_width(s.module) for s in reversed(around))
    width = next((width for width in found if width is not None), None)
    if width is None or site.shape[0] % width:
        raise AttachError(
            f"mov: {site.path} makes {site.shape[0]} numbers a token, and no module around it says into heads of what "
            "width they are split. Set router_scope='tensor' to route the whole vector."
        )
    return site.shape[0] // width

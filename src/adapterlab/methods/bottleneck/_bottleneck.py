"""Bottleneck adapters in one form: s · (W_u f(W_d z + b_d) + b_u); a method chooses the places, z, s and the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter, Copy, Delta, Front, Tokenwise
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.core.targets import Targets
from adapterlab.engine.wrapping import plain_copy
from adapterlab.errors import AttachError
from adapterlab.foreign.calls import order
from adapterlab.foreign.model import plain_class
from adapterlab.ops.segmented import ACTIVATIONS

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"]  # of `ops.segmented`


class Projections(Adapter):
    """The two projections; subclasses say what they read and where the result goes, or what they are made of."""

    not_linear: ClassVar[str] = "a nonlinear function stands between its two projections"
    tokenwise: ClassVar[bool | None] = True
    shares_base: ClassVar[bool] = True

    def __init__(self, method: Bottleneck, site: Site, width: int, out: int | None = None):
        """Make the projections.

        Args:
            method: gives their size, start, scale, nonlinearity and dropout.
            site: where they are attached.
            width: of what they read.
            out: width of what they add to; the same by default.
        """
        super().__init__(site)
        self.activation, self.p = method.activation, method.dropout
        self.make(method, width, method.size(width), out or width)
        self.scale = method.scaling(site)

    def make(self, method: Any, width: int, m: int, out: int) -> None:
        """Make and start the tensors that `weights` come from."""
        self.down, self.down_bias = self.site.parameter(m, width), self.site.parameter(m)
        self.up, self.up_bias = self.site.parameter(out, m), self.site.parameter(out)
        method.start(self.down, self.up)

    def weights(self) -> Weights:
        """W_d `[m, width]`, b_d `[m]`, W_u `[out, m]` and b_u `[out]` of this call."""
        return self.down, self.down_bias, self.up, self.up_bias

    def share(self, z: Tensor) -> Tensor:
        """S · (W_u drop(f(W_d z + b_d)) + b_u), computed in the adapter's dtype and returned in that of z."""
        down, down_bias, up, up_bias = self.weights()
        h = ACTIVATIONS[self.activation](F.linear(z.to(self.dtype), down, down_bias))
        h = F.dropout(h, self.p, self.training)
        return (self.scale * F.linear(h, up, up_bias)).to(z.dtype)

    def added_to_result(self, *, reads_output: bool) -> Tokenwise | None:
        """Return the form for a server of what adds `share` to the module's result; None: `share` is another one."""
        if type(self).share is not Projections.share:
            return None
        (down, down_bias, up, up_bias), scale = self.weights(), float(self.scale)
        return Tokenwise(down, up, scale, down_bias, self.activation, reads_output, shift=scale * up_bias)


class After(Projections):
    """Sequential: y = h + share(h) with h = run(x)."""

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = run(*args, **kwargs)
        return plus(y, self.share(first(y)))

    def serving(self) -> Front | Tokenwise | None:
        """As long as it is this one: another `around` reads something else."""
        return self.added_to_result(reads_output=True) if type(self).around is After.around else None


class Beside(Projections):
    """Parallel: y = run(x) + share(x)."""

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = run(*args, **kwargs)
        return plus(y, self.share(args[0] if args else next(iter(kwargs.values()))))

    def serving(self) -> Front | Tokenwise | None:
        """All of it."""
        return self.added_to_result(reads_output=False)


class AroundNorm(Projections):
    """Sequential, at the norm behind a residual sum z: y = LN(z + share(LN(z)))."""

    def around(self, run: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(z + self.share(run(z, *args, **kwargs)), *args, **kwargs)


class Tap(Adapter):
    """Leaves the input of its module for a `Tapped` one further on in the same layer."""

    not_linear: ClassVar[str] = Projections.not_linear
    tokenwise: ClassVar[bool | None] = True
    rowwise: ClassVar[bool] = False  # the rows of a mixed batch may be grouped otherwise at the other module

    def __init__(self, site: Site, state: State, key: str):
        super().__init__(site)
        self.state, self.key = state, key

    def around(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module as it is."""
        self.state.taps[self.key] = x
        return run(x, *args, **kwargs)


class Tapped(Projections):
    """Parallel to everything between two modules: y = run(x) + share(what `Tap` left)."""

    rowwise: ClassVar[bool] = False

    def __init__(self, method: Bottleneck, site: Site, width: int, out: int, state: State, key: str):
        super().__init__(method, site, width, out)
        self.state, self.key = state, key

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = run(*args, **kwargs)
        return plus(y, self.share(self.read(self.state.taps.pop(self.key), first(y))))

    def read(self, left: Tensor, y: Tensor) -> Tensor:
        """What goes into the projections, of what was left and what the module returned."""
        return left


class TappedSum(Tapped):
    """Sequential, on the residual sum that the block has yet to make: y = r + share(x + r), where `Tap` left x."""

    def read(self, left: Tensor, y: Tensor) -> Tensor:
        """The sum."""
        return left + y


class Pair(Delta):
    """The two projections beside a linear layer, with nothing between them: y = run(x) + s · W_u W_d x, as in LoRA."""

    fused: ClassVar[bool | None] = False  # what they are made of may have a second derivative to take

    def __init__(self, method: Hosted, site: Site):
        super().__init__(site)
        out, in_ = site.shape
        self.p, self.scale = method.dropout, method.scale
        self.make(method, in_, method.size(in_), out)

    def make(self, method: Any, width: int, m: int, out: int) -> None:
        """Make and start the tensors that `factors` come from."""
        self.down, self.up = self.site.parameter(m, width), self.site.parameter(out, m)
        method.start(self.down, self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """W_d `[m, in]` and W_u `[out, m]` of this call."""
        return self.down, self.up


class Bottleneck(Method):
    """What the methods with bottleneck adapters share. Subclasses define `start` and may choose other places.

    Attributes:
        Layer: the adapter at one place.
        kinds: of modules that `targets` may name.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "block")
    Layer: ClassVar[Callable[..., Projections]] = After

    m: int | None = Field(None, ge=1, description="width of the bottleneck; by default the model's width / reduction")
    reduction: float = Field(16.0, ge=1, description="width of the model over that of the bottleneck, when m is unset")
    activation: Activation = Field("relu", description="nonlinearity between the projections")
    scale: float = Field(1.0, gt=0, description="factor s on what the adapter adds")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout in the bottleneck, after the nonlinearity")
    targets: Targets | None = Field(
        None, description="modules to adapt: roles, names or patterns; by default the method's own places"
    )

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the chosen places."""
        sites = host.all_sites()
        for site in host.sites(self.targets, self.kinds) if self.targets else self.places(sites):
            self.put(host, name, site, sites)

    def put(self, host: Carrier, name: str, site: Site, sites: Sequence[Site]) -> None:
        """Attach the adapter of one place."""
        host.wrap(name, site, type(self).Layer(self, site, width_of(site, sites)))

    def places(self, sites: Sequence[Site]) -> list[Site]:
        """Where the method attaches by itself."""
        return feed_forwards(sites)

    def start(self, down: Tensor, up: Tensor) -> None:
        """Fill the projections `[m, d]` and `[d, m]`; they are zero before, as the biases are."""
        raise NotImplementedError

    def size(self, width: int) -> int:
        """Width of the bottleneck where the model's is `width`."""
        return self.m or max(1, int(width / self.reduction))

    def scaling(self, site: Site) -> float | nn.Parameter:
        """The factor s at one place."""
        return self.scale


class Reading(Bottleneck):
    """What the methods share whose adapters may read the sublayer's output, that output normalised, or the sum.

    Attributes:
        AtNorm: the adapter at a norm behind the residual sum.
        OfSum: the adapter that reads a sum which its block has yet to make.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "block", "norm")
    AtNorm: ClassVar[Callable[..., Projections]] = AroundNorm
    OfSum: ClassVar[Callable[..., Projections]] = TappedSum

    reads: Literal["normed", "output", "sum"] = Field(
        "normed",
        description="input of the adapter: the normalised sum where a norm follows it, the sublayer's output, or the "
        "sum in blocks that normalise first",
    )

    def put(self, host: Carrier, name: str, site: Site, sites: Sequence[Site]) -> None:
        """Wrap the norm behind the sublayer if there is one and it is to be read, else the sublayer."""
        norm = site if site.kind == "norm" else norm_behind(site, sites)
        if norm is not None and self.reads == "sum":
            raise AttachError(
                f"reads='sum' is for blocks that normalise first, and {norm.path} normalises the sum. Take 'normed', "
                "which reads what it returns."
            )
        if norm is None and self.reads == "sum":
            key, width = tap(host, name, site, norm_before(site, sites)), width_of(site, sites)
            host.wrap(name, site, type(self).OfSum(self, site, width, width, host.state, key))
        elif norm is None or (self.reads == "output" and norm is not site):
            super().put(host, name, site, sites)
        else:
            host.wrap(name, norm, type(self).AtNorm(self, norm, width_of(norm, sites)))


class Hosted(Bottleneck):
    """What the methods share that change how the two projections are made, of bottleneck adapters or of LoRA.

    Attributes:
        Product: the projections of LoRA at one module.
        of_adapters: further fields that mean nothing to LoRA.
    """

    Product: ClassVar[Callable[..., Pair]] = Pair
    of_adapters: ClassVar[tuple[str, ...]] = ()

    host: Literal["adapter", "lora"] = Field(
        "adapter",
        description="whose projections: a bottleneck adapter's, or LoRA's on queries and values (m is its rank, scale "
        "its alpha / r)",
    )

    @model_validator(mode="after")
    def _of_adapters(self) -> Self:
        usual = {key: self.__class__.model_fields[key].get_default() for key in ("activation", *self.of_adapters)}
        given = [key for key, value in usual.items() if getattr(self, key) != value]
        if self.host == "lora" and given:
            raise ValueError(f"{', '.join(given)}: LoRA has no such thing; leave it out, or take host='adapter'")
        return self

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the chosen places, or the targets of LoRA."""
        if self.host == "adapter":
            return super().attach(host, name)
        roles = {site.role for site in host.all_sites()}
        usual = Targets(include=("q", "v") if "q" in roles else ("qkv",))
        for site in host.sites(self.targets or usual, ("linear",)):
            host.wrap(name, site, type(self).Product(self, site))


def copy_norms(host: Carrier, name: str) -> None:
    """Give an adapter norms of its own, as copies, which leave the base's untouched and are switched with it."""
    for site in host.all_sites():
        if site.kind == "norm" and not site.is_head and site.module._parameters["weight"] is not None:
            host.wrap(name, site, Copy(site, plain_copy(site.module)))


def first(y: Any) -> Tensor:
    """The hidden states in what a block returns."""
    hidden: Tensor = y[0] if isinstance(y, tuple) else y
    return hidden


def plus(y: Any, share: Tensor) -> Any:
    """Add to the hidden states in what a block returns."""
    return (y[0] + share, *y[1:]) if isinstance(y, tuple) else y + share.to(y.dtype)


def attention_outputs(sites: Sequence[Site]) -> list[Site]:
    """The output projections of all attention sublayers.

    Raises:
        AttachError: there are none.
    """
    return _some([s for s in sites if _inside(s) and s.role == "o"], "attention output projections", '["o_proj"]')


def feed_forwards(sites: Sequence[Site]) -> list[Site]:
    """The feed-forward sublayers: their blocks, and where there is no block of its own the second projections.

    Experts are inside a block, which stands for all of them.

    Raises:
        AttachError: there are none.
    """
    found = [s for s in sites if _inside(s) and (s.role == "mlp" or (s.role == "down" and s.kind == "linear"))]
    outer = [s for s in found if not any(s.path.startswith(f"{o.path}.") for o in found)]
    return _some(outer, "feed-forward blocks", '["down_proj"]')


def entrance(site: Site, sites: Sequence[Site]) -> Site:
    """The first projection of the feed-forward sublayer whose second one is `site`; both gates read the same.

    Raises:
        AttachError: it cannot be found.
    """
    found = [s for s in sites if s.role in ("up", "gate_up") and s.kind == "linear" and s.layer == site.layer]
    if not found:
        raise AttachError(
            f"{site.path} is the end of a feed-forward sublayer whose first projection cannot be told by its name, so "
            "its input is out of reach. Name a module with that input as target: the whole block, or the projection."
        )
    return max(found, key=lambda s: _common(s.path, site.path))


def norm_before(site: Site, sites: Sequence[Site]) -> Site:
    """The norm whose output a sublayer reads, in blocks that normalise first; its input is the residual stream.

    Raises:
        AttachError: the block calls none before the sublayer.
    """
    parent, _, name = site.path.rpartition(".")
    beside = {s.path.rpartition(".")[2]: s for s in sites if s.path.rpartition(".")[0] == parent and s.kind == "norm"}
    around = next(s for s in sites if s.path == parent)
    children = dict(around.module.named_children())
    called = [path for path in order(plain_class(around.module)) if path in children]
    before = called[: called.index(name)] if name in called else []
    found = [beside[path] for path in before if path in beside]
    if not found or before[0] not in beside:  # a block that calls something else first normalises sums
        raise AttachError(
            f"{type(around.module).__name__} calls no norm first, and before {name!r}, that its source shows, so the "
            "residual stream in front of it is out of reach. Let the adapter read the sublayer's own input or output."
        )
    return found[-1]


def norm_behind(site: Site, sites: Sequence[Site]) -> Site | None:
    """The norm of a module that holds nothing but one projection and one norm, as BERT's outputs do."""
    parent = site.path.rpartition(".")[0]
    beside = [s for s in sites if s.path.rpartition(".")[0] == parent and s.kind in ("linear", "norm")]
    norms = [s for s in beside if s.kind == "norm"]
    return norms[0] if site.kind == "linear" and len(beside) == 2 and len(norms) == 1 else None


def tap(host: Carrier, name: str, site: Site, begin: Site) -> str:
    """Leave the input of one module for another, and return the key it is left under."""
    key = f"{name}:{site.path}"
    host.wrap(name, begin, Tap(begin, host.state, key))
    return key


def width_of(site: Site, sites: Sequence[Site]) -> int:
    """Width of what a module returns; for a block that of its second projection, or of the norm beside it.

    Raises:
        AttachError: neither is there.
    """
    if site.kind == "linear":
        return site.shape[0]
    if site.kind == "norm":
        return site.module.get_parameter("weight").shape[0]
    parent = site.path.rpartition(".")[0]
    inner = [s for s in sites if s.path.startswith(f"{site.path}.") and s.role in ("down", "o") and s.kind == "linear"]
    beside = [s for s in sites if s.kind == "norm" and s.path.rpartition(".")[0] == parent]
    for found in (*inner, *beside):
        return width_of(found, sites)
    raise AttachError(
        f"The width of {site.path} ({type(site.module).__name__}) cannot be told from what it holds. Name a linear "
        "layer inside it as target instead."
    )


def _inside(site: Site) -> bool:
    return site.layer is not None and not site.is_head


def _common(a: str, b: str) -> int:
    parts = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (p, q) in enumerate(parts) if p != q), min(a.count("."), b.count(".")) + 1)


def _some(found: list[Site], what: str, example: str) -> list[Site]:
    if not found:
        raise AttachError(
            f"This model has no {what} that can be told by their names. Name the modules to adapt, for example "
            f"targets={example}; list them with: adapterlab targets MODEL."
        )
    return found

"""What runs at one module: the whole contract is `around`, or `added` for what adds to the module's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.foreign.quantized import is_quantized

_LARGEST_GAIN = 1e4  # of a copied norm, as half precision holds it
RESTING = "_adapterlab_resting"  # attribute of a module: what it keeps of its adapters while nobody trains them


@dataclass(frozen=True)
class Front:
    """What an adapter puts in front of every sequence, whatever the sequence is.

    Attributes:
        embedded: vectors that are read before the tokens are, as if they were embedded ones, `[P, d]`.
        keys: of one attention module, as they are used, `[kv_heads, P, head_dim]`.
        values: likewise.
        shift: by how many positions the tokens move.
    """

    embedded: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    shift: int = 0


class Tokenwise(NamedTuple):
    """What an adapter makes of each token outside of training: y = g ⊙ (h + s · B f(A z + d)) + c with h = M(l ⊙ x).

    M is the module, and z is x, or h. What is None is left out.

    Attributes:
        a: A `[r, in]`, or `[r, out]` where z is h.
        b: B `[out, r]`.
        scale: s.
        d: d `[r]`.
        f: one of `ops.segmented.FUNCTIONS`.
        reads_output: z is h.
        on_input: l `[in]`.
        gain: g `[out]`.
        shift: c `[out]`.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    d: Tensor | None = None
    f: str | None = None
    reads_output: bool = False
    on_input: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None


class Adapter(nn.Module):
    """The trainable part at one site.

    Attributes:
        place: `call`: around the module's call; `attention`: around the attention core inside it.
        not_linear: why the adapted module is no longer affine in its input, for the message of a refused merge; "" if
            it is, so that it can be merged.
        rowwise: row i of the output depends on row i of the input only, so adapters can be mixed in a batch.
        resident: its values are in the base's own parameters already, so merging has nothing to write.
        outlives: what has no weight to be merged into and stays live beside the merged ones (of a resident adapter).
        takes: arguments that the module does not have and the adapter consumes; they show in its signature, so that
            `generate` and `Trainer` hand them on.
        tokenwise: it makes no position depend on another (beyond what the module does), so samples can be packed;
            None: at a linear layer, an embedding or a norm and inside the attention it does not, elsewhere it may.
        additive: the output is run(x) plus something, so a mixed batch needs the base's product once; what follows from
            having no `around` of its own.
        shares_base: it calls `run` in the state that it finds, so that one result serves whoever asks the
            same in a mixed batch; what only adds does so too.
        counts_tokens: it asks `state.real_tokens`; only models with such an adapter are watched for that.
        is_its_factors: what it adds is a product of two factors, which the engine computes; see `Delta`.
        alike: it is one of several of its name that stand at every module with a certain weight and change it alike, so
            that the modules stay tied when it is merged; one of them may be the only one that is called.
        site: where it is attached.
        is_merged: its effect is in the base's weights now.
        idle: it is passed over for the time being: the module is computed as if it were not there.
    """

    place: str = "call"
    not_linear: ClassVar[str] = ""
    rowwise: ClassVar[bool] = True
    resident: ClassVar[bool] = False
    outlives: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()
    tokenwise: ClassVar[bool | None] = None
    shares_base: ClassVar[bool] = False
    counts_tokens: ClassVar[bool] = False
    additive: bool = True
    is_its_factors: bool = False
    alike: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.additive = cls.around is Adapter.around

    def __init__(self, site: Site):
        super().__init__()
        self.site = site
        self.is_merged = False
        self.idle = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the adapter computes in: that of its first parameter."""
        return next(self.parameters()).dtype

    @property
    def keeps_tokens_apart(self) -> bool:
        """Whether it makes no position depend on another; what `tokenwise` says, or leaves open.

        Inside the attention a sample comes by itself.
        """
        if self.tokenwise is None:
            return self.place == "attention" or self.site.tokenwise
        return self.tokenwise

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the adapted module; without a form of its own: run(x) + added(x), in the dtype of run(x).

        Args:
            run: the rest of the computation: adapters attached earlier, then the module itself. May be called with
                other arguments, several times, or not at all.
            args: what the module was called with (at the attention core: query, key, value, mask).
            kwargs: likewise.
        """
        y: Tensor = run(*args, **kwargs)
        return y + self.added(args[0]).to(y.dtype)

    def added(self, x: Tensor) -> Tensor:
        """What is added for an input as the module received it; it depends on x alone."""
        raise NotImplementedError(f"{type(self).__qualname__} gives neither `around` nor `added`")

    def whole(self, x: Tensor) -> Tensor | None:
        """Compute base and what is added for x in one node, if there is such a form, else None.

        Asked only of what adds and gives no factors, and where the frozen weight (`Site.frozen_weight`) may be
        multiplied in the module's place.
        """
        return None

    def serving(self) -> Front | Tokenwise | None:
        """Return all that it does outside of training in a form that a server keeps, computed once, or None.

        What it puts in front of every sequence, or what it makes of each token. Without a form it is computed with its
        own tokens of a step, if it keeps tokens apart.
        """
        return None

    def covers(self, other: Adapter) -> str:
        """Say what of another adapter at the same module has no effect beside this one, or ""."""
        return ""

    def refer(self, key: str, module: nn.Module) -> None:
        """Give the adapter an attribute that leads to a module it does not hold: one that is saved elsewhere, once.

        What `Carrier.share` keeps at the root of the model is reached so from the adapters that use it.
        """
        self.__dict__[key] = module

    def slow_because(self) -> str:
        """Return why training does not compute the adapter in one node with the module's own product, or ""."""
        return f"{'adds to' if self.additive else 'works on'} what the base returns"

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias of a plain module that computes what the adapted one does.

        The default pushes the identity through the adapter, in chunks of rows: W'ᵀ = around(base, I) − around(base, 0)
        and bias' = around(base, 0). It is right to rounding for every adapter that is affine in its input.

        Args:
            weight: `[out, in]`, what the module would compute with otherwise.
            bias: `[out]` or None.

        Returns:
            (`[out, in]`, `[out]` or None) in the dtype of `weight`.
        """
        if self.site.kind == "embedding":
            ids = torch.arange(weight.shape[1], device=weight.device)
            table: Tensor = self.around(lambda x: self.site.op(x, weight), ids)
            return (table / self.site.gain).T, bias

        def base(x: Tensor) -> Tensor:
            y = self.site.op(x.to(weight.dtype), weight)
            return y if bias is None else y + bias

        zero = self.around(base, weight.new_zeros(1, weight.shape[1]))[0]
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        columns = [self.around(base, rows) - zero for rows in eye.split(1024)]
        shift = zero if bias is not None or bool(zero.any()) else None
        return torch.cat(columns).T, shift


class Delta(Adapter):
    """An adapter that adds a matrix to the weight: y = run(x) + op(x, ΔW).

    A subclass gives `factors`, or `delta` for an update of another form; `forward` is overridden for a cheaper one.

    Attributes:
        scale: the factor s of an update s · B A.
        p: dropout on the input of an update with factors, in training.
        fused: an update with factors may be computed in one node with the module's own product; None: if the class has
            no `forward` and no `added` of its own, which would not be called then.
        is_its_factors: what follows from that and from being additive.
        holds: names of its parameters, if they are the factors as they are; what a class says stands beside its own
            `factors`, so that one which computes them loses it.
        casts: `forward` gets x in the adapter's own dtype; otherwise as it came, and casts what is smaller.
    """

    fused: ClassVar[bool | None] = None
    is_its_factors: bool = True
    holds: ClassVar[tuple[str, str] | None] = None
    casts: ClassVar[bool] = True
    scale: float = 1.0
    p: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.forward is not Delta.forward or cls.added is not Delta.added
        cls.is_its_factors = cls.additive and (not own if cls.fused is None else cls.fused)
        cls.holds = next(base.__dict__.get("holds") for base in cls.__mro__ if "factors" in base.__dict__)

    def train(self, mode: bool = True) -> Self:
        """Switch modes, and forget what was kept of the factors."""
        self.site.module.__dict__.pop(RESTING, None)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the tensors, which their counts of writes do not show, and forget what was kept of them."""
        self.site.module.__dict__.pop(RESTING, None)
        return super()._apply(fn, recurse)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (A `[r, in]`, B `[out, r]`) with ΔW = s · B A, or None for an update of another form."""
        return None

    def change(self) -> tuple[Tensor, Tensor] | None:
        """Return the like for the whole change of the original weight, where a part of it is in the base's.

        None: there is no such part, or it is no product of two factors.
        """
        return None

    def serving(self) -> Front | Tokenwise | None:
        found = self.factors() if self.is_its_factors else None
        return None if found is None else Tokenwise(*found, self.scale, shift=self.added_bias)

    @property
    def added_bias(self) -> Tensor | None:
        """What is added to the output beside the update `[out]`, or None."""
        return None

    def delta(self) -> Tensor:
        """The update ΔW `[out, in]`."""
        found = self.factors()
        if found is None:
            raise NotImplementedError(f"{type(self).__qualname__} gives neither factors nor a delta")
        return self.scale * (found[1] @ found[0])

    def forward(self, x: Tensor) -> Tensor:
        """The update's share of the output; override it with a cheaper form."""
        return self.product(F.dropout(x, self.p) if self.training and self.p else x)

    def product(self, x: Tensor) -> Tensor:
        """The same without dropout, in the dtype of x (of the adapter for token ids)."""
        dtype = x.dtype if x.is_floating_point() else self.dtype
        found = self.factors()
        if found is None:
            return self.site.op(x, self.delta().to(dtype))
        a, b = found[0].to(dtype), (self.scale * found[1]).to(dtype)
        if self.site.grouped:
            return self.site.op(x, b @ a)
        return self.site.mix(self.site.op(x, a), b, None if self.added_bias is None else self.added_bias.to(dtype))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return (A, s · B) if the adapter adds exactly x Aᵀ (s B)ᵀ in evaluation, else None."""
        found = self.factors() if self.additive and self.added_bias is None else None
        if found is None or self.site.grouped or self.site.kind != "linear":
            return None
        return found[0], self.scale * found[1]

    def added(self, x: Tensor) -> Tensor:
        """The update's share, for x as the module received it."""
        share: Tensor = self(x.to(self.dtype) if self.casts and x.is_floating_point() else x)
        return share

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + ΔW; what is added beside it joins the bias."""
        shift = None if self.added_bias is None else self.added_bias.to(weight.dtype)
        if shift is not None and bias is not None:
            shift = bias + shift
        return weight + self.delta().to(weight.dtype), bias if shift is None else shift


class Entrance(Adapter):
    """An adapter around a whole model that changes what the model is called with, and nothing that it returns.

    The loss may therefore call the backbone itself with the changed arguments.
    """

    resident: ClassVar[bool] = True
    outlives: ClassVar[bool] = True

    @contextlib.contextmanager
    def entering(self, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Give the changed arguments of a call (by name, labels perhaps among them) for as long as it lasts."""
        yield given

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.entering(self.site.bound(args, kwargs)) as given:
            return run(**given)


class Copy(Adapter):
    """A full trainable copy of a module, used instead of it (what HF PEFT calls `modules_to_save`).

    The copy leaves a tensor that the base shares with another module untouched, and each adapter can bring its own.
    """

    def __init__(self, site: Site, copy: nn.Module):
        """Let a copy of the module train.

        Raises:
            AttachError: its weights are packed.
        """
        super().__init__(site)
        if any(is_quantized(module) for module in copy.modules()):
            raise AttachError(
                f"{site.path} is to be trained whole and has packed weights, of which no copy can be trained. Leave it "
                "out of modules_to_save and target it, or load the base without quantization."
            )
        self.copy = copy.to(site.dtype).requires_grad_(True)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moved = [a.to(self.dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        y = self.copy(*moved, **kwargs)
        given = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        outside = given.dtype if given is not None else self.site_dtype
        return y.to(outside) if isinstance(y, Tensor) else y

    def serving(self) -> Front | Tokenwise | None:
        """Return what a copy of a norm makes of the norm's own result, or None.

        n ⊙ (w + o) + b is g ⊙ (n ⊙ (w₀ + o) + b₀) + c with g = (w + o) / (w₀ + o) and c = b − g ⊙ b₀.
        """
        offset = self.site.norm_offset
        if offset is None:
            return None
        (w, b), (own_w, own_b) = (
            (None if t is None else t.detach().float() for t in map(module._parameters.get, ("weight", "bias")))
            for module in (self.copy, self.site.unmerged.module)
        )
        assert w is not None and own_w is not None  # noqa: PT018
        gain = (w + offset) / (own_w + offset)
        if not bool((gain.abs() < _LARGEST_GAIN).all()):  # NaN is not either
            return None
        return Tokenwise(gain=gain, shift=None if b is None or own_b is None else b - gain * own_b)

    @property
    def site_dtype(self) -> torch.dtype:
        """Dtype the base module answers in."""
        return next(self.site.module.parameters()).dtype

"""Chosen entries of base parameters, trained in place: memory for what is chosen, not for the whole tensor.

The parameter in the model holds the tuned values, so every other code that reads it sees them. What trains is a
float32 vector of the chosen values, which is the truth: the parameter has it rounded to its dtype, since the last
forward pass or whenever the adapter was switched on or loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.site import Site
from adapterlab.foreign.sharding import is_part, read


class Chosen:
    """Which places of a parameter an adapter holds, and the values it has for them."""

    def places(self) -> Tensor:
        """What was chosen: flat row-major positions `[k]`, or what else `seen` counts along its first dimension."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The values there, detached: `[k, ...]`."""
        raise NotImplementedError

    def seen(self, parameter: Tensor) -> Tensor:
        """A view of the parameter whose first dimension is chosen from."""
        return parameter.view(-1)

    def index(self) -> Tensor:
        """The chosen places as flat row-major positions."""
        return self.places()

    def renew(self) -> None:
        """Take note that the tensors behind this were changed from outside."""


# ---------------------------------------------------------------------- entries, a vector for each parameter


class Entries(Adapter):
    """The trained entries of one module's parameters.

    Attributes:
        values: float32 `[k]` for each parameter name.
        index<name>: int64 `[k]`, flat row-major positions in the parameter as it is stored.
        held: for each parameter name its entries, and those that are kept elsewhere: of a tied parameter, or as a part
            of a vector for many.
        fetched: the parameters come from other processes anew for each pass, and do not bring the entries.
    """

    rowwise: ClassVar[bool] = False
    resident: ClassVar[bool] = True
    fetched: bool = False

    def __init__(self, site: Site):
        super().__init__(site)
        self.values = nn.ParameterDict()
        self.index = nn.Module()
        self.held: dict[str, Trained] = {}

    def add(self, parameter: str, index: Tensor) -> Trained:
        """Train these entries of a parameter; they start at their present values."""
        base = self.site.module._parameters[parameter]
        assert base is not None
        index = index.to(base.device, torch.int64).flatten()
        self.index.register_buffer(parameter, index)
        self.values[parameter] = nn.Parameter(read(base, index).float())
        self.fetched = is_part(base)
        self.held[parameter] = OwnVector(self, parameter)
        return self.held[parameter]

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module with its parameters seen as functions of the trained vectors."""
        tensors: dict[str, Tensor] = {}
        again: list[Tensor] = []  # `list[Tensor]()` is nothing that torch.compile follows
        for name, held in self.held.items():
            vector, values, index = held.trained()
            if len(index):
                parameter = self.site.module._parameters[name]
                tensors[name] = _Placed.apply(parameter, vector, values, index)
                again += [parameter, values, index]  # type: ignore[list-item]
        if not tensors:
            return run(*args, **kwargs)
        with self.site.substituted(**tensors):
            y = run(*args, **kwargs)
        return _PlacedAgain.apply(y, *again) if self.fetched and torch.is_grad_enabled() else y


class Trained(Chosen):
    """Chosen entries that train."""

    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the gradient `[k]` goes to, the values `[k]` and their flat positions `[k]`."""
        raise NotImplementedError


class OwnVector(Trained):
    """Entries that one `Entries` holds by itself, under the names that `as_saved` gives them."""

    def __init__(self, entries: Entries, name: str):
        self.entries, self.name = entries, name

    def places(self) -> Tensor:
        found: Tensor = self.entries.index._buffers[self.name]  # type: ignore[assignment]
        return found

    def values(self) -> Tensor:
        return self.entries.values[self.name].detach()

    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        vector = self.entries.values[self.name]
        return vector, vector.detach(), self.places()


def as_saved(entries: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of an adapter that holds these entries, by parameter positions and values, as `Entries` do."""
    found = {}
    for path, (index, values) in entries.items():
        module, _, parameter = path.rpartition(".")
        found[f"adapter.{module}.index.{parameter}"] = index
        found[f"adapter.{module}.values.{parameter}"] = values
    return found


class _PlacedAgain(torch.autograd.Function):
    """A module's output as it is; in the backward pass its parameters get the entries before the module needs them.

    The backward pass multiplies by the memory that the forward pass saw, into which FSDP2 has fetched the base anew.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *placed: Tensor) -> Tensor:
        ctx.placed = [
            (p, values.clone(), index) for p, values, index in zip(placed[::3], placed[1::3], placed[2::3], strict=True)
        ]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for parameter, values, index in ctx.placed:
            parameter.data.view(-1)[index] = values.to(parameter.device, parameter.dtype)
        return grad, *[None] * (3 * len(ctx.placed))


class _Placed(torch.autograd.Function):
    """The parameter with the values written into it; backward gathers the gradient of the values."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, vector: Tensor, values: Tensor, index: Tensor) -> Tensor:
        # `data` keeps the version counter: between two forward passes of one step the values are the same, and
        # tensors saved by the first pass stay valid.
        index = index.to(parameter.device)
        parameter.data.view(-1)[index] = values.to(parameter.device, parameter.dtype)
        ctx.save_for_backward(index)
        ctx.like = {"dtype": vector.dtype, "device": vector.device}
        return parameter.detach().view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return None, grad.reshape(-1)[index].to(**ctx.like), None, None


# ---------------------------------------------------------------------- entries, one vector for all parameters


class Vector(nn.Module):
    """Entries of many parameters in one vector of a fixed length, so that they can be chosen in the middle of a run.

    Which parameters they belong to may change; optimizers, trainers, processes and checkpoints see one tensor of one
    shape. A position counts through all the parameters, one after another.

    Attributes:
        values: float32 `[k]`.
        index: int64 `[k]`, ascending positions; -1 as long as nothing is chosen.
        sizes: int64, of the parameters, by which a saved vector is known to be of this model.
        left_index, left_values: entries that do not train any more and keep their values; None: there are none.
        steps: of the run, once they are known.
    """

    index: Tensor
    sizes: Tensor
    left_index: Tensor | None
    left_values: Tensor | None

    def __init__(self, parameters: Mapping[str, Tensor], count: int):
        super().__init__()
        device = next(iter(parameters.values())).device
        self.paths = list(parameters)
        numbers = [p.numel() for p in parameters.values()]
        self.offsets = list(itertools.accumulate(numbers, initial=0))
        self.values = nn.Parameter(torch.zeros(count, dtype=torch.float32, device=device), requires_grad=False)
        self.register_buffer("index", torch.full((count,), -1, device=device))
        self.register_buffer("sizes", torch.tensor(numbers, device=device))
        self.register_buffer("left_index", None)
        self.register_buffer("left_values", None)
        self.steps: int | None = None
        self._bounds, self._left = (
            [count] * len(self.offsets),
            [0] * len(self.offsets),
        )  # none: all lie before the first
        self._carriers: tuple[Any, tuple[Tensor, ...]] | None = None

    @property
    def chosen(self) -> bool:
        """Whether entries have been chosen."""
        return self._bounds[0] < self._bounds[-1]

    def part(self, path: str) -> Trained:
        """The entries of one parameter."""
        return _Part(self, self.paths.index(path))

    def positions(self, chosen: Mapping[str, Tensor]) -> Tensor:
        """Ascending positions of entries that are given by parameter, flat there."""
        found = [chosen[path] + self.offsets[i] for i, path in enumerate(self.paths) if path in chosen]
        return torch.cat(found).sort().values.to(self.index.device)

    @torch.no_grad()
    def choose(self, index: Tensor, values: Tensor, left: tuple[Tensor, Tensor] | None = None) -> None:
        """Let these entries train from these values, and keep others as they are."""
        self.index.copy_(index)
        self.values.copy_(values)
        self.values.requires_grad_(True)
        self.left_index, self.left_values = left if left is not None and len(left[0]) else (None, None)
        self.renew()

    def renew(self) -> None:
        """Find out where the parameters' entries begin; `index` was changed."""
        self._bounds, self._left = self._begins(self.index), self._begins(self.left_index)
        self._carriers = None

    def _begins(self, index: Tensor | None) -> list[int]:
        if index is None:
            return [0] * len(self.offsets)
        borders = torch.tensor(self.offsets, device=index.device)
        found: list[int] = torch.searchsorted(index, borders).tolist()
        return found

    def carrier(self, i: int) -> Tensor:
        """What takes the gradient of the i-th parameter's entries to `values`.

        A slice of `values` would do so too, and fill a vector of the whole length with zeros for each parameter.
        """
        key = (self.values.requires_grad, torch.is_grad_enabled(), id(self.values))
        if self._carriers is None or self._carriers[0] != key or torch.compiler.is_compiling():
            counts = [b - a for a, b in itertools.pairwise(self._bounds)]
            self._carriers = key, _Carriers.apply(self.values, self._bounds[0], counts)
        return self._carriers[1][i]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what cannot be copied: tensors in the middle of a graph."""
        return {**self.__dict__, "_carriers": None}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """Load, with as many entries that do not train any more as were saved."""
        for name in ("left_index", "left_values") if f"{prefix}index" in state_dict else ():
            saved = state_dict.get(f"{prefix}{name}")
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.index.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.renew()


class _Part(Trained):
    def __init__(self, vector: Vector, i: int):
        self.vector, self.i = vector, i

    def places(self) -> Tensor:
        v = self.vector
        left = None if v.left_index is None else v.left_index[v._left[self.i] : v._left[self.i + 1]] - v.offsets[self.i]
        return self._index() if left is None else torch.cat([self._index(), left])

    def values(self) -> Tensor:
        v = self.vector
        left = None if v.left_values is None else v.left_values[v._left[self.i] : v._left[self.i + 1]]
        return self._now() if left is None else torch.cat([self._now(), left])

    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        index = self._index()
        return self.vector.carrier(self.i) if len(index) else index, self._now(), index

    def renew(self) -> None:
        self.vector.renew()

    def _index(self) -> Tensor:
        v = self.vector
        return v.index[v._bounds[self.i] : v._bounds[self.i + 1]] - v.offsets[self.i]

    def _now(self) -> Tensor:
        v = self.vector
        return v.values.detach()[v._bounds[self.i] : v._bounds[self.i + 1]]


class _Carriers(torch.autograd.Function):
    """One tensor for each part of a vector, without content; backward puts their gradients behind each other."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, skipped: int, counts: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.skipped, ctx.counts = skipped, counts
        ctx.set_materialize_grads(False)
        return tuple(values.new_zeros(1).expand(count) for count in counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        like: Any = next(g for g in grads if g is not None)
        found = [like.new_zeros(n) if g is None else g for g, n in zip(grads, ctx.counts, strict=True)]
        return torch.cat([like.new_zeros(ctx.skipped), *found]), None, None


# ---------------------------------------------------------------------- whole lines


class Lines(Adapter):
    """Chosen outputs of a linear layer, whose weights train in place: the others cost no gradient of a weight.

    Attributes:
        values: float32, `weight` `[r, in]` and `bias` `[r]` if there is one.
        rows: int64 `[r]`, ascending; -1 as long as none are chosen.
        chosen: they are.
        steps: of the run, once they are known.
    """

    rowwise: ClassVar[bool] = False
    resident: ClassVar[bool] = True
    rows: Tensor

    def __init__(self, site: Site, count: int):
        super().__init__(site)
        self.names = ("weight",) if site.bias is None else ("weight", "bias")
        shapes = {"weight": (count, site.shape[1]), "bias": (count,)}
        self.values = nn.ParameterDict(
            {n: nn.Parameter(torch.zeros(shapes[n], device=site.device), requires_grad=False) for n in self.names}
        )
        self.register_buffer("rows", torch.full((count,), -1, device=site.device))
        self.chosen = False
        self.steps: int | None = None

    def part(self, name: str) -> Chosen:
        """The rows of the weight, or their entries of the bias."""
        return _LinesOf(self, name)

    def renew(self) -> None:
        """Find out whether rows are chosen; `rows` was changed."""
        self.chosen = bool((self.rows >= 0).all())

    @torch.no_grad()
    def choose(self, rows: Tensor, start: Mapping[str, Tensor]) -> None:
        """Let these rows train.

        Args:
            rows: which.
            start: the parameters, by their name in the module, that they start from.
        """
        self.rows.copy_(rows)
        for name in self.names:
            self.values[name].copy_(self.part(name).seen(start[name])[self.rows])
            self.values[name].requires_grad_(True)
        self.renew()

    @torch.no_grad()
    def write(self) -> None:
        """Put the values into the parameters."""
        for name in self.names:
            stored = self._stored(name).data
            self.part(name).seen(stored)[self.rows] = self.values[name].to(stored.dtype)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module with the rows in their places, and take their gradients from its output's."""
        if not self.chosen:
            return run(*args, **kwargs)
        self.write()
        y = run(*args, **kwargs)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.values.values())
        return _Outputs.apply(y, args[0], self.rows, *(self.values[name] for name in self.names)) if trains else y

    def _stored(self, name: str) -> Tensor:
        found: Any = self.site.module._parameters[name]
        return found  # type: ignore[no-any-return]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.renew()


class _LinesOf(Chosen):
    def __init__(self, lines: Lines, name: str):
        self.lines, self.name = lines, name

    def places(self) -> Tensor:
        return self.lines.rows

    def values(self) -> Tensor:
        return self.lines.values[self.name].detach()

    def seen(self, parameter: Tensor) -> Tensor:
        return parameter if self.name == "bias" else self.lines.site.matrix(parameter)

    def renew(self) -> None:
        self.lines.renew()

    def index(self) -> Tensor:
        stored = self.lines._stored(self.name)
        every = torch.arange(stored.numel(), device=stored.device).view(stored.shape)
        return self.seen(every)[self.lines.rows].flatten()


class _Outputs(torch.autograd.Function):
    """The output of a linear layer as it is; backward makes the gradients of some rows of its weight and bias."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, rows)
        ctx.dtype, ctx.given = weight.dtype, 4 + (bias is not None)
        return y.clone()  # a model may change in place what a module returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows = ctx.saved_tensors
        chosen = grad.reshape(-1, grad.shape[-1])[:, rows]
        found = (chosen.T @ x.reshape(len(chosen), -1).to(grad.dtype)).to(ctx.dtype)
        return (grad, None, None, found, chosen.sum(0).to(ctx.dtype))[: ctx.given]

"""Where low-rank factors start: what an initialiser is, and how one is found.

The usual starts are here. A start that belongs to a method stands in the method's file and has its name.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import PlainSerializer, PlainValidator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, ConfigError, nearest
from adapterlab.registry import ids, method
from adapterlab.settings import Settings


@dataclass(frozen=True)
class Place:
    """A module whose update s · B A is to be started.

    Attributes:
        site: the module.
        r: rank of the update.
        scale: the factor s, positive.
    """

    site: Site
    r: int
    scale: float


@dataclass(frozen=True)
class Start:
    """Where the update of one module starts.

    Attributes:
        A: `[r, in]`.
        B: `[out, r]`.
        taken: (A0, B0) of any rank, when the base gives something up: while the adapter is live the base weight is
            `Initialiser.base(W − s · B0 A0)`. None: the base stays.
    """

    A: Tensor
    B: Tensor
    taken: tuple[Tensor, Tensor] | None = None


class Initialiser(Settings):
    """A way to choose the first values of the factors; its name is that of its file, its fields are its options.

    Attributes:
        moves_base: the base weight changes too.
        low_rank: what the base gives up is exactly s · B0 A0.
        needs_data: the start is chosen by `learn`; until then it is the default one.
        kinds: of modules it can start.
    """

    moves_base: ClassVar[bool] = False
    low_rank: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "conv")

    @property
    def name(self) -> str:
        """What it is chosen by: the name of the method it belongs to, or one of the usual starts."""
        return next(
            (name for name, cls in USUAL.items() if cls is type(self)), type(self).__module__.rpartition(".")[2]
        )

    def check(self, place: Place) -> None:
        """Refuse a module before anything is computed.

        Raises:
            AttachError: it is of another kind, or its weight would have to change and cannot.
        """
        site = place.site
        if site.kind not in self.kinds:
            raise AttachError(
                f"init={self.name!r} starts {' and '.join(self.kinds)} modules; {site.path} is of kind {site.kind}. "
                "Exclude it from the targets, or choose init='kaiming'."
            )
        if self.moves_base and site.quantized:
            raise AttachError(
                f"init={self.name!r} changes the base weight, and that of {site.path} is stored packed "
                f"({type(site.module).__name__}). Load the base without quantization, or choose 'kaiming' or 'eva'."
            )
        if self.moves_base and site.tied:
            raise AttachError(
                f"init={self.name!r} changes the base weight, and that of {site.path} is tied to another module, which "
                "would change with it. Exclude it from the targets, or choose init='kaiming'."
            )

    def start(self, place: Place) -> Start:
        """Choose the factors without data; the default is LoRA's: the update is zero."""
        return zero(place)

    def learn(self, host: Carrier, places: Mapping[str, Place], batches: Iterable[Mapping[str, Tensor]]) -> Starts:
        """Choose the factors from data.

        Args:
            host: of the model; the adapter is live, and its update is still zero.
            places: the modules by path.
            batches: arguments of the model.

        Returns:
            A start for each path; None where the adapter should be taken away.
        """
        raise NotImplementedError

    def base(self, weight: Tensor) -> Tensor:
        """The base weight `[out, in]` in place of W − s · B0 A0."""
        return weight


Starts = dict[str, Start | None]


def zero(place: Place, std: float | None = None) -> Start:
    """The start of LoRA: an update that is zero, with one factor random.

    Args:
        place: the module.
        std: of a normal A; None: uniform within ±1/√in. For embeddings A = 0 and B is standard normal.
    """
    out, in_ = place.site.shape
    dtype, device = place.site.dtype, place.site.device
    a, b = (torch.zeros(*size, dtype=dtype, device=device) for size in ((place.r, in_), (out, place.r)))
    if place.site.kind == "embedding":
        nn.init.normal_(b)
    elif std is not None:
        nn.init.normal_(a, std=std)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return Start(a, b)


def full_weight(site: Site) -> Tensor:
    """The weight `[out, in]` in float32 at least; decompositions in half precision are useless."""
    weight = site.weight()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def part_of(place: Place, count: int, what: str) -> None:
    """Check that a matrix of the module's size has so many directions.

    Raises:
        AttachError: it has fewer.
    """
    largest = min(place.site.shape)
    if count > largest:
        raise AttachError(
            f"{what} needs {count} directions of {place.site.path} for r={place.r}, and a weight of {place.site.shape} "
            f"has {largest}. Lower r there (rank_pattern), or exclude the module."
        )


def balanced(u: Tensor, s: Tensor, vh: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Share singular values out: A `[r, in]` and B `[out, r]` with scale · B A = u diag(s) vh."""
    root = (s.clamp(min=0) / scale).sqrt()
    return root[:, None] * vh, u * root


class Kaiming(Initialiser):
    """The usual start: A uniform within ±1/√in and B zero; for embeddings A zero and B standard normal."""


class Gaussian(Initialiser):
    """A normal with standard deviation 1/r and B zero; for embeddings A zero and B standard normal."""

    def start(self, place: Place) -> Start:
        """Draw A."""
        return zero(place, std=1 / place.r)


USUAL: dict[str, type[Initialiser]] = {"kaiming": Kaiming, "gaussian": Gaussian}


def names() -> list[str]:
    """List the starts; imports all methods."""
    return sorted([*USUAL, *(id for id in ids() if _of_method(id) is not None)])


def initialiser(name: str, **options: Any) -> Initialiser:
    """Make an initialiser.

    Args:
        name: of it.
        options: its fields.

    Raises:
        ConfigError: there is none of that name, or an option is unknown or out of range.
    """
    cls = USUAL.get(name) or (_of_method(name) if name in ids() else None)
    if cls is None:
        raise ConfigError(f"there is no initialiser {name!r}. {nearest(name, names())}")
    return cls(**options)


def _of_method(id: str) -> type[Initialiser] | None:
    """The start that the file of a method defines, if it does."""
    module = importlib.import_module(method(id).__module__)
    for cls in vars(module).values():
        if inspect.isclass(cls) and issubclass(cls, Initialiser) and cls.__module__ == module.__name__:
            return cls
    return None


def _read(value: Any) -> Initialiser:
    if isinstance(value, Initialiser):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("write a name such as 'pissa', or name and options such as {name: pissa, niter: 4}")
    try:
        return initialiser(**{str(key): option for key, option in value.items()})
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _write(value: Initialiser) -> str | dict[str, Any]:
    options = value.model_dump(mode="json", exclude_defaults=True)
    return {"name": value.name, **options} if options else value.name


# The type of a field that holds an initialiser: given and stored as a name, or as name and options.
Init = Annotated[Initialiser, PlainValidator(_read), PlainSerializer(_write)]

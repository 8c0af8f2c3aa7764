"""Methods whose adapters are two factors, and where those start: at zero, with a part of the base, or from data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches, LayerMethod
from adapterlab.core.site import Site
from adapterlab.foreign.roles import ranks_by_role
from adapterlab.methods.low_rank._starts import Init, Initialiser, Place, Start, initialiser


class LowRank(LayerMethod):
    """Two factors for each module, started by an initialiser."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "conv")

    init: Init = Field(
        "kaiming",
        validate_default=True,
        description="start of the factors: kaiming, gaussian, pissa, milora, olora, loftq, eva, corda or lora_ga; with "
        "options as in {name: pissa, niter: 4}",
    )

    def place(self, site: Site) -> Place:
        """What an initialiser needs to know about a module."""
        raise NotImplementedError

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets and take out of the base what the factors hold."""
        super().attach(host, name)
        for factors in self._factors(host, name).values():
            factors.settle(host, name)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with the ranks that data gave and what was taken out of the base; nothing is decomposed."""
        if not (self.init.needs_data or self.init.moves_base):
            return self.attach(host, name)
        self.replace(init="kaiming").attach(host, name)
        for path, factors in self._factors(host, name).items():
            a, b, a0, b0 = (tensors.get(f"adapter.{path}.{leaf}") for leaf in ("A", "B", "A0", "B0"))
            if a is None or b is None:
                host.unwrap(name, factors.site)  # data gave this module no rank
                continue
            factors.init = self.init
            factors.begin(Start(a, b, None if a0 is None or b0 is None else (a0, b0)))
            factors.settle(host, name)

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Choose the start from data, if `init` asks for it; what has been chosen or trained stays as it is."""
        super().prepare(host, name, batches)
        held = self._factors(host, name)
        if not self.init.needs_data or any(factors.chosen or bool(factors.B.any()) for factors in held.values()):
            return
        places = {path: self.place(factors.site) for path, factors in held.items()}
        for path, start in self.init.learn(host, places, batches).items():
            if start is None:
                host.unwrap(name, held[path].site)
            else:
                held[path].begin(start)
                held[path].chosen = True
                held[path].settle(host, name)

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """The ranks that data gave."""
        held = self._factors(host, name) if self.init.needs_data else {}
        return ranks_by_role({path: len(factors.factors()[0]) for path, factors in held.items()})

    @classmethod
    def capabilities(cls) -> dict[str, bool]:
        """As of any method; whether data is needed depends on the usual start."""
        usual = cls.model_fields["init"].get_default()
        usual = initialiser(usual) if isinstance(usual, str) else usual
        return {**super().capabilities(), "needs_data": cls.prepare is not LowRank.prepare or usual.needs_data}

    def _factors(self, host: Carrier, name: str) -> dict[str, Factors]:
        return {path: part for path, part in host.adapters(name).items() if isinstance(part, Factors)}


class Factors(Delta):
    """Two factors at one module; A0 and B0 are what the base gave up, if it did.

    Attributes:
        A: `[r, in]`.
        B: `[out, r]`.
        scale: the factor s.
        init: how they were started.
        chosen: data has been used for it.
    """

    holds: ClassVar[tuple[str, str] | None] = ("A", "B")

    A: nn.Parameter
    B: nn.Parameter
    A0: Tensor | None
    B0: Tensor | None
    scale: float
    init: Initialiser
    chosen: bool = False

    def __init__(self, method: LowRank, site: Site):
        super().__init__(site)
        place = method.place(site)
        self.scale, self.init = place.scale, method.init
        self.init.check(place)
        self.begin(self.init.start(place))

    @torch.no_grad()
    def begin(self, start: Start) -> None:
        """Take over the values, the rank and the part of the base of a start."""
        for key, value in (("A", start.A), ("B", start.B)):
            held = self._parameters.get(key)
            if held is None or held.shape != value.shape:
                setattr(self, key, self.site.parameter_of(value))
            else:
                held.copy_(value)
        for key, taken in zip(("A0", "B0"), start.taken or (None, None), strict=True):
            self.register_buffer(key, None if taken is None else taken.detach().to(self.A, copy=True))

    def settle(self, host: Carrier, name: str) -> None:
        """Take what the factors hold out of the base."""
        if self.A0 is not None:
            host.replace(name, f"{self.site.path}.weight", self.residual)

    def residual(self, stored: Tensor) -> Tensor:
        """What is left of the base weight W, both as the module stores it: W − s · B0 A0, or its quantized form."""
        assert self.A0 is not None
        assert self.B0 is not None
        precise = torch.promote_types(stored.dtype, torch.float32)
        weight = self.site.matrix(stored).to(self.A0.device, precise)
        left = self.init.base(weight - self.scale * (self.B0 @ self.A0).to(precise))
        return self.site.stored(left).to(stored.device, stored.dtype)

    def change(self) -> tuple[Tensor, Tensor] | None:
        """[A; A0] and [B, −B0], when that is exactly what the base gave up."""
        if self.A0 is None or self.B0 is None or not self.init.low_rank:
            return None
        a, b = self.factors()
        return torch.cat([a, self.A0]), torch.cat([b, -self.B0], 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The A and B that every product uses; variants make others of their tensors."""
        return self.A, self.B

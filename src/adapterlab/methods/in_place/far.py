"""FAR: train the feed-forward nodes that learn most, and reconfigure the layers so that the others cost nothing."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.engine.sparse import Lines
from adapterlab.errors import AttachError
from adapterlab.foreign.quantized import is_plain
from adapterlab.methods.in_place._two_phases import TwoPhases
from adapterlab.optim import Span, master, steps_of
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

_ROLES = ("gate", "up", "gate_up", "down")


@register
class FAR(TwoPhases):
    """Prime for a few steps, keep the output nodes of the feed-forward layers that moved most, freeze the others.

    After `priming` node j of W `[out, in]`, b `[out]` scores Σᵢ |W₁ⱼᵢ − W₀ⱼᵢ| + |b₁ⱼ − b₀ⱼ|. The ⌈ρ out⌉ best nodes
    of each layer train on; the others have neither gradients of their weights nor a state of the optimizer. Gate and up
    projection of one block choose one set of nodes, by the sum of their scores.

    Where it attaches: the linear layers of the feed-forward networks in all blocks, or `targets`. Everything else is
    frozen; heads belong in `modules_to_save`.

    Start: the base's values. With `rewind` the chosen nodes begin there again after priming, and the file holds their
    rows alone. Without it all keep what priming made of them, and the file holds the layers whole: the paper's summary
    says neither.

    Trainable parameters: ⌈ρ out⌉ (in + 1) for each layer, all of out (in + 1) during priming.

    Memory: gradients and moments of ρ of the layers; the input of each layer is kept as in full training, since every
    node's gradient needs all of it.

    Cost of a step: the gradient of W is ρ times as much work as in full training.

    Inference: the rows are in the layer already, nothing to merge, no cost.

    By a reader's account random nodes do nearly as well: `selection="random"` has them from the first step on.

    Rate: 5e-5, that of full fine-tuning; the authors' is not known to us.

    Reference: "Efficient Fine-Tuning of BERT Models on the Edge", arXiv 2205.01541.

    Example:
        >>> from adapterlab.methods.in_place.far import FAR
        >>> FAR(retention=0.4).count(48)
        20
    """

    formula: ClassVar[str] = "⌈ρ out⌉ (in + 1) for each layer"

    retention: float = Field(0.1, gt=0, le=1, description="share ρ of the nodes of a layer that train")
    priming: Span = Field(
        0.05, description="steps in which all nodes train, to choose by: a number, or a share of the run (below 1)"
    )
    rewind: bool = Field(True, description="begin again at the base's values after priming")
    selection: Literal["movement", "random"] = Field(
        "movement", description="what nodes are chosen by; random ones need no priming and are a baseline"
    )
    targets: Targets | None = Field(None, description="layers to train nodes of; null: feed-forward networks")
    seed: int = Field(0, ge=0, lt=1 << 31, description="of the random selection")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Prime for one step, then train one node in four."""
        return {"retention": 0.25, "priming": 1}

    # ------------------------------------------------------------------ structure

    def attach(self, host: Carrier, name: str) -> None:
        """Give each layer its rows, and own it whole until they are chosen."""
        sites = self.sites(host)
        layers = {site.path: self._lines(host, name, site, self.count(site.shape[0])) for site in sites}
        if self.selection == "random":
            for group in self.groups(sites):
                rows = self._drawn(group[0])
                for site in group:
                    layers[site.path].choose(rows, _parameters(site))
        self._own(host, name, layers, entire=self.selection != "random")

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with the rows that were saved, in the phase that they are of.

        Raises:
            AttachError: they lie outside of a layer.
        """
        layers = {}
        for site in self.sites(host):
            rows = tensors.get(f"adapter.{site.path}.rows")
            if rows is None:
                continue
            if len(rows) and int(rows.max()) >= site.shape[0]:
                raise AttachError(
                    f"The rows of {site.path} reach {int(rows.max())}, and it has {site.shape[0]} here: they were "
                    "chosen on another base model. Load that one, or train again."
                )
            layers[site.path] = self._lines(host, name, site, len(rows))
            layers[site.path].rows.copy_(rows)
            layers[site.path].renew()
        self._own(host, name, layers, entire=any(key.startswith("base.") for key in tensors))
        if layers and self.is_chosen(host, name):
            self.turn(host, name)

    def with_entries(self, host: Carrier, entries: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, Tensor] | None:
        """Whole rows of the layers."""
        left, found = dict(entries), dict[str, Tensor]()
        for site in self.sites(host):
            own = {leaf: left.pop(f"{site.path}.{leaf}") for leaf in _parameters(site) if f"{site.path}.{leaf}" in left}
            rows = _as_rows(site, own) if own else {}
            if rows is None:
                return None
            found |= {f"adapter.{site.path}.{key}": value for key, value in rows.items()}
        return None if left else found

    def sites(self, host: Carrier) -> list[Site]:
        """Return the layers.

        Raises:
            AttachError: there are none, or one is stored packed.
        """
        if self.targets is not None:
            found = host.sites(self.targets, ("linear",))
        else:
            found = [s for s in host.all_sites() if s.role in _ROLES and s.kind == "linear" and s.layer is not None]
        if not found:
            raise AttachError(
                f"{type(host.model).__name__} has no feed-forward layers that are linear layers ({', '.join(_ROLES)}), "
                "so far would train nothing. Name layers in targets; list them with: adapterlab targets MODEL."
            )
        for site in found:
            if site.quantized or not all(is_plain(p) for p in _parameters(site).values()):
                raise AttachError(
                    f"The weight of {site.path} is stored packed, and far trains rows of it in place. Load the base "
                    "without quantization, leave it out of targets, or choose a method that adds tensors beside it."
                )
        return found

    def count(self, out: int) -> int:
        """Nodes that train in a layer of so many."""
        return math.ceil(self.retention * out)

    def groups(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Return layers that choose the same nodes: gate and up of a block, whose outputs are multiplied."""
        found: dict[tuple[str, int], list[Site]] = {}
        for site in sites:
            joint = site.role in ("gate", "up")
            found.setdefault((site.path.rpartition(".")[0] if joint else site.path, site.shape[0]), []).append(site)
        return list(found.values())

    def whole(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return weights and biases of the layers."""
        return {f"{site.path}.{leaf}": p for site in self.sites(host) for leaf, p in _parameters(site).items()}

    def held(self, host: Carrier, name: str) -> Sequence[Lines]:
        """The rows of each layer."""
        return [a for a in host.adapters(name).values() if isinstance(a, Lines)]

    def _lines(self, host: Carrier, name: str, site: Site, count: int) -> Lines:
        layer = Lines(site, count)
        host.wrap(name, site, layer)
        return layer

    def _own(self, host: Carrier, name: str, layers: Mapping[str, Lines], entire: bool) -> None:
        for path, layer in layers.items():
            for leaf in layer.names:
                host.own(name, f"{path}.{leaf}", chosen=layer.part(leaf), entire=entire)

    # ------------------------------------------------------------------ the run

    def first(self, steps: int) -> int:
        """Number of steps of priming."""
        return max(1, steps_of(self.priming, steps))

    def span(self) -> str:
        """The setting, for messages."""
        return f"priming={self.priming}"

    def keeps_whole(self) -> bool:
        """Without `rewind` the frozen rows keep what priming made of them."""
        return not self.rewind

    @torch.no_grad()
    def choose(self, host: Carrier, name: str, optimizer: Optimizer) -> None:
        """The nodes whose weights moved most train on."""
        patches = host.patches[name]
        layers = {layer.site.path: layer for layer in self.held(host, name)}
        for group in self.groups([layer.site for layer in layers.values()]):
            scores = torch.stack([self.moved(host, name, site, optimizer) for site in group]).sum(0)
            rows = scores.topk(len(layers[group[0].path].rows)).indices.sort().values
            for site in group:
                now = {leaf: master(optimizer, p) for leaf, p in _parameters(site).items()}
                start = {leaf: patches[f"{site.path}.{leaf}"].original for leaf in now}
                layers[site.path].choose(rows, start if self.rewind else now)

    def moved(self, host: Carrier, name: str, site: Site, optimizer: Optimizer) -> Tensor:
        """Σᵢ |W₁ⱼᵢ − W₀ⱼᵢ| + |b₁ⱼ − b₀ⱼ| of each node `[out]`."""
        found = []
        for leaf, p in _parameters(site).items():
            change = (
                master(optimizer, p).detach().float() - host.patches[name][f"{site.path}.{leaf}"].original.float()
            ).abs()
            found.append(site.matrix(change).sum(1) if leaf == "weight" else change)
        return torch.stack(found).sum(0)

    def after_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Layers that are kept whole have the rows' last values."""
        super().after_step(host, name, step, optimizer)
        for layer in self.held(host, name) if not self.rewind else ():
            if layer.chosen:
                layer.write()

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """How many rows train."""
        layers = self.held(host, name)
        if not self.is_chosen(host, name):
            return {"nodes": "none chosen: the run ended while it was priming, and the adapter holds all of them"}
        return {"nodes": f"{sum(len(a.rows) for a in layers)} of {sum(a.site.shape[0] for a in layers)}"}

    def _drawn(self, site: Site) -> Tensor:
        # The generator uses 32 bits of its seed, so both numbers must go into those.
        draw = torch.Generator().manual_seed(zlib.crc32(site.path.encode(), self.seed))
        rows = torch.randperm(site.shape[0], generator=draw)[: self.count(site.shape[0])]
        return rows.sort().values.to(site.device)


def _parameters(site: Site) -> dict[str, nn.Parameter]:
    """Weight and bias of a linear layer."""
    return {leaf: p for leaf, p in site.module._parameters.items() if p is not None and leaf in ("weight", "bias")}


def _as_rows(site: Site, entries: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor] | None:
    """Entries of a layer as its rows; None where they are none."""
    shown, values = {}, {}
    for leaf, p in _parameters(site).items():
        index, held = entries.get(leaf, (torch.empty(0, dtype=torch.int64), torch.empty(0)))
        there, value = torch.zeros(p.numel(), dtype=torch.bool), p.detach().float().flatten().clone()
        there[index], value[index] = True, held.float()
        seen = site.matrix if leaf == "weight" else lambda stored: stored
        shown[leaf], values[leaf] = seen(there.view(p.shape)), seen(value.view(p.shape))
    rows = shown["weight"].any(1)
    if "bias" in shown:
        rows |= shown["bias"]
    if not shown["weight"][rows].all() and shown["weight"].any():
        return None
    kept = rows.nonzero().flatten()
    return {"rows": kept, **{f"values.{leaf}": value[kept] for leaf, value in values.items()}}

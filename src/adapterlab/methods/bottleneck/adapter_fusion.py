"""Attention over the outputs of several trained adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import FUSE, HubCodec, Options, fuse, method_of, taken
from adapterlab.core.method import Batches, Method
from adapterlab.core.site import Site
from adapterlab.engine.modes import evaluating
from adapterlab.errors import AttachError, ConfigError, DataError, FormatError
from adapterlab.foreign.model import config_of
from adapterlab.io.adapter_hub import find_method
from adapterlab.methods.bottleneck import _hub
from adapterlab.methods.bottleneck._bottleneck import After, AroundNorm, Projections
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
from adapterlab.methods.mixture._saved_adapters import Entry, compose, compose_saved
from adapterlab.registry import register

_ADAPTERS = ".adapters."  # before the name of an adapter, in the keys of AdapterHub's library
_PENALTY = 0.01  # its factor
_FUSED = "fused"  # the place of adapters that are computed by the one that fuses them


@register
class AdapterFusion(Method):
    """Freeze N trained adapters and learn, in every block, an attention that mixes what they add.

    With h the input of the adapters `[tokens, d]` and z_n what adapter n adds, without the residual:
    q = W_q h + b_q, k_n = W_k z_n + b_k, v_n = W_v z_n, a = softmax_n(q · k_n), and the sum Σ_n a_n v_n is added in
    place of one z. The softmax runs over the adapters, in float32, and its scores are not scaled.

    Where it attaches: at the modules of the adapters in `adapters`, which must be the same for all of them. These are
    folders of trained adapters, or names of adapters on the model, of which copies are made; their widths may differ,
    and heads that they trained are left behind. They run one after the other only in so far as each is a part of this
    one: the fusion is what is active, and not they.

    Start: W_q and W_k `[d, d]` from a normal distribution with deviation 0.02, biases 0; W_v `[d, d]` has ones on its
    diagonal and 1e-6 elsewhere. The penalty `regularisation` · Σ ‖I − W_v‖² keeps it near the identity.

    Trainable parameters: 3 d² + 2 d for each place of the adapters; theirs are frozen.

    Inference: not mergeable; all N adapters run at every place, and three products `[d, d]`. `method.prune(host, name,
    batches, keep=2)` leaves the two at each place that have the largest mean weight on rows of the task, as the authors
    of AdapterDrop do (arXiv 2010.11918).

    Rate: 5e-5, as in the authors' runs; their range was 6e-6 to 2e-4.

    Reference: "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv 2005.00247; the start of
    W_v and the form of the scores are those of the authors' library (arXiv 2007.07779). Its annealed temperature, which
    is off by default there, is left out.

    Example:
        >>> from adapterlab.methods.bottleneck.adapter_fusion import AdapterFusion
        >>> sorted(AdapterFusion(adapters={"math": "runs/math/best", "code": "runs/code/best"}).adapters)
        ['code', 'math']
    """

    formula: ClassVar[str] = "3 d² + 2 d for each place of the adapters"
    starts_at_base: ClassVar[bool] = False
    typical_lr: ClassVar[float] = 5e-5

    adapters: dict[str, Entry] = Field(
        min_length=1, description="by the name of each part: the folder of a trained adapter, or its name on the model"
    )
    regularisation: float = Field(_PENALTY, ge=0, description="factor of the penalty that keeps W_v near the identity")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the scores, before the softmax")

    hub: ClassVar[HubCodec | None] = HubCodec(
        options={
            "key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True,
            "residual_before": False, "temperature": False, "value_before_softmax": True, "value_initialized": True,
            "dropout_prob": None,
        },
        when={"architecture": FUSE},
        fields={},
        ignores=("adapters", "fusion", "regularization", "value_before_softmax", "value_initialized", "dropout_prob"),
        derived=lambda host, options, tensors: _read(host, options, tensors),
        outward=lambda host, key, method: _outward(host, key, method),
        inward=lambda host, key, tensors: _inward(host, key, tensors),
    )  # fmt: skip

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Fuse two adapters with random values."""
        return {
            "adapters": {
                part: {"name": AdapterPfeiffer.id, "m": m, "init_std": 0.5} for part, m in (("one", 4), ("two", 3))
            }
        }

    def attach(self, host: Carrier, name: str) -> None:
        """Attach the adapters as frozen parts, and what mixes them.

        Raises:
            FormatError: a folder holds no adapter, or one that does not fit the model.
            AttachError: the adapters stand at different modules, or do not add at one place behind a sublayer.
        """
        compose(host, name, self, self.adapters)
        _check({part: host.adapters(f"{name}/{part}") for part in self.adapters})
        self._fuse(host, name)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        compose_saved(host, name, self, self.adapters, tensors)
        for part in self.adapters:
            for path, adapter in list(host.adapters(f"{name}/{part}").items()):
                if not any(f"{part}/adapter.{path}.{leaf}" in tensors for leaf in adapter.state_dict()):
                    host.unwrap(f"{name}/{part}", adapter.site)  # it was pruned there
        self._fuse(host, name)

    def _fuse(self, host: Carrier, name: str) -> None:
        held = {part: host.adapters(f"{name}/{part}") for part in self.adapters}
        for path in dict.fromkeys(path for adapters in held.values() for path in adapters):
            parts = {part: adapters[path] for part, adapters in held.items() if path in adapters}
            for adapter in parts.values():
                adapter.place = _FUSED
            first = next(iter(parts.values()))
            host.wrap(name, first.site, Fusing(self, first.site, parts))  # type: ignore[arg-type]
        for part in self.adapters:
            for tensor in host.tensors(f"{name}/{part}").values():
                tensor.requires_grad_(False)

    def prune(self, host: Carrier, name: str, batches: Batches, keep: int = 2) -> dict[str, tuple[str, ...]]:
        """Leave at each place the adapters that have the largest mean weight over the tokens of some batches.

        The others are taken off there, and the softmax runs over those that are left.

        Args:
            host: of the model.
            name: of the adapter.
            batches: of rows that it was trained on; padding does not count.
            keep: adapters at a place.

        Returns:
            The names of the parts that are left, by path.

        Raises:
            ConfigError: keep is less than one.
            DataError: there are no batches.
        """
        if keep < 1:
            raise ConfigError(f"keep = {keep}: at least one adapter is left at a place. The authors take 2.")
        layers = {path: adapter for path, adapter in host.adapters(name).items() if isinstance(adapter, Fusing)}
        for path, weights in mean_weights(host, layers, batches).items():
            layer = layers[path]
            best = {layer.names[i] for i in weights.topk(min(keep, len(weights))).indices.tolist()}
            for part in [part for part in layer.names if part not in best]:
                host.unwrap(f"{name}/{part}", layer.site)
                layer.drop(part)
        return {path: tuple(layer.names) for path, layer in layers.items()}

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """Factor · Σ over places of ‖I − W_v‖²."""
        if not self.regularisation:
            return None
        values = [adapter.value for adapter in host.adapters(name).values() if isinstance(adapter, Fusing)]
        off = [(torch.eye(len(v), dtype=v.dtype, device=v.device) - v).square().sum() for v in values]
        return self.regularisation * torch.stack(off).sum()


class Fusing(Adapter):
    """The attention over the parts at one place; it adds where they would.

    Attributes:
        names: of the parts, in order.
        seen: their weights `[..., N]` in every call, while somebody collects them.
    """

    not_linear: ClassVar[str] = Projections.not_linear
    tokenwise: ClassVar[bool | None] = True

    def __init__(self, method: AdapterFusion, site: Site, parts: Mapping[str, Projections]):
        super().__init__(site)
        self.names = list(parts)
        for part, adapter in parts.items():
            self.refer(f"part-{part}", adapter)
        width = len(self.parts[0].weights()[2])
        self.seen: list[Tensor] | None = None
        self.query, self.query_bias = site.parameter(width, width), site.parameter(width)
        self.key, self.key_bias = site.parameter(width, width), site.parameter(width)
        self.value = site.parameter(width, width)
        self.p = method.dropout
        with torch.no_grad():
            nn.init.normal_(self.query, std=0.02)
            nn.init.normal_(self.key, std=0.02)
            self.value.fill_(1e-6).fill_diagonal_(1.0)

    @property
    def parts(self) -> list[Any]:
        """The adapters that are mixed, in order."""
        return [self.__dict__[f"part-{part}"] for part in self.names]

    def drop(self, part: str) -> None:
        """Mix without one of the adapters from now on."""
        self.names = [name for name in self.names if name != part]
        del self.__dict__[f"part-{part}"]

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what an adapter of the parts' kind does, with the mixture for its share."""
        found: Any = type(self.parts[-1]).around(self, run, *args, **kwargs)  # type: ignore[arg-type]
        return found

    def share(self, h: Tensor) -> Tensor:
        """Σ_n a_n W_v z_n for what the parts read, `[..., d]`."""
        z = torch.stack([part.share(h) for part in self.parts], -2).to(self.dtype)
        q = F.linear(h.to(self.dtype), self.query, self.query_bias)
        k = F.linear(z, self.key, self.key_bias)
        return self.mixed(self.weights(q, k), F.linear(z, self.value)).to(h.dtype)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax over the parts of q · k_n: `[..., N]`."""
        scores = F.dropout((k @ q[..., None])[..., 0], self.p, self.training)
        found = torch.softmax(scores.float(), -1)
        if self.seen is not None:
            self.seen.append(found)
        return found.to(q.dtype)

    def mixed(self, weights: Tensor, values: Tensor) -> Tensor:
        """Σ_n a_n v_n."""
        return (weights[..., None] * values).sum(-2)


def mean_weights(host: Carrier, layers: Mapping[str, Fusing], batches: Batches) -> dict[str, Tensor]:
    """Return the mean weight of each part `[N]` over the real tokens of some batches, by path.

    Raises:
        DataError: there are no batches.
    """
    sums: dict[str, Tensor] = {}
    with evaluating(host.model):
        for batch in batches:
            for layer in layers.values():
                layer.seen = []
            host.model(**batch)
            for path, layer in layers.items():
                for weights in layer.seen or ():
                    real = batch.get("attention_mask")
                    if real is not None and real.shape == weights.shape[:-1]:
                        weights = weights[real.bool()]
                    sums[path] = sums.get(path, torch.zeros(())).to(weights.device) + weights.flatten(0, -2).sum(0)
                layer.seen = None
    if not sums:
        raise DataError("No batch went through the adapters, so nothing says which of them count. Pass some.")
    return {path: total / total.sum() for path, total in sums.items()}


def _check(held: Mapping[str, Mapping[str, Adapter]]) -> None:
    (first, wanted), *others = held.items()
    for part, adapters in held.items():
        kinds = {path: type(adapter) for path, adapter in adapters.items()}
        wrong = [path for path, kind in kinds.items() if not issubclass(kind, (After, AroundNorm))]
        if wrong or not kinds:
            what = f"a {kinds[wrong[0]].__qualname__} at {wrong[0]}" if wrong else "nothing around a module"
            raise AttachError(
                f"{part!r} has {what}: fusion mixes what bottleneck adapters add behind a sublayer. Name adapters "
                "of that kind; mixtures of low-rank adapters have methods of their own."
            )
    for part, adapters in others:
        if adapters.keys() != wanted.keys() or any(type(adapters[p]) is not type(wanted[p]) for p in wanted):
            apart = sorted(adapters.keys() ^ wanted.keys())[:3] or ["with another form"]
            raise AttachError(
                f"{first!r} and {part!r} stand at different modules ({', '.join(apart)}), and fusion mixes adapters "
                "module by module. Train both with the same targets."
            )


def _read(host: Carrier, options: Options, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a fusion of AdapterHub's; its dropout is the attention's where it says none."""
    adapters: dict[str, Any] = {}
    for part, own in options["adapters"].items():
        method = find_method(own)
        assert method.hub is not None
        adapters[part] = {"name": method.id, **method.hub.settings(host, own, _of_part(part, tensors))}
    return {
        "adapters": adapters,
        "dropout": options.get("dropout_prob") or _usual_dropout(host),
        "regularisation": _PENALTY if options.get("regularization", True) else 0.0,
    }


def _outward(host: Carrier, key: str, method: AdapterFusion) -> tuple[dict[str, Any], dict[str, Tensor]]:
    adapters, tensors = {}, {}
    layers = [layer for layer in host.adapters(key).values() if isinstance(layer, Fusing)]
    if any(len(layer.names) < len(method.adapters) for layer in layers):
        raise FormatError("AdapterHub fuses all adapters at every place, and this fusion is pruned. Keep our own form.")
    for part in method.adapters:
        inner = method_of(host, f"{key}/{part}")
        if inner.hub is None or "hub" not in vars(type(inner)):
            raise FormatError(f"AdapterHub's library has no {inner.id}, which is fused here as {part!r}.")
        options, found = inner.hub.outward(host, f"{key}/{part}", inner)
        adapters[part] = {**inner.hub.written(inner), **options}
        tensors.update({theirs.replace(_ADAPTERS, f"{_ADAPTERS}{part}."): value for theirs, value in found.items()})
    own = host.tensors(key)
    tensors.update({theirs: own[ours] for ours, theirs in _mixing(host, key).items()})
    dropout = None if method.dropout == _usual_dropout(host) else method.dropout
    return {**fuse(adapters), "regularization": bool(method.regularisation), "dropout_prob": dropout}, tensors


def _inward(host: Carrier, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {ours: taken(tensors, theirs) for ours, theirs in _mixing(host, key).items()}
    for part in method_of(host, key).adapters:
        inner, own = method_of(host, f"{key}/{part}"), _of_part(part, tensors)
        for theirs in own:
            del tensors[theirs.replace(_ADAPTERS, f"{_ADAPTERS}{part}.")]
        found.update({f"{part}/{ours}": value for ours, value in inner.hub.inward(host, f"{key}/{part}", own).items()})
        tensors.update(own)  # what the part did not take
    return found


def _of_part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of the adapters, without its name."""
    within = f"{_ADAPTERS}{part}."
    return {key.replace(within, _ADAPTERS): value for key, value in tensors.items() if within in key}


def _mixing(host: Carrier, key: str) -> dict[str, str]:
    """The library's names of the tensors that mix, by ours."""
    found = {}
    for path, adapter in host.adapters(key).items():
        stem = f"{_hub.place(host, adapter.site).removesuffix('adapters')}adapter_fusion_layer"
        for ours in adapter.state_dict():
            leaf = ours.replace("_bias", ".bias") if ours.endswith("_bias") else f"{ours}.weight"
            found[f"adapter.{path}.{ours}"] = f"{stem}.{leaf}"
    return found


def _usual_dropout(host: Carrier) -> float:
    return float(getattr(config_of(host.model), "attention_probs_dropout_prob", 0.0))

"""Attention over the outputs of several trained adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.errors import AttachError
from adapterlab.methods.bottleneck._bottleneck import After, AroundNorm, Projections
from adapterlab.methods.bottleneck.adapter_pfeiffer import AdapterPfeiffer
from adapterlab.methods.mixture._saved_adapters import Entry, compose, compose_saved
from adapterlab.registry import register

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

    Inference: not mergeable; all N adapters run at every place, and three products `[d, d]`.

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
    regularisation: float = Field(0.01, ge=0, description="factor of the penalty that keeps W_v near the identity")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the scores, before the softmax")

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
        self._fuse(host, name)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        compose_saved(host, name, self, self.adapters, tensors)
        self._fuse(host, name)

    def _fuse(self, host: Carrier, name: str) -> None:
        held = {part: host.adapters(f"{name}/{part}") for part in self.adapters}
        _check(held)
        for path in next(iter(held.values())):
            parts = [held[part][path] for part in self.adapters]
            for part in parts:
                part.place = _FUSED
                part.requires_grad_(False)
            host.wrap(name, parts[0].site, Fusing(self, parts[0].site, parts))  # type: ignore[arg-type]

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """Factor · Σ over places of ‖I − W_v‖²."""
        if not self.regularisation:
            return None
        values = [adapter.value for adapter in host.adapters(name).values() if isinstance(adapter, Fusing)]
        off = [(torch.eye(len(v), dtype=v.dtype, device=v.device) - v).square().sum() for v in values]
        return self.regularisation * torch.stack(off).sum()


class Fusing(Adapter):
    """The attention over the parts at one place; it adds where they would."""

    not_linear: ClassVar[str] = Projections.not_linear
    tokenwise: ClassVar[bool | None] = True

    def __init__(self, method: AdapterFusion, site: Site, parts: Sequence[Projections]):
        super().__init__(site)
        width = parts[0].up.shape[0]
        self.names = [f"part{i}" for i in range(len(parts))]
        for key, part in zip(self.names, parts, strict=True):
            self.refer(key, part)
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
        return [self.__dict__[key] for key in self.names]

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
        return torch.softmax(scores.float(), -1).to(q.dtype)

    def mixed(self, weights: Tensor, values: Tensor) -> Tensor:
        """Σ_n a_n v_n."""
        return (weights[..., None] * values).sum(-2)


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

"""Which fast paths a run takes, which not, and why: for the table before training and for run.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterlab.data.batching import PackingCollator
from adapterlab.engine.attention import uses_interface
from adapterlab.engine.float_products import FloatProducts, fast_products
from adapterlab.engine.fusion import why_apart
from adapterlab.engine.norms import HALF, rms_norms
from adapterlab.engine.wrapping import adapters_of
from adapterlab.foreign.model import base_modules, is_encoder_decoder, plain_class
from adapterlab.foreign.private_transformers import attention_implementation
from adapterlab.hosts import Host

if TYPE_CHECKING:
    from adapterlab.train.loop import Loop


@dataclass(frozen=True)
class FastPath:
    """One way to save time or memory.

    Attributes:
        name: of the way.
        on: whether the run takes it everywhere.
        why: what it does, or what stands against it.
    """

    name: str
    on: bool
    why: str

    def __str__(self) -> str:
        return f"{'✓' if self.on else '✗'} {self.name}: {self.why}"


def fast_paths(loop: Loop) -> list[FastPath]:
    """Return the fast paths of a run that is ready to start."""
    training = loop.training
    how = {
        "none": "everything is kept",
        "cheap": "products and attention are kept",
        "full": "inputs of blocks are kept",
    }
    return [
        _fused(loop.host, loop.name, autocast=loop.accelerator.mixed_precision != "no"),
        FastPath("loss", loop.loss.path != "model", f"{loop.loss.path}, {loop.loss.why}"),
        _attention(loop.host.model),
        *_norms(loop.host.model),
        FastPath("packing", isinstance(loop.collate, PackingCollator), loop.batching),
        FastPath("recomputation", training.recompute != "none", f"{training.recompute}, {how[training.recompute]}"),
        FastPath("offload", training.offload, "activations wait on the " + ("CPU" if training.offload else "device")),
        _optimizer(loop._raw),
        _lowest(loop.host, loop.name),
        *_products(loop.host.model),
    ]


def _fused(host: Host, name: str, *, autocast: bool) -> FastPath:
    """How many adapters compute one node together with the module they stand around."""
    reasons: Counter[str] = Counter()
    for key in host.parts(name):
        for path, adapter in host.adapters(key).items():
            if adapter.resident or adapter.place != "call":
                continue
            live = [n for n in adapters_of(host.module(path)) if n in host.state.active]
            before = live[: live.index(key)] if key in live else []
            reason = f"{before[-1]!r} stands between" if before else why_apart(adapter)
            reasons[reason or ("autocast changes dtypes" if autocast else "")] += 1
    fused, total = reasons.pop("", 0), reasons.total()
    if not fused + total:
        return FastPath("fused products", False, "nothing stands around a module")
    against = "".join(f"; {count}: {reason}" for reason, count in reasons.most_common())
    return FastPath("fused products", not total, f"{fused} of {fused + total} modules{against}")


def _attention(model: Any) -> FastPath:
    """Whether attention may be computed by this package's kernel."""
    name = attention_implementation(model)
    if not any(uses_interface(plain_class(module)) for module in model.modules()):
        return FastPath("attention", False, f"{type(model).__name__} computes it in its own way")
    device = next(model.parameters()).device.type
    if name != "sdpa" or device != "cpu":
        return FastPath("attention", name != "eager", f"{name} on {device}")
    return FastPath("attention", True, "one kernel for batches without a mask and large enough, else sdpa")


def _norms(model: Any) -> list[FastPath]:
    """How many norms keep nothing but their input; there is nothing to save in float32."""
    lean = [m for m in rms_norms(model) if m.weight.dtype in HALF and not m.weight.requires_grad]  # type: ignore[union-attr]
    return [FastPath("norms", True, f"{len(lean)} keep their input alone")] if lean else []


def _products(model: Any) -> list[FastPath]:
    """In what products are computed; nothing to say where it is the weights' precision."""
    if not isinstance(fast_products(model), FloatProducts):
        return []
    return [FastPath("products", True, "in float32, as the processor has no instructions for half precision")]


def _optimizer(optimizer: Any) -> FastPath:
    name = type(optimizer).__name__
    for kind in ("fused", "foreach"):
        if all(group.get(kind) for group in optimizer.param_groups):
            return FastPath("optimizer", True, f"{name}, {kind}")
    return FastPath("optimizer", False, f"{name}, one tensor after the other")


def _lowest(host: Host, name: str) -> FastPath:
    """Where the backward pass can stop: below the lowest layer that holds something to train."""
    trained = [path for key in host.parts(name) for path in (*host.adapters(key), *host.patches[key])]
    if any(host.shared(key) for key in host.parts(name)) or is_encoder_decoder(host.model):
        return FastPath("gradient stops", False, "it may be needed down to the input")
    place = {path: i for i, (path, _) in enumerate(base_modules(host.model))}
    first = min((i for path, i in place.items() if host.layer_of(path)[0] is not None), default=0)
    layers = {path: host.layer_of(path) for path in trained}
    outside = [path for path, (stack, _) in layers.items() if stack is None]
    before = [path for path in outside if place.get(path, place.get(path.rpartition(".")[0], 0)) <= first]
    stacks = {stack for stack, _ in layers.values() if stack is not None}
    lowest = min((layer for _, layer in layers.values() if layer is not None), default=None)
    if before or lowest == 0 or len(stacks) > 1 or not trained:
        where = (before[0] or "the whole model") if before else "the first layer"
        return FastPath("gradient stops", False, f"it is needed down to {where}")
    return FastPath("gradient stops", True, f"below {outside[0]}" if lowest is None else f"below layer {lowest}")

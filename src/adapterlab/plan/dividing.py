"""One device of several: what it holds of a step, what it gathers for a while, what it sends.

The step is the one that was simulated for one device; here its moments are divided. What belongs to the device's own
rows (activations, loss, temporary tensors) stays; what belongs to the model is whole or a part:

| | weights | gradients | optimizer | beside | a device sends in a step |
|---|---|---|---|---|---|
| ddp | whole | whole | whole | buckets, as large as the gradients | 2 (N-1)/N · G |
| fsdp | 1/N | 1/N | 1/N | the layer that computes, and the next or last one | (N-1)/N · (2 W - R + G) |
| zero2 | whole | 1/N | 1/N, and float32 copies | a bucket | 2 (N-1)/N · G |
| zero3 | 1/N | 1/N | 1/N, and float32 copies | a bucket, weights that stay | (N-1)/N · (2 W + G) |

N devices, W bytes of all weights, R of those outside of the layers, which fsdp gathers once, G of the gradients:
those of what trains, and no others. Rings are assumed: an all-gather or reduce-scatter of X bytes sends (N-1)/N · X
from each device, an all-reduce both. Gradients travel once a step, weights with every batch of it.

Sources: PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (arXiv:2304.11277); ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models (arXiv:1910.02054). fsdp is torch's `fully_shard` on each layer
and on the model, ddp its `DistributedDataParallel`; the buckets and thresholds of zero2 and zero3 are DeepSpeed's
defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from adapterlab.errors import ConfigError
from adapterlab.plan.parallel import Parallel, Traffic
from adapterlab.plan.simulate import ACTIVATIONS, ADAPTER, BASE, CHECKS, GRADIENTS, STATE, UPDATE, Piece, Trace
from adapterlab.plan.tracker import KERNELS, Moment

GATHERED, BUCKETS = "gathered weights", "communication buffers"
FIRST, LAST = "gathering the first layer", "reducing what is in no layer"  # windows of fsdp alone
# DeepSpeed's defaults, in elements
_BUCKET = 500_000_000  # reduce_bucket_size, allocated whole
_LIVE = 1_000_000_000  # stage3_max_live_parameters
_SMALL = 100_000  # stage3_param_persistence_threshold
_FORWARD = "forward, layer 0"
_LAYER = re.compile(r"(forward|backward), layer (\d+)")


def divided(trace: Trace, parallel: Parallel, accumulation: int = 1) -> tuple[Trace, Traffic]:
    """Return what one of the devices does in the step that one device would do, and what it sends.

    Args:
        trace: of a step of one device with the rows of one.
        parallel: how it is divided.
        accumulation: batches of a step.

    Raises:
        ConfigError: the parameters cannot be divided in this way.
    """
    return _DIVISIONS[parallel.kind](trace, parallel.devices, accumulation).done(parallel)


class _Division:
    """Copies on every device, whose gradients are reduced in buckets (ddp); the others differ in some of it."""

    def __init__(self, trace: Trace, devices: int, accumulation: int):
        self.trace, self.devices, self.accumulation = trace, devices, accumulation
        self.pieces = [piece for group in trace.groups for piece in group]
        self.gradients = sum(piece.size for piece in self.pieces if piece.trained)
        self.saved = {
            part: sum(p.size - self.held(p) for p in self.pieces if p.part == part) for part in (BASE, ADAPTER)
        }
        held = sum(self.held_gradient(piece) for piece in self.pieces if piece.trained)
        self.share = held / self.gradients if self.gradients else 1.0  # of what trains

    def done(self, parallel: Parallel) -> tuple[Trace, Traffic]:
        """Put the divided step and its traffic together."""
        moments = {window: self._moment(window, moment.parts) for window, moment in self.trace.moments.items()}
        moments |= self.ends(moments)
        resting = _counted(self.at_rest(self.weights(self.trace.resting)))
        base = self.trace.base - self.saved[BASE]
        gathered, reduced = self.volumes()
        ring, link = (self.devices - 1) / self.devices, parallel.link
        seconds = ring * (gathered + reduced) / link.rate if link else None
        traffic = Traffic(round(ring * gathered), round(ring * reduced), link.name if link else None, seconds)
        return replace(self.trace, moments=moments, resting=resting, base=base), traffic

    def _moment(self, window: str, parts: Mapping[str, int]) -> Moment:
        held = self.weights(parts)
        found = _counted(self.at_rest(held) if window in (CHECKS, UPDATE) else self.at_work(window, held))
        return Moment(sum(found.values()), found)

    def weights(self, parts: Mapping[str, int]) -> dict[str, float]:
        """Take away what other devices hold of the weights."""
        return {**parts, **{part: parts.get(part, 0) - saved for part, saved in self.saved.items()}}

    # ------------------------------------------------------------------ what kinds differ in

    def held(self, piece: Piece) -> int:
        """Bytes that a device keeps of a parameter."""
        return piece.size

    def held_gradient(self, piece: Piece) -> int:
        """Bytes that a device keeps of the parameter's gradient, and of each number of the optimizer beside it."""
        return piece.size

    def at_work(self, window: str, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of a window of the forward or backward pass."""
        return {**parts, BUCKETS: self.gradients}  # they are made before the first step, and stay

    def at_rest(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of windows after the backward pass, and of the time between steps."""
        return {**parts, BUCKETS: self.gradients}

    def ends(self, moments: Mapping[str, Moment]) -> dict[str, Moment]:
        """Return windows that one device does not have."""
        return {}

    def volumes(self) -> tuple[float, float]:
        """Return bytes of weights that are gathered, and of gradients that are reduced, in a step."""
        return 0, 2 * self.gradients


def _counted(parts: Mapping[str, float]) -> dict[str, int]:
    return {part: round(size) for part, size in parts.items() if round(size) > 0}


class _Rows(_Division):
    """The rows of every parameter are dealt out; a layer's are put together while it computes (fsdp)."""

    def __init__(self, trace: Trace, devices: int, accumulation: int):
        _check_groups(trace)
        super().__init__(trace, devices, accumulation)
        *self.layers, self.root = (sum(self.held(p) for p in group) * devices for group in trace.groups)
        *self.trained, self.rooted = (sum(p.size for p in group if p.trained) for group in trace.groups)

    def held(self, piece: Piece) -> int:
        """Bytes that a device keeps of a parameter: the first device has most."""
        return -(-piece.rows // self.devices) * (piece.size // piece.rows)

    held_gradient = held

    def at_work(self, window: str, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of a window of the forward or backward pass."""
        found = _LAYER.fullmatch(window)
        layer = int(found[2]) if found else None
        backward = found is not None and found[1] == "backward"
        whole = self.rooted + (self.trained[layer] if backward and layer is not None else 0)
        return {
            **parts,
            STATE: self.share * parts.get(STATE, 0),
            GRADIENTS: self._gradients(parts.get(GRADIENTS, 0), whole),
            GATHERED: self.root + self._beside(layer, backward),
            BUCKETS: self.trained[min(layer + 1, len(self.layers) - 1)] if backward and layer is not None else 0,
        }

    def _gradients(self, size: float, whole: int) -> float:
        """Gradients of layers that are done are in parts; those of the layer at work and of no layer are not yet."""
        if self.accumulation > 1:  # they are summed where they are until the last batch
            return size
        return min(size, whole) + self.share * max(0, size - whole)

    def _beside(self, layer: int | None, backward: bool) -> int:
        """Bytes gathered beside what is in no layer: a layer, and the flat tensor that it or the next one came in."""
        if layer is None:  # the last one's flat tensor
            return self.layers[-1]
        return self.layers[layer] + self.layers[max(0, layer - 1) if backward else layer]

    def at_rest(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of windows after the backward pass: all is in parts again."""
        return {**parts, **{name: self.share * parts.get(name, 0) for name in (GRADIENTS, STATE, UPDATE, CHECKS)}}

    def ends(self, moments: Mapping[str, Moment]) -> dict[str, Moment]:
        """Return the moments before the first layer computes, and in which what is in no layer is reduced."""
        first = {
            key: size
            for key, size in moments[_FORWARD].parts.items()
            if key not in (f"{ACTIVATIONS}, layer 0", KERNELS)
        }
        last = moments[CHECKS].parts
        found = {
            FIRST: {**first, GATHERED: 2 * self.root + self.layers[0]},
            LAST: {**last, GRADIENTS: last.get(GRADIENTS, 0) + self.rooted, BUCKETS: self.rooted},
        }
        return {window: Moment(sum(parts.values()), parts) for window, parts in found.items()}

    def volumes(self) -> tuple[float, float]:
        """Return bytes of weights that are gathered, and of gradients that are reduced, in a step."""
        reached = [int(m[2]) for w in self.trace.moments if (m := _LAYER.fullmatch(w)) and m[1] == "backward"]
        again = sum(self.layers[min(reached, default=0) :])
        return self.accumulation * (sum(self.layers) + self.root + again), self.gradients


def _check_groups(trace: Trace) -> None:
    """Refuse what torch's `fully_shard` refuses."""
    for group in trace.groups:
        if any(not piece.rows for piece in group):
            raise ConfigError(
                "parallel='fsdp' deals out the rows of tensors, and a parameter of this model or method is a single "
                "number. Use ddp."
            )
        if len(types := sorted({piece.dtype for piece in group if piece.trained})) > 1:
            raise ConfigError(
                f"parallel='fsdp' reduces the gradients of a layer in one tensor, and those here are in "
                f"{' and '.join(types)}. Use ddp, or precision fp32."
            )


class _Flat(_Division):
    """The optimizer's numbers and the gradients are dealt out as one flat tensor (zero2)."""

    def held_gradient(self, piece: Piece) -> int:
        """Bytes that a device keeps of the parameter's gradient, and of each number of the optimizer beside it."""
        return -(-piece.size // self.devices)

    @property
    def bucket(self) -> int:
        """Bytes of the tensor in which gradients are reduced; it is made whole, however little comes into it."""
        return _BUCKET * max((piece.size // piece.numel for piece in self.pieces if piece.trained), default=0)

    @property
    def copies(self) -> int:
        """Bytes of the optimizer's own float32 copies, where it has none already."""
        return sum(-(-4 * p.numel // self.devices) for p in self.pieces if p.trained and p.dtype == "float32")

    def at_work(self, window: str, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of a window of the forward or backward pass."""
        arrived = parts.get(GRADIENTS, 0)
        return {**self.at_rest(parts), BUCKETS: self.bucket if arrived or window.startswith("backward") else 0}

    def at_rest(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of windows after the backward pass, and of the time between steps."""
        shared = {name: self.share * parts.get(name, 0) for name in (GRADIENTS, UPDATE, CHECKS)}
        return {**parts, **shared, STATE: self.share * parts.get(STATE, 0) + self.copies}


class _FlatWeights(_Flat):
    """The weights are dealt out too, but for small ones; some stay gathered (zero3)."""

    def held(self, piece: Piece) -> int:
        """Bytes that a device keeps of a parameter."""
        return piece.size if piece.numel < _SMALL else -(-piece.size // self.devices)

    def at_work(self, window: str, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of a window of the forward or backward pass."""
        dealt = [[p for p in group if p.numel >= _SMALL] for group in self.trace.groups]
        most = max((sum(p.size for p in group) for group in dealt), default=0)
        everything = [piece for group in dealt for piece in group]
        live = _LIVE * max((p.size // p.numel for p in everything), default=0)
        gathered = min(sum(p.size for p in everything), max(live, 2 * most))
        return {**super().at_work(window, parts), GATHERED: gathered}

    def volumes(self) -> tuple[float, float]:
        """Return bytes of weights that are gathered, and of gradients that are reduced, in a step."""
        dealt = sum(piece.size for piece in self.pieces if piece.numel >= _SMALL)
        stays = sum(piece.size for piece in self.pieces if piece.trained and piece.numel < _SMALL)
        return 2 * self.accumulation * dealt, self.gradients + stays


_DIVISIONS: dict[str, Callable[[Trace, int, int], _Division]] = {
    "ddp": _Division, "fsdp": _Rows, "zero2": _Flat, "zero3": _FlatWeights,
}  # fmt: skip

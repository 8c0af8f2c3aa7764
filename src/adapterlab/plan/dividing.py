"""One device of several: what it holds of a step, what it gathers for a while, what it sends.

The step is the one that was simulated for one device; here its moments are divided as `train.parallel` divides them.
What belongs to the device's own rows (activations, loss, temporary tensors) stays, and so does what a method adds:
parameters, gradients, moments. What belongs to the base is whole or a part:

| | base, its gradients and moments | beside | a device sends in a step |
|---|---|---|---|
| ddp | whole | a piece of gradients that are summed | 2 (N-1)/N · (A + G) |
| fsdp, zero3 | 1/N | the layer at work, and the next or last one; the same piece | (N-1)/N · (2 W - R + G + 2 A) |
| zero2 | 1/N | all layers from their forward to their backward pass; the same piece | (N-1)/N · (W + G + 2 A) |

N devices, W bytes of the base, R of what of it is outside of the layers, which is gathered once, G of the gradients of
what of it trains, A of the gradients of what is added. Rings are assumed: an all-gather or reduce-scatter of X bytes
sends (N-1)/N · X from each device, an all-reduce both. W and G count once for every batch of a step: FSDP2 deals
gradients out in each backward pass, in float32 where the base is in half precision, and adds them up in parts; to sum
them whole first would send less and hold all of them. A is sent once a step, when the last backward pass is over, with
nothing to compute meanwhile: the pieces are `train.parallel.flat`'s. The same holds of G with ddp.

Sources: PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (arXiv:2304.11277); ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models (arXiv:1910.02054).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from adapterlab.errors import ConfigError
from adapterlab.plan.parallel import Parallel, Traffic
from adapterlab.plan.simulate import ACTIVATIONS, ADAPTER, BASE, CHECKS, GRADIENTS, INPUT, STATE, UPDATE, Piece, Trace
from adapterlab.plan.tracker import KERNELS, Moment
from adapterlab.train.parallel.flat import buckets

GATHERED, BUCKETS = "gathered weights", "communication buffers"
FIRST, LAST = "gathering the first layer", "reducing what is in no layer"  # windows of split bases alone
SUMMED = "summing gradients"  # a window of several processes alone
_WIDE = 4  # bytes of the numbers in which gradients are dealt out, at least
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
    """Copies on every device, whose gradients are summed in pieces (ddp); the others differ in some of it."""

    def __init__(self, trace: Trace, devices: int, accumulation: int):
        self.trace, self.devices, self.accumulation = trace, devices, accumulation
        self.pieces = [piece for group in trace.groups for piece in group]
        self.gradients = sum(piece.size for piece in self.pieces if piece.trained)
        self.saved = {
            part: sum(self._saved(p, p.size) for p in self.pieces if p.part == part) for part in (BASE, ADAPTER)
        }
        self.saved[ADAPTER] += sum(self._saved(p, p.original) for p in self.pieces)
        self.saved[STATE] = sum(self._saved(p, p.moments) for p in self.pieces)
        self.split = sum(p.size for p in self.pieces if p.trained and self.splits(p))  # of the gradients
        held = sum(p.size - self._saved(p, p.size) for p in self.pieces if p.trained and self.splits(p))
        self.part = held / self.split if self.split else 1.0

    def _saved(self, piece: Piece, size: int) -> int:
        """Bytes that other devices have of a tensor in a parameter's shape: the first device has most rows."""
        if not self.splits(piece):
            return 0
        return size - -(-piece.rows // self.devices) * (size // piece.rows)

    def done(self, parallel: Parallel) -> tuple[Trace, Traffic]:
        """Put the divided step and its traffic together."""
        moments = {window: self._moment(window, moment.parts) for window, moment in self.trace.moments.items()}
        moments |= self.ends(moments)
        resting = _counted(self.at_rest(self.held(self.trace.resting)))
        base = self.trace.base - self.saved[BASE]
        gathered, dealt, summed = self.volumes()
        ring, link = (self.devices - 1) / self.devices, parallel.link
        waited = round(ring * 2 * summed)
        seconds = ring * (gathered + dealt + 2 * summed) / link.rate if link else None
        traffic = Traffic(
            round(ring * gathered), round(ring * dealt) + waited, link.name if link else None, seconds, waited
        )
        return replace(self.trace, moments=moments, resting=resting, base=base), traffic

    def _moment(self, window: str, parts: Mapping[str, int]) -> Moment:
        held = self.held(parts)
        found = _counted(self.at_rest(held) if window in (CHECKS, UPDATE) else self.at_work(window, held))
        return Moment(sum(found.values()), found)

    def held(self, parts: Mapping[str, int]) -> dict[str, float]:
        """Take away what other devices hold of what is there all the time."""
        return {**parts, **{part: max(0, parts.get(part, 0) - saved) for part, saved in self.saved.items()}}

    def ends(self, moments: Mapping[str, Moment]) -> dict[str, Moment]:
        """Return windows that one device does not have: the one in which gradients are summed."""
        if CHECKS not in moments:
            return {}
        parts = {key: size for key, size in moments[CHECKS].parts.items() if key != CHECKS}
        parts |= _counted({BUCKETS: _largest(p for p in self.pieces if p.trained and not self.splits(p))})
        return {SUMMED: Moment(sum(parts.values()), parts)}

    # ------------------------------------------------------------------ what kinds differ in

    def splits(self, piece: Piece) -> bool:
        """Say whether the rows of a parameter are dealt out."""
        return False

    def at_work(self, window: str, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of a window of the forward or backward pass."""
        return {**parts}

    def at_rest(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of windows after the backward pass, and of the time between steps."""
        return {**parts}

    def volumes(self) -> tuple[float, float, float]:
        """Return bytes of weights that are gathered in a step, and of gradients that are dealt out and summed."""
        return 0, 0, self.gradients


def _counted(parts: Mapping[str, float]) -> dict[str, int]:
    return {part: round(size) for part, size in parts.items() if round(size) > 0}


def _largest(pieces: Iterable[Piece]) -> int:
    """Bytes of the largest tensor into which gradients are copied to be summed; one that is alone is not copied."""
    like = [torch.empty(p.numel, dtype=getattr(torch, p.dtype), device="meta") for p in pieces]
    return max((sum(like[i].nbytes for i in chosen) for chosen in buckets(like) if len(chosen) > 1), default=0)


class _Rows(_Division):
    """The rows of the base are dealt out; a layer's are put together while it computes (fsdp, zero3)."""

    def __init__(self, trace: Trace, devices: int, accumulation: int):
        _check_groups(trace)
        super().__init__(trace, devices, accumulation)
        *self.layers, self.root = (
            sum((p.size - self._saved(p, p.size)) * devices for p in group if not p.added) for group in trace.groups
        )
        *self.trained, self.rooted = (sum(p.size for p in _dealt(group)) for group in trace.groups)
        halves = any("16" in p.dtype for p in self.pieces if not p.added)
        dealt = [p for group in trace.groups for p in _dealt(group)]
        wide = sum(p.numel * _WIDE if halves else p.size for p in dealt)
        self.wider = wide / self.split if self.split else 1.0  # gradients on their way

    def splits(self, piece: Piece) -> bool:
        """Say whether the rows of a parameter are dealt out: those of the base."""
        return not piece.added

    def at_work(self, window: str, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of a window of the forward or backward pass."""
        found = _LAYER.fullmatch(window)
        layer = int(found[2]) if found else None
        backward = found is not None and found[1] == "backward"
        above = self.trained[min(layer + 1, len(self.layers) - 1)] if backward and layer is not None else 0
        forward = window == INPUT or (found is not None and not backward)
        whole = 0 if forward else self.rooted + (self.trained[layer] if layer is not None else 0)
        return {
            **parts,
            GRADIENTS: self._gradients(parts.get(GRADIENTS, 0), whole),
            GATHERED: self.root + self.beside(layer, backward),
            BUCKETS: self.wider * above,
        }

    def _gradients(self, size: float, whole: int) -> float:
        """Gradients of layers that are done are in parts; those of the layer at work and of no layer are not yet.

        From the second batch on, the parts of the batches before are there too.
        """
        base = size * self.split / self.gradients if self.gradients else 0.0
        mine = (
            self.part * base + whole if self.accumulation > 1 else min(base, whole) + self.part * max(0, base - whole)
        )
        return size - base + (mine if base else 0)

    def beside(self, layer: int | None, backward: bool) -> int:
        """Bytes gathered beside what is in no layer: a layer, and the flat tensor that it or the next one came in."""
        if layer is None:  # the last one's flat tensor
            return self.layers[-1]
        return self.layers[layer] + self.layers[max(0, layer - 1) if backward else layer]

    def at_rest(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Change the parts of windows after the backward pass: all of the base is in parts again."""
        share = 1 - (1 - self.part) * self.split / self.gradients if self.gradients else 1.0
        return {**parts, **{name: share * parts.get(name, 0) for name in (GRADIENTS, UPDATE, CHECKS)}}

    def ends(self, moments: Mapping[str, Moment]) -> dict[str, Moment]:
        """Return also the moments before the first layer computes, and in which what is in no layer is dealt out."""
        first = {
            key: size
            for key, size in moments[_FORWARD].parts.items()
            if key not in (f"{ACTIVATIONS}, layer 0", KERNELS)
        }
        last = moments[CHECKS].parts
        found = {
            FIRST: {**first, GATHERED: 2 * self.root + self.layers[0]},
            LAST: {
                **last, GRADIENTS: last.get(GRADIENTS, 0) + self.rooted, BUCKETS: round(self.wider * self.rooted)
            },
        }  # fmt: skip
        return super().ends(moments) | {window: Moment(sum(parts.values()), parts) for window, parts in found.items()}

    def volumes(self) -> tuple[float, float, float]:
        """Return bytes of weights that are gathered in a step, and of gradients that are dealt out and summed."""
        gathered = sum(self.layers) + self.root + self.again()
        dealt = self.wider * self.split
        return self.accumulation * gathered, self.accumulation * dealt, self.gradients - self.split

    def again(self) -> int:
        """Bytes of the layers that are gathered once more in a backward pass: those that it comes to."""
        reached = [int(m[2]) for w in self.trace.moments if (m := _LAYER.fullmatch(w)) and m[1] == "backward"]
        return sum(self.layers[min(reached, default=0) :])


class _Kept(_Rows):
    """The same, but a layer that was put together stays so until its backward pass is over (zero2)."""

    def beside(self, layer: int | None, backward: bool) -> int:
        """Bytes gathered beside what is in no layer: the layers so far, and the flat tensor that the last came in."""
        last = len(self.layers) - 1 if layer is None else layer
        return sum(self.layers[: last + 1]) + (0 if backward else self.layers[last])

    def again(self) -> int:
        """None: they are there."""
        return 0


def _dealt(group: Iterable[Piece]) -> list[Piece]:
    """The parameters of the base that train."""
    return [piece for piece in group if piece.trained and not piece.added]


def _check_groups(trace: Trace) -> None:
    """Refuse of the base what torch's `fully_shard` refuses."""
    for group in trace.groups:
        if any(not piece.rows for piece in group if not piece.added):
            raise ConfigError(
                "parallel='fsdp' deals out the rows of tensors, and a parameter of this model is a single number. Use "
                "ddp."
            )
        if len(types := sorted({piece.dtype for piece in _dealt(group)})) > 1:
            raise ConfigError(
                f"parallel='fsdp' reduces the gradients of a layer in one tensor, and those here are in "
                f"{' and '.join(types)}. Use ddp, or precision fp32."
            )


_DIVISIONS: dict[str, Callable[[Trace, int, int], _Division]] = {
    "ddp": _Division, "fsdp": _Rows, "zero2": _Kept, "zero3": _Rows,
}  # fmt: skip

"""Whether the micro-batches of a run can be in one pass with those of others, and why not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.data.batching import PackingCollator, joined, placed
from adapterlab.engine.modes import draws, evaluating
from adapterlab.engine.packing import made_up
from adapterlab.foreign.model import output_head
from adapterlab.foreign.quantized import is_plain
from adapterlab.train.loop import Loop

LEAST = 32  # rows of a product from which on its bits may be asked to depend on no other row
_BESIDE, _OWN = 9, 12  # tokens of the rows of a trial


def own_passes(loop: Loop) -> str:
    """Return why a run needs forward and backward passes of its own, or "".

    What its method says is asked first; the rest is tried: a row of the run beside one of the plain base must have the
    hidden states that it has by itself. Its adapter must be the live one, and the model in training mode.
    """
    if type(loop.method).overrides("gradient"):
        return f"{loop.method.id} computes gradients in its own way"
    if loop.accelerator.scaler is not None:
        return "fp16 finds a scale for the loss of each run"
    if not isinstance(loop.collate, PackingCollator):
        return loop.batching
    if loop.loss.path == "model":
        return f"the model computes its own loss: {loop.loss.why}"
    if _base_draws(loop):
        return "the model has dropout of its own, which would draw for all runs at once"
    return _fault(loop)


def _rows(loop: Loop) -> list[dict[str, Tensor]]:
    """A batch of one row for the base, and another for the run."""
    ids = [made_up(loop.host.model, size, shift) for shift, size in ((1, _BESIDE), (2, _OWN))]
    return [placed(PackingCollator()([{"input_ids": row, "labels": row}]), loop.device) for row in ids]


@torch.no_grad()
def _base_draws(loop: Loop) -> bool:
    """Say whether the base alone takes random numbers in training."""
    with loop.host.using():
        return draws(lambda: loop.loss.hidden(_rows(loop)[0]))


def _fault(loop: Loop) -> str:
    """Try a pass for the run and the plain base; say what goes wrong."""
    host, batches = loop.host, _rows(loop)
    try:
        with evaluating(host.model):
            own = loop.loss.hidden(batches[1])
            with host.using():
                beside = loop.loss.hidden(batches[0])
            with host.tokens([(None, _BESIDE), (loop.name, _OWN)]):
                both = loop.loss.hidden(joined(batches)).split([_BESIDE, _OWN], 1)
    except Exception as error:  # foreign code that does not know such a batch may fail in any way
        return f"{type(error).__name__}: {error}"
    tolerance = 1e-3 if own.dtype in (torch.float32, torch.float64) else 2e-2
    for found, wanted in zip(both, (beside, own), strict=True):
        if not float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max()):
            return "its rows are computed otherwise beside those of others"
    return ""


@torch.no_grad()
def same_bits(model: nn.Module) -> bool:
    """Say whether a row of a product has the same bits whatever rows are beside it, from `LEAST` rows on.

    It depends on the processor, its library and the shapes; one weight of each shape below the head is tried, forwards
    and backwards.
    """
    head, draw = output_head(model), torch.Generator().manual_seed(0)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and is_plain(m.weight)]
    for weight in {m.weight.shape: m.weight for m in linear}.values():
        for factor in (weight, weight.T):
            x = torch.randn(5 * LEAST, factor.shape[1], generator=draw).to(weight)
            whole = F.linear(x, factor)
            for start, stop in ((0, LEAST), (LEAST, 3 * LEAST), (3 * LEAST, 5 * LEAST)):
                if not torch.equal(whole[start:stop], F.linear(x[start:stop], factor)):
                    return False
    return True

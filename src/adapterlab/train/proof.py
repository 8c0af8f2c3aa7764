"""Proof of training: what is about to be trained, and that every part of it really is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterlab.errors import NotTrainingError
from adapterlab.foreign.sharding import local
from adapterlab.hosts import Host
from adapterlab.optim import master

_SHOWN = 8
_PART = 1 << 20  # values that are looked at together
MOVED = ""  # the verdict on a tensor that trains
NO_GRADIENT, ZERO, NON_FINITE = "no gradient", "gradient zero everywhere", "gradient not finite"
UNCHANGED = "gradient fine, but the optimizer did not change the values"
_ADVICE = {
    NO_GRADIENT: "The model computes past them: a fused kernel, an unused part, code that reads weights directly, a "
    "detach or an outer no_grad. Exclude these modules, or load the model with another implementation.",
    ZERO: "Nothing they compute reaches the loss: something multiplies it by zero or cuts it off, or the rows never "
    "use this part.",
    NON_FINITE: "Lower training.lr, or use precision bf16 or fp32.",
    UNCHANGED: "The learning rate is too small for their dtype (or zero), or the optimizer was not given them.",
}


class Proof:
    """Watches the first steps: a tensor is proven when one step gave it a finite, non-zero gradient and moved it.

    One entry is enough, as in an embedding. A tensor has `within` steps, because some start with a gradient of zero
    (the first factor of a product whose second is zero). Steps in which it is frozen do not count.

    Attributes:
        proven: keys of the tensors that train.
        steps: number of steps watched.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        within: int,
        gathered: Callable[[dict[str, str]], list[dict[str, str]]] | None = None,
    ):
        """Set what is watched.

        Args:
            host: of the model.
            name: of the adapter.
            within: steps that a tensor has.
            gathered: the verdicts of all processes that see parts of the tensors, from those of this one.
        """
        self.host, self.name, self.within = host, name, within
        self._gathered = gathered or (lambda found: [found])
        self.proven: set[str] = set()
        self.steps = 0
        self.open = within > 0
        self._waited: Counter[str] = Counter()
        self._faults: dict[str, str] = {}
        self._watched: dict[str, nn.Parameter] = {}
        self._before: dict[str, int] = {}
        self._seen: set[str] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, optimizer: Optimizer) -> None:
        """Look at the values before a step."""
        if not self.open:
            return
        parameters = self.host.named_parameters(self.name)
        self._watched = {key: p for key, p in parameters.items() if key not in self.proven}
        self._before = {key: _fingerprint(master(optimizer, p)) for key, p in self._watched.items()}
        self._seen = set()
        # An optimizer that updates during the backward pass leaves no gradient behind: see it when it arrives.
        self._hooks = [p.register_hook(self._sees(key)) for key, p in self._watched.items()]

    def gradients(self) -> None:
        """Look at the gradients when they are complete."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._faults = {key: self._verdict(key, p) for key, p in self._watched.items()} if self.open else {}

    def end(self, optimizer: Optimizer) -> None:
        """Look at the values after a step.

        Raises:
            NotTrainingError: a tensor has waited too long.
        """
        if not self.open:
            return
        self.steps += 1
        for key, p in self._watched.items():
            if not self._faults[key] and _fingerprint(master(optimizer, p)) == self._before[key]:
                self._faults[key] = UNCHANGED
        self._faults = _agreed(self._gathered(self._faults))
        for key in self._watched:
            if self._faults[key]:
                self._waited[key] += 1
            else:
                self.proven.add(key)
        late = [key for key in self._watched if key not in self.proven and self._waited[key] >= self.within]
        if late:
            raise NotTrainingError(self._message(late, optimizer))
        waiting = any(key not in self.proven for key in self._watched)
        self.open = waiting or self.steps < self.within

    def close(self, optimizer: Optimizer) -> None:
        """End the watch of a run that was shorter than `within`.

        Raises:
            NotTrainingError: nothing at all has trained.
        """
        if self.open and self.steps and not self.proven and self._watched:
            raise NotTrainingError(self._message(list(self._watched), optimizer))

    def _sees(self, key: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not _fault(gradient):
                self._seen.add(key)

        return hook

    def _verdict(self, key: str, p: nn.Parameter) -> str:
        if p.grad is not None:
            return _fault(p.grad)
        return MOVED if key in self._seen else NO_GRADIENT

    def _message(self, keys: list[str], optimizer: Optimizer) -> str:
        rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
        total = len(self.proven | self._watched.keys())
        lines = [f"{len(keys)} of {total} trainable tensors did not train within {self.steps} steps:"]
        lines += [f"  {key}: {self._faults[key]}" for key in keys[:_SHOWN]]
        if len(keys) > _SHOWN:
            lines.append(f"  ... and {len(keys) - _SHOWN} more")
        lines += [_ADVICE[fault] for fault in dict.fromkeys(self._faults[key] for key in keys)]
        lines.append(
            f"The learning rate of the last step was {', '.join(f'{rate:g}' for rate in rates)}. If these parts are "
            "rightly used in few steps only, raise training.proof_steps."
        )
        return "\n".join(lines)


def _agreed(found: list[dict[str, str]]) -> dict[str, str]:
    """One verdict on each tensor, of verdicts on its parts: it trains where any part does, if all are finite."""
    order = (NON_FINITE, MOVED, UNCHANGED, ZERO, NO_GRADIENT)
    return {key: min((verdicts[key] for verdicts in found), key=order.index) for key in found[0]}


def _fault(gradient: Tensor) -> str:
    values = local(gradient)
    values = values.coalesce().values() if values.is_sparse else values
    if not bool(torch.isfinite(values).all()):
        return NON_FINITE
    return MOVED if bool(values.any()) else ZERO


@torch.no_grad()
def _fingerprint(values: Tensor) -> int:
    """A number made of the bits: it differs only if a value does, and no copy of the parameters is kept.

    A sum alone would not see that two values of one exponent moved by the same step in opposite directions, as the
    biases of a softmax over two do. Squares do; the shift gives some to the bits of half precision, which are all high.
    """
    values = local(values)
    wide = values if values.dtype is torch.float64 else values.float()
    bits = wide.contiguous().view(torch.int64 if wide.dtype is torch.float64 else torch.int32)
    total = bits.new_zeros((), dtype=torch.int64)
    for part in bits.flatten().split(_PART):
        mixed = part + (part >> 4 * part.itemsize)
        total += (mixed * mixed).sum(dtype=torch.int64) + part.sum(dtype=torch.int64)
    return int(total)

"""Which tokens of the current batch are no padding, for whoever counts them: statistics of routers, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterlab.errors import AttachError

Shape = tuple[int, ...]


@dataclass
class Tokens:
    """What the call of a model, or of a part such as its decoder, says about its tokens.

    Attributes:
        shape: `(rows, tokens)` of the hidden states; () where nobody says it.
        mask: makes a boolean of that shape, true at real tokens; None: all are real.
        asked: what the call wants logits of: the last so many positions, or these; 0: all.
        swaps: the model exchanges rows and tokens of something.
        memory: of the encoder, in a decoder.
        states: what the encoder returned `[rows, tokens, width]`.
    """

    shape: Shape
    mask: Callable[[], Tensor | None] | None = None
    asked: int | Tensor = 0
    swaps: bool = False
    memory: Tokens | None = None
    states: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """The boolean, or None: all are real."""
        return None if self.mask is None else self.mask()

    def of(self, x: Tensor) -> Tensor | None:
        """Say which tokens of a tensor `[..., width]` inside the call are real: a boolean `[...]`; None: all are.

        Raises:
            AttachError: some are not, and which of them are in x cannot be told.
        """
        if self.memory is not None and self.states is not None and _same(x, self.states):
            return self.memory.of(x)
        real, lead = self.real, tuple(x.shape[:-1])
        if self.swaps and lead == self.shape[::-1]:
            real = None if real is None else real.T
            return _told(real, x) if lead != self.shape else _sole(real, x)
        if lead == self.shape or self.memory is None or lead != self.memory.shape:
            return _told(self._asked(real, lead), x, flat=not self.swaps)
        return self.memory.of(x)

    def part(self, like: Tensor | None, index: slice | Tensor, by_token: bool = False) -> Part:
        """The same for some rows, or some tokens, of a tensor inside the call, see `Part`."""
        return Part(self, like, index, by_token)

    def _asked(self, real: Tensor | None, lead: Shape) -> Tensor | None:
        """What is real of the positions that the head sees."""
        if real is None or lead == self.shape or len(lead) != 2:
            return real
        if isinstance(self.asked, Tensor):
            return real[:, self.asked] if lead[1] == len(self.asked) else real
        return real[:, -self.asked :] if self.asked and lead[1] == self.asked else real


@dataclass
class Part:
    """Some rows of a call, or some tokens, in a batch whose parts have different adapters.

    Attributes:
        outer: what is known of all of them.
        like: what all of them were given.
        index: which entries of its first dimension these are, or which of its tokens, counted over all rows.
        by_token: they are tokens, and have become a single row.
    """

    outer: Tokens | Part
    like: Tensor | None
    index: slice | Tensor
    by_token: bool = False

    def of(self, x: Tensor) -> Tensor | None:
        """As `Tokens.of`."""
        if self.like is None:
            raise AttachError(_UNKNOWN.format(shape=list(x.shape)))
        real = self.outer.of(self.like)
        if real is None:
            return None
        index = self.index if isinstance(self.index, slice) else self.index.to(real.device)
        return _told(real.flatten()[index][None] if self.by_token else real[index], x)

    def part(self, like: Tensor | None, index: slice | Tensor, by_token: bool = False) -> Part:
        """As `Tokens.part`."""
        return Part(self, like, index, by_token)


_UNKNOWN = (
    "The batch has padding, and which of its tokens a module that gets {shape} sees cannot be told, so that what is "
    "counted there would be wrong. Leave the module out of the targets, or give rows of one length, without padding."
)


def _told(real: Tensor | None, x: Tensor, flat: bool = True) -> Tensor | None:
    """Bring the boolean into the leading shape of x: the same, flattened, or with heads behind it."""
    if real is None:
        return None
    real, lead = real.to(x.device), tuple(x.shape[:-1])
    shape = tuple(real.shape)
    if lead == shape:
        return real
    if flat and len(lead) == 1 and lead[0] == math.prod(shape):
        return real.flatten()
    if lead == shape[:1]:  # pooled: one vector for each row
        return None
    if len(lead) > len(shape) and lead[: len(shape)] == shape:
        return real[(...,) + (None,) * (len(lead) - len(shape))].expand(lead)
    return _sole(real, x)


def _sole(real: Tensor | None, x: Tensor) -> Tensor | None:
    """Whatever tokens these are: they are real where all are."""
    if real is not None and not bool(real.all()):
        raise AttachError(_UNKNOWN.format(shape=list(x.shape)))
    return None


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are one, as far as it can be seen."""
    if x is y or x.shape != y.shape:
        return x is y
    return not torch.compiler.is_compiling() and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()

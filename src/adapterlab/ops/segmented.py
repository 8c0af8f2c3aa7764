"""Low-rank updates of runs of tokens, added in place, with factors that are read where they lie.

    y[t] += s_i · f_i(x[t] A_iᵀ + d_i) B_iᵀ    for the tokens t of each run, whose update is i

Of LoRA, f is the identity and d zero; a bottleneck adapter has both.

A step of a server has one set of runs and hundreds of modules. What an adapter has at its modules is written down once,
as addresses; the lists of a step's adapters side by side are the table of the step; and a call for a module brings the
addresses of x and y. There are several ways to compute it, each for some devices (`Way`); where there is none, the
forms of `ops.low_rank` do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RANK = 1024  # the largest
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNREADABLE = -1
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
FUNCTIONS = (None, *ACTIVATIONS)  # None: the identity
# As kernels read it. A rank of 0: the adapter is not at this module. The type UNREADABLE: no kernel can read it. No
# address of d: it is zero. f is a place among FUNCTIONS. Kernels leave `reads_output` to who calls them.
ENTRY = np.dtype(
    [
        ("a", np.uint64), ("b", np.uint64), ("d", np.uint64), ("rank", np.int64),
        ("scale", np.float32), ("type", np.int32), ("f", np.int32), ("reads_output", np.int32),
    ]
)  # fmt: skip
Entries = np.ndarray[Any, Any]  # of ENTRY
Product = Callable[[Tensor, Tensor], None]  # of x `[..., in]`, added to y `[..., out]` in place


class Run(NamedTuple):
    """Tokens that get one update.

    Attributes:
        start: first token.
        stop: behind the last one.
        update: its number.
    """

    start: int
    stop: int
    update: int


class Runs:
    """Which tokens get which updates.

    Attributes:
        rounds: runs that do not overlap, so that they may be computed at the same time; a token that gets several
            updates is in several rounds.
        total: number of tokens.
    """

    def __init__(self, runs: Iterable[Run], total: int):
        """Put runs into rounds.

        Raises:
            ValueError: one has tokens that are not there.
        """
        self.total = total
        self.rounds: list[list[Run]] = []
        for run in sorted(runs):
            if not 0 <= run.start <= run.stop <= total:
                raise ValueError(f"{run} is not within {total} tokens")
            if run.start == run.stop:
                continue
            free = next((one for one in self.rounds if one[-1].stop <= run.start), None)
            if free is None:
                self.rounds.append([run])
            else:
                free.append(run)


def cut(runs: Iterable[Run], most: int) -> list[Run]:
    """Cut runs into pieces of at most so many tokens."""
    return [
        Run(start, min(start + most, run.stop), run.update)
        for run in runs
        for start in range(run.start, run.stop, most)
    ]


class Update(NamedTuple):
    """The factors of an adapter at one module.

    Attributes:
        a: A `[r, in]`, whose rows lie behind each other.
        b: B `[out, r]`, whose columns do; see `by_column`.
        scale: s.
        d: d `[r]`, in the dtype of A, or None.
        f: one of `FUNCTIONS`.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    d: Tensor | None = None
    f: str | None = None

    def inner(self, h: Tensor) -> Tensor:
        """Return f(h + d) for h = x Aᵀ `[..., r]`."""
        h = h if self.d is None else h + self.d.to(h.dtype)
        return h if self.f is None else ACTIVATIONS[self.f](h)


def by_column(b: Tensor) -> Tensor:
    """Lay B out as kernels read it, so that vectors of outputs lie beside each other: the same numbers elsewhere."""
    return b.T.contiguous().T


def in_one_block(update: Update, dtype: torch.dtype) -> Update:
    """Copy factors into one block of memory, as kernels read them.

    What a few tokens cost is the reading: numbers are half as many bytes in half precision, to which factors of a
    wider dtype are rounded where the tokens are of it.
    """
    a, b, scale, d, f = update
    held = [a, b.T] if d is None else [a, b.T, d]
    dtype = min(a.dtype, dtype, key=lambda dtype: torch.finfo(dtype).bits)
    block = torch.cat([t.reshape(-1).to(dtype) for t in held])
    made = [part.view_as(t) for part, t in zip(block.split([*map(Tensor.numel, held)]), held, strict=True)]
    return Update(made[0], made[1].T, scale, None if d is None else made[2], f)


def can_be_read(update: Update, n_in: int, out: int) -> bool:
    """Say whether kernels can read factors, laid out for them, at a module of a size."""
    a, b, _, d, f = update
    shaped = a.dim() == b.dim() == 2 and len(a) <= RANK and (a.shape[1], *b.shape) == (n_in, out, len(a))
    alike = all(t.dtype is a.dtype and t.device == a.device for t in (b, d) if t is not None)
    inside = (d is None or d.shape == a.shape[:1]) and f in FUNCTIONS
    return shaped and alike and inside and a.dtype in TYPES


def entry(update: Update, n_in: int, out: int) -> tuple[int, int, int, int, float, int, int, int]:
    """Return the `ENTRY` of an update for a module of a size; it holds while the factors stay where they are."""
    a, b, scale, d, f = update
    held = [t for t in (a, b.T, d) if t is not None]
    plain = all(t.layout is torch.strided and type(t.data) is Tensor and t.is_contiguous() for t in held)
    if not (can_be_read(update, n_in, out) and plain):
        return 0, 0, 0, 0, 0.0, UNREADABLE, 0, 0
    at_d = 0 if d is None else d.data_ptr()
    return a.data_ptr(), b.data_ptr(), at_d, len(a), scale, TYPES[a.dtype], FUNCTIONS.index(f), 0


class Step(Protocol):
    """The products of one step."""

    def __call__(self, module: int, x: Tensor, y: Tensor) -> None:
        """Add to y `[..., out]` the updates of x `[..., in]` at the module of a number.

        Raises:
            ValueError: x and y are not what the step is for.
        """


class Way(Protocol):
    """A way to compute products of runs.

    Attributes:
        name: for people.
        dtypes: of x that it takes.
        long: tokens of a run from which on torch's own products are at least as fast.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    long: float

    def step(self, table: Entries, widths: Sequence[tuple[int, int]], runs: Runs) -> Step:
        """Prepare the products of a step.

        Args:
            table: `[modules, updates]`, all of them readable. The factors must stay where they are.
            widths: `(in, out)` of each module.
            runs: their updates are columns of the table.
        """


def product(way: Way, updates: Sequence[Update], runs: Runs) -> Product:
    """Prepare the product of a single module; it keeps the factors alive, whose addresses it reads.

    Raises:
        ValueError: factors that do not go together, or that cannot be read in place.
    """
    widths = updates[0].a.shape[1], updates[0].b.shape[0]
    table = np.array([[entry(update, *widths) for update in updates]], ENTRY)
    if (table["type"] == UNREADABLE).any():
        raise ValueError(f"factors are float32, bfloat16 or float16, laid out as kernels read them, of rank <= {RANK}")
    step, held = way.step(table, [widths], runs), [*updates]

    def call(x: Tensor, y: Tensor) -> None:
        assert held
        step(0, x, y)

    return call


def formula(x: Tensor, y: Tensor, updates: Sequence[Update], runs: Runs) -> None:
    """Add the updates of x `[tokens, in]` to y `[tokens, out]` run by run, in the dtype of y."""
    for start, stop, number in (run for one in runs.rounds for run in one):
        a, b, scale, *_ = update = updates[number]
        y[start:stop] += scale * (update.inner(x[start:stop].to(y.dtype) @ a.to(y.dtype).T) @ b.to(y.dtype).T)


def off(way: Way, device: str) -> str:
    """Try a small product of each type, and say what is wrong with it, or ""."""
    draw = torch.Generator().manual_seed(0)
    runs = Runs([Run(0, 1, 0), Run(1, 9, 1), Run(2, 3, 0), Run(10, 40, 2), Run(11, 12, 1)], 41)
    for dtype in way.dtypes:
        for factors, f in zip(TYPES, ("gelu", "gelu_tanh", "silu"), strict=True):
            shapes = [((rank, 35), (21, rank), (rank,)) for rank in (3, 8, 17)]
            made = [[torch.randn(shape, generator=draw).to(device, factors) for shape in each] for each in shapes]
            inner: list[tuple[Tensor | None, str | None]] = [(None, None), (made[1][2], f), (None, "tanh")]
            updates = [Update(a, by_column(b), 0.5, *more) for (a, b, _), more in zip(made, inner, strict=True)]
            x, y = (torch.randn(41, width, generator=draw).to(device, dtype) for width in (35, 21))
            wanted = y.double()
            formula(x, wanted, updates, runs)
            product(way, updates, runs)(x, y)
            found = float((y.double() - wanted).abs().max() / wanted.abs().max())
            if not found <= 4 * torch.finfo(dtype).eps:
                return f"off by {found:.1e} for factors in {factors} and inputs in {dtype}"
    return ""

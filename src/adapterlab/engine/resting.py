"""Linear modules whose adapters are products of two factors that nobody trains: what is made of them is kept.

A decoding step goes through hundreds of such modules with a few tokens each, so that what is asked on every call counts
as much as what is multiplied. A module keeps a plan: all that a call needs, for one set of live adapters or one map of
a mixed batch. A call asks only whether all that the plan was made of is still the same: the same adapters in the same
mode, the same tensors, written to as often. Whatever else a module carries or is called with has no plan and goes the
usual way, see `wrapping.through`.

A few tokens are multiplied by a kernel (`ops.by_address`), if there is a compiler: one call for all adapters, from a
copy of the factors in the tokens' dtype. Many, and all on other devices, are products of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import RESTING
from adapterlab.core.composition import Stack
from adapterlab.core.segments import Here, Segment, Slots, Who, names_of
from adapterlab.engine.batch_rows import all_there
from adapterlab.engine.fusion import only_adds
from adapterlab.engine.products import fastest
from adapterlab.foreign.model import ADAPTERS
from adapterlab.foreign.private_torch import is_followed
from adapterlab.ops.low_rank import (
    FEW_OF_A_ROW,
    add_low_rank,
    add_low_rank_by_row,
    low_rank_by_row,
    thin_dtype,
)
from adapterlab.ops.segmented import UNREADABLE, Run, Runs, Update, entry, in_one_block, product

if TYPE_CHECKING:
    from adapterlab.core.state import State

Pair = tuple[Tensor, Tensor]
_LENGTHS = 4  # of a batch that are kept prepared


def at_rest(module: nn.Module, state: State, x: Any) -> Tensor | None:
    """Compute a plain linear module by its plan, outside of training.

    Args:
        module: with adapters.
        state: shared by the adapters.
        x: its only argument.

    Returns:
        None where there is no plan for the call; a compiler makes its own.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return None
    plan: Plan | None = module.__dict__.get(RESTING)
    if plan is None or not plan.holds(module, state, x):
        plan = module.__dict__[RESTING] = Plan(module, state, x, plan)
    return plan.computed(state, x)


class Plan:
    """What a module keeps of its adapters.

    Attributes:
        products: what is added, by who owns entries of the batch; None: there is no plan for what is live.
        here: of a mixed batch, who owns what.
        stack: the products of a mixed batch, stacked.
    """

    def __init__(self, module: Any, state: State, x: Tensor, before: Plan | None):
        adapters: dict[str, Any] = module._modules[ADAPTERS]._modules
        self.active, self.together, self.segments = state.active, state.together, state.segments
        self.dtype, self.device = x.dtype, x.device
        self.weight, self.bias = (module._parameters.get(name) for name in ("weight", "bias"))
        found = {name: a for name, a in adapters.items() if name in self.active}
        live = {name: a for name, a in found.items() if not (a.idle or a.is_merged)}
        self.passed_over = [a for name, a in found.items() if name not in live]
        self.here = None if self.segments is None else self.segments.among(tuple(live))
        self.stack: Stacked | None = None if before is None else before.stack
        self._slots: dict[int, Slots] = {}  # by the number of entries
        self._short: dict[int, Short | None] = {}  # likewise
        self._laid_out: dict[str, tuple[AtRest, Update]] = {}
        if before is not None and before.dtype is self.dtype:  # to which they are rounded
            self._laid_out = before._laid_out
        site = next(iter(adapters.values())).site
        self.transposed = site.transposed
        self.held: dict[str, AtRest] = {}
        self.products: dict[Who, Product] | None = None
        owners, held = self._owners(tuple(live)), resting(live, mixed=self.here is not None)
        fits = site.at_hand(x.dtype) and (self.bias is None or self.bias.dtype == x.dtype)
        if fits and owners is not None and held is not None:
            self.held = held
            self.products = {who: Product([held[name] for name in names_of(who)]) for who in owners}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the module, or one that was saved, makes its own plan."""
        return type(None), ()

    def _owners(self, names: tuple[str, ...]) -> list[Who] | None:
        """Who owns entries, without those of the plain base; None: what one owner's adapters do is not their sum."""
        if self.here is not None:
            return [who for who in dict.fromkeys(p.who for p in self.here.parts) if who] if self.here.plain else None
        parts = self.together.parts if isinstance(self.together, Stack) else ()
        summed = self.together is None or (parts and all(isinstance(part, str) for part in parts))
        return ([names] if names else []) if summed else None

    def holds(self, module: nn.Module, state: State, x: Tensor) -> bool:
        """Say whether all that the plan was made of is still the same."""
        if state.segments is not self.segments or state.together is not self.together or x.dtype is not self.dtype:
            return False
        if x.device != self.device:
            return False
        if state.active is not self.active:
            if state.active != self.active:
                return False
            self.active = state.active  # every switch makes it anew
        if self.products is None:
            return True
        own = module._parameters
        if own.get("weight") is not self.weight or own.get("bias") is not self.bias:
            return False
        if not unchanged(self.held.values()):
            return False
        return not self.passed_over or all(a.idle or a.is_merged for a in self.passed_over)

    def computed(self, state: State, x: Tensor) -> Tensor | None:
        """What the module computes for x, or None where the plan is not for such a call."""
        if self.products is None or torch.is_autocast_enabled(self.device.type):
            return None
        if self.here is not None and not all_there(x, state):
            return None
        weight = self.weight.T if self.transposed else self.weight
        if not self.products:
            return F.linear(x, weight, self.bias)
        short = None if state.in_torch else self._short_runs(x)
        if short is not None and not is_followed():
            y = F.linear(x, weight, self.bias).contiguous()
            short.add(x, y)
            for who, start, stop in short.others:
                self.products[who].add(y.view(-1, y.shape[-1])[start:stop], x.reshape(-1, x.shape[-1])[start:stop])
            return y
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, self.bias)
        if self.here is None:
            for product in self.products.values():
                product.add(y, flat)
        else:
            self._add_by_owner(y, flat, self.here, self.products)
        return y.view(*x.shape[:-1], y.shape[1])

    def _short_runs(self, x: Tensor) -> Short | None:
        """How a kernel adds to runs of few entries, if there are some."""
        entries = x.numel() // x.shape[-1]
        if entries in (kept := self._short):
            return kept[entries]
        if len(kept) >= _LENGTHS:
            kept = self._short = {}  # a new one: another thread may be reading
        kept[entries] = found = self._shortened(entries)
        return found

    def _shortened(self, entries: int) -> Short | None:
        way, _ = fastest("cpu") if self.device.type == "cpu" else (None, "")
        if way is None or self.dtype not in way.dtypes:
            return None
        per = 1 if self.here is None else entries // self.here.total
        whole = [Segment(who, 0, entries) for who in self.products or ()]
        parts = whole if self.here is None else [Segment(who, a * per, b * per) for who, a, b in self.here.parts if who]
        short = [part for part in parts if part.stop - part.start < way.long]
        if not short:
            return None
        names = list(dict.fromkeys(name for part in short for name in names_of(part.who)))
        self._laid_out = {name: self._lay_out(name) for name in names}
        updates = [update for _, update in self._laid_out.values()]
        if not all(u.a.is_cpu and entry(u, u.a.shape[1], len(u.b))[-1] != UNREADABLE for u in updates):
            return None
        runs = [Run(part.start, part.stop, names.index(name)) for part in short for name in names_of(part.who)]
        return Short(product(way, updates, Runs(runs, entries)), [part for part in parts if part not in short])

    def _lay_out(self, name: str) -> tuple[AtRest, Update]:
        now = self.held[name]
        before = self._laid_out.get(name)
        if before is not None and _alike([before[0]], [now]):
            return before
        return now, in_one_block(Update(now.a.detach(), now.b.detach(), now.scale), self.dtype)

    def _add_by_owner(self, y: Tensor, x: Tensor, here: Here, products: Mapping[Who, Product]) -> None:
        """Add to each of the entries y `[entries, out]` what its owner's adapters add."""
        if not self._slots and (self.stack is None or not self.stack.serves(products)):
            self.stack = Stacked(products)
        assert self.stack is not None
        slots = self._slots.get(len(x))
        if slots is None:
            per = len(x) // here.total
            slots = self._slots[len(x)] = here.slots(self.stack.owners, per, FEW_OF_A_ROW, x.device)
        for who, start, stop in slots.apart:
            products[who].add(y[start:stop], x[start:stop])
        if slots.width:
            self.stack.add(y, x, slots)


class Short(NamedTuple):
    """How runs of few entries are computed.

    Attributes:
        add: adds what is made of x `[..., in]` to y `[..., out]`, in place.
        others: runs of many entries.
    """

    add: Callable[[Tensor, Tensor], None]
    others: Sequence[Segment]


# ---------------------------------------------------------------------- adapters


class AtRest(NamedTuple):
    """An adapter that nobody trains: its factors, and how often they had been written to.

    `own` and `names` say where they are; None: the adapter has to be asked, see `Delta.holds`.
    """

    adapter: Any
    own: Mapping[str, Any] | None
    names: tuple[str, str]
    a: Tensor
    b: Tensor
    written: tuple[int, int]
    scale: float


def resting(live: Mapping[str, Any], mixed: bool) -> dict[str, AtRest] | None:
    """Return the factors of adapters that nobody trains, or None: one adds something else, or its factors are made.

    Writes through `.data` cannot be seen: `Delta.train` forgets what was kept.

    Args:
        live: adapters of a module.
        mixed: they share a batch with others.
    """
    held: dict[str, AtRest] = {}
    for name, adapter in live.items():
        if not (adapter.is_its_factors and only_adds(adapter) and may_be_kept(adapter, mixed)):
            return None
        found = adapter.factors()
        if found is None or adapter.added_bias is not None or not all(_counts_writes(t) for t in found):
            return None
        a, b = found
        own = adapter._parameters if adapter.holds else None
        held[name] = AtRest(adapter, own, adapter.holds or ("", ""), a, b, (a._version, b._version), adapter.scale)
    return held


def may_be_kept(adapter: Any, mixed: bool) -> bool:
    """Say whether nobody trains an adapter of a module's call, or brings its tensors for each call."""
    apart = not mixed or (adapter.rowwise and adapter.keeps_tokens_apart)
    return adapter.place == "call" and apart and not adapter.training and "_hf_hook" not in adapter.__dict__


def _counts_writes(t: Tensor) -> bool:
    return isinstance(t, nn.Parameter) and not t.is_inference()


def unchanged(held: Iterable[AtRest]) -> bool:
    """Say whether adapters still have the factors, with the values, that they had."""
    for adapter, own, (name_a, name_b), a, b, (written_a, written_b), scale in held:
        if a._version != written_a or b._version != written_b or adapter.training or adapter.scale != scale:
            return False
        if adapter.idle or adapter.is_merged or "around" in adapter.__dict__:
            return False
        now = adapter.factors() if own is None else (own.get(name_a), own.get(name_b))
        if now[0] is not a or now[1] is not b:
            return False
    return True


class Product:
    """What several adapters add to a module's output, as one product of two factors.

    Attributes:
        held: the adapters.
    """

    def __init__(self, held: Sequence[AtRest]):
        self.held = held
        self._cast: dict[torch.dtype, Pair] = {}
        scales = {one.scale for one in held}
        self._scale = scales.pop() if len(scales) == 1 else None  # of all; otherwise each B has its own in it

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add to y `[tokens, out]` what is made of x `[tokens, in]`, in place."""
        dtype = thin_dtype(x)
        if dtype not in self._cast:
            a, b = behind([(one.a, one.b if self._scale is not None else one.scale * one.b) for one in self.held])
            self._cast[dtype] = a.detach().to(dtype).T, b.detach().to(dtype).T
        add_low_rank(y, x, *self._cast[dtype], 1.0 if self._scale is None else self._scale)

    def pair(self) -> Pair:
        """A `[r, in]` and B `[out, r]` with its factor."""
        return behind([(one.a, one.scale * one.b) for one in self.held])


def behind(pairs: Sequence[Pair]) -> Pair:
    """The pair (A `[r, in]`, B `[out, r]`) that is the sum of several."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)


class Padded:
    """Several pairs of factors of one module, padded with zeros to the largest rank.

    Attributes:
        a: A `[n, r, in]`.
        b: Bᵀ with its factor `[n, r, out]`.
    """

    def __init__(self, pairs: Sequence[Pair | None]):
        """Stack (A `[r, in]`, B `[out, r]` with its factor); None has no update."""
        first = next(pair for pair in pairs if pair is not None)
        rank = max(len(pair[0]) for pair in pairs if pair is not None)
        self.a = first[0].new_zeros(len(pairs), rank, first[0].shape[1])
        self.b = first[1].new_zeros(len(pairs), rank, len(first[1]))
        for place, pair in enumerate(pairs):
            if pair is not None:
                a, b = pair
                self.a[place, : len(a)] = a.detach()
                self.b[place, : len(a)] = b.detach().T


class Stacked:
    """The products of a mixed batch's owners, stacked; it serves every map of the same owners, in any order.

    Attributes:
        owners: by slot.
    """

    def __init__(self, products: Mapping[Who, Product]):
        self.owners = tuple(products)
        self._held = {who: product.held for who, product in products.items()}
        self._factors = Padded([product.pair() for product in products.values()])
        self._cast: dict[torch.dtype, Pair] = {}

    def serves(self, products: Mapping[Who, Product]) -> bool:
        """Say whether it has all these products, unchanged, and not many others."""
        if len(self.owners) > 2 * len(products):
            return False
        return all(who in self._held and _alike(self._held[who], one.held) for who, one in products.items())

    def add(self, y: Tensor, x: Tensor, slots: Slots) -> None:
        """Add to the entries y `[entries, out]` that stand in slots what is made of x `[entries, in]`, in place."""
        n = len(self.owners)
        dtype = thin_dtype(x, FEW_OF_A_ROW, n)
        if dtype not in self._cast:
            self._cast[dtype] = self._factors.a.to(dtype), self._factors.b.to(dtype)
        a, b = self._cast[dtype]
        if slots.filled is None or slots.places is None:
            add_low_rank_by_row(y.view(n, -1, y.shape[1]), x.view(n, -1, x.shape[1]), a, b)
            return
        found = low_rank_by_row(x.index_select(0, slots.filled).view(n, slots.width, -1), a, b)
        found = found.flatten(0, 1).index_select(0, slots.places)
        if slots.entries is None:
            y.add_(found)
        else:
            y.index_add_(0, slots.entries, found)


def _alike(before: Sequence[AtRest], now: Sequence[AtRest]) -> bool:
    """Say whether factors are the same, and have the same values."""
    pairs = zip(before, now, strict=False)
    same = (o.a is n.a and o.b is n.b and o.written == n.written and o.scale == n.scale for o, n in pairs)
    return len(before) == len(now) and all(same)

"""One forward pass over tokens of many sequences, `[1, T]`, whose keys and values lie in pages.

Each attention module has a pool of pages. A pass writes the keys and values of its tokens there, and each sequence
attends to the pages of its table: first those of what stands in front of it, then its own. Rows of the pass meet
nowhere else, so that what is wrong with one (NaN, say) stays with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.engine.attention import attention_modules, core_attention
from adapterlab.engine.float_products import fast_products
from adapterlab.errors import ModelError
from adapterlab.foreign.calls import argument_names
from adapterlab.foreign.model import attention_limits, input_device, is_encoder_decoder, plain_class, text_config
from adapterlab.serve.pages import ZERO

_CHOOSES = "logits_to_keep"
_FORMS = ("softcap", "s_aux", "position_bias", "head_mask")  # arguments that change the scores
_PLAIN = ("position_ids", "cache_position", "position_embeddings")  # tensors that attention functions do not look at


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence, behind each other.

    Attributes:
        ids: of the tokens.
        start: how many tokens of the sequence come before them.
        pages: of the sequence.
        front: pages of what stands in front of it.
        in_front: how many positions that has.
        shift: by how many positions the tokens move.
        chooses: logits are wanted after the last of them.
    """

    ids: Sequence[int]
    start: int
    pages: Sequence[int]
    front: Sequence[int] = ()
    in_front: int = 0
    shift: int = 0
    chooses: bool = True


@dataclass
class Pool:
    """Keys and values of one attention module: `[pages + 1, tokens of a page, heads, width]`."""

    keys: Tensor
    values: Tensor


@dataclass
class _Group:
    """Rows of equal length that attend together.

    Attributes:
        tokens: where they are in the pass, `[rows * n]`.
        pages: their tables, `[rows * p]`, filled up with the page of zeros.
        count: of rows.
        visible: which of the tables' places each token sees, `[rows, n, places]`.
    """

    tokens: Tensor
    pages: Tensor
    count: int
    visible: Tensor
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def mask(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, `[rows, 1, repeats * n, places]`; the same for all modules that are alike."""
        if (repeats, dtype) not in self.masks:
            added = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            added.masked_fill_(~self.visible, -torch.inf)
            self.masks[repeats, dtype] = added.repeat(1, repeats, 1)[:, None]
        return self.masks[repeats, dtype]


@dataclass
class _Layout:
    """Where the tokens of a pass belong.

    Attributes:
        slots: place of each token in a pool whose pages are laid end to end, `[T]`.
        groups: rows by how they attend.
    """

    slots: Tensor
    groups: list[_Group]


class Forward:
    """A model that computes packed passes.

    Attributes:
        modules: those that attend.
        fast: context in which the model's products are computed as fast as this machine can.
        page_bytes: what a page takes, in all modules together.
    """

    def __init__(self, model: Any, page_tokens: int):
        """Find out how a model attends, and whether it can be served so.

        Raises:
            ModelError: it cannot, with the reason.
        """
        self.model, self.page_tokens = model, page_tokens
        if why := _obstacle(model):
            raise ModelError(f"{type(model).__name__} cannot be served: {why}.")
        self.device = input_device(model)
        self.takes = argument_names(plain_class(model))
        self.shapes = self._watched()
        self.modules = list(self.shapes)
        per_token = sum(t.shape[1] * t.shape[3] * t.element_size() for pair in self.shapes.values() for t in pair)
        self.page_bytes = per_token * page_tokens
        self.pools: dict[nn.Module, Pool] = {}
        self._layout: _Layout | None = None
        self.fast = fast_products(model)

    def make_pools(self, pages: int) -> None:
        """Make room for pages, beside the one of zeros; memory is taken when they are written."""
        for module, (k, v) in self.shapes.items():
            made = (t.new_zeros(pages + 1, self.page_tokens, t.shape[1], t.shape[3]) for t in (k, v))
            self.pools[module] = Pool(*made)

    def clear(self, pages: Sequence[int]) -> None:
        """Put zeros into pages: numbers that are not finite would be seen through any mask."""
        for pool in self.pools.values() if pages else ():
            index = torch.tensor(pages, device=pool.keys.device)
            pool.keys[index], pool.values[index] = 0, 0

    def write(self, module: nn.Module, pages: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Put keys and values `[heads, P, width]` into pages, from the beginning of the first."""
        pool = self.pools[module]
        for into, t in ((pool.keys, keys), (pool.values, values)):
            slots = torch.tensor(self._slots(pages, range(t.shape[1])), device=into.device)
            into.flatten(0, 1)[slots] = t.transpose(0, 1).to(into.dtype)

    def run(self, rows: Sequence[Row], embedded: Tensor | None = None) -> Tensor:
        """Compute a pass.

        Args:
            rows: those that go through the same adapters behind each other.
            embedded: vectors `[T, d]` in the place of the tokens' ids.

        Returns:
            Logits `[rows that choose, vocabulary]`.
        """
        given: dict[str, Any] = {"position_ids": self._numbers_of(rows), "use_cache": False}
        # A mask of four dimensions goes through as it is, and `_attend` does not look at it.
        given["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        if embedded is None:
            given["input_ids"] = torch.tensor([[i for row in rows for i in row.ids]], device=self.device)
        else:
            given["inputs_embeds"] = embedded[None]
        chosen = self._last(rows)
        if _CHOOSES in self.takes:
            given[_CHOOSES] = chosen if len(chosen) else chosen.new_zeros(1)
        self._layout = self._laid_out(rows)
        with core_attention(self.modules, self._attend), self.fast:
            logits: Tensor = self.model(**given).logits[0]
        return logits[: len(chosen)] if _CHOOSES in given else logits[chosen]

    # ------------------------------------------------------------------ where tokens are

    def _numbers_of(self, rows: Sequence[Row]) -> Tensor:
        found = [row.shift + row.start + i for row in rows for i in range(len(row.ids))]
        return torch.tensor([found], device=self.device)

    def _last(self, rows: Sequence[Row]) -> Tensor:
        ends = itertools.accumulate(len(row.ids) for row in rows)
        found = [end - 1 for end, row in zip(ends, rows, strict=True) if row.chooses]
        return torch.tensor(found, dtype=torch.long, device=self.device)

    def _slots(self, pages: Sequence[int], places: Sequence[int]) -> list[int]:
        size = self.page_tokens
        return [pages[i // size] * size + i % size for i in places]

    def _laid_out(self, rows: Sequence[Row]) -> _Layout:
        slots = [at for row in rows for at in self._slots(row.pages, range(row.start, row.start + len(row.ids)))]
        begins = list(itertools.accumulate((len(row.ids) for row in rows), initial=0))
        alike: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(rows):
            # Tables of up to twice the length go together, filled up.
            alike.setdefault((len(row.ids), self._table(row).bit_length()), []).append(i)
        groups = [self._group([rows[i] for i in each], [begins[i] for i in each]) for each in alike.values()]
        return _Layout(torch.tensor(slots, device=self.device), groups)

    def _table(self, row: Row) -> int:
        """Pages that a row attends to."""
        return len(row.front) - (-(row.start + len(row.ids)) // self.page_tokens)

    def _group(self, rows: Sequence[Row], begins: Sequence[int]) -> _Group:
        size, n = self.page_tokens, len(rows[0].ids)
        width = max(map(self._table, rows))
        tables = [[*row.front, *row.pages][: self._table(row)] for row in rows]
        filled = torch.tensor([[*table, *[ZERO] * (width - len(table))] for table in tables])
        facts = torch.tensor([[len(row.front) * size, row.in_front, row.start] for row in rows])
        own, front, start = (facts[:, i, None, None] for i in range(3))
        places = torch.arange(width * size)
        last = start + torch.arange(n)[:, None]
        visible = (places < front) | ((places >= own) & (places - own <= last))
        tokens = torch.tensor(begins)[:, None] + torch.arange(n)
        return _Group(
            tokens.flatten().to(self.device), filled.flatten().to(self.device), len(rows), visible.to(self.device)
        )

    # ------------------------------------------------------------------ attention

    def _attend(
        self, module: nn.Module, original: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Write keys and values `[1, heads, T, width]` and attend; what an adapter put in front of them is for all."""
        layout, pool = self._layout, self.pools[module]
        assert layout is not None
        more = k.shape[2] - q.shape[2]
        before = (k[:, :, :more], v[:, :, :more]) if more else None
        for into, t in ((pool.keys, k), (pool.values, v)):
            into.flatten(0, 1).index_copy_(0, layout.slots, t[0, :, more:].transpose(0, 1).to(into.dtype))
        out = q.new_empty(q.shape[2], q.shape[1], v.shape[3])
        for group in layout.groups:
            out[group.tokens] = _attended(q[0], group, pool, kwargs.get("scaling"), before)
        return out[None], None

    # ------------------------------------------------------------------ looking at the model

    @torch.no_grad()
    def _watched(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Run two tokens and see what keys and values each attention module has; of each only the shape counts."""
        found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def watch(module: nn.Module, original: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            if why := _special(module, kwargs, again=module in found, square=q.shape[2] == k.shape[2]):
                raise ModelError(f"{type(self.model).__name__} cannot be served: {why}.")
            found[module] = (k, v)
            return original(module, q, k, v, *args, **kwargs)

        try:
            with core_attention(attention_modules(self.model), watch):
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        except ModelError:
            raise
        except Exception as error:  # foreign code may fail in any way
            raise ModelError(
                f"{type(self.model).__name__} cannot be served: it does not take two tokens without a cache "
                f"({type(error).__name__}: {str(error)[:200]})."
            ) from error
        if not found:
            raise ModelError(f"{type(self.model).__name__} cannot be served: it computes attention in its own way.")
        return found


def _attended(
    q: Tensor, group: _Group, pool: Pool, scale: float | None, before: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention of a group's rows: `[rows * n, heads, width]` from queries `[heads, T, width]`.

    Query heads that share a key head are further queries of it, so that keys need not be repeated.
    """
    rows, heads = group.count, pool.keys.shape[2]
    repeats = q.shape[0] // heads
    n = len(group.tokens) // rows
    queries = q[:, group.tokens].view(heads, repeats, rows, n, -1).permute(2, 0, 1, 3, 4)
    keys, values = (
        pages.index_select(0, group.pages).view(rows, -1, *pages.shape[2:]).transpose(1, 2).to(q.dtype)
        for pages in (pool.keys, pool.values)
    )
    mask = group.mask(repeats, q.dtype)
    if before is not None:
        keys, values = (
            torch.cat([f.expand(rows, -1, -1, -1), t], 2) for f, t in zip(before, (keys, values), strict=True)
        )
        mask = F.pad(mask, (before[0].shape[2], 0))
    queries = queries.reshape(rows, heads, repeats * n, -1)
    found = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
    return found.view(rows, heads, repeats, n, -1).permute(0, 3, 1, 2, 4).reshape(rows * n, heads * repeats, -1)


def _obstacle(model: Any) -> str:
    """Why a model cannot be served, as far as its configuration and its arguments tell, or ""."""
    if is_encoder_decoder(model):
        return "an encoder-decoder has two texts in a row"
    if not hasattr(model, "generation_config"):
        return "it does not generate"
    if "position_ids" not in argument_names(plain_class(model)):
        return "it takes no positions, without which tokens of several sequences cannot share a row"
    for name, width in attention_limits(model).items():
        longest = getattr(text_config(model), "max_position_embeddings", None)
        if longest is None or longest > width:
            return f"its {name} of {width} tokens is shorter than its window, and pages are kept whole here"
    return ""


def _special(module: nn.Module, kwargs: dict[str, Any], *, again: bool, square: bool) -> str:
    """Why the attention of a module is not the plain one, or ""."""
    name = type(module).__name__
    if again or not square:
        return f"{name} attends to something else than its own tokens"
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        return f"{name} is not causal"
    if kwargs.get("dropout"):
        return f"{name} has dropout in evaluation"
    told = {key: value for key, value in kwargs.items() if value is not None and key not in _PLAIN}
    other = [key for key, value in told.items() if isinstance(value, Tensor) or key in _FORMS]
    return f"{name} computes more than plain attention ({', '.join(other)})" if other else ""

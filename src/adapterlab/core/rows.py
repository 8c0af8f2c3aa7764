"""Chosen rows of a table of tokens that train beside it: new tokens, or others that are to mean something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.errors import AttachError, ModelError, nearest
from adapterlab.foreign.model import base_copy, base_name, config_of, input_table
from adapterlab.models.pulling import resolve

KINDS = ("embedding", "linear")


def _each_once(tokens: tuple[int | str, ...]) -> tuple[int | str, ...]:
    twice = sorted({str(token) for token in tokens if tokens.count(token) > 1})
    if twice:
        raise ValueError(f"tokens name {', '.join(twice)} twice; name each once")
    return tokens


Token = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]
Tokens = Annotated[tuple[Token, ...], AfterValidator(_each_once)]


class Rows(Adapter):
    """The rows of some tokens at one module that holds a table of them, used instead of the base's.

    Values are kept and not differences from the base: the rows of new tokens are other random numbers wherever a
    vocabulary is made larger.

    Attributes:
        ids: of the tokens `[k]`.
        rows: `[k, d]`, in their order; at a module that is tied to another one those of the adapter there.
    """

    tokenwise: ClassVar[bool | None] = True

    def __init__(self, site: Site, ids: Sequence[int], lender: Rows | None = None):
        """Start at the base's rows.

        Args:
            site: an embedding, or a linear layer whose outputs are tokens.
            ids: of the tokens.
            lender: the adapter at a module with the same weight, whose rows these are.
        """
        super().__init__(site)
        chosen = torch.tensor(ids, dtype=torch.int64, device=site.device)
        self.register_buffer("ids", chosen, persistent=False)
        self.ids: Tensor
        if lender is None:
            self.rows = nn.Parameter(self.table(site.weight())[chosen].to(site.dtype, copy=True))
        else:
            self.refer("lender", lender)
            self.alike = lender.alike = True

    @property
    def values(self) -> Tensor:
        """The rows `[k, d]`."""
        lender: Rows = self.__dict__.get("lender", self)
        return lender.rows

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self.values.dtype

    def table(self, weight: Tensor) -> Tensor:
        """See a weight `[out, in]` as one row for each token, and back."""
        return weight.T if self.site.kind == "embedding" else weight

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Look the tokens up here and not in the base, or let their outputs be the products with these rows."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        y: Tensor = run(*args, **kwargs)
        return self.looked_up(x, y) if self.site.kind == "embedding" else self.scored(x, y)

    def looked_up(self, tokens: Tensor, y: Tensor) -> Tensor:
        """Put the rows where their tokens stand: `[...]` and `[..., d]` give `[..., d]`."""
        place, chosen = self.places(tokens)
        found = F.embedding(place, self.values.to(y.dtype)) * self.site.gain
        return torch.where(chosen[..., None], found.to(y.dtype), y)

    def scored(self, x: Tensor, y: Tensor) -> Tensor:
        """Put the tokens' outputs in their places: `[..., d]` and `[..., out]` give `[..., out]`."""
        bias = self.site.unmerged.bias
        found = F.linear(x, self.values.to(x.dtype), None if bias is None else bias[self.ids])
        return y.index_copy(-1, self.ids, found.to(y.dtype))

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which row each token has here, and whether it has one."""
        ordered, order = self.ids.sort()
        place = torch.searchsorted(ordered, tokens).clamp_(max=len(ordered) - 1)
        return order[place], ordered[place] == tokens

    def covers(self, other: Adapter) -> str:
        """The rows of tokens that both have."""
        both = sorted(set(self.ids.tolist()) & set(other.ids.tolist())) if isinstance(other, Rows) else []
        return f"the rows of the tokens {', '.join(map(str, both[:8]))}" if both else ""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The table with the rows in it."""
        table = self.table(weight)
        return self.table(table.index_copy(0, self.ids, self.values.to(table.dtype))), bias


def train_rows(host: Carrier, name: str, method: Any, targets: Targets | None = None) -> None:
    """Let rows of tables of tokens train; every module that holds such a table sees them.

    Args:
        host: of the model.
        name: of the adapter.
        method: with the setting `tokens`: ids or texts of tokens, or a dictionary with those of each of several tables.
            It is settled with ids.
        targets: the tables, where there is no dictionary; None: what embeds the model's input.

    Raises:
        AttachError: the model has no such table, an id lies beyond it, tied ones get different tokens, the model has no
            tokenizer for texts, or one of them is no single token of it.
        TargetError: a name matches nothing, or no table.
    """
    settled, sites = _with_ids(method, host), host.all_sites()
    host.settle(name, settled)
    wanted = settled.tokens
    done: dict[str, Sequence[int]] = {}
    for table, ids in wanted.items() if isinstance(wanted, Mapping) else [("", wanted)]:
        chosen = Targets(include=(table,)) if table else targets
        for site in host.sites(chosen, KINDS) if chosen is not None else [_input(host, sites)]:
            holders = _holders(host, site, sites)
            before = done.get(holders[0].path)
            if before is None:
                _put(host, name, holders, ids)
            elif tuple(before) != tuple(ids):
                raise AttachError(
                    f"tokens: {site.path} and {holders[0].path} are one table, and get different tokens, "
                    f"{list(ids)[:8]} and {list(before)[:8]}. Give tied tables the same ones, or name one of them."
                )
            done[holders[0].path] = ids


def _put(host: Carrier, name: str, holders: Sequence[Site], ids: Sequence[int]) -> None:
    """Attach the rows at every module that holds a table; they belong to the first."""
    lender: Rows | None = None
    for site in holders:
        size = site.shape[1] if site.kind == "embedding" else site.shape[0]
        if beyond := [token for token in ids if token >= size]:
            raise AttachError(
                f"tokens: {', '.join(map(str, beyond[:8]))} lie beyond the table {site.path}, which has the ids 0 to "
                f"{size - 1}. Give ids of tokens that it has; for new ones call "
                f"model.resize_token_embeddings({max(beyond) + 1}) before attaching, and before loading too."
            )
        if getattr(site.module, "max_norm", None) is not None:
            raise AttachError(
                f"{site.path} renormalises the rows it returns (max_norm), in the table itself, which rows beside it "
                "would miss. Train the whole table: name it in modules_to_save."
            )
        rows = Rows(site, ids, lender)
        host.wrap(name, site, rows)
        lender = lender or rows


def _holders(host: Carrier, site: Site, sites: Sequence[Site]) -> list[Site]:
    """All modules that hold a site's weight, what embeds the input first."""
    weight, table = site.module._parameters.get("weight"), input_table(host.model)
    found = [s for s in sites if s.kind in KINDS and s.module._parameters.get("weight") is weight]
    return sorted(found, key=lambda s: s.module is not table) if weight is not None else [site]


def _input(host: Carrier, sites: Sequence[Site]) -> Site:
    table = input_table(host.model)
    found = next((site for site in sites if site.module is table and site.kind == "embedding"), None)
    if found is None:
        raise AttachError(
            f"{type(host.model).__name__} has no table that embeds its input, so there are no rows of tokens to train. "
            "Name the table as a target where the model has one, or choose another method."
        )
    return found


def _with_ids(method: Any, host: Carrier) -> Any:
    """Return a method whose setting `tokens` has ids where it had texts."""
    tables = method.tokens if isinstance(method.tokens, dict) else {"": method.tokens}
    if all(isinstance(token, int) for tokens in tables.values() for token in tokens):
        return method
    ids = {table: token_ids(host.model, tokens) for table, tokens in tables.items()}
    return method.model_copy(update={"tokens": ids if isinstance(method.tokens, dict) else ids[""]})


def token_ids(model: Any, tokens: Sequence[int | str]) -> tuple[int, ...]:
    """Return ids for tokens that are given as text, by the tokenizer that lies with the model.

    Raises:
        AttachError: there is no such tokenizer, or a text is no single token of it.
    """
    tokenizer = _tokenizer(model)
    return tuple(token if isinstance(token, int) else _id(tokenizer, token) for token in tokens)


def _tokenizer(model: Any) -> Any:
    name = base_copy(model) or base_name(model)
    how = "give the ids instead: tokens=tokenizer.convert_tokens_to_ids([...])"
    if name is None:
        raise AttachError(f"This {type(model).__name__} does not say where its tokenizer is; {how}.")
    try:
        from adapterlab.foreign.pretrained import read_tokenizer  # with all of transformers: seconds

        return read_tokenizer(resolve(name), config_of(model), trust_remote_code=False)
    except (ModelError, OSError, ValueError, KeyError, TypeError) as error:
        raise AttachError(f"The tokenizer of {name} cannot be read ({error}); {how}.") from None


def _id(tokenizer: Any, token: str) -> int:
    """The id of a token by its name in the vocabulary, or of a text that is one token."""
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    pieces = tokenizer.encode(token, add_special_tokens=False)
    if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id:
        return int(pieces[0])
    raise AttachError(
        f"tokens: {token!r} is no single token of this tokenizer, which reads it as "
        f"{tokenizer.convert_ids_to_tokens(pieces)}. {nearest(token, vocabulary)} For a new one call "
        "tokenizer.add_tokens, resize the model and save both; or give ids."
    )

"""From examples to token rows, with a label for exactly those tokens that are to be learnt.

The trained part of a conversation is a set of character spans of the rendered text, one for every assistant turn: what
the model has to write, up to and including the token that ends the turn, without the line break some templates put
after it. Spans come from the template's `{% generation %}` markers where it has them, else from comparing the text
rendered with and without the turn. A token is trained when it covers any character of a span; where one token would
cover the end of a prompt and the beginning of the answer, the text is cut there before it is tokenised.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from adapterlab.data.config import DataConfig
from adapterlab.data.formats import Example
from adapterlab.data.report import Encoded, Report
from adapterlab.data.showing import RENDERING, Showing
from adapterlab.data.turns import SPOKEN, Message, content_text
from adapterlab.errors import DataError

IGNORED = -100
Ids = list[int]
Span = tuple[int, int]

# Used for tokenizers without a chat template: every turn on its own line, assistant turns closed by the end token.
PLAIN_TEMPLATE = (
    "{{ bos_token if add_bos else '' }}{% for m in messages %}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}"
)
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CHUNK = 256
_SHOWN = 5


@dataclass(frozen=True)
class _Row:
    """One encoded row before the length limit."""

    example: Example
    ids: Ids
    labels: Ids

    def prompt_length(self) -> int:
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


def encode(
    examples: Sequence[Example], tokenizer: Any, cfg: DataConfig, *, window: int | None, seq2seq: bool = False
) -> Encoded:
    """Turn examples into token rows.

    For a causal model labels stand at the positions of their tokens; the loss shifts them, so the first token of a row
    never carries one. For a seq2seq model the last answer is the labels and everything before it the encoder's input.

    Args:
        examples: examples of one format.
        tokenizer: a transformers tokenizer; without a chat template `PLAIN_TEMPLATE` is used, and the report says so.
        cfg: `max_length`, `too_long` and `train_on`.
        window: the most positions the model has; None when it has no limit.
        seq2seq: whether the model has an encoder and a decoder.

    Returns:
        The rows and a report.

    Raises:
        DataError: the template cannot render a row or hides a part of it, a prompt leaves no room for any trained
            token, or nothing is left to train on.
    """
    return Encoder(tokenizer, cfg, window, seq2seq)(examples)


class Encoder:
    """`encode` for one tokenizer, as often as wanted.

    Attributes:
        tokenizer: of transformers.
        cfg: the data settings.
        window: the most positions the model has, or None.
        seq2seq: whether the model has an encoder and a decoder.
    """

    def __init__(self, tokenizer: Any, cfg: DataConfig, window: int | None, seq2seq: bool = False):
        self.tokenizer, self.cfg, self.window, self.seq2seq = tokenizer, cfg, window, seq2seq
        self._coder: _Coder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coder": None}

    @property
    def unknown(self) -> int:
        """The id of the token for what the tokenizer has no word for; `IGNORED` where there is none."""
        return self._coded().unknown

    @property
    def limit(self) -> int:
        """The most tokens that a row may have."""
        return min(self.cfg.max_length, self.window or self.cfg.max_length)

    def _coded(self) -> _Coder:
        self._coder = self._coder or _Coder(self.tokenizer, self.cfg, self.seq2seq)
        return self._coder

    def __call__(self, examples: Sequence[Example], *, some: bool = False) -> Encoded:
        """Encode examples; see `encode`.

        Args:
            examples: of one format.
            some: whether these are a part of more, so that all of them may be dropped.
        """
        if not examples:
            raise DataError("There are no rows to encode. Check data.path, data.limit and data.eval_size.")
        cfg, limit, seq2seq = self.cfg, self.limit, self.seq2seq
        coder = self._coded()
        mask_by = "decoder labels" if seq2seq else coder.mask_by(examples[0])
        work = coder.pairs if seq2seq else coder.whole if mask_by == "whole text" else coder.masked
        chunks = (examples[i : i + _CHUNK] for i in range(0, len(examples), _CHUNK))
        rows = [row for chunk in _with_progress(chunks, len(examples)) for row in work(chunk)]
        fitting = _fitting(rows, limit, self.window, cfg, seq2seq, some)
        cut: list[dict[str, Any]] = [
            {"input_ids": row.ids[:limit], "labels": row.labels[:limit], **_tensors(row.example.numbers)}
            for row in fitting
        ]
        place = {id(row): i for i, row in enumerate(rows)}
        shortened = [place[id(row)] for row in fitting if max(len(row.ids), len(row.labels)) > limit]
        lengths = [len(row["input_ids"]) for row in cut]
        trained = sum(len(row["labels"]) - row["labels"].count(IGNORED) for row in cut)
        report = Report(
            rows=len(cut),
            dropped=len(rows) - len(fitting),
            truncated=len(shortened),
            tokens=sum(lengths),
            trained_tokens=trained,
            trained_share=trained / max(1, sum(lengths)),
            max_length=max(lengths, default=0),
            mean_length=sum(lengths) / max(1, len(lengths)),
            limit=limit,
            mask_by=mask_by,
            template=coder.template_name if examples[0].messages is not None else "none",
            unshown=tuple(coder.showing.unshown),
            unknown=sum(row["input_ids"].count(coder.unknown) for row in cut),
        )
        return Encoded(cut, report, [place[id(row)] for row in fitting], shortened)


def _tensors(numbers: Mapping[str, int]) -> dict[str, Any]:
    """Columns beside the text, as a batch takes them."""
    if not numbers:
        return {}
    import torch

    return {column: torch.tensor(number) for column, number in numbers.items()}


def prompt_of(example: Example, tokenizer: Any, cfg: DataConfig, *, seq2seq: bool = False) -> Ids:
    """Tokens to generate an answer from: the conversation before its last assistant turn.

    For a causal model they are a prefix of what `encode` gives for the same example, special tokens included. (Only
    where an *earlier* answer begins with white space that merges with the template's may that place differ.)

    Args:
        example: an example with messages.
        tokenizer: the tokenizer used for training.
        cfg: the data settings used for training.
        seq2seq: whether the tokens go to an encoder.

    Returns:
        Token ids.

    Raises:
        DataError: the example is plain text, or the template cannot render it.
    """
    return _Coder(tokenizer, cfg, seq2seq).prompts([example])[0]


def prompt_and_unshown(
    messages: Sequence[Message], context: Mapping[str, Any], tokenizer: Any
) -> tuple[Ids, list[str]]:
    """Tokens of a conversation up to the opening of the next assistant turn, as training renders it.

    Args:
        messages: the turns so far, for a causal model.
        context: what the template gets besides, such as `tools`.
        tokenizer: its chat template is used; without one, the plain form that training uses.

    Returns:
        Token ids, and what the template leaves out of what was said.

    Raises:
        DataError: the template cannot render it; the cause says why.
    """
    coder = _Coder(tokenizer, DataConfig(path="conversation"), seq2seq=False)  # no path is read; a config names one
    example = Example(messages=tuple(messages), row=1, context=dict(context))
    text = coder.render([messages], [example], reply=True)[0]
    whole = coder.render([messages], [example])[0]
    return coder._ids([text])[0], coder.showing.problems(example, whole)


def _fitting(
    rows: list[_Row], limit: int, window: int | None, cfg: DataConfig, seq2seq: bool, some: bool
) -> list[_Row]:
    """The rows that train something within the limit; an error where there are others and they may not be dropped."""
    empty = [row for row in rows if all(label == IGNORED for label in row.labels)]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} rows have no trained token at any length (rows {_numbers(empty)}): "
            "the chat template leaves out their answers, or the rows are single tokens. Check the rows, or use a "
            "tokenizer whose template renders every turn."
        )
    if seq2seq:
        long = [row for row in rows if len(row.ids) > limit]
    else:
        long = [row for row in rows if row.prompt_length() >= limit]
    if not long or (cfg.too_long == "drop" and (some or len(long) < len(rows))):
        dropped = set(map(id, long))
        return [row for row in rows if id(row) not in dropped]
    shown = "; ".join(
        f"row {row.example.row}: {len(row.ids)} tokens"
        + ("" if seq2seq else f", {row.prompt_length()} before the first trained one")
        for row in long[:_SHOWN]
    )
    more = f"; ... and {len(long) - _SHOWN} more" if len(long) > _SHOWN else ""
    if window is not None and limit == window:
        room = f"The model's window is {window}, so data.max_length={cfg.max_length} cannot help: shorten these rows"
    else:
        room = f"Raise data.max_length (now {cfg.max_length}; the model's window is {window or 'not limited'})"
    drop = " or set data.too_long=drop to leave them out" if len(long) < len(rows) else ""
    raise DataError(
        f"{len(long)} of {len(rows)} rows have no trained token within {limit} tokens: {shown}{more}. {room}{drop}."
    )


def _numbers(rows: list[_Row]) -> str:
    return ", ".join(str(row.example.row) for row in rows[:_SHOWN]) + (", ..." if len(rows) > _SHOWN else "")


class _Coder:
    """Renders and tokenises conversations with one tokenizer."""

    def __init__(self, tokenizer: Any, cfg: DataConfig, seq2seq: bool) -> None:
        self.tokenizer, self.cfg, self.seq2seq = tokenizer, cfg, seq2seq
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self.template = tokenizer.get_chat_template() if self.chat else PLAIN_TEMPLATE
        self.template_name = (
            "chat template" if self.chat else "plain text (turns on lines of their own, end token after answers)"
        )
        self.eos = tokenizer.eos_token or ""
        if not self.eos and not self.chat:
            raise DataError(
                "The tokenizer has neither a chat template nor an end token, so a model could not learn to stop. "
                "Set tokenizer.eos_token or tokenizer.chat_template."
            )
        # Some tokenizers put a begin token before every text; then training has to see it, too.
        self.bos = tokenizer.bos_token or ""
        begins = self._ids([""], special=True)[0][:1] == [tokenizer.bos_token_id]
        self.add_bos = bool(self.bos) and begins and not seq2seq  # an encoder's input gets its special tokens later
        added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        # Some tokenizers have one token for what is unknown and for the end: it tells nothing there.
        unknown = tokenizer.unk_token_id
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        self.unknown = unknown if unknown is not None and unknown not in ends else IGNORED
        self.showing = Showing(lambda turns, context: self._rendered([turns], context)[0][0])
        self.closers = tuple({*tokenizer.all_special_tokens, *added, self.eos} - {"", self.bos} | {self.eos} - {""})

    def _ids(self, texts: list[str], special: bool = False) -> list[Ids]:
        ids: list[Ids] = self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def mask_by(self, example: Example) -> str:
        if example.messages is None or self.cfg.train_on == "all":
            return "whole text"
        return "template markers" if _MARKED.search(self.template) else "prefix diffing"

    def render(
        self, turns: Sequence[Sequence[Message]], examples: Sequence[Example], *, reply: bool = False
    ) -> list[str]:
        """Render conversations; `reply` adds the opening of the next assistant turn."""
        return self._render(turns, examples, reply=reply)[0]

    def _render(
        self,
        turns: Sequence[Sequence[Message]],
        examples: Sequence[Example],
        *,
        reply: bool = False,
        spans: bool = False,
    ) -> tuple[list[str], list[list[Span]]]:
        texts: list[str] = []
        found: list[list[Span]] = []
        pairs = zip(turns, examples, strict=True)
        for context, group in groupby(pairs, key=lambda pair: pair[1].context):  # tools and such are the row's own
            part, owners = zip(*group, strict=True)
            rows = [self.showing.settled(row) for row in part]
            try:
                more, places = self._rendered(rows, context, reply=reply, spans=spans)
            except RENDERING as error:
                if len(rows) > 1:  # find the row
                    for turn, example in zip(part, owners, strict=True):
                        self._render([turn], [example], reply=reply, spans=spans)
                roles = ", ".join(m["role"] for m in rows[0])
                raise DataError(
                    f"The chat template cannot render row {owners[0].row} (roles: {roles}): {error}. "
                    "Change the row's roles, remove data.system if it is the system message, or use another template."
                ) from error
            texts, found = texts + more, found + places
        return texts, found

    def _rendered(
        self, rows: Sequence[Sequence[Message]], context: Mapping[str, Any], *, reply: bool = False, spans: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        # The renderer below `apply_chat_template`, because only it gives spans in characters: the token mask that
        # `apply_chat_template` makes of them is wrong where tokens trim white space from their offsets.
        from adapterlab.foreign.private_transformers import render_jinja_template

        options = {**self.tokenizer.special_tokens_map, "add_bos": self.add_bos, **context}
        options |= {"chat_template": self.template, "add_generation_prompt": reply}
        return render_jinja_template(  # type: ignore[no-any-return]
            conversations=[list(row) for row in rows], return_assistant_tokens_mask=spans, **options
        )

    def _check_shown(self, chunk: Sequence[Example], texts: Sequence[str]) -> None:
        """Refuse rows of which the template leaves something out."""
        bad = []
        for example, text in zip(chunk, texts, strict=True):
            bad += [f"  row {example.row}: {problem}" for problem in self.showing.problems(example, text)[:1]]
        if bad:
            more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            listed = "\n".join(bad[:_SHOWN])
            raise DataError(
                f"The {self.template_name} does not show all that rows say:\n{listed}{more}\n"
                "Use a tokenizer whose template shows it, write it into the content of the turns, or leave the "
                "column or field out by naming it in data.ignore."
            )

    def whole(self, chunk: Sequence[Example]) -> Iterator[_Row]:
        """Rows in which every token is trained."""
        plain = [e for e in chunk if e.messages is None]
        if plain:
            bos = self.bos if self.add_bos else ""
            texts = [bos + str(e.text).removesuffix(self.eos) + self.eos for e in chunk]
        else:
            texts = self.render([e.messages or () for e in chunk], chunk)
            self._check_shown(chunk, texts)
            texts = [self._closed(text, [(0, len(text))])[0] for text in texts]
        for example, ids in zip(chunk, self._ids(texts), strict=True):
            yield _Row(example, ids, [IGNORED, *ids[1:]])

    def prompts(self, examples: Sequence[Example]) -> list[Ids]:
        """Tokens of everything before the last answer."""
        for example in examples:
            if example.messages is None:
                raise DataError(
                    f"Row {example.row} is plain text, which has no prompt to answer. Use rows with prompts and "
                    "completions (see data.format); plain text can only be trained on, by a causal model."
                )
        texts = self.render([(e.messages or ())[:-1] for e in examples], examples, reply=True)
        return self._ids(texts, special=self.seq2seq)

    def pairs(self, chunk: Sequence[Example]) -> Iterator[_Row]:
        """Rows for an encoder and a decoder."""
        prompts = self.prompts(chunk)
        asked = [dataclasses.replace(e, messages=(e.messages or ())[:-1]) for e in chunk]
        self._check_shown(asked, self.render([e.messages or () for e in asked], asked, reply=True))
        for example in chunk:
            if lost := [field for field in SPOKEN if field in (example.messages or ({},))[-1]]:
                raise DataError(
                    f"The last answer of row {example.row} has {', '.join(lost)}, but a model with an encoder and a "
                    "decoder learns plain text as its answer. Write it into the content, or set data.ignore."
                )
        answers = self.tokenizer(text_target=[content_text(e.messages[-1]) for e in chunk if e.messages], verbose=False)
        end = self.tokenizer.eos_token_id
        for example, ids, labels in zip(chunk, prompts, answers["input_ids"], strict=True):
            yield _Row(example, ids, labels if end is None or labels[-1:] == [end] else [*labels, end])

    def masked(self, chunk: Sequence[Example]) -> Iterator[_Row]:
        """Rows in which the assistant's turns are trained."""
        marked = self.mask_by(chunk[0]) == "template markers"
        texts, spans = self._render([e.messages or () for e in chunk], chunk, spans=marked)
        if not marked:
            spans = self._diffed(chunk, texts)
        self._check_shown(chunk, texts)
        spans = [self._learnt(row, example) for row, example in zip(spans, chunk, strict=True)]
        closed = [self._closed(text, row) for text, row in zip(texts, spans, strict=True)]
        tokens = self._masks([text for text, _ in closed], [row for _, row in closed], chunk)
        for example, (ids, mask) in zip(chunk, tokens, strict=True):
            labels = [i if trained else IGNORED for i, trained in zip(ids, mask, strict=True)]
            yield _Row(example, ids, [IGNORED, *labels[1:]])

    def _learnt(self, spans: list[Span], example: Example) -> list[Span]:
        """Those of a row's answers that are to be trained."""
        if example.trained is None:
            return spans
        flags = [
            learnt
            for m, learnt in zip(example.messages or (), example.trained, strict=True)
            if m["role"] == "assistant"
        ]
        if len(flags) != len(spans):
            raise DataError(
                f"Row {example.row} has {len(flags)} answers, of which {sum(flags)} are to be trained, but the "
                f"template marks {len(spans)} as generated. Split the conversation into rows of one answer each."
            )
        return [span for span, learnt in zip(spans, flags, strict=True) if learnt]

    def _closed(self, text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """Let every span end with the token that closes its turn; a last turn without one gets the end token."""
        settled = []
        for start, end in spans:
            filled = len(text[:end].rstrip())
            if text[start:filled].endswith(self.closers):
                end = filled
            elif closer := next((c for c in self.closers if text.startswith(c, end)), None):
                end += len(closer)
            elif not text[end:].strip():
                text, end = text[:end] + self.eos, end + len(self.eos)
            else:
                end = filled
            settled.append((start, end))
        return text, settled

    def _diffed(self, chunk: Sequence[Example], texts: Sequence[str]) -> list[list[Span]]:
        """Spans of the assistant's turns, from rendering each conversation up to every one of them."""
        at = [(n, k) for n, e in enumerate(chunk) for k, m in enumerate(e.messages or ()) if m["role"] == "assistant"]
        owners = [chunk[n] for n, _ in at]
        turns = [chunk[n].messages or () for n, _ in at]
        opened = {i: turns[i][:k] for i, (_, k) in enumerate(at) if k}
        ended = {i: turns[i][: k + 1] for i, (_, k) in enumerate(at) if k + 1 < len(turns[i])}
        heads, tails = self._prefixes(opened, owners, reply=True), self._prefixes(ended, owners, reply=False)
        spans: list[list[Span]] = [[] for _ in chunk]
        for i, (n, k) in enumerate(at):
            text, tail = texts[n], tails.get(i, texts[n])
            start = self._start(text, heads.get(i, ""), turns[i], k, owners[i])
            if text.startswith(tail) and len(tail) > start:
                end = len(tail)
            elif _plain(turns[i][k]):  # the template renders this turn differently once others follow
                end = start + len(turns[i][k]["content"].strip())
            else:
                end = self._end(text, start, turns[i], k, owners[i])
            spans[n].append((start, end))
        return spans

    def _end(self, text: str, start: int, turns: Sequence[Message], k: int, example: Example) -> int:
        """Where turn k ends that says more than its content: at the last end token before what the next turn says."""
        other = [*turns[: k + 1], {**turns[k + 1], "content": "\0"}, *turns[k + 2 :]]
        changed = self.render([other], [example])[0]
        upto = len(os.path.commonprefix([text, changed]))  # noqa: RUF071 (characters are meant)
        end = text.rfind(self.eos, start, upto) if self.eos else -1
        if end < 0:
            raise self._lost(turns, k, example)
        return end + len(self.eos)

    def _prefixes(
        self, turns: dict[int, tuple[Message, ...]], owners: Sequence[Example], *, reply: bool
    ) -> dict[int, str]:
        texts = self.render(list(turns.values()), [owners[i] for i in turns], reply=reply)
        return dict(zip(turns, texts, strict=True))

    def _start(self, text: str, head: str, turns: Sequence[Message], k: int, example: Example) -> int:
        """Where turn k begins in the whole text: after its opening, or where its content is found past its prompt."""
        if head and text.startswith(head):
            return len(head)
        shared = len(os.path.commonprefix([text, head]))  # noqa: RUF071 (characters are meant)
        asked = content_text(turns[k - 1]).strip() if k else ""
        start = text.find(turns[k]["content"].strip(), shared) if _plain(turns[k]) else -1
        if start < 0 or asked not in text[:shared]:
            raise self._lost(turns, k, example)
        return start

    def _lost(self, turns: Sequence[Message], k: int, example: Example) -> DataError:
        return DataError(
            f"The trained part of row {example.row} cannot be located: the chat template rewrites turn {k + 1} "
            f"({content_text(turns[k])[:40]!r}...) or what precedes it when later turns follow. Use a template with "
            "{% generation %} markers, split the conversation into rows of one answer each, or set "
            "data.train_on=all."
        )

    def _masks(
        self, texts: list[str], spans: Sequence[Sequence[Span]], chunk: Sequence[Example]
    ) -> Iterator[tuple[Ids, list[bool]]]:
        if not getattr(self.tokenizer, "is_fast", False):
            for text, row, example in zip(texts, spans, chunk, strict=True):
                yield self._mask_by_pieces(text, row, example)
            return
        out = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets, row in zip(texts, out["input_ids"], out["offset_mapping"], spans, strict=True):
            if _straddled(offsets, row):
                ids, offsets = self._cut(text, row, (ids, offsets))
            yield ids, _mask(offsets, row)

    def _cut(self, text: str, spans: Sequence[Span], whole: tuple[Ids, list[Span]]) -> tuple[Ids, list[Span]]:
        """Tokenise the text cut where spans begin, as generation does: a prompt ends there, whatever follows."""
        cuts = [0, *(start for start, _ in spans if start), len(text)]
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        out = self.tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = [(a + x, a + y) for a, row in zip(cuts[:-1], out["offset_mapping"], strict=True) for x, y in row]
        ids = [i for row in out["input_ids"] for i in row]
        # Tokenizers that begin every text with a space would add one at the cuts.
        return (ids, offsets) if self._same_text(ids, whole[0]) else whole

    def _same_text(self, left: Ids, right: Ids) -> bool:
        return left == right or bool(self.tokenizer.decode(left) == self.tokenizer.decode(right))

    def _mask_by_pieces(self, text: str, spans: Sequence[Span], example: Example) -> tuple[Ids, list[bool]]:
        """Ids and mask from tokenising what is trained apart, for tokenizers that do not tell offsets."""
        cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
        pieces = self._ids([text[a:b] for a, b in pairwise(cuts)])
        starts = {start for start, _ in spans}
        ids = [i for piece in pieces for i in piece]
        mask = [a in starts for a, piece in zip(cuts[:-1], pieces, strict=True) for _ in piece]
        if not self._same_text(ids, self._ids([text])[0]):
            raise DataError(
                f"The trained part of row {example.row} does not begin or end between two tokens, and this "
                "tokenizer does not tell which characters a token covers. Use the fast version of the tokenizer."
            )
        return ids, mask


def _plain(message: Message) -> bool:
    """Whether a turn is its content and nothing else that could be trained."""
    return isinstance(message["content"], str) and not any(field in message for field in SPOKEN)


def _straddled(offsets: Sequence[Span], spans: Sequence[Span]) -> bool:
    """Whether a token, white space trimmed from it included, lies on both sides of the beginning of a span."""
    starts, done = iter(start for start, _ in spans), 0
    start = next(starts, None)
    for first, last in offsets:
        while start is not None and start <= min(first, done):
            start = next(starts, None)
        if start is None:
            return False
        if start < last:
            return True
        done = max(done, last)
    return False


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens cover a character of a span; both in reading order.

    Byte-level tokenizers may trim white space from offsets, so that a token of white space is empty and stands behind
    itself: `last > start` still takes it in at the beginning of a span, and spans do not end in white space.
    """
    mask, pending = [], iter(spans)
    start, end = next(pending, (0, 0))
    for first, last in offsets:
        while start < end <= first:
            start, end = next(pending, (0, 0))
        mask.append(first < end and last > start)
    return mask


def _with_progress(chunks: Iterator[Sequence[Example]], total: int) -> Iterator[Sequence[Example]]:
    """Pass chunks on, with a progress bar on stderr once that takes more than a second."""
    if total <= _CHUNK:
        yield from chunks
        return
    from rich.progress import Progress

    from adapterlab.terminal import Terminal

    bar = Progress(console=Terminal(stderr=True), transient=True)
    task, began = bar.add_task("Tokenising rows", total=total), time.monotonic()
    try:
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))
            if time.monotonic() - began > 1 and bar.console.is_interactive and not bar.live.is_started:
                bar.start()
    finally:
        if bar.live.is_started:
            bar.stop()

"""From examples to what a given model takes: token rows within its window and vocabulary, and batches of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from adapterlab.data import Collator, DataConfig, Encoded, Example
from adapterlab.data.encoding import Encoder
from adapterlab.data.formats import Examples
from adapterlab.data.mixture import Mixture, Named
from adapterlab.data.report import Report
from adapterlab.data.sources import FEW
from adapterlab.data.streams import Stream, Streams
from adapterlab.data.views import Picked
from adapterlab.data.vocabulary import covers, filler
from adapterlab.errors import DataError
from adapterlab.evaluate.generation import window_of
from adapterlab.evaluate.prepared import SAMPLE, Prepared, Recipe, Store
from adapterlab.foreign.model import is_encoder_decoder, vocabulary


def rows_for(model: Any, tokenizer: Any, examples: Sequence[Example], cfg: DataConfig) -> Encoded:
    """Turn examples into token rows for a model.

    Few are encoded at once. Many of a source are encoded when they are asked for, unless something must be known of
    all of them first: which are dropped, or whether their tokens are in the model's tables.

    Args:
        model: of transformers.
        tokenizer: its tokenizer.
        examples: of one format, or several sources of one each.
        cfg: the data settings.

    Raises:
        DataError: a row cannot be used (see `encode`), or has a token that the model does not know.
    """
    encoder = Encoder(tokenizer, cfg, window_of(model, tokenizer), is_encoder_decoder(model))
    return _encoded(Recipe(encoder, vocabulary(model)), examples)


def _encoded(recipe: Recipe, examples: Sequence[Example]) -> Encoded:
    if isinstance(examples, (Mixture, Named)):
        return _of_parts(recipe, examples)
    if isinstance(examples, Stream):
        return _streamed(recipe, examples)
    if isinstance(examples, Streams):
        reports = [_streamed(recipe, stream).report for stream in examples.streams]
        return Encoded(examples, functools.reduce(Report.joined, reports), ())
    whole, places = _places(examples)
    if len(examples) <= FEW or not isinstance(whole, Examples):
        return recipe.made([*examples])
    recipe = dataclasses.replace(recipe, columns=tuple(whole.layout.numbers))
    rows = Prepared(Store(whole, recipe), places)
    if recipe.encoder.cfg.too_long != "drop" and covers(recipe.tables, recipe.encoder.tokenizer):
        return Encoded(rows, rows.sampled(), range(len(rows)))
    chosen: Any = np.flatnonzero(rows.all_lengths())
    if not len(chosen):
        raise DataError(
            f"None of the {len(rows):,} rows has a trained token within {recipe.encoder.limit} tokens. Raise "
            "data.max_length, or shorten the rows."
        )
    return Encoded(Prepared(rows.store, Picked(places, chosen)), rows.report(), chosen)


def _of_parts(recipe: Recipe, examples: Mixture[Example] | Named[Example]) -> Encoded:
    """Each source for itself, and then mixed as the examples were."""
    found = [_encoded(recipe, part) for part in examples.parts]
    report = functools.reduce(Report.joined, (part.report for part in found))
    rows = [part.rows for part in found]
    if isinstance(examples, Mixture):
        mixed = examples.of(rows)
        return Encoded(mixed, report, range(len(mixed)))
    starts = accumulate((len(part) for part in examples.parts), initial=0)
    kept = [start + place for start, part in zip(starts, found, strict=False) for place in part.kept]
    return Encoded(Named(rows, [*examples.named]), report, kept)


def _streamed(recipe: Recipe, stream: Stream) -> Encoded:
    stream.make, stream.bound = lambda some: recipe.made(some, some=True).rows, recipe.encoder.limit
    first = recipe.made(stream.head(stream.held + SAMPLE)[stream.held :], some=True)
    return Encoded(stream, first.report, ())


def _places(examples: Sequence[Example]) -> tuple[Sequence[Example], Sequence[int]]:
    """The sequence that holds all examples, and which of them are meant."""
    places: Sequence[int] | None = None
    while isinstance(examples, Picked):
        places = examples.places if places is None else Picked(examples.places, places)
        examples = examples.whole
    return examples, range(len(examples)) if places is None else places


def collator_for(model: Any, tokenizer: Any) -> Collator:
    """Return what pads a model's token rows."""
    return Collator(filler(model, tokenizer), seq2seq=is_encoder_decoder(model))

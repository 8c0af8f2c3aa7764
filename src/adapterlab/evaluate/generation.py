"""Generate text: batched and independent of the batch, or streamed one answer at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from adapterlab.data import DataConfig, Example, prompt_of
from adapterlab.data.vocabulary import check_ids, filler
from adapterlab.engine.modes import evaluating
from adapterlab.errors import ConfigError, DataError
from adapterlab.foreign.model import input_device, is_encoder_decoder, text_config
from adapterlab.foreign.private_transformers import render_jinja_template

Ids = list[int]
_NO_LIMIT = 10**9  # tokenizers that know no limit report a huge one


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Ids],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer prompts in batches, the same for the same arguments.

    An answer depends on its own prompt and position in `prompts` alone: rows are padded on the left, and each has a
    random stream of its own. In float32 it is also the same for every batch size; in half precision the kernels of
    another batch shape round differently, which may turn a near tie.

    Args:
        model: a causal or seq2seq model of transformers, with or without adapters.
        tokenizer: its tokenizer.
        prompts: texts to continue as they stand, or token ids (see `chat_ids`).
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts computed at once.
        temperature: 0 takes the likeliest token; higher values sample.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the sampling.
        progress: called with the number of answers that each batch adds.

    Returns:
        The new text of each prompt, without special tokens.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a prompt is empty, or leaves no room for `max_new_tokens` in the model's window.
    """
    _check_settings(max_new_tokens, temperature, top_p, seed, batch_size)
    rows = [p if isinstance(p, list) else tokenizer(p)["input_ids"] for p in prompts]
    _check_room(model, tokenizer, rows, max_new_tokens)
    config = _config(model, tokenizer, max_new_tokens)
    answers: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the longest first: memory trouble shows at once
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        sampler = _sampler(temperature, top_p, [(seed, i) for i in chosen])
        output = _run(model, [rows[i] for i in chosen], config, sampler)
        answers.update(zip(chosen, _texts(output, tokenizer, config), strict=True))
        if progress:
            progress(len(chosen))
    return [answers[i] for i in range(len(rows))]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Ids,
    *,
    show: Callable[[str], None],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Answer one prompt and pass the text on as it comes, in whole words.

    Args:
        model: a causal or seq2seq model of transformers.
        tokenizer: its tokenizer.
        prompt: token ids.
        show: called with each new piece of text.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the likeliest token.
        top_p: see `generate`.
        seed: of the sampling.

    Raises:
        ConfigError: a setting is out of range.
        DataError: the prompt leaves no room in the model's window.
    """
    _check_settings(max_new_tokens, temperature, top_p, seed)
    _check_room(model, tokenizer, [prompt], max_new_tokens)
    config = _config(model, tokenizer, max_new_tokens)
    _run(model, [prompt], config, _sampler(temperature, top_p, [(seed, 0)]), _Shown(tokenizer, show))


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]], *, seq2seq: bool = False) -> Ids:
    """Render a conversation up to the opening of the next assistant turn, exactly as training renders it.

    Args:
        tokenizer: its chat template is used; without one, the plain form that training uses.
        messages: turns with `role` and `content`, the last one the user's.
        seq2seq: whether the tokens go to an encoder.
    """
    example = Example(messages=(*messages, {"role": "assistant", "content": ""}), row=1)
    # `prompt_of` reads no path; a config just has to name one.
    ids: Ids = prompt_of(example, tokenizer, DataConfig(path="conversation"), seq2seq=seq2seq)
    return ids


def window_of(model: Any, tokenizer: Any) -> int | None:
    """Return the most tokens a model has positions for, or None when nothing limits them."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    limit = positions or tokenizer.model_max_length
    return int(limit) if limit < _NO_LIMIT else None


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's and tokenizer's end tokens, and the chat template's own."""
    ends = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends]), _end_of_turn(tokenizer)}
    return sorted(i for i in found if i is not None)


class _Noise(LogitsProcessor):
    """Add Gumbel noise, so that taking the largest logit is a sample; each row draws from its own generator."""

    def __init__(self, streams: Sequence[tuple[int, int]]):
        self.generators = [np.random.default_rng(pair) for pair in streams]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = np.stack([generator.gumbel(size=scores.shape[1]) for generator in self.generators])
        return scores + torch.from_numpy(noise).to(scores.device, scores.dtype)


class _Shown(TextStreamer):  # type: ignore[misc]
    """Passes text on to a function instead of printing it."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)


def _sampler(temperature: float, top_p: float, streams: Sequence[tuple[int, int]]) -> LogitsProcessorList:
    steps: list[LogitsProcessor] = []
    if temperature:
        steps.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            steps.append(TopPLogitsWarper(top_p))
        steps.append(_Noise(streams))
    return LogitsProcessorList(steps)


def _config(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    own = model.generation_config
    ends = stop_ids(model, tokenizer)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=filler(model, tokenizer),
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        use_cache=True,
    )


def _run(
    model: Any,
    rows: Sequence[Ids],
    config: GenerationConfig,
    sampler: LogitsProcessorList,
    streamer: TextStreamer | None = None,
) -> Tensor:
    """Generate for one batch; returns the new tokens `[batch, time]` alone."""
    width = max(map(len, rows))
    device = input_device(model)
    ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    # What the model's own generation config sets (sampling, penalties) would be mixed into ours, with warnings.
    before, model.generation_config = model.generation_config, config
    try:
        with evaluating(model):
            output: Tensor = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=sampler,
                streamer=streamer,
            )
    finally:
        model.generation_config = before
    return output[:, 1 if is_encoder_decoder(model) else width :]


def _texts(output: Tensor, tokenizer: Any, config: GenerationConfig) -> list[str]:
    ends = set(config.eos_token_id or ())
    rows = []
    for row in output.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        rows.append(str(tokenizer.decode(row[:stop], skip_special_tokens=True)))
    return rows


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an answer."""
    if not tokenizer.chat_template:
        return None
    mark = "adapterlab"
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}]
    template = tokenizer.get_chat_template()
    try:
        [text], _ = render_jinja_template(conversations=[turns], chat_template=template, **tokenizer.special_tokens_map)
    except TemplateError:
        return None  # such a conversation cannot be rendered; where one is needed, encoding says so
    after = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special else None


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int, batch_size: int = 1) -> None:
    faults = [
        (max_new_tokens < 1, f"max_new_tokens must be 1 or more; received {max_new_tokens}."),
        (batch_size < 1, f"batch_size must be 1 or more; received {batch_size}."),
        (
            not 0 <= temperature < math.inf,
            f"temperature must be 0 (no sampling) or more; received {temperature}. Usual: 0.7 to 1.",
        ),
        (not 0 < top_p <= 1, f"top_p must lie above 0 and up to 1; received {top_p}."),
        (seed < 0, f"seed must be 0 or more; received {seed}."),
    ]
    if found := [message for wrong, message in faults if wrong]:
        raise ConfigError("\n".join(found))


def _check_room(model: Any, tokenizer: Any, rows: Sequence[Ids], max_new_tokens: int) -> None:
    check_ids(model, [{"input_ids": row} for row in rows], tokenizer)
    window = window_of(model, tokenizer)
    apart = is_encoder_decoder(model)  # prompt and answer have positions of their own there
    for number, row in enumerate(rows, 1):
        if not row:
            raise DataError(f"Prompt {number} of {len(rows)} is empty. Give it at least one token.")
        needed = max(len(row), max_new_tokens) if apart else len(row) + max_new_tokens
        if window is not None and needed > window:
            raise DataError(
                f"Prompt {number} of {len(rows)} has {len(row)} tokens; with max_new_tokens={max_new_tokens} it does "
                f"not fit into the model's window of {window}. Shorten the prompt or lower max_new_tokens."
            )

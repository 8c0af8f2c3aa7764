"""`adapterlab generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterlab.cli._shared import (
    AsJson,
    BaseModel,
    Checkpoint,
    Device,
    Precision,
    Seed,
    System,
    Target,
    Temperature,
    Trust,
    bars,
    print_json,
    read_lines,
    say,
)
from adapterlab.errors import ConfigError


def generate(
    target: Target,
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts.", show_default=False)] = None,
    file: Annotated[str | None, typer.Option(help="Text file with one prompt a line; - for stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")] = 1.0,
    seed: Seed = 0,
    system: System = None,
    base: Annotated[bool, typer.Option("--base", help="Also show what the base model answers.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts computed at once.")] = 16,
    checkpoint: Checkpoint = "best",
    model: BaseModel = None,
    device: Device = None,
    precision: Precision = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts, put to the model through its chat template."""
    from adapterlab.foreign.model import is_encoder_decoder

    asked = [*(prompt or []), *(read_lines(file) if file else [])]
    if not asked:
        raise ConfigError(f'There is nothing to answer. Give a prompt, adapterlab generate {target} "...", or --file.')
    from adapterlab.evaluate.generation import chat_ids
    from adapterlab.evaluate.generation import generate as answer
    from adapterlab.evaluate.opening import locate, open_target
    from adapterlab.evaluate.progress import counter

    place = locate(target, model=model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    if base and place.adapter is None:
        raise ConfigError(f"--base compares an adapter with its base, and {target} is a base model. Leave it out.")
    opened = open_target(place, device=device, precision=precision)
    system = system if system is not None else place.system
    before = [{"role": "system", "content": system}] if system else []
    seq2seq = is_encoder_decoder(opened.model)
    ids = [chat_ids(opened.tokenizer, [*before, {"role": "user", "content": text}], seq2seq=seq2seq) for text in asked]

    def answers(phase: str) -> list[str]:
        with bars() as progress:
            given: list[str] = answer(
                opened.model,
                opened.tokenizer,
                ids,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                progress=counter(progress, phase, len(ids)),
            )
        return given

    rows = [{"prompt": text, "answer": given} for text, given in zip(asked, answers("answers"), strict=True)]
    if base and opened.host is not None:
        with opened.host.using():
            rows = [{**row, "base_answer": given} for row, given in zip(rows, answers("base"), strict=True)]
    print_json(rows) if as_json else _show(rows)


def _show(rows: list[dict[str, str]]) -> None:
    """Print a single answer as it is, for use in a pipe; several ones with their prompts."""
    if len(rows) == 1 and len(rows[0]) == 2:
        say(rows[0]["answer"])
        return
    for row in rows:
        say(f"> {row['prompt']}", bold=True)
        say(row["answer"])
        if "base_answer" in row:
            say("base:", dim=True)
            say(row["base_answer"])
        say()

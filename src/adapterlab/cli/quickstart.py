"""`adapterlab quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import bars, say

if TYPE_CHECKING:
    from adapterlab.evaluate.result import Evaluation
    from adapterlab.terminal import Terminal

_SHOWN = 3


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 16 rows.")] = 130,
    questions: Annotated[int, typer.Option(min=_SHOWN, help="How many held-out questions to ask.")] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
) -> None:
    """Fine-tune the default model on small sums, and show what it learned: a few minutes on a laptop."""
    import torch
    from rich.text import Text

    from adapterlab.foreign.processor import accelerated, slow_in
    from adapterlab.io.atomic import check_free
    from adapterlab.models import DEFAULT, load_model, pull
    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    check_free(output, overwrite=overwrite)
    # On a GPU, and on processors that compute with it, bfloat16 halves memory and time.
    precision = "fp32" if not accelerated() and slow_in(torch.bfloat16) else "bf16"
    config = {**_config(output, steps, questions), "precision": precision}
    console.rule("1. The model as it is")
    pull(DEFAULT)
    model, tokenizer = load_model(DEFAULT, precision=precision)
    before = _ask(model, tokenizer, data=config["data"])
    del model
    _answers(console, before)
    console.print(f"Right answers: {_share(before)}")

    console.rule("2. Training a LoRA adapter")
    from adapterlab.train import Interrupted, fit

    try:
        result = fit(config, overwrite=overwrite)
    except Interrupted as stop:
        say(f"{stop}\nContinue with: adapterlab train {output}/config.yaml --resume", err=True)
        raise typer.Exit(130) from None
    assert result is not None

    console.rule("3. The same questions again")
    after = _ask(str(output))
    _answers(console, after)
    memory = result.memory
    console.print(f"Right answers before: {_share(before)}")
    console.print(Text.assemble("Right answers after:  ", (_share(after), "bold green")))
    console.print(
        f"Trained {result.trainable:,} of {result.total:,} parameters in {result.seconds:.0f} s; peak memory "
        f"{memory['peak'] / 2**30:.2f} GiB, of which the loaded model took {memory['loaded'] / 2**30:.2f} GiB."
    )
    console.print(f"The adapter is in {result.adapter} (HF PEFT and vLLM read it too).", soft_wrap=True)
    console.print("\nTry next:")
    for command in (
        f"adapterlab chat {result.adapter}",
        f"adapterlab evaluate {output} --base",
        "adapterlab train examples/gsm8k_lora.yaml data.path=YOUR_ROWS.jsonl training.steps=50",
    ):
        console.print(f"  {command}", style="bold", soft_wrap=True)


def _config(output: Path, steps: int, questions: int) -> dict[str, Any]:
    return {
        "model": "smollm2-135m",
        "method": {"name": "lora", "r": 16, "alpha": 32, "targets": "all-linear"},
        "data": {
            "task": "chain_sum",
            "task_args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            "limit": 16 * steps,
            "eval_size": questions,
            "system": "You are a calculator.",  # shorter than the template's own, so that steps are faster
        },
        "training": {
            "steps": steps,
            "batch_size": 16,
            "lr": 1.5e-3,
            "schedule": "linear",
            "warmup": min(5, steps),
            "eval_every": max(1, steps // 2),
        },
        "output": str(output),
    }


def _ask(target: Any, tokenizer: Any = None, **options: Any) -> Evaluation:
    from adapterlab.evaluate import score

    with bars() as progress:
        # Sums need few tokens; a model that has not learned to stop would talk on up to the default limit.
        return score(target, tokenizer, samples=_SHOWN, max_new_tokens=16, progress=progress, **options)


def _share(found: Evaluation) -> str:
    low, high = found.interval or (0.0, 1.0)
    share = (found.correct or 0) / found.n
    return f"{found.correct} of {found.n} ({share:.0%}; 95 % interval {low:.0%} to {high:.0%})"


def _answers(console: Terminal, found: Evaluation) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("question", "right answer", "model's answer", show_lines=True)
    for row in found.samples:
        mark = ("✓ ", "green") if row["score"] else ("✗ ", "red")
        table.add_row(row["prompt"], row["reference"], Text.assemble(mark, row["answer"]))
    console.print(table)

"""`adapterlab train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterlab.cli._shared import Trust, help_config, say


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; see examples/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint, exactly.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load, check and show everything; train nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even what cannot fit into memory.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    trust_remote_code: Trust = False,
    help_config: Annotated[bool, help_config("adapterlab.train.config", "TrainConfig")] = False,
) -> None:
    """Train an adapter as a YAML file says, with KEY=VALUE overrides such as training.lr=1e-4.

    The output folder gets adapters (best/, last/), metrics.jsonl, run.json, config.yaml and a checkpoint.
    Ctrl-C finishes the step and saves a checkpoint; so do a closed terminal and SIGTERM.
    """
    import shlex

    from adapterlab.train import Interrupted, fit, load_config

    overrides = [*(overrides or []), *["trust_remote_code=true"] * trust_remote_code]
    settings, provenance = load_config(config, overrides)
    try:
        result = fit(
            settings,
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            force=force,
            quiet=quiet,
            provenance=provenance,
        )
    except Interrupted as stop:
        again = shlex.join(["adapterlab", "train", str(config), *overrides, "--resume"])
        say(f"{stop}\nContinue with: {again}", err=True)
        raise typer.Exit(130) from None
    if result is not None and not quiet:
        folder = shlex.quote(str(result.folder))
        adapter = shlex.quote(str(result.adapter))
        say(f"Next:  adapterlab evaluate {folder if result.best else adapter}")
        say(f"       adapterlab chat {adapter}")

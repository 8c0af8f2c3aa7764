"""`adapterlab train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterlab.cli._shared import Trust, help_config, say


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; see examples/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings that replace those of the file; with --together further files may stand in front of them.",
        ),
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train the runs of several files at once, on one base in memory.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --together: the numbers of separate runs to the bit; saves no time.")
    ] = False,
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

    from adapterlab.errors import ConfigError
    from adapterlab.train import Interrupted, fit, load_config

    overrides = [*(overrides or []), *["trust_remote_code=true"] * trust_remote_code]
    files = [str(config), *(word for word in overrides if "=" not in word)]
    if together:
        if dry_run:
            raise ConfigError(
                "--dry-run tries one run. Try each by itself; what runs need together says adapterlab plan --together."
            )
        pairs = [word for word in overrides if "=" in word]
        options = {"resume": resume, "overwrite": overwrite, "force": force, "exact": exact, "quiet": quiet}
        return _together(files, pairs, options)
    if exact or len(files) > 1:
        what = "--exact" if exact else f"{files[1]!r}"
        raise ConfigError(
            f"{what} belongs to runs that are trained together: adapterlab train {' '.join(files)} --together. "
            "Settings are written key=value."
        )
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


def _together(files: list[str], pairs: list[str], options: dict[str, bool]) -> None:
    """Train the runs of several files at once."""
    import shlex

    from adapterlab.errors import AdapterlabError
    from adapterlab.train import Interrupted, fit_many, load_config

    loaded = [load_config(file, pairs) for file in files]
    again = shlex.join(["adapterlab", "train", *files, *pairs, "--together", "--resume"])
    try:
        endings = fit_many([config for config, _ in loaded], provenances=[found for _, found in loaded], **options)
    except Interrupted as stop:
        say(f"{stop}\nContinue all with: {again}", err=True)
        raise typer.Exit(130) from None
    failed = [ending for ending in endings if ending.error is not None]
    for ending in failed:
        kind = "" if isinstance(ending.error, AdapterlabError) else f"{type(ending.error).__name__}: "
        say(f"{ending.name} failed: {kind}{ending.error}", err=True)
    if failed:
        raise typer.Exit(1)
    if not options["quiet"]:
        say(f"Next:  adapterlab evaluate {shlex.quote(endings[0].name)}")

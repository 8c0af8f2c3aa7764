"""`adapterlab train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import Trust, help_config, say

if TYPE_CHECKING:
    from adapterlab.train import TrainConfig


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
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Train in this many processes of this machine, one a GPU; accelerate starts them."),
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
    Ctrl-C finishes the step and saves a checkpoint; so do a closed terminal and SIGTERM. Over several machines, or with
    options of accelerate: accelerate launch [...] -m adapterlab train ...; see docs/many_processes.md.
    """
    from adapterlab.errors import ConfigError
    from adapterlab.train import load_config

    overrides = [*(overrides or []), *["trust_remote_code=true"] * trust_remote_code]
    files = [str(config), *(word for word in overrides if "=" not in word)]
    several = processes is not None and processes > 1
    if together:
        if several:
            raise ConfigError(
                "--together trains several runs in one process, and --processes one run in several. Choose one of them."
            )
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
    words = ["train", str(config), *overrides]
    if several:
        from adapterlab.train.launching import launch

        flags = {"--resume": resume, "--overwrite": overwrite, "--dry-run": dry_run, "--force": force, "--quiet": quiet}
        words += [flag for flag, given in flags.items() if given]
        raise typer.Exit(launch(words, processes or 1, settings.device, settings.output))
    options = {"resume": resume, "overwrite": overwrite, "dry_run": dry_run, "force": force, "quiet": quiet}
    _one(settings, words, provenance=provenance, **options)


def _one(settings: TrainConfig, words: list[str], **options: Any) -> None:
    """Train one run, in this process or as one of several ranks."""
    import shlex
    import signal

    from adapterlab.train import Interrupted, fit
    from adapterlab.train.rank_log import RankLog
    from adapterlab.train.ranks import launched, rank

    try:
        result = fit(settings, callbacks=[RankLog(settings.output)], **options)
    except Interrupted as stop:
        if launched() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the others when the first one leaves
        say(f"{stop}\nContinue with: {_again(words)}", err=True)
        raise typer.Exit(130) from None
    if result is not None and not options["quiet"] and rank() == 0:
        folder = shlex.quote(str(result.folder))
        adapter = shlex.quote(str(result.adapter))
        say(f"Next:  adapterlab evaluate {folder if result.best else adapter}")
        say(f"       adapterlab chat {adapter}")


def _again(words: list[str]) -> str:
    """The command that continues an interrupted run, in as many processes as it had."""
    import os
    import shlex

    from adapterlab.train.launching import PROCESSES
    from adapterlab.train.ranks import launched

    words = [*words, "--resume"]
    if number := os.environ.get(PROCESSES):
        return shlex.join(["adapterlab", *words, "--processes", number])
    return ("accelerate launch [...] -m " if launched() > 1 else "") + shlex.join(["adapterlab", *words])


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

"""`adapterlab compare`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterlab.cli._shared import AsJson, Trust, help_config, print_json, say, settings
from adapterlab.errors import ConfigError

if TYPE_CHECKING:
    from adapterlab.compare import Comparison, Watcher


def compare(
    config: Annotated[
        str | None,
        typer.Argument(
            help="YAML file of a comparison (see examples/compare_smollm2.yaml); with --worker, its folder."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings on top, such as budget.steps=50 or seeds=3.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, separated by commas; patterns such as 'lora*' are allowed.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or hub id of the rows.")] = None,
    task: Annotated[str | None, typer.Option(help="A generated task instead of --data, such as chain_sum.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget of each run: optimizer steps.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the comparison.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="Who does the runs: local processes, a ray cluster, a slurm array, or workers on the folder."
        ),
    ] = "local",
    worker: Annotated[
        bool, typer.Option("--worker", help="Help with the comparison in a folder that somebody opened.")
    ] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script of --engine slurm to sbatch.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="With slurm or folder: stay until all is done.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: as memory and cores allow.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder that is in use.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try runs again that failed in an earlier start.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list the runs, start none.")] = False,
    power: Annotated[
        bool, typer.Option("--power", help="Say how many evaluation rows and seeds it takes, and run nothing.")
    ] = False,
    points: Annotated[
        float | None, typer.Option(help="With --power: points of right answers to tell apart; default: 5.")
    ] = None,
    nats: Annotated[
        float | None, typer.Option(help="With --power: nats a token to tell apart where the loss judges.")
    ] = None,
    pilot: Annotated[
        Path | None,
        typer.Option(help="With --power: folder of a comparison whose rows and seeds say how far they spread."),
    ] = None,
    discordance: Annotated[
        float | None, typer.Option(help="With --power: share of rows on which exactly one of two methods is right.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing while it runs.")] = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    help_config: Annotated[bool, help_config("adapterlab.compare.config", "CompareConfig")] = False,
) -> None:
    """Compare methods on one model and data set; run it again to continue where it stopped."""
    from adapterlab.compare import compare as run
    from adapterlab.compare import load_config

    if worker:
        beside = {"--engine": engine != "local", "--overwrite": overwrite, "--retry": retry, "--dry-run": dry_run}
        _help(config, processes, quiet, [*(overrides or []), *(name for name, given in beside.items() if given)])
        return
    pairs = list(overrides or [])
    if config is not None and "=" in config:  # no file, only settings
        pairs, config = [config, *pairs], None
    given: dict[str, Any] = {"methods": methods.split(",") if methods else None, "model": model, "processes": processes}
    given |= {"output": str(output) if output else None, "budget": {"steps": steps} if steps else None}
    given |= {"data": {"task": task} if task else {"path": data} if data else None}
    given |= {"trust_remote_code": trust_remote_code or None}
    changes = _merged(settings(pairs, "A setting") if pairs else {}, given)
    asked = {"points": points, "nats": nats, "discordance": discordance}
    if power:
        _say_power(load_config(config, changes) if config or changes else None, pilot, asked, as_json)
        return
    if idle := [f"--{name}" for name, value in {**asked, "pilot": pilot}.items() if value is not None]:
        raise ConfigError(f"{', '.join(idle)} belongs to --power, which asks before anything runs.")
    comparison = load_config(config, changes)
    _say_left_out(comparison)
    if dry_run:
        _list(comparison)
        return
    options: dict[str, Any] = {"overwrite": overwrite, "retry": retry, "submit": submit, "wait": wait or None}
    try:
        with _watching(quiet or as_json) as watcher:
            result = run(comparison, engine=engine, watcher=watcher, **options)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        say("Stopped. What is done is kept; the same command continues (without --overwrite).", err=True)
        raise typer.Exit(130) from None
    written = _report(result, comparison.output)
    if as_json:
        print_json(result.model_dump(mode="json"))
    elif not quiet:
        _show(result, written)
        _say_next(result, comparison.output, engine, submit)


def _help(folder: str | None, processes: int | None, quiet: bool, others: list[str]) -> None:
    """Do jobs of a comparison that somebody opened, and write the report where they were the last ones."""
    from adapterlab.compare.engine import work
    from adapterlab.compare.slurm import AGAIN
    from adapterlab.compare.stopping import Asked, asked_to_end
    from adapterlab.paths import user_path

    if folder is None or others:
        raise ConfigError(
            "--worker takes the folder of a comparison, and no other setting than --processes: how it goes is decided "
            f"where it was opened. Received {', '.join([*([folder] if folder else ['no folder']), *others])}."
        )
    root = user_path(folder)
    try:
        with asked_to_end():
            result = work(root, processes=processes, say=(lambda line: None) if quiet else say)
    except Asked as end:
        say("Stopped. What is done is kept, and others can go on with the rest.", err=True)
        raise typer.Exit(AGAIN if end.for_now else 130) from None
    if result is None:
        say("Nothing is left to begin; others do the last jobs.")
        return
    for file in _report(result, root):
        say(file)


def _say_next(result: Comparison, folder: Path, engine: str, submitted: bool) -> None:
    """Say how those begin who do the work."""
    from shlex import quote

    from adapterlab.compare.slurm import SCRIPT

    if result.finished or engine not in ("slurm", "folder"):
        return
    script = f"sbatch {quote(str(folder / SCRIPT))}"
    start = script if engine == "slurm" else f"adapterlab compare {quote(str(folder))} --worker"
    begun = "The tasks are in the queue; more of them, or others in their place:" if submitted else "Start the work:"
    under_way = sum(run.status == "running" for run in result.runs)
    say(f"{under_way} runs are under way. {begun} {start}\nThe same command shows how far it is.")


def _merged(changes: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the options on top of `key=value` pairs."""
    for key, value in given.items():
        if value is not None:
            both = isinstance(value, dict) and isinstance(changes.get(key), dict)
            changes[key] = {**changes[key], **value} if both else value
    return changes


@contextlib.contextmanager
def _watching(quiet: bool) -> Iterator[Watcher | None]:
    """A live table on a terminal, lines elsewhere."""
    from adapterlab.compare.report.live import LiveView
    from adapterlab.compare.watching import Lines
    from adapterlab.terminal import Terminal

    console = Terminal(stderr=True)
    if quiet:
        yield None
    elif console.is_terminal:
        with LiveView(console) as view:
            yield view
    else:
        yield Lines(lambda line: say(line, err=True))


def _say_left_out(comparison: Any) -> None:
    """Say before hours are spent what is left out."""
    for id, keys in comparison.left_out().items():
        say(f"Left out: {id}, which needs {', '.join(keys)}. Name it with its settings to compare it.", err=True)


def _list(comparison: Any) -> None:
    from adapterlab.compare import preparing

    contenders = comparison.contenders()
    facts, judge, _, _ = preparing.read_rows(comparison)
    preparing.check_attach(comparison, contenders)
    for contender in contenders:
        say(f"{contender.label}  (learning rate {contender.lr}, seeds {', '.join(map(str, comparison.seeds))})")
    say(
        f"{len(contenders) * len(comparison.seeds)} runs of {comparison.budget} each on {facts['train_rows']} rows of "
        f"{facts['source']}; {facts['eval_rows']} evaluation rows, judged by {judge}.\n"
        f"Columns: {facts['columns']}."
    )


def _say_power(config: Any, pilot: Path | None, asked: dict[str, float | None], as_json: bool) -> None:
    """Tell how many rows and seeds a difference needs."""
    import dataclasses

    from rich.table import Table

    from adapterlab.compare.power import outlook
    from adapterlab.compare.results import load
    from adapterlab.terminal import Terminal

    found = outlook(config, None if pilot is None else load(pilot), **asked)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    scale, unit, digits = (100, "points", 1) if found.judge == "score" else (1, "nats a token", 3)
    parts = {"seeds": found.spread.seeds, "rows": found.spread.rows, "rest": found.spread.rest}
    spread = ", ".join(f"{name} {scale * value:.{digits}f}" for name, value in parts.items() if value is not None)
    title = f"To tell {scale * found.difference:g} {unit} apart"
    table = Table("seeds of each method", "evaluation rows", title=title, title_justify="left")
    if found.rows:
        table.add_column(f"told apart with {found.rows:,} rows")
    for column in table.columns:
        column.justify = "right"
    for need in found.needs:
        rows = "no number is enough" if need.rows is None else f"{need.rows:,}"
        least = [] if need.least is None else [f"{scale * need.least:.{digits}f} {unit}"]
        table.add_row(str(need.seeds), rows, *least)
    console = Terminal(highlight=False)
    console.print(table)
    console.print(
        f"{found.methods} methods and the untrained model: {found.pairs} pairs at the {100 * found.level:g} % level, "
        f"corrected; found in {100 * found.power:g} % of comparisons.\n"
        f"Spread of a difference in {unit}: {spread} ({found.spread.source})."
    )
    if found.spread.seeds is None:
        console.print("How far seeds differ is not known here and counts as nothing: rows alone are told.")
    elif pilot is None:
        console.print("Another model or other rows spread otherwise: run a small comparison and pass it with --pilot.")


def _report(result: Comparison, folder: Path) -> list[Path]:
    from adapterlab.compare.report import write

    return write(result, folder)


def _show(result: Comparison, written: list[Path]) -> None:
    from rich.table import Table

    from adapterlab.terminal import Terminal

    console = Terminal(highlight=False)
    unit = "right" if result.judge == "score" else "loss"
    table = Table("rank", "method", unit, "95 % interval", "peak memory", "training time", "runs", title=result.name)
    for s in result.standings:
        memory, seconds = (result.mean(s.label, f) for f in (lambda r: r.peak_memory, lambda r: r.train_seconds))
        span = f"{s.interval[0]:.3f} - {s.interval[1]:.3f}" if s.interval else "-"
        value = "-" if s.value is None else f"{s.value:.3f}"
        cells = [str(s.rank or "-"), s.label, value, span, f"{memory / 2**20:,.0f} MiB" if memory else "-"]
        failed = f", {s.failed} failed" if s.failed else ""
        table.add_row(*cells, f"{seconds:,.0f} s" if seconds else "-", f"{s.finished}{failed}")
    console.print(table)
    if result.recommendation:
        console.print(result.recommendation.text)
    for file in written:
        console.print(str(file), soft_wrap=True)

"""Writing a report into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterlab.compare.report import page, peft, picture, table
from adapterlab.compare.report.origins import came_about
from adapterlab.compare.results import Comparison, load
from adapterlab.errors import ConfigError, OutputError
from adapterlab.io.atomic import check_made_here, new_file, write_json, write_text
from adapterlab.paths import user_path

PAGE, RESULTS, MARKDOWN, CSV, PICTURE = "report.html", "results.json", "table.md", "table.csv", "loss_curves.png"
FILES = (PAGE, RESULTS, MARKDOWN, CSV, PICTURE)


def write(comparisons: Comparison | Sequence[Comparison], folder: str | Path) -> list[Path]:
    """Write the report of one comparison, or of several side by side. An earlier report there is replaced.

    Args:
        comparisons: what to show.
        folder: for `report.html`, `results.json`, `table.md`, `table.csv`, and `loss_curves.png` where matplotlib is
            installed.

    Returns:
        The files.

    Raises:
        ConfigError: there is nothing to show.
        OutputError: they cannot be written, or would replace files that are not from here.
    """
    many = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    if not many or not any(c.runs for c in many):
        raise ConfigError("A report needs at least one comparison with runs; received none. Run adapterlab compare.")
    many = _named_apart(many)
    folder, rows = user_path(folder), table.build(many)
    _check_place(folder)
    write_text(folder / PAGE, page.page(many, rows))
    write_json(folder / RESULTS, peft.records(many))
    write_text(folder / MARKDOWN, _markdown(many, rows))
    write_text(folder / CSV, table.comma_separated(rows))
    written = [folder / name for name in (PAGE, RESULTS, MARKDOWN, CSV)]
    if picture.can_draw():
        _draw(rows, folder / PICTURE)
        written.append(folder / PICTURE)
    return written


def rebuild(folders: Sequence[str | Path], output: str | Path | None = None) -> list[Path]:
    """Write the report of one or more comparison folders again, from what is recorded there.

    Args:
        folders: of comparisons.
        output: folder for the report; with one comparison, its own by default.

    Returns:
        The files.

    Raises:
        ConfigError: no folder is given, one is given twice, or several without an output.
        FormatError: one of them holds no comparison.
        OutputError: the report cannot be written.
    """
    paths = [user_path(folder) for folder in folders]
    if not paths:
        raise ConfigError("A report needs at least one folder of a comparison; received none.")
    if twice := {str(p) for p in paths if sum(q.resolve() == p.resolve() for q in paths) > 1}:
        raise ConfigError(f"A folder can stand in a report once; received twice: {', '.join(sorted(twice))}.")
    if output is None and len(paths) > 1:
        raise ConfigError(
            f"{len(paths)} comparisons side by side need a folder of their own: say where with --output FOLDER."
        )
    comparisons = [load(path) for path in paths]
    return write(comparisons, paths[0] if output is None else output)


def _check_place(folder: Path) -> None:
    """The page is written first, so that where it is not ours, or not there, the other files are not ours either."""
    check_made_here(folder / PAGE)
    foreign = [] if (folder / PAGE).exists() else [name for name in FILES if (folder / name).exists()]
    if foreign:
        raise OutputError(
            f"{folder} holds {', '.join(foreign)} already, not from adapterlab, which are left alone. Choose another "
            "output."
        )


def _named_apart(comparisons: list[Comparison]) -> list[Comparison]:
    names = [c.name for c in comparisons]
    if len(set(names)) == len(names):
        return comparisons
    return [c.model_copy(update={"name": f"{c.name} ({i})"}) for i, c in enumerate(comparisons, 1)]


def _markdown(comparisons: Sequence[Comparison], rows: Sequence[table.Row]) -> str:
    advice = [table.plain(c.recommendation.text) for c in comparisons if c.recommendation is not None]
    notices = map(table.plain, page.notices(comparisons))
    origins = map(table.plain, came_about(comparisons))
    return "\n\n".join([*notices, table.markdown(rows).rstrip("\n"), *origins, *advice]) + "\n"


def _draw(rows: Sequence[table.Row], file: Path) -> None:
    groups: dict[int, list[table.Row]] = {}
    for row in rows:
        groups.setdefault(id(row.comparison), []).append(row)
    with new_file(file) as stream:
        picture.draw([table.foremost(own) for own in groups.values()], stream)

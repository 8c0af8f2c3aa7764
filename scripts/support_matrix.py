"""What every method can do: run the conformance suite over families and precisions and write the tables.

`make docs` measures what is missing, which is all that a new method or check needs. This script is for the rest:
`python scripts/support_matrix.py` runs everything (minutes) and writes docs/support.json and docs/support.md.
`--only ID ...` runs these methods and keeps the other rows; `--failed` runs what is missing or failed.
`--parallel` runs what two processes do, for the chosen methods, and nothing else.
`--check` runs nothing: it fails when the page is not what the data gives, or when a method or check is missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from adapterlab import registry
from adapterlab.core.method import LayerMethod, Method
from adapterlab.io.atomic import write_json, write_text
from adapterlab.testing import CHECKS, FAMILIES, Case, checks_for, outcome, parallel

DOCS = Path(__file__).resolve().parent.parent / "docs"
STORED, PAGE = DOCS / "support.json", DOCS / "support.md"
PRECISIONS = ("fp32", "bf16", "nf4", "int8")
GRIDS = {
    "smoke": ("Models and precisions", "The method starts, trains, is saved, loaded and removed on a tiny model"),
    "merge": ("Merging", "Merged into the weights (packed ones are unpacked) it answers as before, and restores"),
}
# Kinds of modules that adapters are exchanged on with HF PEFT: a tiny model and targets in it.
EXCHANGED = {
    "linear": ("llama", ("q", "v", "down")),
    "`Conv1D`": ("gpt2", ("qkv", "down")),
    "embedding": ("qwen2", ("embed",)),
    "convolution": ("vit", ("projection",)),
}
PARALLEL = "parallel"
PLACE = "its own"  # of a method that is no adapter for each module
WORDS = {"passed": "yes", "not applicable": "–", "refused": "no", "failed": "**fails**"}
Cell = dict[str, str]


@dataclass(frozen=True)
class Targeted(Case):
    """A method at chosen modules of a tiny model."""

    targets: tuple[str, ...] = ()

    def make(self, model: Any, **settings: Any) -> Method:
        return self.method(**{**self.method.example(model), "targets": self.targets, **settings})


def exchanges(method: type[Method]) -> dict[str, Case]:
    """Where to try the exchange with HF PEFT: at each kind of module, or where the method attaches by itself."""
    if method.hf is None:
        return {}
    if not issubclass(method, LayerMethod):
        return {PLACE: Case(method)}
    return {kind: Targeted(method, family, targets=targets) for kind, (family, targets) in EXCHANGED.items()}


def plan(method: type[Method]) -> Iterator[tuple[tuple[str, ...], str, Case]]:
    """Yield where a result goes in the method's data, the check, and what it runs on."""
    for check in checks_for(method):
        if check.name not in GRIDS:
            yield ("features", check.name), check.name, Case(method)
    for name in GRIDS:
        for family in FAMILIES:
            for precision in PRECISIONS:
                yield (name, family, precision), name, Case(method, family, precision)
    for kind, case in exchanges(method).items():
        yield ("peft", kind), "peft", case


def measure(method: type[Method], label: str, known: dict[str, Any]) -> dict[str, Any]:
    """Run everything for one method, or again what failed in the known data."""
    data: dict[str, Any] = known
    steps = [step for step in plan(method) if _status(known, step[0]) in ("", "failed")]
    for path, name, case in track(steps, label.ljust(24)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outcome(CHECKS[name], case)
        place = data
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = {"status": found.status, "detail": found.detail}
    for check in CHECKS.values():
        reason = check.excluded(method)
        if reason and check.name not in GRIDS:
            data["features"][check.name] = {"status": "not applicable", "detail": reason}
    data["features"]["merge"] = data["merge"]["llama"]["fp32"]
    return data


def tidied(data: dict[str, Any]) -> dict[str, Any]:
    """The data in the words of today's checks, without methods and checks that are gone; nothing is measured."""
    rows = {}
    for id in registry.ids():
        if (found := data["methods"].get(id)) is not None:
            features = {name: cell for name, cell in found["features"].items() if name in CHECKS}
            rows[id] = {**found, "features": features}
    return {**data, "methods": rows, "checks": {name: check.what for name, check in CHECKS.items()}}


def lacking(data: dict[str, Any]) -> list[str]:
    """Methods without a result for every check on every model: new ones, and all of them after a check was added."""
    return [id for id in registry.ids() if not _complete(registry.method(id), data["methods"].get(id, {}))]


def _complete(method: type[Method], found: dict[str, Any]) -> bool:
    shown = all(name in found.get("features", {}) for name in CHECKS if name != "smoke")
    shown &= all(kind in found.get(PARALLEL, {}) for kind in parallel.KINDS)
    return shown and all(_status(found, path) for path, _, _ in plan(method))


def extend(data: dict[str, Any], chosen: list[str], again: bool = False) -> dict[str, Any]:
    """Measure methods and store the data after each, so that an interrupted call goes on where it was.

    Args:
        data: what is known.
        chosen: ids of methods.
        again: measure all of each method; otherwise what is missing or failed.
    """
    for i, id in enumerate(chosen, 1):
        known = {} if again else data["methods"].get(id, {})
        row = measure(registry.method(id), f"{id} ({i} of {len(chosen)})", known)
        data = tidied({**data, "methods": {**data["methods"], id: row}})
        write_json(STORED, data)
    return over_processes(data, [id for id in chosen if again or _is_lacking_parallel(data["methods"][id])])


def over_processes(data: dict[str, Any], chosen: list[str]) -> dict[str, Any]:
    """Measure what a pair of processes trains, all methods in one pair, and store it."""
    if not chosen:
        return data
    with tempfile.TemporaryDirectory() as folder:
        pair = parallel.pair(functools.partial(parallel.measured, chosen, parallel.KINDS), Path(folder))
    rows = {
        id: {kind: parallel.worse(*(found[id][kind] for found in pair)) for kind in parallel.KINDS} for id in chosen
    }
    data = {
        **data,
        "methods": {id: row | ({PARALLEL: rows[id]} if id in rows else {}) for id, row in data["methods"].items()},
    }
    write_json(STORED, data)
    return data


def _is_lacking_parallel(row: dict[str, Any]) -> bool:
    return any(_status(row, (PARALLEL, kind)) in ("", "failed") for kind in parallel.KINDS)


def load() -> dict[str, Any]:
    """The stored data."""
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"methods": {}}
    return found


def failures(data: dict[str, Any]) -> list[str]:
    """What failed, a line for each."""
    rows = data["methods"].items()
    return [f"{id}: {cell['detail']}" for id, row in rows for cell in _leaves(row) if cell["status"] == "failed"]


def _status(data: dict[str, Any], path: tuple[str, ...]) -> str:
    for part in path:
        data = data.get(part, {})
    return str(data.get("status", ""))


class Notes:
    """Numbered reasons under the tables."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, id: str, cell: Cell) -> str:
        word = WORDS[cell["status"]]
        if cell["status"] == "passed":
            return cell["detail"] or word
        if cell["status"] == "not applicable":
            return word
        text = f"{id}: {cell['detail'].partition(': ')[2] or cell['detail']}"
        if text not in self.texts:
            self.texts.append(text)
        return f"{word} [{self.texts.index(text) + 1}](#notes)"


def render(data: dict[str, Any]) -> str:
    """Write the page for the data."""
    notes, methods = Notes(), data["methods"]
    names = [name for name in data["checks"] if name != "smoke"]
    lines = [
        "# Support", "",
        "Generated by `scripts/support_matrix.py` from runs of the conformance suite on tiny random models, on a CPU.",
        "`yes`, or in what way: the check passed. `no`: the method refuses with an error that says why. `–`: the check",
        "does not apply.",
        "", "## Features", "", "On a small Llama in float32, unless the check names another precision.", "",
        *(f"- `{name}`: {data['checks'][name]}" for name in names), "",
    ]  # fmt: skip
    lines += _table(["method", *names], [
        [f"`{id}`", *(notes(id, found["features"][name]) for name in names)] for id, found in methods.items()
    ])  # fmt: skip
    for grid, (title, what) in GRIDS.items():
        lines += ["", f"## {title}", "", f"{what}. A cell lists the precisions where it does.", ""]
        lines += _table(["method", *FAMILIES], [
            [f"`{id}`", *(_cell(id, found[grid][family], notes) for family in FAMILIES)]
            for id, found in methods.items()
        ])  # fmt: skip
    lines += [
        "", "## Over processes", "",
        "Two processes on a small Llama in float32 train what one does: losses and tensors after a few steps are those",
        "of one process up to rounding, and both processes end with the same. `ddp`: each has the whole model; `fsdp`:",
        "the base is split by rows. See [parallel_training.md](parallel_training.md).", "",
    ]  # fmt: skip
    lines += _table(["method", *parallel.KINDS], [
        [f"`{id}`", *(notes(id, found[PARALLEL][kind]) for kind in parallel.KINDS)] for id, found in methods.items()
    ])  # fmt: skip
    lines += ["", "## Notes", "", *(f"{i}. {text}" for i, text in enumerate(notes.texts, 1))]
    return "\n".join(lines) + "\n"


def _cell(id: str, cells: dict[str, Cell], notes: Notes) -> str:
    """One family: the precisions that work, then why the others do not."""
    good = [p for p in PRECISIONS if cells[p]["status"] == "passed"]
    marks: dict[str, list[str]] = {}
    for precision in PRECISIONS:
        if precision not in good:
            marks.setdefault(notes(id, cells[precision]), []).append(precision)
    rest = [mark if len(which) == len(PRECISIONS) else f"{', '.join(which)}: {mark}" for mark, which in marks.items()]
    yes = ["all" if len(good) == len(PRECISIONS) else ", ".join(good)] if good else []
    return "; ".join(yes + rest)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def faults(data: dict[str, Any], page: str) -> list[str]:
    """Say what of the stored data and page is out of date."""
    found = [f"method {id}: not in the data" for id in registry.ids() if id not in data["methods"]]
    found += [f"method {id}: in the data, and not registered" for id in data["methods"] if id not in registry.ids()]
    if data.get("checks") != {name: check.what for name, check in CHECKS.items()}:
        found.append("the checks of the suite are not those of the data")
    if not found and page != render(data):
        found.append("docs/support.md is not what docs/support.json gives")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run nothing, compare what is stored")
    parser.add_argument("--only", nargs="+", metavar="ID", help="methods to run; the others keep their rows")
    parser.add_argument("--parallel", action="store_true", help="run what two processes do and nothing else")
    parser.add_argument("--failed", action="store_true", help="run only what is missing or failed")
    options = parser.parse_args()
    data = load()
    if options.check:
        wrong = faults(data, PAGE.read_text(encoding="utf-8"))
        if wrong:
            raise SystemExit("not up to date, run `make docs`:\n  " + "\n  ".join(wrong))
        return
    logging.disable(logging.WARNING)
    chosen = list(options.only or registry.ids())
    data = over_processes(data, chosen) if options.parallel else extend(data, chosen, again=not options.failed)
    write_text(PAGE, render(data))
    if failed := failures(data):
        raise SystemExit("failed:\n  " + "\n  ".join(failed))


def _leaves(tree: dict[str, Any]) -> Iterator[Cell]:
    for value in tree.values():
        if "status" in value:
            yield value
        else:
            yield from _leaves(value)


if __name__ == "__main__":
    main()

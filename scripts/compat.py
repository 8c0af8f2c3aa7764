"""Do the oldest and the newest versions that pyproject.toml allows still work?

`python scripts/compat.py` makes two environments beside `.venv`, one of each kind, runs the tests there that meet other
libraries, and writes docs/compatibility.md and docs/compatibility.json. `--only oldest` runs one of them; `--lock`
writes requirements/tested.txt from the environment that the tests of every day run in, and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTED = ROOT / "requirements" / "tested.txt"
RESULTS, PAGE = ROOT / "docs" / "compatibility.json", ROOT / "docs" / "compatibility.md"
TESTS = ("core", "ops", "io", "evaluate", "interop", "conformance", "claims")
EXTRAS = "quickstart,dev"
SHOWN = ("torch", "transformers", "accelerate", "datasets", "safetensors", "pydantic", "peft", "trl", "bitsandbytes")
WHAT = {
    "oldest": "every floor of pyproject.toml, to the letter",
    "newest": "what pip takes today within the ceilings of pyproject.toml",
}


def floors(project: dict[str, Any]) -> dict[str, str]:
    """The lowest version that pyproject.toml allows of each package it bounds from below.

    Raises:
        SystemExit: two places give one package different floors.
    """
    found: dict[str, str] = {}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (r for group in groups for r in group):
        match = re.match(r"([A-Za-z0-9_.-]+)[^>]*>=\s*([0-9.]+)", requirement)
        if match and found.setdefault(match[1], match[2]) != match[2]:
            raise SystemExit(f"pyproject.toml has two floors of {match[1]}: {found[match[1]]} and {match[2]}")
    return found


def constraints(kind: str) -> str:
    """The text of a constraints file; the newest set leaves everything to pip but says nothing of torch's build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return "".join(f"{name}=={low}\n" for name, low in floors(project).items()) if kind == "oldest" else ""


def frozen(python: Path) -> dict[str, str]:
    """The versions installed in an environment, without the labels of builds, and without this package."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json", "--exclude-editable"], capture_output=True, check=True, text=True
    )
    versions = {p["name"]: p["version"].partition("+")[0] for p in json.loads(listed.stdout)}
    return {name: version for name, version in versions.items() if name not in ("pip", "setuptools", "wheel")}


def lock() -> None:
    """Write down what is installed in the environment of every day."""
    versions = frozen(ROOT / ".venv" / "bin" / "python")
    head = [
        "# The versions that every check ran with; both commands of the README install from here.",
        "# Written by `make lock` on Python " + ".".join(map(str, sys.version_info[:2])) + ".",
    ]
    lines = [f"{name}=={version}" for name, version in sorted(versions.items(), key=lambda item: item[0].lower())]
    TESTED.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    print(f"{TESTED.relative_to(ROOT)}: {len(lines)} versions")


def examine(kind: str, interpreter: str, tests: list[str]) -> dict[str, Any]:
    """Make the environment of one kind, run the tests in it and say what came out."""
    venv = ROOT / ".compat" / kind
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(constraints(kind))
        file.flush()
        print(f"{kind}: installing into {venv.relative_to(ROOT)}", flush=True)
        environment = {**os.environ, "PYTHON": interpreter}
        subprocess.run(
            ["sh", "scripts/install.sh", str(venv), EXTRAS, file.name], cwd=ROOT, env=environment, check=True
        )
    python = venv / "bin" / "python"
    print(f"{kind}: running tests/{{{','.join(tests)}}}", flush=True)
    began = time.monotonic()
    run = subprocess.run(
        [python, "-m", "pytest", "-n", "2", *(f"tests/{name}" for name in tests), "-m", "not model"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    if run.returncode not in (0, 1):
        raise SystemExit("\n".join([*lines[-30:], run.stderr[-3000:]]))
    told = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed)", line)), "")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", told)}
    versions = frozen(python)
    asked = subprocess.run([python, "-c", "import platform; print(platform.python_version())"], capture_output=True)
    return {
        "date": date.today().isoformat(),
        "python": asked.stdout.decode().strip(),
        "versions": versions,
        "tests": tests,
        "counts": counts,
        "failed": sorted(found[1] for line in lines if (found := re.match(r"(?:FAILED|ERROR) (.+?)(?: - |$)", line))),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def render(results: dict[str, Any]) -> str:
    """Write the page."""
    rows = [["set", "what it is", "date", "Python", *SHOWN, "tests", "passed", "failed", "skipped"]]
    for kind, found in results.items():
        counts = found["counts"]
        rows.append([
            kind, WHAT[kind], found["date"], found["python"], *(found["versions"].get(name, "–") for name in SHOWN),
            ", ".join(found["tests"]),
            str(counts.get("passed", "–")), str(len(found["failed"])), str(counts.get("skipped", "–")),
        ])  # fmt: skip
    turned = [list(column) for column in zip(*rows, strict=True)]  # packages down, sets across: it fits 80 columns
    turned.insert(1, ["---"] * len(rows))
    lines = [
        "# Compatibility", "",
        "Generated by `make compat`, which makes an environment of the oldest and one of the newest versions that",
        "`pyproject.toml` allows, and runs the tests that meet other libraries in both. The table says which ran.",
        "Every other check runs in the versions of [requirements/tested.txt](../requirements/tested.txt), from which",
        "`make quickstart` and `make test` install.", "",
        *(f"| {' | '.join(row)} |" for row in turned),
    ]  # fmt: skip
    for kind, found in results.items():
        if found["failed"]:
            lines += ["", f"Failed in the {kind} set:", "", *(f"- `{id}`" for id in found["failed"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(WHAT), help="run one set and keep the other's results")
    parser.add_argument("--oldest-python", default="python3.11", help="interpreter of the oldest set")
    parser.add_argument("--newest-python", default="python3.13", help="interpreter of the newest set")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS), help="folders of tests to run")
    parser.add_argument("--lock", action="store_true", help="write requirements/tested.txt from .venv")
    options = parser.parse_args()
    if options.lock:
        lock()
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for kind in [options.only] if options.only else list(WHAT):
        results[kind] = examine(kind, getattr(options, f"{kind}_python"), options.tests)
        results = {name: results[name] for name in WHAT if name in results}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(render(results), encoding="utf-8")
        print(f"{kind}: {results[kind]['counts']} in {results[kind]['minutes']} min", flush=True)
    if any(found["failed"] for found in results.values()):
        raise SystemExit("failures are listed in docs/compatibility.md")


if __name__ == "__main__":
    main()

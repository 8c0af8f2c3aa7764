"""Check methods and print what comes out: `python -m adapterlab.testing my_method --family llama --checks merge`."""

from __future__ import annotations

import argparse

from adapterlab import registry
from adapterlab.core.method import Method
from adapterlab.errors import ConfigError, nearest
from adapterlab.terminal import Terminal
from adapterlab.testing import CHECKS, FAMILIES, Case, outcome

_OUT = Terminal(highlight=False, soft_wrap=True)


def main() -> None:
    """Run checks one after the other; exit with 1 if one fails, with 2 if something unknown is named."""
    parser = argparse.ArgumentParser(prog="python -m adapterlab.testing", description=__doc__)
    parser.add_argument("id", nargs="+", help="of a method")
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), help="of models (default: each check's own)")
    parser.add_argument("--checks", nargs="+", metavar="NAME", help=f"some of: {', '.join(CHECKS)}")
    options = parser.parse_args()
    for name in options.checks or ():
        if name not in CHECKS:
            parser.error(f"there is no check {name!r}. {nearest(name, CHECKS)}")
    try:
        methods = [registry.method(id) for id in options.id]
    except ConfigError as error:
        parser.error(str(error))
    if failed := sum([_show(method, options.family, options.checks or list(CHECKS)) for method in methods]):
        raise SystemExit(f"{failed} failed")


def _show(method: type[Method], families: list[str] | None, names: list[str]) -> int:
    """Print what each check says; return how many failed."""
    failed = 0
    for name in names:
        found = CHECKS[name]
        if reason := found.excluded(method):
            _OUT.print(f"– {name}: {reason}")
            continue
        for family in families or found.families:
            result = outcome(found, Case(method, family))
            failed += not result.ok
            _OUT.print(f"{'✓' if result.ok else '✗'} {result} ({result.seconds:.1f} s)")
    return failed


if __name__ == "__main__":
    main()

"""Refusals are part of what a method does: they are listed at the end of a run."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = terminalreporter.getreports("passed")
    refused = [(r.nodeid.rpartition("[")[2].rstrip("]"), text) for r in reports for k, text in r.user_properties]
    if refused:
        terminalreporter.section("refused by the methods, as they should")
        for id, text in sorted(refused):
            terminalreporter.write_line(f"{id}: {text}")

"""Runs that `adapterlab train --processes` starts, and what becomes of them when a signal arrives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
_PATIENCE = 120  # seconds for the first step


def command(file: Path, processes: int) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "adapterlab", "train", str(file), "--processes", str(processes)]


def stopped(words: list[str], output: Path) -> tuple[int, str]:
    """Start a run, ask its launcher to end once a step is done, and return the exit status and what was said."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD)
    end, metered = time.monotonic() + _PATIENCE, output / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None and not (metered.is_file() and metered.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said

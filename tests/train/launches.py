"""Launches of several processes: by the command line, what becomes of them when a signal arrives, by scripts here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
_PATIENCE = 120  # seconds for the first step


def command(file: Path, processes: int) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "adapterlab", "train", str(file), "--processes", str(processes)]


def outcomes(script: str, root: Path, seconds: float) -> dict[str, Any]:
    """What happened in a script of this folder, by the name of the launch; its last line says it."""
    words = [sys.executable, Path(__file__).parent / script, root]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def stopped(words: list[str], output: Path) -> tuple[int, str]:
    """Start a run, ask its launcher to end once a step is done, and return the exit status and what was said."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD)
    end, metered = time.monotonic() + _PATIENCE, output / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None and not (metered.is_file() and metered.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said

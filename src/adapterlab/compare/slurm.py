"""A Slurm array as a pool: one script, whose tasks do what is left of a comparison's folder until nothing is.

Tasks know nothing of each other, and the scheduler nothing of jobs: which task does which job is decided in the folder.
So it does not matter how many tasks start, when, how often, or which of them end early.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from adapterlab.compare.config import CompareConfig
from adapterlab.errors import ConfigError
from adapterlab.io.atomic import write_text
from adapterlab.io.disk import explained

SCRIPT, LOGS = "slurm.sh", "slurm"
AGAIN = 75  # exit status of a worker that was told that its time is up, and left something to do

_SHELL = """
cd {folder} || exit
{setup}
# The scheduler signals this shell, which passes it on: USR1 before the time is up, TERM when the task has to go.
{command} &
worker=$!
trap 'kill -USR1 "$worker"' USR1
trap 'kill -TERM "$worker"' TERM
status=138
while [ "$status" -eq 138 ] || [ "$status" -eq 143 ]; do wait "$worker"; status=$?; done  # a signal ends a wait
if [ "$status" -eq {again} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" && exit 0
fi
exit "$status"
"""


def write(config: CompareConfig, tasks: int) -> Path:
    """Write the script into a comparison's folder.

    Args:
        config: of the comparison.
        tasks: jobs at a time.

    Raises:
        OutputError: it cannot be written.
    """
    root = config.output.absolute()
    with explained(root):
        (root / LOGS).mkdir(exist_ok=True)
    write_text(root / SCRIPT, script(config, tasks, Path.cwd()))
    return root / SCRIPT


def script(config: CompareConfig, tasks: int, cwd: Path) -> str:
    """Return the text of the script.

    Args:
        config: of the comparison.
        tasks: jobs at a time.
        cwd: where tasks work: relative paths of the configuration count from there.
    """
    root, asked = config.output.absolute(), config.slurm
    memory = config.memory_bytes()
    options = {
        "job-name": f"compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', root.name)}",
        "array": f"1-{tasks}",
        "nodes": 1,
        "ntasks": 1,
        "output": shlex.quote(str(root / LOGS / "%A_%a.txt")),
        "open-mode": "append",
        "signal": f"B:USR1@{asked.notice}",
        "partition": asked.partition,
        "account": asked.account,
        "time": asked.time,
        "cpus-per-task": config.threads and config.threads * config.processes_per_run,
        "gres": f"gpu:{config.gpus}" if config.gpus else None,
        "mem": f"{-(-memory // 2**20)}M" if memory else None,
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    work = [sys.executable, "-m", "adapterlab", "compare", str(root), "--worker", "--processes", "1"]
    return "".join(
        f"{line}\n" for line in ("#!/bin/bash", *(f"#SBATCH {line}" for line in (*lines, "--requeue", *asked.lines)))
    ) + _SHELL.format(
        folder=shlex.quote(str(cwd)), setup="\n".join(asked.setup), command=shlex.join(work), again=AGAIN
    )  # fmt: skip


def submit(file: Path) -> str:
    """Hand a script to the scheduler.

    Returns:
        The scheduler's number for the array.

    Raises:
        ConfigError: there is no scheduler, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(f"There is no sbatch here. On a machine that has it, run: sbatch {shlex.quote(str(file))}")
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"sbatch refused {file}: {done.stderr.strip() or f'status {done.returncode}'}. Its options come from "
            "slurm, threads, gpus and memory in the configuration."
        )
    return done.stdout.strip().partition(";")[0]

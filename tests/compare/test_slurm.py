"""The script of an array: what it asks for, what its tasks do when they are killed or out of time."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from inline_comparisons import use_inline_pool
from test_scheduling import pretend

from adapterlab.compare import CompareConfig, compare, load, slurm
from adapterlab.compare.claims import Note, losses
from adapterlab.errors import ConfigError

# Starts the tasks of an array as processes here, as many as it has, and forgets them.
SBATCH = """#!/bin/bash
script=${@: -1}
last=$(sed -n 's/^#SBATCH --array=1-//p' "$script")
for task in $(seq "$last"); do
    SLURM_ARRAY_JOB_ID=17 SLURM_ARRAY_TASK_ID=$task setsid bash "$script" >"$TASKS/$task.txt" 2>&1 &
    echo $! >"$TASKS/$task.pid"
done
echo "17;cluster"
"""
# A worker whose jobs end with it, and come out as those in another folder did; runs wait until a file is there.
WORKER = """
import sys
from adapterlab.cli import main
from adapterlab.compare import pools
job = '''
import os, pathlib, shutil, sys, threading, time
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
folder = pathlib.Path(sys.argv[1])
(folder / "begun.txt").open("a").write("x")
while "runs" in folder.parts and not os.path.exists({go!r}):
    time.sleep(0.05)
shutil.copy(pathlib.Path({made!r}) / folder.relative_to({root!r}) / "result.json", folder / "result.json")
'''
pools.can_fork = lambda: False
pools.command = lambda folder: [sys.executable, "-S", "-c", job, str(folder)]
main(sys.argv[1:])
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs that the shell finds first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TASKS", str(tmp_path))
    return folder


def program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def test_the_script_asks_for_what_the_configuration_says(fields: dict[str, Any], tmp_path: Path) -> None:
    asked = {
        "partition": "gpu", "account": "lab", "time": "04:00:00", "lines": ["--qos=high"], "setup": ["module load cuda"]
    }  # fmt: skip
    given = {**fields, "output": tmp_path / "it's here", "threads": 4, "gpus": 2, "memory": "1.5GB", "slurm": asked}
    text = slurm.script(CompareConfig(**given), 8, tmp_path)
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert shlex.split(options.pop(4)) == [f"--output={tmp_path}/it's here/slurm/%A_%a.txt"]
    assert options == [
        "--job-name=compare-it-s-here", "--array=1-8", "--nodes=1", "--ntasks=1", "--open-mode=append",
        "--signal=B:USR1@120", "--partition=gpu", "--account=lab", "--time=04:00:00", "--cpus-per-task=4",
        "--gres=gpu:2", "--mem=1536M", "--requeue", "--qos=high",
    ]  # fmt: skip
    assert "\nmodule load cuda\n" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    several = slurm.script(CompareConfig(**{**given, "processes_per_run": 2}), 8, tmp_path)
    assert "--cpus-per-task=8\n" in several
    plain = slurm.script(CompareConfig(**fields), 1, tmp_path)
    assert not any(f"--{name}" in plain for name in ("partition", "account", "time", "gres", "mem", "cpus"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"time": "soon"},
        {"lines": ["qos=high"]},
        {"setup": ["a\nb"]},
        {"partition": "a b"},
        {"notice": 1},
        {"queue": "a"},
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CompareConfig(**{**fields, "slurm": wrong})


def test_without_a_scheduler_or_when_it_refuses(
    fields: dict[str, Any], programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompareConfig(**fields)
    with pytest.raises(ConfigError, match=r"no sbatch here.*run: sbatch .*slurm\.sh"):
        compare(config, engine="slurm", submit=True)
    program(programs / "sbatch", "#!/bin/bash\necho 'invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(ConfigError, match=r"refused.*invalid partition"):
        compare(config, engine="slurm", submit=True)
    with pytest.raises(ConfigError, match="submit is for engine slurm"):
        compare(config, submit=True)


@pytest.mark.parametrize(
    ("sent", "worker_says", "status", "queued"),
    [("USR1", 75, 0, "requeue 17_3"), ("TERM", 130, 130, ""), (None, 0, 0, ""), (None, 2, 2, "")],
)
def test_signals_reach_the_worker_and_its_status_decides(
    fields: dict[str, Any], programs: Path, tmp_path: Path, sent: str | None, worker_says: int, status: int, queued: str
) -> None:
    """The shell of the script alone, with a worker that does nothing but wait for the signal."""
    program(programs / "scontrol", f'#!/bin/bash\necho "$@" >{tmp_path}/queued.txt\n')
    waits = f"trap 'exit {worker_says}' {sent}; touch {tmp_path}/ready; while :; do sleep 0.05; done" if sent else ""
    program(programs / "worker", f"#!/bin/bash\n{waits}\nexit {worker_says}\n")
    text = slurm.script(CompareConfig(**fields), 1, tmp_path)
    text = text.replace(f"{sys.executable} -m adapterlab compare", str(programs / "worker"))
    ids = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    shell = subprocess.Popen(["bash", "-c", text], env={**os.environ, **ids})
    if sent:
        end = time.monotonic() + 20
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.01)
        shell.send_signal(getattr(signal, f"SIG{sent}"))
    assert shell.wait(60) == status
    file = tmp_path / "queued.txt"
    assert (file.read_text().strip() if file.exists() else "") == queued


@pytest.mark.slow
def test_two_tasks_do_what_one_process_does_though_one_is_killed(
    fields: dict[str, Any], programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**fields, "methods": ["lora", "ia3", "dora"], "seeds": 2, "together": "never", "processes": 2}
    with pytest.MonkeyPatch.context() as patch:
        use_inline_pool(patch, pretend)
        alone = compare(CompareConfig(**{**given, "output": tmp_path / "alone"}))
    config = CompareConfig(**{**given, "output": tmp_path / "array"})
    file = tmp_path / "worker.py"
    go = tmp_path / "go"
    file.write_text(textwrap.dedent(WORKER).format(made=str(tmp_path / "alone"), root=str(config.output), go=str(go)))
    program(programs / "sbatch", SBATCH)
    original = slurm.script
    monkeypatch.setattr(slurm, "script", lambda *given: original(*given).replace("-m adapterlab", str(file)))
    first = compare(config, engine="slurm", submit=True)
    assert not first.finished

    def at_work() -> dict[Path, int]:
        texts = {file.parent: file.read_text() for file in config.output.glob("runs/*/*/claim-0")}
        notes = {folder: Note.model_validate_json(text) for folder, text in texts.items() if text}  # made, then written
        return {folder: note.process for folder, note in notes.items() if note.state == "held" and note.process}

    end = time.monotonic() + 120
    while len(set((found := at_work()).values())) < 2:
        assert time.monotonic() < end, [file.read_text() for file in tmp_path.glob("?.txt")]
        time.sleep(0.02)
    killed, process = next(iter(found.items()))
    os.kill(process, signal.SIGKILL)
    while any(str(killed) in (job.info["cmdline"] or ()) for job in psutil.process_iter(["cmdline"])):
        time.sleep(0.02)  # its job ends with it, and must not come to its own end before
    go.touch()
    result = compare(config, engine="slurm", wait=True)
    assert result.finished
    assert [(run.label, run.seed, run.best) for run in result.runs] == [
        (run.label, run.seed, run.best) for run in alone.runs
    ]
    assert result.standings == alone.standings
    assert [len(run.lost) for run in result.runs if run.lost] == [1]
    assert "has ended" in losses(killed)[0]
    assert all(len(file.read_text()) == 1 for file in config.output.glob("runs/*/*/begun.txt") if file.parent != killed)
    end = time.monotonic() + 60
    while not (config.output / "report.html").is_file():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert load(config.output).finished

"""One training on several processes of this machine, started by accelerate as `accelerate launch` does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterlab.errors import ConfigError
from adapterlab.terminal import Terminal
from adapterlab.train.folder import read_run
from adapterlab.train.ranks import check_devices, launched
from adapterlab.train.watch import STATUS

PROCESSES = "ADAPTERLAB_PROCESSES"  # tells a rank that --processes started it, and how many
STOPPED = 130  # exit status after a signal
_PATIENCE = "600"  # seconds for the ranks to finish their step and to save, before they are killed
_PATIENCE_OF_TORCH = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def launch(
    words: Sequence[str], processes: int, device: str | None, output: Path | None = None, module: str = "adapterlab"
) -> int:
    """Run `python -m MODULE WORDS` in several processes.

    It is `accelerate launch --multi_gpu --num_processes N -m MODULE WORDS`, on GPUs and on CPUs, with a free port, the
    cores of the machine divided among the processes, and time to save when a signal arrives.

    Args:
        words: what follows the module's name.
        processes: how many.
        device: of the configuration.
        output: folder of the run, if a signal is to be answered with whether the run was saved.
        module: what each of them runs.

    Returns:
        The exit status: that of the process that ended the run.

    Raises:
        ConfigError: they do not fit the devices of this machine, or this is one of several processes already.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if launched() > 1:
        raise ConfigError("A launcher started this process as one of several already. Leave --processes out.")
    check_devices(device, processes)
    os.environ[PROCESSES] = str(processes)
    os.environ.setdefault(_PATIENCE_OF_TORCH, _PATIENCE)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks and this say what it would
    with tempfile.TemporaryDirectory(prefix="adapterlab-") as logs, _handlers_kept():
        options = {
            "--num_processes": processes, "--num_machines": 1, "--mixed_precision": "no", "--dynamo_backend": "no",
            "--main_process_port": 0, "--log_dir": logs, **_threads(processes),
        }  # fmt: skip
        given = [str(word) for option in options.items() for word in option]
        try:
            launch_command(launch_command_parser().parse_args(["--multi_gpu", *given, "-m", module, *words]))
        except SignalException:
            if output is not None and read_run(output).get("status") not in ("interrupted", "finished"):
                _say(f"The run in {output} was ended before it could save; an earlier checkpoint stays.")
            return STOPPED
        except ChildFailedError as error:
            return _ended(error.failures)
    return 0


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put the handlers of signals back that the launcher replaces for good."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _threads(processes: int) -> dict[str, int]:
    """Divide the cores, unless the user did."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"--num_cpu_threads_per_process": max(1, cores // processes)}


def _ended(failures: Mapping[int, Any]) -> int:
    """Say which rank a signal ended, and return the status of the run; what ranks raised they said themselves."""
    asked = -signal.SIGTERM  # what ranks get from the launcher when one of them failed
    for rank, failure in failures.items():
        if failure.exitcode < 0 and failure.exitcode != asked:
            number = signal.Signals(-failure.exitcode)
            why = ", as the system does when memory runs out" if number is signal.SIGKILL else ""
            _say(f"Rank {rank} (process {failure.pid}) was ended by {number.name}{why}.")
            return 128 + number
    codes = [failure.exitcode for failure in failures.values()]
    return STOPPED if STOPPED in codes else STATUS if STATUS in codes else max(codes[0], 1)


def _say(text: str) -> None:
    Terminal(stderr=True, highlight=False, soft_wrap=True).print(text)

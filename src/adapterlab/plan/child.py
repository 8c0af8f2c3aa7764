"""Functions called in processes of their own: one that dies takes an answer with it, and nothing else.

    with apart():
        plan(...)          # simulations inside run in a child

    with prepared():       # a child whose imports go on beside our own
        plan(...)

Children are started as `python -m adapterlab.plan.child`, so a script that plans needs no guard around its main part.
Requests and answers are pickled; only a parent and its own child exchange them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar
from typing import IO, Any, TypeVar

from adapterlab.errors import AdapterlabError, ConfigError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MOST = 60  # calls that a process answers before a fresh one takes its place
_TRIES = 2
_LENGTH = struct.Struct("!Q")
_MODULE = "adapterlab.plan.child"


class Child:
    """A process that calls functions, one at a time; a new one takes over when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._calls = 0
        self._stopped = False

    def start(self) -> None:
        """Start the process, if there is none; its imports take seconds."""
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # nothing is computed
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
            )  # fmt: skip
            self._calls = 0

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a function returns, or raise what it raises.

        Raises:
            ConfigError: the process died, and so did a second one.
        """
        request = pickle.dumps((function, args, kwargs))
        code = 0
        for _ in range(_TRIES):
            if self._calls >= _MOST:
                self._kill()
            self.start()
            answer = self._ask(request)
            if answer is not None:
                good, value = pickle.loads(answer)
                if good:
                    return value
                raise value
            code = self._end()
            if self._stopped:
                break
        raise ConfigError(
            f"The process that simulated a training step died, and so did a second one ({_died(code)}). Measure a "
            "short run instead: adapterlab train --dry-run."
        )

    def stop(self) -> None:
        """Kill the process from another thread; the call that it was busy with fails."""
        self._stopped = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        self._stopped = True
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._end()

    def _ask(self, request: bytes) -> bytes | None:
        """The answer, or None when the process is no more."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._calls += 1
        try:
            _write(self._process.stdin, request)
        except OSError:
            return None
        return _read(self._process.stdout)

    def _end(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        with contextlib.suppress(OSError):
            process.communicate()
        if self._log is not None:
            self._log.close()
        return process.returncode

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_CURRENT: ContextVar[Child | None] = ContextVar("adapterlab_plan_child", default=None)


@contextlib.contextmanager
def apart(child: Child | None = None) -> Iterator[Child]:
    """Run the simulations inside in a child process, a given one or a new one that ends with the context."""
    with Child() if child is None else contextlib.nullcontext(child) as child:
        token = _CURRENT.set(child)
        try:
            yield child
        finally:
            _CURRENT.reset(token)


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in the child of the surrounding `apart()`, or here where there is none or it cannot be sent."""
    child = _CURRENT.get()
    if child is None or not _can_travel(function, args, kwargs):
        return function(*args, **kwargs)
    return child.call(function, *args, **kwargs)


_PREPARED: ContextVar[list[Child] | None] = ContextVar("adapterlab_plan_prepared", default=None)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Start a process now that simulations inside share; where there is one core alone, none."""
    with Child() as child:
        ready = [child] if (os.cpu_count() or 1) > 1 else []
        for one in ready:
            one.start()
        token = _PREPARED.set(ready)
        try:
            yield
        finally:
            _PREPARED.reset(token)


def shared(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Call a function for each item: for the last one in the process that is `prepared()`, for the others here."""
    ready = _PREPARED.get()
    if not ready or len(items) < 2 or not _can_travel(function, items):
        return [function(item) for item in items]
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(ready[0].call, function, items[-1])
        return [*(function(item) for item in items[:-1]), last.result()]


def processes() -> int:
    """How many children work at once: one for two cores, and two at least."""
    return max(2, (os.cpu_count() or 1) // 2)


def each(
    jobs: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]],
    processes: int,
    done: Callable[[str, int], None] = lambda key, count: None,
) -> tuple[dict[str, Any], dict[str, AdapterlabError]]:
    """Call functions in a few processes at once.

    Args:
        jobs: function, arguments and keyword arguments by name.
        processes: how many.
        done: told of every job that has ended, and how many have.

    Returns:
        Results, and the errors of the library, by name; in the order of the jobs. Other errors are raised.
    """
    idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
    count = max(1, min(processes, len(jobs)))
    ready = _PREPARED.get() or []
    children = [ready.pop() if ready else Child() for _ in range(count)]  # a prepared one ends with the others below
    for child in children:
        idle.put(child)

    def run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _can_travel(function, args, kwargs):
            with _HERE:
                return function(*args, **kwargs)
        child = idle.get()
        try:
            return child.call(function, *args, **kwargs)
        finally:
            idle.put(child)

    results: dict[str, Any] = {}
    errors: dict[str, AdapterlabError] = {}
    pool = ThreadPoolExecutor(len(children))
    waiting = {pool.submit(run, *job): key for key, job in jobs.items()}
    try:
        for count, future in enumerate(as_completed(waiting), 1):
            key = waiting[future]
            try:
                results[key] = future.result()
            except AdapterlabError as error:
                errors[key] = error
            done(key, count)
    finally:  # after an interruption, too, nobody waits for what is running
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.stop()
        pool.shutdown()
        for child in children:
            child.close()
    return ({key: results[key] for key in jobs if key in results}, {key: errors[key] for key in jobs if key in errors})


_HERE = threading.Lock()  # modes of torch belong to a thread, but what a simulation patches does not


def _can_travel(*what: Any) -> bool:
    """Say whether another process can make the same objects: classes of a script's main part it cannot."""
    try:
        return b"__main__" not in pickle.dumps(what)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False


def _died(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


def _answer(request: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(request)
        gc.freeze()  # what libraries brought is not looked through whenever a simulation tidies up
        return pickle.dumps((True, function(*args, **kwargs)))
    except Exception as error:  # the parent raises it
        try:
            return pickle.dumps((False, error))
        except Exception:
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))


def _asked() -> bool:
    """Say whether a request is there already: reading it imports what it needs, and no more."""
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # a system that cannot tell
        return False


def _serve() -> None:
    """Answer requests until the parent is gone; what functions print goes to the log."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if not _asked():
        importlib.import_module("adapterlab.plan.planning")  # while nobody waits
    while (request := _read(sys.stdin.buffer)) is not None:
        _write(answers, _answer(request))


if __name__ == "__main__":
    _serve()

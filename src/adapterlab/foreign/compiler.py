"""Small libraries in C that are compiled where they run, when they are first needed, and kept.

What lies in the folder of kept libraries is executed, so nobody else may write to it, or to a library in it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from adapterlab.errors import BuildError
from adapterlab.foreign.processor import facts
from adapterlab.paths import home

_COMPILERS = ("cc", "gcc", "clang")
# GCC takes some fused multiplications apart, where it thinks that the processor likes that, so that the same sum would
# be rounded in one way here and in another way there.
_ALWAYS = ("-O3", "-std=gnu11", "-fPIC", "--param=avoid-fma-max-bits=0")
# The first with which it can be built and loaded. OpenMP's calls are left open when the library is linked: the runtime
# that torch has loaded for all answers them, so that both share their threads. A second one would fight for the cores.
_TRIED = (("-march=native", "-fopenmp"), ("-march=native",), ())
_SECONDS = 120  # for the compiler
_OF_A_PROCESSOR = ("vendor_id", "cpu family", "model name", "flags", "CPU implementer", "CPU part", "Features")


def library(source: Path) -> ctypes.CDLL:
    """Compile a file in C for this machine, unless that was done, and load it.

    It is kept in the folder `native` of `paths.home`, under a digest of the source, the compiler, its options and the
    processor.

    Raises:
        BuildError: there is no compiler, it fails, or the folder is not safe, with the reason.
    """
    if sys.platform != "linux":
        raise BuildError(f"it is compiled on Linux alone, and this is {sys.platform}")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"there is no C compiler ({', '.join(_COMPILERS)}) on this machine")
    folder, why = _private(home() / "native"), ""
    given = (source.read_bytes(), _run(folder, compiler, "--version"), os.path.realpath(compiler), _processor())
    for flags in _TRIED:
        facts = (*given, _ALWAYS, flags)
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        file = folder / f"{source.stem}-{key}.so"
        if file.is_symlink() or file.exists():
            _check_own(file)
        try:
            if not file.exists():
                _compile(compiler, flags, source, file)
            return ctypes.CDLL(str(file))
        except (BuildError, OSError) as error:
            why = why or str(error)  # the others fail for the same reason, or for one that says less
    raise BuildError(why)


def _private(folder: Path) -> Path:
    """Make a folder that nobody else writes to, at a place that nobody else can take away.

    Raises:
        BuildError: it cannot be made, or others may write there.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        found = folder.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise BuildError(f"{folder} must belong to this user alone: remove it, or set ADAPTERLAB_HOME elsewhere")
        for place in folder.parents:
            mode = place.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise BuildError(f"everybody may write to {place}: set ADAPTERLAB_HOME to a folder of your own")
    except OSError as error:
        raise BuildError(f"{folder} cannot be made: {error.strerror or error}") from error
    return folder


def _compile(compiler: str, flags: tuple[str, ...], source: Path, file: Path) -> None:
    """Make a library beside its place, and put it there in one step.

    Raises:
        BuildError: the compiler fails.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as name:
            work = Path(name)
            _run(work, compiler, *_ALWAYS, *flags, "-c", str(source), "-o", str(work / "made.o"))
            _run(work, compiler, "-shared", str(work / "made.o"), "-lm", "-o", str(work / "made.so"))
            (work / "made.so").chmod(0o500)
            (work / "made.so").replace(file)
    except OSError as error:
        raise BuildError(f"{file} cannot be made: {error.strerror or error}") from error


def _run(work: Path, compiler: str, *arguments: str) -> str:
    """Run the compiler with its own files in a folder, and return what it says."""
    try:
        done = subprocess.run(
            [compiler, *arguments], cwd=work, env={**os.environ, "TMPDIR": str(work), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        telling = (line for word in (os.strerror(errno.ENOSPC), "error", "") for line in lines if word in line)
        said = next(telling, f"exit code {done.returncode}")
        raise BuildError(f"{compiler} failed: {said[:300]}")
    return done.stdout


def _check_own(file: Path) -> None:
    """Refuse a library that somebody else can have written.

    Raises:
        BuildError: somebody else can.
    """
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise BuildError(f"{file} was not written by this user alone: remove it")


def _processor() -> str:
    """What of a processor decides about its instructions."""
    found = {name: value for name, value in facts().items() if name in _OF_A_PROCESSOR}
    return f"{platform.machine()} {sorted(found.items())}"

"""The exception tree. Everything the library raises on purpose is an `AdapterlabError`.

    AdapterlabError
    ├── ConfigError            a setting is unknown, of the wrong type or out of range
    │   └── TargetError        a target entry matches nothing, or a kind of module the method cannot adapt
    ├── AttachError            an adapter cannot be put on this model (name taken, conflict, unsupported module)
    ├── MergeError             a merge or restore would be wrong
    ├── ModelError             a base model is unknown, damaged or cannot be fetched
    ├── DataError              rows are missing, malformed, or leave nothing to train on
    ├── FormatError            an adapter folder or checkpoint is damaged, foreign, or made for another base
    ├── TrainingError          training cannot go on
    │   ├── NotTrainingError   what should train did not: no gradient, a non-finite one, or unchanged bits
    │   └── RankError          another process of the run ended before its time
    ├── ServingError           a server cannot do what is asked of it
    │   ├── UnknownAdapterError   no adapter of this name is registered
    │   ├── UnusableAdapterError  an adapter is damaged, or cannot be served
    │   └── BusyError             there is no room now; it may be asked for again
    ├── BuildError             a kernel cannot be compiled here, and what it computes is computed in another way
    ├── OutputError            a folder or file cannot be written, or would be overwritten
    └── MissingDependencyError an optional package is needed

A message names the rule broken, the value received, the nearest valid choices and the next step.
The command line prints the message alone and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapterlabError(Exception):
    """Base class of all errors raised on purpose by adapterlab."""


class ConfigError(AdapterlabError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class TargetError(ConfigError):
    """A target entry matches no module, or only modules the method cannot adapt."""


class AttachError(AdapterlabError):
    """An adapter cannot be attached to this model."""


class MergeError(AdapterlabError):
    """A merge or a restore would give a wrong result."""


class ModelError(AdapterlabError):
    """A base model is unknown, damaged, or cannot be fetched."""


class DataError(AdapterlabError, ValueError):
    """Rows are missing, malformed, or leave nothing to train on."""


class FormatError(AdapterlabError):
    """An adapter folder or checkpoint is damaged, foreign, or made for another base model."""


class TrainingError(AdapterlabError):
    """Training cannot go on."""


class NotTrainingError(TrainingError):
    """A tensor that should train received no finite, non-zero gradient, or did not change."""


class RankError(TrainingError):
    """Another process of the run ended before its time, and this one ends with it.

    Attributes:
        rank: of the process that ended first.
    """

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.rank = rank


class ServingError(AdapterlabError):
    """A server cannot do what is asked of it."""


class UnknownAdapterError(ServingError):
    """No adapter of this name is registered with a server."""


class UnusableAdapterError(ServingError):
    """An adapter is damaged, or cannot be served on this base."""


class BusyError(ServingError):
    """A server has no room now, drains, or is stopped."""


class BuildError(AdapterlabError):
    """A kernel cannot be compiled or used on this machine."""


class OutputError(AdapterlabError, OSError):
    """A folder or file cannot be written, or would be overwritten."""


class MissingDependencyError(AdapterlabError, ImportError):
    """An optional package is needed for what was asked."""


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """Say which of `choices` come closest to `word`, as the end of an error message.

    Args:
        word: what was received.
        choices: what would have been valid.
        n: how many to name.

    Returns:
        "Nearest: a, b, c." or, when nothing is close, "Valid: a, b, c, ...".
    """
    pool = sorted(set(choices))
    close = difflib.get_close_matches(word, pool, n=n, cutoff=0.5)
    if close:
        return f"Nearest: {', '.join(close)}."
    shown = ", ".join(pool[:12]) + (", ..." if len(pool) > 12 else "")
    return f"Valid: {shown}." if pool else "There is nothing to choose from."


def require(module: str, extra: str, why: str) -> None:
    """Check that an optional package can be imported.

    Args:
        module: import name of the package.
        extra: the extra of adapterlab that brings it.
        why: what it is needed for, as "to ...".

    Raises:
        MissingDependencyError: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise MissingDependencyError(
            f"The package {module!r} is needed {why} and is not installed. Install it with: "
            f"pip install 'adapterlab[{extra}]' (in a checkout: pip install -e '.[{extra}]')."
        )

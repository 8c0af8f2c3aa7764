"""The software that does a comparison's jobs, which is the same wherever they run, or figures could not be compared."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from adapterlab.errors import ConfigError
from adapterlab.foreign.versions import versions


class Software(BaseModel):
    """What a process would do a job with.

    Attributes:
        versions: of Python (without its last part), of this package and of those it stands on.
        sources: SHA-256 of this package's modules, since a checkout changes more often than its version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[str, str]
    sources: str

    @classmethod
    def here(cls) -> Self:
        """Return that of this process."""
        found = versions()
        return cls(versions={**found, "python": found["python"].rpartition(".")[0]}, sources=_sources())

    def check(self, place: str) -> None:
        """Check that this process has the same.

        Args:
            place: where this process runs, for the message.

        Raises:
            ConfigError: it has not; all differences are in the message.
        """
        here = self.here()
        names = dict.fromkeys([*self.versions, *here.versions])
        differing = [
            f"  {name}: {self.versions.get(name, 'none')} there, {here.versions.get(name, 'none')} here"
            for name in names
            if self.versions.get(name) != here.versions.get(name)
        ]
        if not differing and self.sources != here.sources:
            differing = [f"  the sources of adapterlab: {self.sources[:12]} there, {here.sources[:12]} here"]
        if differing:
            raise ConfigError(
                f"{place} has other software than the process that opened the comparison, and their figures could not "
                "be compared:\n" + "\n".join(differing) + "\nInstall the same versions on all machines, or start the "
                "comparison again from this one."
            )


@functools.cache
def _sources() -> str:
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return found.hexdigest()

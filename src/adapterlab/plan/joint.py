"""What several runs on one base need together, and which can begin at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterlab.plan.process import of_base
from adapterlab.plan.result import Plan, Verdict, verdict
from adapterlab.train.together import admits


@dataclass(frozen=True)
class Joint:
    """Plans of runs that share a base.

    Attributes:
        plans: of each run by itself.
        base: bytes of the process, or of the device's memory, with the base alone.
        limit: bytes the device has; None when it is not known.
    """

    plans: Sequence[Plan]
    base: int
    limit: int | None

    @property
    def needs(self) -> list[int]:
        """Bytes that each run takes beside the base at its peak; in one pass they add up."""
        return [max(0, plan.process - self.base) for plan in self.plans]

    @property
    def room(self) -> int | None:
        """Bytes beside the base."""
        return None if self.limit is None else max(0, self.limit - self.base)

    @property
    def process(self) -> int:
        """Bytes at the peak with all runs at once."""
        return self.base + sum(self.needs)

    @property
    def verdict(self) -> Verdict:
        """Whether all fit at once; `tight` is within the error of the estimate."""
        return verdict(self.process, self.plans[0].band[1], self.limit)

    @property
    def at_once(self) -> list[bool]:
        """Which runs begin at once; the others wait until some have ended."""
        begun: list[int | None] = []
        found = []
        for need in self.needs:
            found.append(admits(need, begun, self.room))
            begun += [need] if found[-1] else []
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        runs = [
            {"need": need, "at_once": now, "plan": plan.to_json()}
            for plan, need, now in zip(self.plans, self.needs, self.at_once, strict=True)
        ]
        return {
            "base": self.base, "process": self.process, "limit": self.limit, "verdict": self.verdict, "runs": runs,
            "separate_processes": sum(plan.process for plan in self.plans),
        }  # fmt: skip


def together(plans: Sequence[Plan]) -> Joint:
    """Put the plans of runs on one base together."""
    return Joint(list(plans), of_base(plans[0]), plans[0].limit)

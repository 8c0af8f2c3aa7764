"""Who comes next: virtual counters of the tokens that tenants, and the adapters of each, were given.

After "Fairness in Serving Large Language Models" (arXiv 2401.00588): the one that was given least comes first, and
whoever comes back after a pause starts at the least of those that are there, so that nobody saves up.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

GENERATED = 2.0  # a generated token costs a pass over all weights for itself; one of a prompt shares it with others


class Counters:
    """What each of several was given."""

    def __init__(self) -> None:
        self._given: dict[Hashable, float] = {}

    def __getitem__(self, who: Hashable) -> float:
        return self._given.get(who, 0.0)

    def join(self, who: Hashable, others: Iterable[Hashable]) -> None:
        """Let somebody come (back), who has nothing waiting or running, beside others that do."""
        least = min((self[other] for other in others), default=None)
        if least is None:
            self._given.clear()  # nobody is left to compare with
        else:
            self._given[who] = max(self[who], least)

    def charge(self, who: Hashable, tokens: float) -> None:
        """Note what somebody was given."""
        self._given[who] = self[who] + tokens

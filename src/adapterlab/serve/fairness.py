"""Who comes next: virtual counters of the tokens that tenants, and the adapters of each, were given.

After "Fairness in Serving Large Language Models" (arXiv 2401.00588): the one that was given least comes first, and
whoever comes back after a pause starts at the least of those that are there, so that nobody saves up.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

_SPARE = 64  # of those that went, whom it does not pay to look for
GENERATED = 2.0  # a generated token costs a pass over all weights for itself; one of a prompt shares it with others


class Counters:
    """What each of several was given."""

    def __init__(self) -> None:
        self._given: dict[Hashable, float] = {}

    def __getitem__(self, who: Hashable) -> float:
        return self._given.get(who, 0.0)

    def __len__(self) -> int:
        return len(self._given)

    def join(self, who: Hashable, others: Collection[Hashable]) -> None:
        """Let somebody come (back), who has nothing waiting or running, beside others that do."""
        least = min((self[other] for other in others), default=None)
        if least is None:
            self._given.clear()  # nobody is left to compare with
            return
        self._given[who] = max(self[who], least)
        if len(self._given) > 2 * (len(others) + _SPARE):
            # Who went with no more than the least would come back with just that.
            there = {who, *others}
            self._given = {one: given for one, given in self._given.items() if given > least or one in there}

    def charge(self, who: Hashable, tokens: float) -> None:
        """Note what somebody was given."""
        self._given[who] = self[who] + tokens

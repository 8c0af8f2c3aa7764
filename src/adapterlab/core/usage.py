"""How much the parts of mixtures are used, as people see it: the share of the weight that each part got."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterlab.foreign.roles import role_of

LOAD = "load"  # under this name a line of metrics.jsonl has the shares of each part, by the path of the module
ALONE = 0.95  # a part with more than this share is as good as alone
_SHOWN = 4

Load = Mapping[str, Sequence[float]]


def shares(sums: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Return the shares of parts from sums of their weights, which several processes may have; to four digits."""
    total: dict[str, list[float]] = {}
    for some in sums:
        for path, values in some.items():
            before = total.get(path, [0.0] * len(values))
            total[path] = [a + b for a, b in zip(before, values, strict=True)]
    return {path: [round(v / sum(values), 4) for v in values] for path, values in total.items() if sum(values) > 0}


def even(share: Sequence[float]) -> float:
    """The effective number of parts: exp of the entropy of their shares, from 1 for one alone to all of them."""
    whole = sum(share)
    return math.exp(-sum(p / whole * math.log(p / whole) for p in share if p > 0))


def means(load: Load) -> dict[str, float]:
    """What a tracker gets: means over the modules of the largest share and of the effective number of parts."""
    return {
        f"{LOAD}/largest": sum(map(max, load.values())) / len(load),
        f"{LOAD}/effective": sum(map(even, load.values())) / len(load),
    }


def described(history: Mapping[int, Load]) -> dict[str, Any]:
    """Return figures of a run as plain data: the shares at last, and how even they were from the first step on."""
    step, load = list(history.items())[-1]
    return {
        "step": step,
        "shares": {path: list(share) for path, share in load.items()},
        "effective": {path: even(share) for path, share in load.items()},
        "collapsed": collapsed(load),
        "history": [{"step": at, **means(then)} for at, then in history.items()],
    }


def collapsed(load: Load) -> str:
    """Name the modules in which one part is as good as alone, or ""."""
    alone = {path: share.index(max(share)) for path, share in load.items() if len(share) > 1 and max(share) > ALONE}
    if not alone:
        return ""
    if len(alone) == len(load):
        roles = {role_of(path) or path.rpartition(".")[2] for path in alone}
        where = f"in all {len(load)} modules ({', '.join(sorted(roles))})"
    else:
        named = [f"{path} ({part})" for path, part in alone.items()]
        where = f"in {len(alone)} of {len(load)} modules: {', '.join(named[:_SHOWN])}"
        where += ", ..." if len(named) > _SHOWN else ""
    return f"collapsed: one expert has more than {ALONE:.0%} of the weight {where}"

"""Ranks that differ by module, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from adapterlab.foreign.roles import role_of


def ranks_by_role(ranks: Mapping[str, int]) -> dict[str, str]:
    """Say which ranks the modules of each role have, in the order of the model; nothing where all are alike."""
    if len(set(ranks.values())) < 2:
        return {}
    roles: dict[str, list[int]] = defaultdict(list)
    for path, rank in ranks.items():
        roles[role_of(path) or path.rpartition(".")[2]].append(rank)
    said = [f"{role} {' '.join(map(str, found))}" for role, found in roles.items()]
    return {"ranks": f"{sum(ranks.values())} in all, layer by layer: {'; '.join(said)}"}

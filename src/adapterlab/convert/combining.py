"""Several adapters into one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapterlab.convert.blending import HOWS, SUMS, How, blend
from adapterlab.convert.building import Conversion, Draft
from adapterlab.convert.changes import MATRICES, AdapterChanges, Change
from adapterlab.convert.entries import United, own_entries, unite
from adapterlab.convert.low_rank import Factors, Fit, check_size, fit, wide
from adapterlab.errors import ConfigError, nearest
from adapterlab.hosts import Host

_DENSITY = 0.5
_LOW_RANK = ("cat", "svd")  # these speak of factors


def combine(
    host: Host,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    how: How = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    into: str = "combined",
    progress: Callable[[str, int, int], None] | None = None,
) -> Conversion | United:
    """Make one adapter of several, of whatever linear methods.

    The combination is made of the changes ΔWᵢ that merging would write, module by module, and does not depend on how
    an adapter factors its own. A module that only some adapters change takes what those have.

    | how               | the change Δ                                                  | rank without `rank`        |
    |-------------------|---------------------------------------------------------------|----------------------------|
    | `linear`          | Σ wᵢ Δᵢ                                                       | that of Δ: exact           |
    | `cat`             | Σ wᵢ Δᵢ, factors side by side                                 | sum of the ranks: exact    |
    | `svd`             | Σ wᵢ Δᵢ                                                       | the largest of the inputs' |
    | `ties`            | trim, elect a sign, mean of those that agree (2306.01708)     | the largest of the inputs' |
    | `dare_linear`     | drop at random and rescale, then Σ wᵢ Δᵢ (2311.03099)         | the largest of the inputs' |
    | `dare_ties`       | drop at random and rescale, then elect and mean               | the largest of the inputs' |
    | `magnitude_prune` | keep the largest entries, then Σ wᵢ Δᵢ                        | the largest of the inputs' |

    Biases, norms and modules trained in full are combined in the same way, and kept exactly.

    The result is a LoRA. Of adapters that all own entries of the base it is one that owns the union of these instead,
    exactly, unless `rank`, `cat` or `svd` asks for factors; `density` is then a share of each one's entries.

    Args:
        host: of the model that carries the adapters.
        names: of the adapters.
        weights: one for each, of any sign; default: equal shares of one.
        how: see the table.
        rank: largest rank of a module's factors; not for `cat`.
        density: for `ties` and `magnitude_prune` the share of entries to keep, for DARE the probability to keep one;
            default 0.5.
        seed: of DARE's choices.
        into: name of the new adapter. It is attached, and not active.
        progress: called with the phase, the modules done, and their number.

    Returns:
        Rank and error against Δ of each module and of the whole; of entries their numbers, and how much they overlap.

    Raises:
        ConfigError: names, weights or options are not valid.
        MergeError: an adapter is not linear, or none of them changed a weight matrix.
        AttachError: the name `into` is taken, or an adapter is merged now.
    """
    weights = _checked(host, names, weights, how, rank, density)
    generator = torch.Generator().manual_seed(seed)
    draft = Draft()
    share = _DENSITY if density is None else density
    with host.using():
        if rank is None and how not in _LOW_RANK and own_entries(host, names):
            made = unite(host, names, weights, how, share, generator, into, progress)
            if made is not None:
                return made
        sources = [AdapterChanges(host, name) for name in names]
        paths = [site.path for site in host.all_sites() if any(site.path in s.sites for s in sources)]
        for done, path in enumerate(paths):
            found = [(w, c) for w, source in zip(weights, sources, strict=True) if (c := source.at(path)) is not None]
            if found:
                mixed, limit = _mix(found, how, share, generator)
                draft.add(mixed, functools.partial(_fitted, how=how, rank=rank, limit=limit))
            if progress:
                progress("combining", done + 1, len(paths))
        return draft.attach(host, into)


def _mix(found: list[tuple[float, Change]], how: str, density: float, generator: torch.Generator) -> tuple[Change, int]:
    """Combine the changes of one module; also the largest rank among them."""
    first = found[0][1]

    def mixed(pairs: list[tuple[float, Tensor]]) -> Tensor:
        ws, tensors = zip(*pairs, strict=True)
        return blend(tensors, ws, how, density, generator)

    dense = [(w, c.weight) for w, c in found if c.weight is not None]
    leaves = dict.fromkeys(leaf for _, c in found for leaf in c.others)
    others = {leaf: mixed([(w, c.others[leaf]) for w, c in found if leaf in c.others]) for leaf in leaves}
    with_weight = [(w, c) for w, c in found if c.weight is not None]
    change = Change(
        first.site,
        mixed(dense) if dense else None,
        others,
        _side_by_side(with_weight) if how in SUMS else None,
        math.sqrt(sum((w * c.floor) ** 2 for w, c in found)),
        any(c.whole for _, c in found),
    )
    return change, max((c.rank for _, c in with_weight), default=1) if first.site.kind in MATRICES else 1


def _side_by_side(found: list[tuple[float, Change]]) -> Factors | None:
    """The weighted sum as one product; None when an adapter has no factors."""
    parts = [(w, c.factors) for w, c in found if c.factors is not None]
    if not parts or len(parts) < len(found):
        return None
    return Factors(torch.cat([f.B for _, f in parts], 1), torch.cat([w * f.A for w, f in parts]))


def _fitted(change: Change, how: str, rank: int | None, limit: int) -> Fit:
    assert change.weight is not None  # only weights get factors
    if how == "cat" and change.factors is not None:
        return Fit(change.factors, float(torch.linalg.norm(wide(change.weight))), 0.0)
    if how in ("linear", "cat"):
        limited = rank
    else:
        limited = limit if rank is None else rank
    source = change.weight if change.factors is None else change.factors
    return fit(source, limited, floor=change.floor)


def _checked(
    host: Host,
    names: Sequence[str],
    weights: Sequence[float] | None,
    how: str,
    rank: int | None,
    density: float | None,
) -> list[float]:
    if not names:
        raise ConfigError(f"Name the adapters to combine. Attached: {', '.join(host.methods) or 'none'}.")
    for name in names:
        if name not in host.methods:
            raise ConfigError(f"There is no adapter {name!r} on this model. {nearest(name, host.methods)}")
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise ConfigError(f"{twice[0]!r} is named twice. Name each adapter once, and raise its weight instead.")
    if how not in HOWS:
        raise ConfigError(f"how={how!r} is unknown. {nearest(str(how), HOWS)}")
    if how in SUMS and density is not None:
        raise ConfigError(f"density={density} has no meaning for how={how!r}: nothing is left out. Remove it.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density} is not valid: it is a share, above 0 and at most 1.")
    if how == "cat" and rank is not None:
        raise ConfigError(f"rank={rank} has no meaning for how='cat', whose ranks add up. Choose how='svd' instead.")
    check_size(rank, None)
    found = [1 / len(names)] * len(names) if weights is None else [float(w) for w in weights]
    if len(found) != len(names):
        raise ConfigError(f"{len(names)} adapters need {len(names)} weights; received {len(found)}: {found}.")
    if not all(map(math.isfinite, found)) or not any(found):
        raise ConfigError(f"weights={found} are not valid: finite numbers, and not all zero.")
    return found

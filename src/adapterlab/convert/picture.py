"""A picture of an analysis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterlab.convert.analysis import Analysis
from adapterlab.core.usage import Load
from adapterlab.errors import require
from adapterlab.foreign.roles import role_of


def check_drawing() -> None:
    """Check that pictures can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "reports", "to draw a picture")


def draw(
    analyses: Mapping[str, Analysis], file: str | Path, rank: int = 4, loads: Mapping[str, Load] | None = None
) -> Path:
    """Draw one or more analyses below each other.

    For each the spectra, magnitude against direction, and by layer the ranks and what a lower rank would keep. For a
    mixture the share of the weight that each expert got, layers against experts, for each role.

    Args:
        analyses: by the name to show.
        file: PNG to write.
        rank: whose share of the energy is drawn.
        loads: of mixtures, by the name to show: shares of the experts by the path of the module.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.figure import Figure

    loads = loads or {}
    count = len(analyses) + len(loads)
    figure = Figure(figsize=(21, 4.2 * count), layout="constrained")
    strips = iter(figure.subfigures(count, 1, squeeze=False)[:, 0])
    for (name, found), strip in zip(analyses.items(), strips, strict=False):
        _changes(name, found, strip.subplots(1, 4), rank)
    for (name, load), strip in zip(loads.items(), strips, strict=True):
        _heat(name, load, strip)
    figure.savefig(file, dpi=120, format="png")
    return Path(file)


def _changes(name: str, found: Analysis, panels: Any, rank: int) -> None:
    left, right, ranks, energy = panels
    roles = list(dict.fromkeys(s.role or "other" for s in found.spectra))
    for spectrum in found.spectra:
        color = f"C{roles.index(spectrum.role or 'other') % 10}"
        values = [value / spectrum.singular_values[0] for value in spectrum.singular_values]
        left.plot(range(1, len(values) + 1), values, ".-", color=color, alpha=0.5)
    for index, role in enumerate(roles):
        chosen = [s for s in found.spectra if (s.role or "other") == role]
        xs, ys = [s.direction for s in chosen], [s.magnitude for s in chosen]
        right.scatter(xs, ys, color=f"C{index % 10}", label=role)
        layers, kept = [-1 if s.layer is None else s.layer for s in chosen], [s.rank for s in chosen]
        ranks.plot(layers, kept, "o-", color=f"C{index % 10}", alpha=0.6)
        energy.plot(layers, [s.share(rank) for s in chosen], "o-", color=f"C{index % 10}", alpha=0.6)
    left.axvline(rank, color="grey", linestyle=":")
    energy.set(title=f"share of the energy in rank {rank}", xlabel="layer (-1: in none)", ylim=(0, 1.05))
    left.set(title=f"{name}: spectra", xlabel="index", ylabel="singular value / largest", yscale="log")
    about = "" if found.correlation is None else f", correlation {found.correlation:+.2f}"
    right.set(title=f"magnitude and direction{about}", xlabel="change of direction ΔD", ylabel="of magnitude ΔM")
    right.legend()
    ranks.set(title="rank of the change", xlabel="layer (-1: in none)", ylabel="rank", ylim=(0, None))


def _heat(name: str, load: Load, strip: Any) -> None:
    """One map for each role; a layer with fewer experts than others has white places behind them."""
    roles: dict[str, list[Sequence[float]]] = {}
    for path, share in load.items():
        roles.setdefault(role_of(path) or path.rpartition(".")[2], []).append(share)
    panels, image = strip.subplots(1, len(roles), squeeze=False)[0], None
    for (role, layers), panel in zip(roles.items(), panels, strict=True):
        width = max(map(len, layers))
        grid = [[*share, *[math.nan] * (width - len(share))] for share in layers]
        image = panel.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        panel.set(title=f"{name}: {role}", xlabel="expert", ylabel="module of this role, from the input on")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.yaxis.get_major_locator().set_params(integer=True)
    strip.colorbar(image, ax=list(panels), label="share of the weight")

"""A picture of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapterlab.convert.analysis import Analysis
from adapterlab.errors import require


def check_drawing() -> None:
    """Check that pictures can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "reports", "to draw a picture")


def draw(analyses: Mapping[str, Analysis], file: str | Path, rank: int = 4) -> Path:
    """Draw one or more analyses below each other.

    For each the spectra, magnitude against direction, and by layer the ranks and what a lower rank would keep.

    Args:
        analyses: by the name to show.
        file: PNG to write.
        rank: whose share of the energy is drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(21, 4.2 * len(analyses)), layout="constrained")
    panels = figure.subplots(len(analyses), 4, squeeze=False)
    for (name, found), (left, right, ranks, energy) in zip(analyses.items(), panels, strict=True):
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
    figure.savefig(file, dpi=120, format="png")
    return Path(file)

"""A normal, B zero."""

from __future__ import annotations

from adapterlab.init._base import Initialiser, Place, Start, zero


class Gaussian(Initialiser):
    """A normal with standard deviation 1/r and B zero; for embeddings A zero and B standard normal."""

    def start(self, place: Place) -> Start:
        """Draw A."""
        return zero(place, std=1 / place.r)

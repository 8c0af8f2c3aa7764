"""Base models by name: a local folder, a hub id (`org/name`), or an alias of the catalogue.

    from adapterlab.models import catalogue, load_model, pull

    pull("smollm2-135m")                     # -> the folder it lies in, downloaded when need be
    model, tokenizer = load_model()          # the default model, ready for inference or for adapters

Asking where a model lies imports neither torch nor transformers; `load_model` does, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterlab.models.catalogue import DEFAULT, Entry, catalogue
from adapterlab.models.pulling import check, pull, resolve
from adapterlab.paths import home

if TYPE_CHECKING:
    from adapterlab.models.loading import load_model

__all__ = ["DEFAULT", "Entry", "catalogue", "check", "home", "load_model", "pull", "resolve"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from adapterlab.models.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

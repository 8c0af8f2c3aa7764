"""What a method may ask of the model that carries it: a `Host` is one, and so is whatever else answers to this."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.composition import Composition
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.core.targets import Targets


class Carrier(Protocol):
    """A model with adapters on it, as methods, their codecs and their starts see it."""

    @property
    def model(self) -> Any: ...  # with its adapters
    @property
    def state(self) -> State: ...  # what adapters share
    @property
    def methods(self) -> Mapping[str, Any]: ...  # attached methods by the adapter's name
    @property
    def patches(self) -> Mapping[str, Mapping[str, Any]]: ...  # owned base parameters by adapter and path

    # ---- looking: facts of the base model, adapters left out

    @property
    def backbone(self) -> nn.Module: ...  # without output or task head
    @property
    def layers(self) -> list[nn.Module]: ...  # the repeated blocks in order
    @property
    def attentions(self) -> list[nn.Module]: ...  # what `attend` can reach
    def sites(self, targets: Targets, kinds: Sequence[str] | None = None) -> list[Site]: ...  # what targets mean
    def all_sites(self) -> list[Site]: ...
    def site(self, module: nn.Module) -> Site: ...
    def path_of(self, module: nn.Module) -> str: ...
    def layer_of(self, path: str) -> tuple[str | None, int | None]: ...  # its stack of layers, and the index there
    def holding(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]: ...  # modules with these bare parameters
    def base_parameters(self, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]: ...  # not adapters', each once

    # ---- the four verbs, and their kin

    def wrap(self, name: str, where: Site | nn.Module, adapter: Adapter) -> None: ...  # around a module's call
    def attend(self, name: str, module: nn.Module, adapter: Adapter) -> None: ...  # inside the attention core
    def own(
        self,
        name: str,
        path: str,
        *,
        index: Tensor | None = None,
        chosen: Any = None,
        entire: bool = False,
        keep: bool = True,
    ) -> nn.Parameter: ...  # train a base parameter in place, or some of its entries
    def narrow(self, name: str) -> None: ...  # own the chosen entries of what was owned entire
    def share(self, name: str, key: str, module: nn.Module) -> nn.Module: ...  # what belongs to no single module
    def replace(self, name: str, path: str, derive: Callable[[Tensor], Tensor]) -> None: ...  # another frozen value
    def refresh(self, name: str) -> None: ...  # derive replaced values anew, after what they are made of has changed
    def unwrap(self, name: str, where: Site | nn.Module) -> None: ...
    def compose(
        self, name: str, part: str, method: Any, saved: Mapping[str, Tensor] | None = None
    ) -> None: ...  # attach another method as a part
    def settle(self, name: str, method: Any) -> None: ...  # the same with settings that attaching decided

    # ---- what an adapter consists of; keys of a composite's parts are name/part

    def adapters(self, name: str) -> dict[str, Adapter]: ...  # by the path of their module
    def part_methods(self, name: str) -> dict[str, Any]: ...
    def tensors(self, name: str) -> dict[str, Tensor]: ...  # all that saving must keep
    def state_dict(self, name: str) -> dict[str, Tensor]: ...  # copies of them
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None: ...  # all of them, checked
    def parameters(self, name: str) -> list[nn.Parameter]: ...  # what trains
    def named_parameters(self, name: str) -> dict[str, nn.Parameter]: ...

    # ---- switching

    @property
    def active(self) -> tuple[str, ...]: ...
    def detach(self, name: str) -> None: ...
    def activate(self, *names: str | Composition) -> None: ...
    def using(
        self, *names: str | Composition
    ) -> contextlib.AbstractContextManager[Any]: ...  # exactly these are live inside

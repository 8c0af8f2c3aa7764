"""AdamW that loses no update: parameters in half precision have float32 masters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterlab.foreign.sharding import is_part, laid_out

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
_HALF = (torch.bfloat16, torch.float16)
_FUSED = ("cpu", "cuda")


class AdamW(torch.optim.AdamW):
    """torch's AdamW; a half-precision parameter is updated through a float32 master and rounded from it.

    With lr 1e-5 most steps are smaller than half the distance between neighbouring bfloat16 numbers, and would be
    lost. Masters and moments are float32 and part of `state[p]` and of `state_dict()`, so a resumed run is bit-exact.
    Memory: 12 bytes a half-precision parameter, 8 bytes a float32 one.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._widened(with_gradients=True) as wide:
            super().step()
            for p, stand_in in wide:
                self.state[stand_in]["master"] = stand_in.detach()
                p.detach().copy_(stand_in)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; masters and moments keep their float32 bits."""
        with self._widened(with_gradients=False):  # torch casts the state to the dtype of its parameter
            super().load_state_dict(split_as_parameters(self, state_dict))

    @contextlib.contextmanager
    def _widened(self, *, with_gradients: bool) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
        """Let float32 parameters that hold the masters stand in for those in half precision, and yield both.

        Others take the place, and not only its data: a part of a parameter that is split among processes has none.
        """
        held = [p for g in self.param_groups for p in g["params"] if p.dtype in _HALF]
        narrow = [p for p in held if p.grad is not None] if with_gradients else held
        wide = [(p, nn.Parameter(master(self, p).detach().float())) for p in narrow]
        for p, stand_in in wide:
            stand_in.grad = None if p.grad is None else p.grad.float()
        self._exchange(wide)
        try:
            yield wide
        finally:
            self._exchange([(stand_in, p) for p, stand_in in wide])

    def _exchange(self, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Put other parameters in the place of some, with their state."""
        other = {id(old): new for old, new in pairs}
        for group in self.param_groups:
            group["params"] = [other.get(id(p), p) for p in group["params"]]
        for old, new in pairs:
            if old in self.state:
                self.state[new] = self.state.pop(old)


def adamw(
    params: Parameters,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """Make an AdamW, with the fused kernel where all parameters can use it.

    Args:
        params: parameters, or groups. A group may set any of the arguments below; its `lr_factor` multiplies `lr`.
        lr: learning rate.
        weight_decay: decoupled, times the learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
    """
    given: list[Any] = list(params)
    grouped = bool(given) and isinstance(given[0], dict)
    groups: list[dict[str, Any]] = [dict(group) for group in given] if grouped else [{"params": given}]
    for group in groups:
        group["params"] = list(group["params"])
        group["lr"] = group.get("lr", lr) * group.pop("lr_factor", 1.0)
    groups = [part for group in groups for part in _alike(group)]
    kinds = {p.device.type for group in groups for p in group["params"]}
    fused = bool(kinds) and kinds <= set(_FUSED)
    return AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused or None)


def _alike(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of parameters of which some are split among processes, as two: one kernel takes one kind."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for p in group["params"]:
        kinds.setdefault(is_part(p), []).append(p)
    return [{**group, "params": params} for params in kinds.values()] or [group]


def split_as_parameters(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state in which tensors of a parameter's shape are split among processes as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
    states = dict(state_dict["state"])
    for i, p in zip(numbers, parameters, strict=False):  # torch refuses another number, with a message of its own
        if is_part(p) and i in states:
            states[i] = {
                key: laid_out(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v
                for key, v in states[i].items()
            }
    return {**state_dict, "state": states}


def master(optimizer: Optimizer, p: nn.Parameter) -> Tensor:
    """Return the values that the optimizer really holds for a parameter: its master, or the parameter itself."""
    held: Tensor = optimizer.state.get(p, {}).get("master", p.data)
    return held

"""An optimizer made of transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapterlab.errors import ConfigError
from adapterlab.foreign.sharding import laid_out, whole
from adapterlab.optim.transforms import Adam, Transform, WeightDecay

_HALF = (torch.bfloat16, torch.float16)


class Chain(Optimizer):
    """p ← p − lr · update, where the update is the gradient after a sequence of transforms.

    The first transform stands outermost: it sees the gradient first and the update last. So `[WeightDecay(w),
    Project(r, every), Adam()]` runs Adam in the subspace, maps its update back, then adds the decay.

    Parameter groups may have their own `lr` and `transforms`. All numbers are kept in float32 (float64 for float64
    parameters), and `state_dict` restores them to the bit. A parameter in half precision has a float32 master in
    `state[p]["master"]`, unless `masters` is off.

    Of a parameter that is split among processes each treats its own rows; where a transform looks at more than single
    entries, each gathers the gradient and computes all of it.

    Example:
        >>> p = nn.Parameter(torch.ones(2))
        >>> optimizer = Chain([p], lr=0.5, transforms=[WeightDecay(0.2)])
        >>> p.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()
        >>> p.data
        tensor([0.4000, 0.9000])
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        transforms: Sequence[Transform] = (),
        *,
        masters: bool = True,
    ):
        """Set what is trained and how.

        Args:
            params: parameters, or groups of them.
            lr: learning rate of groups that bring none.
            transforms: of groups that bring none.
            masters: keep float32 masters of half-precision parameters; without them, small updates are lost.
        """
        self._default = tuple(transforms)
        self._transforms: list[tuple[Transform, ...]] = []  # by group; not in the groups, which are saved as plain data
        self._masters = masters
        super().__init__(params, {"lr": lr})  # type: ignore[arg-type]

    @classmethod
    def like(
        cls,
        plain: Optimizer,
        around: Sequence[Sequence[Transform]],
        *,
        outside: Sequence[Sequence[Transform]] = (),
        masters: bool = True,
    ) -> Chain:
        """Do what an AdamW does, with other transforms around its Adam.

        Args:
            plain: an optimizer with `lr`, `betas`, `eps` and `weight_decay` in its groups; it is not used any more.
            around: for each of its groups, the transforms between weight decay and Adam; one that ends with an Adam
                brings its own.
            outside: for each of its groups, transforms that see weight decay too, such as masks; default: none.
            masters: as for `Chain`.

        Raises:
            ConfigError: the optimizer is of another kind.
        """
        lacking = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in plain.defaults]
        if lacking:
            raise ConfigError(
                f"This method rebuilds an AdamW, and received {type(plain).__name__}, which has no {lacking[0]}. "
                "Let `make` return an AdamW, such as adapterlab.optim.adamw."
            )
        groups = [
            {
                "params": group["params"],
                "lr": group["lr"],
                "transforms": (*outer, WeightDecay(group["weight_decay"]), *_with_adam(inner, group)),
            }
            for group, inner, outer in zip(plain.param_groups, around, outside or [()] * len(around), strict=True)
        ]
        return cls(groups, lr=plain.defaults["lr"], masters=masters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which may bring its own `lr` and `transforms`."""
        param_group = dict(param_group)
        transforms = tuple(param_group.pop("transforms", self._default))
        super().add_param_group(param_group)
        self._transforms.append(transforms)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, transforms in zip(self.param_groups, self._transforms, strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["lr"], transforms)
        return loss

    def _update(self, p: nn.Parameter, lr: float, transforms: tuple[Transform, ...]) -> None:
        state, values, half = self.state[p], p.data, p.dtype in _HALF
        if half:
            values = state["master"] if "master" in state else p.data.float()
            if self._masters:
                state["master"] = values
        update, seen = p.grad.to(values.dtype), values  # type: ignore[union-attr]
        if not all(transform.by_entry for transform in transforms):
            update, seen = whole(update), whole(values)
        backs = []
        for key, transform in ((str(i), t) for i, t in enumerate(transforms)):
            if key not in state:
                state[key] = transform.init(update)
            update, back = transform.update(update, state[key], seen)
            if back is not None:
                backs.append(back)
        for back in reversed(backs):
            update = back(update)
        values.add_(laid_out(update, values), alpha=-lr)
        if half:
            p.data.copy_(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, to the bit."""
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the dtype of its parameter: take the numbers again as they are.
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [(p, t) for g, t in zip(self.param_groups, self._transforms, strict=True) for p in g["params"]]
        for number, (p, transforms) in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                own_rows = all(transform.by_entry for transform in transforms)
                self.state[p] = {
                    key: _copied(value, p, split=own_rows or key == "master")
                    for key, value in state_dict["state"][number].items()
                }

    def __getstate__(self) -> dict[str, Any]:
        """Keep the transforms in copies and pickles, which torch would leave out."""
        own = {key: self.__dict__[key] for key in ("_default", "_transforms", "_masters")}
        return {**super().__getstate__(), **own}


def _with_adam(inner: Sequence[Transform], group: Mapping[str, Any]) -> tuple[Transform, ...]:
    own = bool(inner) and isinstance(inner[-1], Adam)
    return tuple(inner) if own else (*inner, Adam(group["betas"], group["eps"]))


def _copied(value: Any, p: Tensor, *, split: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner, p, split=split) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    copied = value.detach().to(p.device, copy=True)
    return laid_out(copied, p) if split and value.shape == p.shape else copied

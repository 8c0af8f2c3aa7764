"""Steps that a gradient takes on its way to an update; `Chain` puts them together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

State = dict[str, Any]
Back = Callable[[Tensor], Tensor]
Side = Literal["std", "reverse_std", "left", "right", "full"]


class Transform:
    """One step. It sees the gradient on the way in and, if it returns a function, the update on the way out.

    All numbers about a parameter live in its `state`, a dictionary of tensors and plain numbers that is saved with the
    optimizer; the transform itself is constant.

    Class attributes:
        by_entry: what becomes of an entry depends on that entry alone, so that each process can treat its own rows.
    """

    by_entry: ClassVar[bool] = True

    def init(self, g: Tensor) -> State:
        """Return the state for a parameter whose gradients arrive here in the shape and dtype of `g`."""
        return {}

    def update(self, g: Tensor, state: State, p: Tensor) -> tuple[Tensor, Back | None]:
        """Transform a gradient.

        Args:
            g: what the transform before this one returned.
            state: of this transform and parameter; change it in place.
            p: the parameter's values, or its float32 master; read only.

        Returns:
            The gradient for the transforms after this one, and what to do with the update they make of it (None:
            pass it on).
        """
        raise NotImplementedError


class Adam(Transform):
    """Bias-corrected Adam: m̂ / (√v̂ + eps), with moments in the shape that the gradient has here.

    With `early` eps joins √v before the bias correction, so that it weighs 1 / √(1 − β₂ᵗ) times as much: in the first
    steps entries far below eps, such as what rounding leaves of zeros, do not grow to full steps.

    With `each` every entry counts its own steps, so that one that begins later is corrected as if it were the first.
    """

    def __init__(
        self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, *, early: bool = False, each: bool = False
    ):
        self.betas, self.eps, self.early, self.each = betas, eps, early, each

    def init(self, g: Tensor) -> State:
        return {
            "step": torch.zeros_like(g) if self.each else 0, "mean": torch.zeros_like(g), "square": torch.zeros_like(g)
        }  # fmt: skip

    def update(self, g: Tensor, state: State, p: Tensor) -> tuple[Tensor, Back | None]:
        first, second = self.betas
        state["step"] += 1
        state["mean"].lerp_(g, 1 - first)
        state["square"].mul_(second).addcmul_(g, g, value=1 - second)
        left = _left(second, state["step"])
        root = (state["square"] / left).sqrt_().add_(self.eps / left**0.5 if self.early else self.eps)
        return (state["mean"] / _left(first, state["step"])).div_(root), None


def _left(beta: float, step: Any) -> Any:
    """1 − βᵗ, for a number of steps or one for each entry, where a power in float32 would lose digits."""
    return -(step * math.log(beta)).expm1_() if isinstance(step, Tensor) else 1 - beta**step


class WeightDecay(Transform):
    """Decoupled weight decay: adds `decay` · p to the update, whatever the transforms after it do."""

    def __init__(self, decay: float):
        self.decay = decay

    def update(self, g: Tensor, state: State, p: Tensor) -> tuple[Tensor, Back | None]:
        return g, (lambda update: update.add(p, alpha=self.decay)) if self.decay else None


class Mask(Transform):
    """Only some entries move: the update is masked, not just the gradient, so decay and momentum cannot leak.

    Put it before `WeightDecay`. It is for one parameter: give that a group of its own.
    """

    by_entry: ClassVar[bool] = False

    def __init__(self, index: Tensor):
        """Set the entries.

        Args:
            index: flat row-major positions `[k]`.
        """
        self.index = index

    def update(self, g: Tensor, state: State, p: Tensor) -> tuple[Tensor, Back | None]:
        return self._kept(g), self._kept

    def _kept(self, values: Tensor) -> Tensor:
        kept = torch.zeros_like(values)
        kept.view(-1)[self.index] = values.reshape(-1)[self.index]
        return kept


class Project(Transform):
    """What comes after it works in a subspace of rank r of the gradient, which is chosen anew every few steps.

    For a gradient `[m, n]`: right, R = G Qᵀ `[m, r]` with Q the first r right singular vectors; left, R = Pᵀ G `[r, n]`
    with P the left ones; full, both, `[r, r]`. `std` takes the shorter side, `reverse_std` the longer one. The moments
    of a later `Adam` are kept when the subspace changes, as in the paper.
    """

    by_entry: ClassVar[bool] = False

    def __init__(self, r: int, every: int, scale: float = 1.0, side: Side = "std"):
        """Set the subspace.

        Args:
            r: its rank; at most the shorter side of the matrix is used.
            every: steps between two choices of it.
            scale: factor of the update.
            side: which side of the gradient is projected.
        """
        self.r, self.every, self.scale, self.side = r, every, scale, side

    def init(self, g: Tensor) -> State:
        return {"step": 0}

    def update(self, g: Tensor, state: State, p: Tensor) -> tuple[Tensor, Back | None]:
        if state["step"] % self.every == 0:
            state.update(self.basis(g))
        state["step"] += 1
        left, right = state.get("left"), state.get("right")
        low = g if left is None else left.T @ g
        low = low if right is None else low @ right.T

        def back(update: Tensor) -> Tensor:
            update = update if left is None else left @ update
            return self.scale * (update if right is None else update @ right)

        return low, back

    def basis(self, g: Tensor) -> State:
        """The subspace that fits a gradient `[m, n]` best: `left` `[m, r]`, `right` `[r, n]`, or both."""
        side = self.side
        if side in ("std", "reverse_std"):  # decided by the shape alone, so it never changes for a matrix
            side = "right" if (g.shape[0] >= g.shape[1]) == (side == "std") else "left"
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        found = {"left": u[:, : self.r], "right": v[: self.r]}
        return {key: value.clone() for key, value in found.items() if side in (key, "full")}

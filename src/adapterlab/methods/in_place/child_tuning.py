"""Child-Tuning: update a part of the network, drawn anew in every step or chosen once by Fisher information."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from rich.progress import track
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches, MakeOptimizer, Method
from adapterlab.errors import AttachError, NotTrainingError
from adapterlab.methods.in_place import _chosen_parameters as chosen
from adapterlab.optim.chain import Chain
from adapterlab.optim.transforms import Back, State, Transform
from adapterlab.registry import register
from adapterlab.terminal import Terminal

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class ChildTuning(Method):
    """Update only a child network, a share p of the entries: another one in every step, or one for the whole run.

    f (task-free): θ ← θ − lr · (M / p) ⊙ u with M ~ Bernoulli(p) for each entry, drawn anew in every step of the
    optimizer, and u what the optimizer would do, weight decay included. An entry outside M keeps its bits in that step,
    and 1 / p keeps the mean of the steps what it was, whatever the optimizer. With `masked="gradient"`, as in the
    authors' code, g ← (M / p) ⊙ g instead, before the moments: momentum and weight decay then move the others too,
    and since Adam divides by its own scale, 1 / p does not keep the mean (√p of it is left).

    d (task-driven): F_i = mean over the training batches of g_i², with g the gradient of a whole batch of which each
    tensor is clipped to the norm `clip` by itself. The share p of the entries of all blocks with the largest F trains.

    Where it attaches: f: all parameters, a tied one once. d: entries of the blocks of encoder and decoder; nothing
    trains until `prepare` has seen data. Embeddings, norms outside and heads are frozen unless `rest` is on, as it is
    in the authors' code; a new head in `modules_to_save` trains whole in both.

    Start: the base's values.

    Trainable parameters: f: all N, a share p at a time. d: ⌊p N⌋ of the N entries of the blocks.

    Inference: f leaves a changed base; d ⌊p N⌋ values with their positions. Nothing to merge, no cost.

    Memory: f: that of full fine-tuning. d: 20 bytes for each trained entry, the gradient of one tensor at a time, and
    while it scores 4 bytes for each entry of the blocks. Scores are computed without dropout.

    The mask of a step depends on `seed`, the tensor's name and the number of its steps alone, so it is the same on all
    processes and after a stop, and is not drawn anew for each part of a step.

    Rate: 4e-5, the authors', with p = 0.3, weight decay 0.01 and batches of 16.

    Reference: "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
    arXiv 2109.05687.

    Example:
        >>> from adapterlab.methods.in_place.child_tuning import ChildTuning
        >>> ChildTuning(mode="f").share
        0.3
    """

    formula: ClassVar[str] = "all parameters; with mode d: ⌊p N⌋ of the blocks"

    mode: Literal["f", "d"] = Field("d", description="f: another child network in every step; d: one, chosen from data")
    share: float = Field(0.3, gt=0, le=1, description="share p of the entries that is updated")
    masked: Literal["update", "gradient"] = Field(
        "update", description="f: what is masked; gradient: before the optimizer, as in the authors' code"
    )
    clip: float | None = Field(1.0, gt=0, description="d: norm that each tensor's gradient is clipped to; none: not")
    rest: bool = Field(False, description="d: train what lies outside the blocks whole")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")
    offload_scores: bool = Field(False, description="d: keep the scores in main memory while they are computed")
    keep_base: bool = Field(
        True, description="store the original values, so that the adapter can be switched off and removed"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="f: of the draws")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Draw half of the entries in every step."""
        return {"mode": "f", "share": 0.5}

    def turns(self) -> int:
        """A tensor of one entry has its turn in one of so many steps, on average."""
        return max(1, round(1 / self.share)) if self.mode == "f" else 1

    def attach(self, host: Carrier, name: str) -> None:
        """Own what trains whole, and check that there is something to choose from."""
        blocks = {} if self.mode == "f" else self.blocks(host)
        if self.mode == "d":
            self.budget(blocks)
        if self.mode == "f" or self.rest:
            for path in host.base_parameters((*self.exclude, *self.modules_to_save)):
                if path not in blocks:
                    host.own(name, path, keep=self.keep_base)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Train the entries that were chosen when the adapter was saved."""
        self.attach(host, name)
        chosen.own_entries(host, name, chosen.saved_entries(tensors))

    def blocks(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return the parameters of the blocks."""
        inside = {id(p) for block in host.layers for p in block.parameters()}
        every = chosen.eligible(host, self.id, (*self.exclude, *self.modules_to_save))
        return {path: p for path, p in every.items() if id(p) in inside}

    def budget(self, blocks: Mapping[str, nn.Parameter]) -> int:
        """Return how many entries of the blocks are chosen.

        Raises:
            AttachError: none.
        """
        total = sum(p.numel() for p in blocks.values())
        k = int(self.share * total)
        if not k:
            raise AttachError(
                f"{self.id}: share={self.share} of the {total:,} entries of the blocks leaves none to train. Raise "
                "share, or exclude less."
            )
        return k

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Choose the child network of the whole run; an adapter that has one keeps it."""
        if self.mode == "f" or chosen.is_chosen(host, name):
            return
        blocks = self.blocks(host)
        shown = track(chosen.labelled(batches), "scoring", transient=True, console=Terminal(stderr=True))
        device = torch.device("cpu") if self.offload_scores else None
        scores = chosen.accumulate(host, blocks, shown, self.information, device=device)
        chosen.choose(host, name, [(list(blocks), self.budget(blocks))], lambda path: scores[path])

    def information(self, gradient: Tensor) -> Tensor:
        """The square of a batch's gradient, which is clipped by itself."""
        if self.clip is None:
            return gradient.square()
        return (gradient * chosen.clipped(self.clip, float(gradient.norm()))).square()

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """The usual one; in mode f its updates are masked."""
        if self.mode == "d":
            chosen.check_chosen(host, name, self.id)
            return make(host.parameters(name))
        named = host.named_parameters(name)
        plain = make([{"params": [p]} for p in named.values()])
        masks = [(Child(self.share, self.seed, key, self.masked),) for key in named]
        nothing: list[tuple[Transform, ...]] = [() for _ in masks]
        if self.masked == "gradient":
            return Chain.like(plain, masks)
        return Chain.like(plain, nothing, outside=masks)

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse a loop in which nothing is masked, or nothing was chosen."""
        if self.mode == "d":
            chosen.check_chosen(host, name, self.id)
        elif not isinstance(getattr(optimizer, "optimizer", optimizer), Chain):
            raise NotTrainingError(
                f"{self.id}: {type(optimizer).__name__} masks nothing, so this would be full fine-tuning. Build the "
                f"optimizer with host.methods[{name!r}].optimizer(host, {name!r}, make) and give it to the trainer."
            )


class Child(Transform):
    """Lets a random part of a tensor's entries move, another one in every step, by 1 / p as much."""

    by_entry: ClassVar[bool] = False

    def __init__(self, share: float, seed: int, key: str, masked: Literal["update", "gradient"]):
        """Set how the masks are drawn.

        Args:
            share: probability p that an entry moves.
            seed: of the run.
            key: name of the tensor, by which the masks of one step differ.
            masked: the update on its way out, or the gradient on its way in.
        """
        self.share, self.masked = share, masked
        self.origin = (seed, zlib.crc32(key.encode()))

    def init(self, g: Tensor) -> State:
        return {"step": 0}

    def mask(self, step: int, like: Tensor) -> Tensor:
        """The entries that move in a step."""
        seed = int(np.random.SeedSequence([*self.origin, step]).generate_state(1)[0])
        draw = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=draw, device=like.device) < self.share

    def update(self, g: Tensor, state: State, p: Tensor) -> tuple[Tensor, Back | None]:
        mask = self.mask(state["step"], g)
        state["step"] += 1
        if self.masked == "gradient":
            return self.scaled(g, mask), None
        return g, lambda update: self.scaled(update, mask)

    def scaled(self, values: Tensor, mask: Tensor) -> Tensor:
        """M / p ⊙ values; what is not finite outside M is left out too."""
        return torch.where(mask, values / self.share, 0.0)

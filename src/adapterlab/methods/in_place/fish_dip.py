"""Fish-Dip: the entries with the largest Fisher information of the samples that are fitted worst, chosen anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches, MakeOptimizer, Method
from adapterlab.engine.modes import dropout_off
from adapterlab.engine.sparse import Entries, Vector
from adapterlab.errors import NotTrainingError
from adapterlab.methods.in_place import _chosen_parameters as chosen
from adapterlab.methods.in_place import _one_vector as one_vector
from adapterlab.optim import moments, reorder
from adapterlab.optim.chain import Chain
from adapterlab.optim.transforms import Adam
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

_ROWS = "pool"


@register
class FishDip(Method):
    """Train the entries that the hardest samples depend on most, and choose them anew every few steps.

    L_j is the loss of row j of the pool, J the n rows with the largest. F_i = Σ_{j ∈ J} (∂ L_j / ∂ θ_i)², over single
    rows; the k highest over all tensors train, in place, until the next choice. n is `share` of the number of batches
    in the pool, at least `least` and at most `most`.

    An entry that stays keeps its moments. One that joins begins at its present value as if the run began: its moments
    are 0 and its steps are counted by themselves, so that its first update is not that of a late step. One that leaves
    keeps what it has learned and moves no more; with `rewind` it goes back to the base's value.

    Where it attaches: all parameters, embeddings, norms and biases included, a tied one once.

    Start: the base's values.

    Trainable parameters: k = ⌊ρ N⌋ of N at a time, a new head in `modules_to_save` included (unless `charge_head` is
    off). All that ever trained are saved; `rewind` keeps them at k.

    The pool is the first rows that `prepare` sees, up to `pool`. It is part of checkpoints, so that a run that goes on
    chooses alike, and not of a saved adapter. A choice costs a forward pass for each of its rows and n backward passes,
    in eval mode. The loss of a row is the mean over its target tokens, whatever its length.

    Memory: 40 bytes for each entry that trains (value, gradient, moments, steps, place, original) and 24 for each that
    did; the gradient of one tensor at a time. While it chooses 4 bytes for each entry of the base.

    Inference: nothing to merge, no cost.

    Rate: 1e-4, that of one fixed mask; the authors' 1e-2 is in proportion to each tensor's size (Adafactor).

    Reference: "Unified Low-Resource Sequence Labeling by Sample-Aware Dynamic Sparse Finetuning", arXiv 2311.03748.

    Example:
        >>> from adapterlab.methods.in_place.fish_dip import FishDip
        >>> FishDip().hardest(batches=80)
        8
    """

    formula: ClassVar[str] = "⌊ρ N⌋ at a time"
    scaffold: ClassVar[tuple[str, ...]] = (_ROWS,)

    density: float = Field(0.01, gt=0, le=1, description="share ρ of the entries that train at a time")
    every: int = Field(100, ge=1, description="steps between two choices")
    pool: int = Field(1024, ge=1, description="rows of which the hardest are found; they are kept for the run")
    share: float = Field(0.1, gt=0, le=1, description="rows that are scored, as a share of the pool's batches")
    least: int = Field(3, ge=1, description="fewest rows that are scored")
    most: int = Field(25, ge=1, description="most rows that are scored, one backward pass each")
    power: Literal["square", "absolute"] = Field("square", description="what of a gradient is summed")
    rewind: bool = Field(False, description="give entries that leave their original value, so that k are saved")
    exclude: tuple[str, ...] = Field((), description="modules to leave frozen: roles, names or patterns")
    charge_head: bool = Field(True, description="count the entries of modules_to_save towards the budget")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Train one entry in fifty, chosen anew every other step from few rows."""
        return {"density": 0.02, "every": 2, "pool": 8}

    def hardest(self, batches: int) -> int:
        """Number n of rows that are scored."""
        return min(max(int(self.share * batches), self.least), self.most)

    # ------------------------------------------------------------------ structure

    def attach(self, host: Carrier, name: str) -> None:
        """Make room for the entries.

        Raises:
            AttachError: there would be none.
        """
        parameters = self.eligible(host)
        count = chosen.share_of_all(host, parameters, self.density, exclude=self.exclude, charge_head=self.charge_head)
        if count < 1:
            raise chosen.none_left(self.id, self.density, parameters)
        one_vector.attach(host, name, parameters, count, entire=False)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with the entries there are, and the rows of a run that goes on."""
        one_vector.attach_saved(host, name, self.eligible(host), tensors)
        lead = f"shared.{_ROWS}."
        rows = {key.removeprefix(lead): value for key, value in tensors.items() if key.startswith(lead)}
        if rows:
            _keep(host, name, {key: torch.empty_like(value) for key, value in rows.items()})

    def with_entries(self, host: Carrier, entries: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, Tensor] | None:
        """Any entries of the parameters that may be chosen from."""
        return one_vector.saved_with(self.eligible(host), entries)

    def eligible(self, host: Carrier) -> dict[str, nn.Parameter]:
        """Return the parameters that entries are chosen from."""
        return chosen.eligible(host, self.id, (*self.exclude, *self.modules_to_save))

    # ------------------------------------------------------------------ the run

    def unsplit(self, host: Carrier, name: str) -> str:
        """The base's own gradients are dealt out before anybody sees them."""
        return "it chooses its entries anew in the run, by gradients of the whole base"

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Keep rows to choose by, and choose; an adapter that has its entries keeps them for now."""
        super().prepare(host, name, batches)
        if not _kept(host, name):
            _keep(host, name, dict(_numbered(batches, self.pool)))
        if not one_vector.of(host, name).chosen:
            self.choose(host, name)

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """The usual one, in which each entry counts its own steps."""
        plain = make(host.parameters(name))
        around = [[Adam(group["betas"], group["eps"], each=True)] for group in plain.param_groups]
        return Chain.like(plain, around)

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Choose anew when it is time.

        Raises:
            NotTrainingError: the rows to choose by were never seen.
        """
        super().before_step(host, name, step, optimizer)
        vector = one_vector.of(host, name)
        due = step > 0 and step % self.every == 0
        if not vector.chosen or (due and not _kept(host, name)):
            raise NotTrainingError(
                f"The {self.id} adapter {name!r} has no rows to choose its entries by. Call "
                f"host.methods[{name!r}].prepare(host, {name!r}, batches) with labelled batches before training; the "
                "training loop of adapterlab does it by itself."
            )
        if due:
            source, kept = self.choose(host, name)
            reorder(moments(optimizer, vector.values), source, kept)

    @torch.no_grad()
    def choose(self, host: Carrier, name: str) -> tuple[Tensor, Tensor]:
        """Choose the entries by the hardest rows.

        Returns:
            For each entry the place of the same one before `[k]`, and whether it trained before `[k]`.
        """
        host.refresh(name)  # the last step is not in the base yet
        vector = one_vector.of(host, name)
        parameters = self.eligible(host)
        with _base_alone(host, name):
            scores = self.scores(host, parameters, list(_kept(host, name).values()))
        index = vector.positions(chosen.top(vector.paths, lambda path: scores[path], len(vector.values)))
        source, kept = _found_in(index, vector.index)
        values = torch.where(kept, vector.values[source], self.joining(vector, parameters, index))
        vector.choose(index, values, None if self.rewind else self.leaving(vector, index))
        host.refresh(name)
        return source, kept

    def scores(
        self, host: Carrier, parameters: Mapping[str, nn.Parameter], batches: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """F of each entry, over the hardest rows."""
        rows = list(chosen.rows(batches, self.pool))
        count = min(self.hardest(len(batches)), len(rows))
        worst = self.losses(host, rows).sort(descending=True, stable=True).indices[:count]
        term = torch.square if self.power == "square" else torch.abs
        with torch.enable_grad():
            return chosen.accumulate(host, parameters, [rows[int(i)] for i in worst], term)

    def losses(self, host: Carrier, rows: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """L of each row, without dropout."""
        with dropout_off(host.model):
            return torch.tensor([float(host.model(**row).loss) for row in rows])

    def joining(self, vector: Vector, parameters: Mapping[str, nn.Parameter], index: Tensor) -> Tensor:
        """The values that entries have in the base, or had when they left `[k]`."""
        begins = torch.searchsorted(index, torch.tensor(vector.offsets, device=index.device)).tolist()
        found = [
            parameters[path].detach().view(-1)[(index[begins[i] : begins[i + 1]] - vector.offsets[i])].float()
            for i, path in enumerate(vector.paths)
        ]
        values = torch.cat([part.to(index.device) for part in found])
        if vector.left_index is None or vector.left_values is None:
            return values
        source, there = _found_in(index, vector.left_index)
        return torch.where(there, vector.left_values[source], values)

    def leaving(self, vector: Vector, index: Tensor) -> tuple[Tensor, Tensor]:
        """Entries that trained before and do not now, ascending, and their values."""
        before = [(vector.index, vector.values.detach())] if vector.chosen else []
        if vector.left_index is not None and vector.left_values is not None:
            before.append((vector.left_index, vector.left_values))
        if not before:
            return index[:0], index[:0].float()
        every, values = (torch.cat(parts) for parts in zip(*before, strict=True))
        gone = ~torch.isin(every, index)
        order = every[gone].argsort()
        return every[gone][order], values[gone][order]

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """How many entries train and have trained."""
        vector = one_vector.of(host, name)
        left = 0 if vector.left_index is None else len(vector.left_index)
        return {"entries": f"{len(vector.values):,} at a time, {len(vector.values) + left:,} in all"}


# ---------------------------------------------------------------------- rows that are kept


def _numbered(batches: Batches, count: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of batches with a label, until there are so many rows, under names that say which."""
    rows = 0
    for i, batch in enumerate(chosen.labelled(batches)):
        yield from ((f"{key}_{i}", value.detach().clone()) for key, value in batch.items())
        rows += len(batch["labels"])
        if rows >= count:
            return


def _keep(host: Carrier, name: str, rows: Mapping[str, Tensor]) -> None:
    held = nn.Module()
    for key, value in rows.items():
        held.register_buffer(key, value)
    host.share(name, _ROWS, held)
    part: Any = next(iter(host.adapters(name).values()))
    part.refer(_ROWS, held)


def _kept(host: Carrier, name: str) -> dict[str, dict[str, Tensor]]:
    """The batches that are kept, by number."""
    part: Any = next(iter(host.adapters(name).values()))
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in part.__dict__[_ROWS].named_buffers() if _ROWS in part.__dict__ else ():
        field, _, number = key.rpartition("_")
        found.setdefault(number, {})[field] = value.to(part.site.device)
    return found


@contextlib.contextmanager
def _base_alone(host: Carrier, name: str) -> Iterator[None]:
    """Let the model compute with what the entries are in the base, and not as functions of their vector."""
    held = [a for a in host.adapters(name).values() if isinstance(a, Entries)]
    try:
        for adapter in held:
            adapter.idle = True
        yield
    finally:
        for adapter in held:
            adapter.idle = False


def _found_in(index: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ascending positions its place among others, and whether it is there."""
    source = torch.searchsorted(before, index).clamp(max=len(before) - 1)
    return source, before[source] == index

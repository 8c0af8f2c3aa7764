"""A mixture of low-rank updates in two groups of experts, one for each of two types of samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Entrance
from adapterlab.core.carrier import Carrier
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.core.targets import Targets
from adapterlab.errors import AttachError, DataError
from adapterlab.methods.mixture._experts import Experts, Mixture
from adapterlab.registry import register

FEEDFORWARD = ("gate", "up", "gate_up", "down")
Form = Literal["code", "paper"]


@register
class LoRAMoE(Mixture):
    """Learn low-rank updates for each feed-forward weight in two groups, which two types of samples use unevenly.

    y = W x + b + s · Σ_e w_e(x) B_e A_e drop(x), w = softmax(G x), s = alpha / r; A `[E, r, in]`, B `[E, out, r]`,
    G `[E, in]`. All E experts take part; the first half is one group (of knowledge that must not be lost), the second
    half the other (of the tasks that are learnt).

    Balance: for each module, beta times how uneven Z `[samples, E]` is over all its entries is added to the loss.
    Z = I · Q; Q is the mean of w over the real tokens of a sample, I is 1 + delta where a sample of type 1 meets the
    first group or one of type 0 the second, and 1 − delta elsewhere. Uneven is var(Z) / (mean(Z)² + 1e-10) in the
    authors' code (`lbc_form="code"`), var(Z) / mean(Z) in their paper; beta means another thing in each. (The authors
    take sums over tokens for means, padding included. That is the same in their code's form where rows are equally
    long; in the paper's it multiplies the loss by the number of tokens.)

    As the loss makes Z constant, the group of a sample's own type is pulled to (1 − delta) / 2 of the weight and the
    other to (1 + delta) / 2, evenly within each: types get different groups, the first the second and the other way
    round.

    Rows bear their type, 0 or 1, in a column that `column` names; whoever gives rows in memory gives a tensor there.
    Without balance no types are needed, nor are they after training. Rows are padded, not packed, while types are read.

    Where it attaches: the linear layers of feed-forward networks (GPT-2's `Conv1D` and quantized ones too); around the
    whole model, where types come in.

    Start: B = 0, so the first output equals the base's; A and G as linear layers start, between ±1/√in.

    Trainable parameters: E (r (in + out) + in) for each module.

    Inference: not mergeable, since the weights depend on the token. It sees one token at a time, so caches, padding
    and mixed batches change nothing.

    Cost of a step: the thin products are those of a LoRA of rank E r, 6 t E r (out + in) operations for t tokens,
    beside the large ones of 4 t out in; and the router's.

    Rate: 2e-4, as in the authors' runs.

    Reference: "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin", arXiv
    2312.09979.

    Example:
        >>> from adapterlab.methods.mixture.loramoe import LoRAMoE
        >>> LoRAMoE(experts=8, column="is_knowledge").columns
        {'is_knowledge': (0, 1)}
    """

    formula: ClassVar[str] = "E (r (in + out) + in)"
    usual: ClassVar[tuple[str, ...]] = FEEDFORWARD

    r: int = Field(4, ge=1, description="rank of each update")
    alpha: float = Field(32.0, gt=0, description="scale numerator")
    experts: int = Field(6, ge=2, description="number E of low-rank updates, half of them in each group")
    delta: float = Field(0.1, ge=0, lt=1, description="how differently the two groups are weighed in the balance")
    beta: float = Field(0.1, ge=0, description="factor of the balance in the loss; 0: none, and no types are read")
    lbc_form: Form = Field(
        "code", description="what is uneven: variance over the squared mean, or over the mean (paper)"
    )
    column: str = Field("type", min_length=1, description="column of the rows that holds a sample's type, 0 or 1")
    targets: Targets = Field(
        default_factory=lambda: Targets(include=FEEDFORWARD),
        description="which modules to adapt; default: gate, up, gate_up and down, those that there are",
    )

    @field_validator("experts")
    @classmethod
    def _two_groups(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} experts make no two groups of one size; take {value - 1} or {value + 1}")
        return value

    @classmethod
    def example_batch(cls, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Types in turn."""
        rows = next(iter(batch.values()))
        return {**batch, "type": torch.arange(len(rows), device=rows.device) % 2}

    @property
    def columns(self) -> Mapping[str, tuple[int, ...]]:
        """The types, where they are read."""
        return {self.column: (0, 1)} if self.beta else {}

    def count(self, site: Site) -> int:
        """As many everywhere."""
        return self.experts

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the targets, and the model, if types are read."""
        super().attach(host, name)
        if self.beta:
            host.wrap(name, host.model, Types(host.site(host.model), host.state, self.column, name))

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        """Make the experts and the router for one site."""
        layer: Any = super().build(site, host, name)
        layer.key, layer.form = name, (self.beta, self.delta, self.lbc_form)
        return layer  # type: ignore[no-any-return]

    class Layer(Experts):
        """The experts and the router at one module.

        Attributes:
            key: under which the types of the samples are left.
            form: beta, delta, and what is uneven.
        """

        key: str
        form: tuple[float, float, Form]

        def routed(self, x: Tensor, z: Tensor, chosen: Tensor | None, w: Tensor) -> None:
            """Add the balance of the module to the losses."""
            super().routed(x, z, chosen, w)
            types = self.state.taps.get(self.key)
            if types is None or not self.state.listening:
                return
            if x.dim() != 3 or len(x) != len(types):
                raise AttachError(
                    f"loramoe: {self.site.path} gets {list(x.shape)}, in which the {len(types)} samples of the batch "
                    "cannot be told apart. Leave it out of the targets, or set beta=0."
                )
            beta, delta, form = self.form
            q = used(w, self.state.real_tokens(x))
            self.state.emit(beta * uneven(importance(types, q.shape[1], delta).to(q) * q, form))


class Types(Entrance):
    """Stands around the whole model and takes the types of the samples."""

    def __init__(self, site: Site, state: State, column: str, key: str):
        super().__init__(site)
        if column in site.arguments:
            raise AttachError(
                f"loramoe: {type(site.module).__name__} has an argument {column!r} of its own. Name the column of "
                "types otherwise: column='sample_type'."
            )
        self.state, self.column, self.key = state, column, key
        self.takes = (column,)  # type: ignore[misc]

    @property
    def idle(self) -> bool:  # type: ignore[override]
        """In batches whose rows have different adapters, which are not trained on, there is nothing to take."""
        return self.state.segments is not None

    @idle.setter
    def idle(self, value: bool) -> None:
        """Nobody else says it."""

    @contextlib.contextmanager
    def entering(self, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Leave the types for the routers inside.

        Raises:
            DataError: there are none in training, or other values than 0 and 1.
        """
        types = given.get(self.column)
        given = {name: value for name, value in given.items() if name != self.column}
        if types is None:
            if self.state.listening:
                raise DataError(
                    f"loramoe balances its experts by the type of each sample, and the batch has no {self.column!r}. "
                    f"Give each row {self.column!r}, 0 or 1 (in memory a tensor), and see that no collator or trainer "
                    "drops the column; name it by the setting column, or set beta=0."
                )
            yield given
            return
        self.check(types, given)
        self.state.taps[self.key] = types
        try:
            yield given
        finally:
            self.state.taps.pop(self.key, None)

    def check(self, types: Any, given: Mapping[str, Any]) -> None:
        """Require one type, 0 or 1, for each row."""
        first = next((v for v in given.values() if isinstance(v, Tensor) and v.dim()), None)
        if not isinstance(types, Tensor) or types.dim() != 1 or (first is not None and len(first) != len(types)):
            got = list(types.shape) if isinstance(types, Tensor) else type(types).__name__
            raise DataError(f"{self.column!r}: a tensor [rows] of types is wanted, and {got} was given.")
        if not torch.compiler.is_compiling() and (other := sorted(set(types.tolist()) - {0, 1})):
            raise DataError(
                f"{self.column!r} has the values {', '.join(map(str, other[:4]))}, and a sample is of type 0 (its own "
                "group is the second half of the experts) or 1 (the first half)."
            )


def used(w: Tensor, real: Tensor | None) -> Tensor:
    """Q: the mean of w `[rows, tokens, E]` over the real tokens of each row, `[rows, E]`."""
    if real is None:
        return w.mean(1)
    counted = real.to(w.dtype)
    return (w * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp_min(1)


def importance(types: Tensor, experts: int, delta: float) -> Tensor:
    """I `[rows, E]`: 1 + delta at the group of a row's own type, 1 − delta at the other."""
    second = torch.arange(experts, device=types.device) >= experts // 2
    own = types.bool()[:, None] != second
    return torch.where(own, 1 + delta, 1 - delta)


def uneven(z: Tensor, form: Form) -> Tensor:
    """The variance of all entries over their squared mean, or over their mean."""
    mean = z.mean()
    return z.var() / (mean if form == "paper" else mean.square() + 1e-10)

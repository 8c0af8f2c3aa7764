"""LoRA of its own where it matters, one shared LoRA elsewhere."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Batches
from adapterlab.core.site import Site
from adapterlab.errors import NotTrainingError
from adapterlab.methods.low_rank._starts import Initialiser
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class LoRADrop(LoRA):
    """Keep a LoRA of their own at the modules where its output is large, and let all others of a kind share one.

    y = W x + b + s · B A x as in LoRA. `prepare` trains LoRA everywhere for a few steps on a part of the data and
    measures g_i = Σ_x ‖ΔW_i x‖². Of each kind of module (the same place in different layers, the same shape) the
    largest g_i keep their own A_i and B_i, until their share of Σ g reaches `threshold`; the others get one (A, B)
    together. All of them start anew.

    The part of the data is a share of the batches, spread evenly over them, so that it follows the order of the data;
    padding is not counted.

    Where it attaches: as LoRA; the paper takes queries and values.

    Start: B = 0 (for embeddings A = 0), so the first output equals the base's.

    Trainable parameters: for each kind of module (k + 1) r (in + out), k of them kept; k r (in + out) if all are.

    Inference: W_i + s B A can be merged, at no cost.

    Rate: 5e-4, LoRA's; the authors' code is not public.

    Reference: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation", arXiv 2402.07721.

    Example:
        >>> from adapterlab.methods.low_rank.lora_drop import select
        >>> select([1.0, 6.0, 3.0], 0.9)
        [1, 2]
    """

    formula: ClassVar[str] = "(k + 1) r (in + out) for each kind of module, k of them kept"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    hf: ClassVar[HFCodec | None] = None

    threshold: float = Field(0.9, gt=0, le=1, description="share of the output that the kept modules have")
    share: float = Field(0.1, gt=0, le=1, description="part of the batches that is used to decide")
    steps: int = Field(50, ge=1, description="steps of training before the measurement")
    lr: float = Field(1e-3, gt=0, description="learning rate of these steps")

    @field_validator("init")
    @classmethod
    def _without_data(cls, value: Initialiser) -> Initialiser:
        if value.moves_base or value.needs_data:
            raise ValueError(
                f"init={value.name!r} does not suit factors that modules share; choose kaiming or gaussian"
            )
        return value

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Decide quickly."""
        return {"steps": 2, "share": 1.0, "threshold": 0.6}

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Share where the saved adapter has no factors of a module's own."""
        self.attach(host, name)
        if not any(key.startswith("shared.") for key in tensors):
            return
        layers = self.layers(host, name)
        self._share(host, name, [path for path in layers if f"adapter.{path}.A" not in tensors])

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Train briefly, measure, choose, and start anew; an adapter that has chosen stays as it is."""
        layers = self.layers(host, name)
        if any(layer.chosen for layer in layers.values()):
            return
        given = list(part(batches, self.share))
        self._train(host, name, given)
        scores = measure(host, layers, given)
        left = []
        for kind, paths in self._kinds(layers).items():
            values = [scores[path] for path in paths]
            if not sum(values) > 0:
                raise NotTrainingError(
                    f"lora_drop: after {self.steps} steps the LoRAs of {kind} have no output to compare. Raise steps "
                    "or lr, and check that the batches have labels."
                )
            kept = select(values, self.threshold)
            left += [path for i, path in enumerate(paths) if i not in kept]
        for layer in layers.values():
            fresh = type(layer)(self, layer.site)
            layer.load_state_dict(fresh.state_dict())
            layer.chosen = True
        self._share(host, name, left)

    def brief(self) -> Self:
        """Decide after one step on all batches."""
        return self.replace(steps=1, share=1.0)

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse to train in a loop that did not call `prepare`."""
        if not any(layer.chosen for layer in self.layers(host, name).values()):
            raise NotTrainingError(
                f"The lora_drop adapter {name!r} has not chosen which modules keep their own LoRA. Call "
                f"host.methods[{name!r}].prepare(host, {name!r}, batches) with labelled batches before training; the "
                "training loop of adapterlab does it by itself."
            )

    def layers(self, host: Carrier, name: str) -> dict[str, LoRADrop.Layer]:
        """Return the adapter's parts by path."""
        return {path: a for path, a in host.adapters(name).items() if isinstance(a, LoRADrop.Layer)}

    def _kinds(self, layers: Mapping[str, LoRADrop.Layer]) -> dict[str, list[str]]:
        """Paths by kind: those that differ in numbers only and have the same shapes."""
        kinds = defaultdict(list)
        for path, layer in layers.items():
            place = re.sub(r"\d+", "N", path).replace(".", "-")
            kinds[f"{place}-{self.rank(path)}-{layer.site.shape[0]}-{layer.site.shape[1]}"].append(path)
        return kinds

    def _train(self, host: Carrier, name: str, batches: list[Mapping[str, Tensor]]) -> None:
        parameters = host.parameters(name)
        optimizer = torch.optim.AdamW(parameters, lr=self.lr)
        for batch in itertools.islice(itertools.cycle(batches), self.steps):
            gradients = torch.autograd.grad(host.model(**batch).loss, parameters, allow_unused=True)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

    def _share(self, host: Carrier, name: str, paths: list[str]) -> None:
        """Give modules of a kind one pair of factors."""
        layers = self.layers(host, name)
        for kind, members in self._kinds({path: layers[path] for path in paths}).items():
            first = layers[members[0]]
            pair = host.share(name, kind, Pair(first.A, first.B))
            for path in members:
                layers[path].join(pair)
        for layer in layers.values():
            layer.chosen = True

    class Layer(LoRA.Layer):
        """A pair of factors of the module's own, or a reference to a shared one.

        Attributes:
            pair: the shared factors, or None.
            chosen: whether it was decided which of the two.
        """

        def __init__(self, method: LoRA, site: Site):
            super().__init__(method, site)
            self.__dict__["pair"] = None
            self.chosen = False

        def join(self, pair: nn.Module) -> None:
            """Use shared factors from now on."""
            del self.A, self.B
            self.refer("pair", pair)

        @property
        def dtype(self) -> torch.dtype:
            """Dtype of the factors."""
            return self.factors()[0].dtype

        def factors(self) -> tuple[Tensor, Tensor]:
            """The module's own, or the shared ones."""
            pair = self.__dict__["pair"]
            return (self.A, self.B) if pair is None else (pair.A.to(self.site.device), pair.B.to(self.site.device))


class Pair(nn.Module):
    """The two factors that modules share."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter):
        super().__init__()
        self.A, self.B = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())


def part(batches: Batches, share: float) -> Iterator[Mapping[str, Tensor]]:
    """Yield the first batch and then a share of all of them, spread evenly: ⌈n · share⌉ of n."""
    exact = Fraction(str(share))  # 30 · 0.1 is not quite 3
    return (batch for i, batch in enumerate(batches) if math.ceil((i + 1) * exact) > math.ceil(i * exact))


def select(scores: list[float], threshold: float) -> list[int]:
    """Return the positions of the largest scores, fewest that have this share of the sum, in descending order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    reached = itertools.accumulate(scores[i] for i in order)
    count = next((n for n, total in enumerate(reached, 1) if total >= threshold * sum(scores)), len(scores))
    return order[:count]


@torch.no_grad()
def measure(
    host: Carrier, layers: Mapping[str, LoRADrop.Layer], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Return Σ ‖ΔW x‖² over the tokens of some batches, by path."""
    sums = dict.fromkeys(layers, 0.0)
    mask: Tensor | None = None

    def hook(path: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            squares = layers[path].product(args[0]).float().square().sum(-1)
            if mask is not None and squares.shape == mask.shape:  # experts see tokens without their padding
                squares = squares * mask
            sums[path] += float(squares.sum(dtype=torch.float64))

        return add

    handles = [layer.site.module.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    training = host.model.training
    host.model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            host.model(**batch)
    finally:
        host.model.train(training)
        for handle in handles:
            handle.remove()
    return sums

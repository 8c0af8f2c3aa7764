"""Bottleneck adapters that are pruned before they are trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Batches
from adapterlab.core.site import Site
from adapterlab.engine.modes import dropout_off
from adapterlab.errors import DataError, NotTrainingError, TrainingError
from adapterlab.methods.bottleneck._bottleneck import After, Bottleneck, Weights, attention_outputs, feed_forwards
from adapterlab.methods.in_place._chosen_parameters import accumulate
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

MATRICES = ("down", "up")
Matrices = dict[str, Tensor]  # by `<path>.<matrix>`


@register
class SparseAdapter(Bottleneck):
    """Prune the projections of bottleneck adapters at the start, by a score, and train what is left.

    y = h + s · ((W_u ⊙ M_u) f((W_d ⊙ M_d) h + b_d) + b_u), f = ReLU, s = 1; the masks M keep the share 1 − σ of all
    entries, biases are never pruned. With g = Σ ∂L/∂θ over batches an entry's score is |θ g| (`snip`),
    θ · (H g) with the Hessian H of the loss (`grasp`), |θ| (`magnitude`) or a random number (`random`); the highest are
    kept. `erdos_renyi` prunes a share of each matrix that is proportional to 1 − (in + out) / (in · out), at random.

    Large-Sparse: with `enlarge = c` the bottleneck is c times as wide and σ = 1 − 1 / c by default, so that as many
    entries train as in the dense adapter.

    Where it attaches: behind attention (its output projection) and behind the feed-forward block, or its second
    projection where it is not a module of its own; `attention=False`: the latter alone.

    Start: W_d and W_u from a normal distribution with deviation `init_std`, biases 0: nearly the base's output. A
    projection of zeros would give all entries the score 0.

    Trainable parameters: (1 − σ) 2 m d + m + d for each sublayer, m being the enlarged width.

    Nothing trains until `prepare` has seen `samples` rows with labels, in evaluation mode; scores without data need
    none. At least one entry of each matrix is kept. What is left is a vector of values for each matrix, so nothing can
    move a pruned entry; it is saved with a mask of one byte an entry.

    Inference: not mergeable, since f is not linear; as fast as a dense adapter of that width.

    Rate: 1e-4, within the authors' 1e-5 to 2e-4.

    Reference: "SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters", arXiv 2210.04284.

    Example:
        >>> from adapterlab.methods.bottleneck.sparse_adapter import SparseAdapter
        >>> SparseAdapter(enlarge=4).share, SparseAdapter(m=64, enlarge=4).size(768)
        (0.75, 256)
    """

    formula: ClassVar[str] = "(1 − σ) 2 m d + m + d for each sublayer"
    starts_at_base: ClassVar[bool] = False

    m: int | None = Field(64, ge=1, description="width of the bottleneck; None: the model's width / reduction")
    enlarge: int = Field(1, ge=1, description="factor of that width; above 1: Large-Sparse")
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share σ of the entries that is pruned; default: 0.4, or 1 − 1 / enlarge"
    )
    score: Literal["snip", "grasp", "magnitude", "random", "erdos_renyi"] = Field(
        "snip", description="what decides which entries are kept; the last three need no data"
    )
    scope: Literal["global", "matrix"] = Field("global", description="rank all entries together, or in each matrix")
    samples: int = Field(320, ge=1, description="rows that snip and grasp look at, at least")
    attention: bool = Field(True, description="adapters behind attention as well")
    init_std: float = Field(0.02, gt=0, description="deviation of the projections at the start")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the random scores")

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Look at few rows."""
        return {"m": 8, "samples": 2}

    @property
    def share(self) -> float:
        """The share σ that is pruned."""
        if self.sparsity is not None:
            return self.sparsity
        return 0.4 if self.enlarge == 1 else 1 - 1 / self.enlarge

    @property
    def needs_data(self) -> bool:
        """Whether the score is made of gradients."""
        return self.score in ("snip", "grasp")

    # ------------------------------------------------------------------ attaching

    def attach(self, host: Carrier, name: str) -> None:
        """Attach the adapters, and prune them at once if no data is needed."""
        super().attach(host, name)
        if not self.needs_data:
            self._prune(host, name, self.scores(self._matrices(host, name)))

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with the masks that were saved."""
        super().attach(host, name)
        for path, layer in self.layers(host, name).items():
            for key in MATRICES:
                if (mask := tensors.get(f"adapter.{path}.{key}_mask")) is not None:
                    layer.cut(key, mask)

    def places(self, sites: Sequence[Site]) -> list[Site]:
        """Attention and feed-forward sublayers."""
        return [*(attention_outputs(sites) if self.attention else []), *feed_forwards(sites)]

    def size(self, width: int) -> int:
        """Width of the bottleneck, enlarged."""
        return self.enlarge * super().size(width)

    def start(self, down: Tensor, up: Tensor) -> None:
        """Normal."""
        for weight in (down, up):
            nn.init.normal_(weight, std=self.init_std)

    def layers(self, host: Carrier, name: str) -> dict[str, SparseAdapter.Layer]:
        """Return the adapter's parts by path."""
        return {path: a for path, a in host.adapters(name).items() if isinstance(a, SparseAdapter.Layer)}

    # ------------------------------------------------------------------ pruning

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Score the entries and prune; an adapter that is pruned stays as it is."""
        if not self._pruned(host, name):
            matrices = self._matrices(host, name)
            with sdpa_kernel(SDPBackend.MATH), dropout_off(host.model):  # its fused kernels have one derivative
                self._prune(host, name, self.scores(matrices, host, list(enough(batches, self.samples))))

    def brief(self) -> Self:
        """Score with one row."""
        made: Self = self.replace(samples=1)
        return made

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse to train dense adapters, in a loop that did not call `prepare`."""
        if not self._pruned(host, name):
            raise NotTrainingError(
                f"The {self.id} adapter {name!r} is not pruned yet. Call host.methods[{name!r}].prepare(host, "
                f"{name!r}, batches) with labelled batches before the optimizer is made; the training loop of "
                "adapterlab does it by itself."
            )

    def scores(self, matrices: Matrices, host: Carrier | None = None, batches: Sequence[Any] = ()) -> Matrices:
        """Return the score of each entry of the matrices, in float32."""
        if self.needs_data:
            assert host is not None
            trained: dict[str, nn.Parameter] = matrices  # type: ignore[assignment]
            g = accumulate(host, trained, batches, lambda gradient: gradient)
            if self.score == "snip":
                return {key: (p.detach().float() * g[key]).abs() for key, p in matrices.items()}
            hg = curved(host, matrices, g, batches)
            return {key: p.detach().float() * second for (key, p), second in zip(matrices.items(), hg, strict=True)}
        if self.score == "magnitude":
            return {key: p.detach().float().abs() for key, p in matrices.items()}
        draw = torch.Generator().manual_seed(self.seed)
        return {key: torch.rand(p.shape, generator=draw).to(p.device) for key, p in matrices.items()}

    def kept(self, scores: Matrices) -> Matrices:
        """Return the masks of what is kept."""
        if self.score == "erdos_renyi":
            sizes = {key: s.numel() for key, s in scores.items()}
            weights = {key: 1 - sum(s.shape) / s.numel() for key, s in scores.items()}
            factor = self.share * sum(sizes.values()) / sum(weights[key] * size for key, size in sizes.items())
            left = {key: size - round(factor * weights[key] * size) for key, size in sizes.items()}
            return {key: highest([s], left[key])[0] for key, s in scores.items()}
        if self.scope == "matrix":
            return {key: highest([s], self.budget(s.numel()))[0] for key, s in scores.items()}
        masks = highest(list(scores.values()), self.budget(sum(s.numel() for s in scores.values())))
        return dict(zip(scores, masks, strict=True))

    def budget(self, size: int) -> int:
        """Return how many of so many entries are kept: all but ⌈σ N⌉."""
        return size - math.ceil(round(self.share * size, 6))

    def _prune(self, host: Carrier, name: str, scores: Matrices) -> None:
        if not all(bool(s.isfinite().all()) for s in scores.values()):
            raise TrainingError(f"{self.id}: some scores are not finite. Load the base in bf16 or fp32.")
        if not any(bool(s.any()) for s in scores.values()):
            raise NotTrainingError(
                f"{self.id}: all scores are zero, so they say nothing. Check that the batches have labels, or take "
                "score='magnitude'."
            )
        masks = self.kept(scores)
        for path, layer in self.layers(host, name).items():
            for key in MATRICES:
                layer.cut(key, masks[f"{path}.{key}"])

    def _matrices(self, host: Carrier, name: str) -> Matrices:
        layers = self.layers(host, name).items()
        return {f"{path}.{key}": getattr(layer, key) for path, layer in layers for key in MATRICES}

    def _pruned(self, host: Carrier, name: str) -> bool:
        return all(layer.is_cut for layer in self.layers(host, name).values())

    class Layer(After):
        """One adapter; a matrix that is pruned is a vector of what is left, and a mask."""

        @property
        def is_cut(self) -> bool:
            """Whether it is pruned."""
            return "down_mask" in self._buffers

        def cut(self, key: str, mask: Tensor) -> None:
            """Keep the entries of a matrix for which the mask says so."""
            whole: Any = getattr(self, key)
            mask = mask.to(whole.device)
            setattr(self, key, nn.Parameter(whole.detach()[mask]))
            self.register_buffer(f"{key}_mask", mask)

        def dense(self, key: str) -> Tensor:
            """W ⊙ M of one matrix."""
            values, mask = getattr(self, key), self._buffers.get(f"{key}_mask")
            return values if mask is None else values.new_zeros(mask.shape).masked_scatter(mask, values)

        def weights(self) -> Weights:
            """The pruned matrices and the biases."""
            return self.dense("down"), self.down_bias, self.dense("up"), self.up_bias


def enough(batches: Batches, rows: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield batches until they have that many rows.

    Raises:
        DataError: there is none, or one without labels.
    """
    given = 0
    for batch in batches:
        if "labels" not in batch:
            raise DataError(f"Scores of gradients need batches with labels; one has only {', '.join(batch)}.")
        yield batch
        given += len(batch["labels"])
        if given >= rows:
            return
    if not given:
        raise DataError("Scores of gradients need data, and there are no batches. Pass some to prepare.")


def curved(host: Carrier, matrices: Matrices, g: Matrices, batches: Sequence[Any]) -> list[Tensor]:
    """Return H g for each matrix, summed over batches: the gradient of g · ∂L/∂θ."""
    parameters = list(matrices.values())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for batch in batches:
        first = torch.autograd.grad(host.model(**batch).loss, parameters, create_graph=True)
        dot = torch.stack([(a * b.to(a.dtype)).sum() for a, b in zip(first, g.values(), strict=True)]).sum()
        for total, second in zip(sums, torch.autograd.grad(dot, parameters), strict=True):
            total += second.float()
    return sums


def highest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return masks of the k highest entries of several tensors together, at least one of each."""
    flat = torch.cat([s.flatten().float() for s in scores])
    starts = itertools.accumulate((s.numel() for s in scores), initial=0)
    for start, s in zip(starts, scores, strict=False):
        flat[start + int(s.argmax())] = torch.inf
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(k, len(scores))).indices] = True
    parts = mask.split([s.numel() for s in scores])
    return [part.view(s.shape).to(s.device) for part, s in zip(parts, scores, strict=True)]

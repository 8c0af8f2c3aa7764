"""Sparse high-rank adapters."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Batches, LayerMethod
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, NotTrainingError
from adapterlab.methods.low_rank._shown_data import mean_gradients, shown
from adapterlab.methods.low_rank._starts import Place
from adapterlab.ops.low_rank import autocasts
from adapterlab.ops.sparse_update import placed, sparse_linear
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer

_FROM_DATA = ("gradient", "snip")


def _outward(method: Any, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """PEFT knows random masks, and stores the places; a scale goes into the values."""
    tensors = {
        path: {"values": method.scale * layer.values, "indices": layer.indices} for path, layer in layers.items()
    }
    return {"mask_type": "random", "random_seed": method.seed}, tensors


def _inward(method: Any, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_outward` for one module; PEFT writes the places as floats on Windows."""
    found = {**tensors}
    if "indices" in found:
        found["indices"] = found["indices"].to(torch.int32)
    if "values" in found:
        found["values"] = found["values"] / method.scale
    return found


@register
class SHiRA(LayerMethod):
    """Train one or two percent of the weight's entries: few enough to switch adapters fast, and of full rank.

    y = (W + s S) x + b, S `[out, in]` zero but for k = r (in + out) entries, as many as LoRA of rank r has. Which train
    is chosen once:

    - `random`: k at random;
    - `magnitude`: the largest |W|;
    - `structured`: the diagonal, and whole rows and columns at equal distances;
    - `gradient`, `snip`: the largest |G| or |W ⊙ G|, G the loss's gradient averaged over batches, by `prepare`.

    Where it attaches: linear layers (GPT-2's `Conv1D` too, and quantized ones with all masks but the last two).

    Start: the values are 0, so the first output equals the base's.

    Trainable parameters: r (in + out) for each module.

    Inference: W + s S can be merged, at no cost; `scale` may be changed after training. Memory: a value, its place in
    8 bytes and its moments; nothing of the weight's size is kept.

    The values are float32. On a half-precision base W + s S is rounded to its dtype for each product, as weights with
    float32 masters are, and as merging rounds it.

    Cost of a step: a copy of W with the entries added, in each pass, and the entries of one product for the gradient:
    2 t k operations on a CPU in float32, and 2 t out in elsewhere; LoRA's large products are 4 t out in for t tokens.

    Rate: 3e-4, as in HF PEFT's comparison.

    Reference: "Sparse High Rank Adapters", arXiv 2406.13175.

    Example:
        >>> from adapterlab.methods.structured.shira import SHiRA
        >>> SHiRA(r=4).count(64, 48)
        448
    """

    formula: ClassVar[str] = "r (in + out)"

    r: int = Field(32, ge=1, description="as many entries train as LoRA of this rank has")
    mask: Literal["random", "magnitude", "structured", "gradient", "snip"] = Field(
        "random", description="how the entries are chosen; the last two need data"
    )
    scale: float = Field(1.0, gt=0, description="factor s of the update; 1 in training, any later")
    seed: int = Field(0, ge=0, lt=1 << 31, description="of the random choice, which differs from module to module")
    batches: int = Field(16, ge=1, description="batches that the gradient is averaged over, at most")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "SHIRA",
        fields={"r": "r"},
        tensors={"values": "shira_weight", "indices": "shira_indices"},
        accepts={"init_weights": (True, False)},
        ignores=("mask_type", "random_seed"),
        derived=lambda config: {"seed": config.get("random_seed") or 0},
        transposed=False,
        outward=_outward,
        inward=_inward,
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Fewer entries than a small layer has."""
        return {"r": 4}

    def count(self, out: int, in_: int) -> int:
        """Entries that train in a weight `[out, in]`."""
        return self.r * (in_ + out)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach with the places that were saved.

        Raises:
            AttachError: they lie outside a weight.
        """
        self.attach(host, name)
        for path, layer in self._layers(host, name).items():
            if (indices := tensors.get(f"adapter.{path}.indices")) is not None:
                layer.choose(_checked(path, indices, layer.site.shape))

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Choose the entries by the gradient, if the mask asks for it; an adapter that has its entries keeps them."""
        super().prepare(host, name, batches)
        waiting = {path: layer for path, layer in self._layers(host, name).items() if not layer.chosen}
        if not waiting:
            return
        places = {path: Place(layer.site, self.r, 1.0) for path, layer in waiting.items()}
        gradients = mean_gradients(host, places, shown(batches, self.batches, "gradients"))
        for path, layer in waiting.items():
            score = gradients[path] if self.mask == "gradient" else gradients[path] * layer.site.weight().float()
            layer.choose(_largest(score.abs(), len(layer.values)))

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Refuse to train entries that no data has chosen, in a loop that did not call `prepare`."""
        super().before_step(host, name, step, optimizer)
        if not all(layer.chosen for layer in self._layers(host, name).values()):
            raise NotTrainingError(
                f"The shira adapter {name!r} has not chosen its entries yet (mask={self.mask!r} goes by gradients). "
                f"Call host.methods[{name!r}].prepare(host, {name!r}, batches) with labelled batches before training; "
                "the training loop of adapterlab does it by itself."
            )

    @classmethod
    def capabilities(cls) -> dict[str, bool]:
        """As of any method; the usual mask needs no data."""
        return {**super().capabilities(), "needs_data": cls.model_fields["mask"].default in _FROM_DATA}

    def _layers(self, host: Carrier, name: str) -> dict[str, SHiRA.Layer]:
        return {path: part for path, part in host.adapters(name).items() if isinstance(part, SHiRA.Layer)}

    class Layer(Delta):
        """The `values` `[k]` and `indices` `[2, k]` of one module's entries, row by row.

        Attributes:
            chosen: the entries are those that the mask asks for, and not a random choice in their place.
        """

        indices: Tensor
        values: nn.Parameter

        casts: ClassVar[bool] = False

        def __init__(self, method: SHiRA, site: Site):
            super().__init__(site)
            self.scale, (out, in_) = method.scale, site.shape
            count, most = method.count(out, in_), out * in_ // (out + in_)
            if count > out * in_:
                raise AttachError(
                    f"shira: r = {method.r} would train {count} entries of {site.path}, which has {out * in_}. Choose "
                    f"r <= {most}, or leave the module out."
                    if most
                    else f"shira: {site.path} is [{out}, {in_}], fewer entries than r = 1 trains. Leave it out."
                )
            if method.mask in _FROM_DATA and site.quantized:
                raise AttachError(
                    f"shira: mask={method.mask!r} needs the gradient of {site.path}.weight, which is stored packed. "
                    "Choose mask='magnitude' or 'random', or load the base without quantization."
                )
            self.register_buffer("indices", None)
            self.values = site.parameter(count)
            self.choose(_first_choice(method, site, count), chosen=method.mask not in _FROM_DATA)

        def choose(self, indices: Tensor, *, chosen: bool = True) -> None:
            """Train these entries from zero."""
            self.indices = indices.to(self.site.device, torch.int32)
            if len(self.values) != indices.shape[1]:
                self.values = self.site.parameter(indices.shape[1])
            self.chosen = chosen

        def scaled(self) -> Tensor:
            """The values times the factor of the update."""
            return self.values if self.scale == 1 else self.scale * self.values

        def delta(self) -> Tensor:
            """ΔW `[out, in]`."""
            return placed(self.scaled(), self.indices, self.site.shape)

        def forward(self, x: Tensor) -> Tensor:
            """The update's share of the output, in the dtype of x."""
            if autocasts(x):  # a node with its own backward must not see dtypes change
                return self.site.op(x, self.delta())
            return sparse_linear(x, None, None, self.scaled(), self.indices, self.site.shape[0])

        def whole(self, x: Tensor) -> Tensor | None:
            """Base and update together."""
            weight, *again = self.site.frozen_weight(x.dtype)
            return sparse_linear(x, weight, self.site.bias, self.scaled(), self.indices, self.site.shape[0], *again)


# ---------------------------------------------------------------------- masks


def _first_choice(method: SHiRA, site: Site, count: int) -> Tensor:
    """The entries of a mask that needs no data; in place of the others a random choice."""
    if method.mask == "magnitude":
        return _largest(site.weight().detach().float().abs(), count)
    if method.mask == "structured":
        return _lines(*site.shape, count)
    # The generator uses 32 bits of its seed, so both numbers must go into those.
    draw = torch.Generator().manual_seed(zlib.crc32(site.path.encode(), method.seed))
    out, in_ = site.shape
    return _rows_and_columns(torch.randperm(out * in_, generator=draw)[:count], in_)


def _rows_and_columns(flat: Tensor, width: int) -> Tensor:
    """`[2, k]` of positions in a matrix, row by row."""
    flat = flat.sort().values
    return torch.stack([flat // width, flat % width]).to(torch.int32)


def _largest(score: Tensor, count: int) -> Tensor:
    """The entries of the largest scores."""
    return _rows_and_columns(score.flatten().topk(count).indices, score.shape[1])


def _lines(out: int, in_: int, count: int) -> Tensor:
    """The diagonal and, in turns, rows and columns at equal distances, up to a number of entries."""
    marked = torch.zeros(out, in_, dtype=torch.bool)
    diagonal = torch.arange(min(out, in_, count))
    marked[diagonal, diagonal] = True
    left = count - len(diagonal)
    lines = -(-count // min(out, in_)) + 1
    spaced = [torch.linspace(0, size - 1, min(lines, size)).round().long().tolist() for size in (out, in_)]
    crossing = [line for pair in zip(*(_padded(found, lines) for found in spaced), strict=True) for line in pair]
    for turn, line in enumerate(crossing):
        if line is None or not left:
            continue
        entries = marked[line] if turn % 2 == 0 else marked[:, line]
        free = (~entries).nonzero().flatten()[:left]
        entries[free] = True
        left -= len(free)
    free = (~marked).flatten().nonzero().flatten()[:left]
    marked.view(-1)[free] = True
    return _rows_and_columns(marked.flatten().nonzero().flatten(), in_)


def _padded(found: list[int], count: int) -> list[int | None]:
    return [*found, *[None] * (count - len(found))]


def _checked(path: str, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Places that lie in the weight.

    Raises:
        AttachError: some do not.
    """
    fits = indices.dim() == 2 and len(indices) == 2
    if not fits or (indices.numel() and bool(((indices < 0) | (indices >= torch.tensor(shape)[:, None])).any())):
        raise AttachError(
            f"The entries of {path} do not lie in its weight {list(shape)} here: they were chosen on another base "
            "model, or the file is damaged."
        )
    return indices

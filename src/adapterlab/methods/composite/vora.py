"""Vision as LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter, Entrance
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.core.targets import Targets
from adapterlab.engine.attention import understood
from adapterlab.engine.wrapping import adapters_of
from adapterlab.errors import AttachError, ConfigError, DataError
from adapterlab.foreign.cache import cache_in, held_tokens, plain_mask
from adapterlab.foreign.model import input_table, is_encoder_decoder, text_config
from adapterlab.foreign.private_transformers import attention_implementation
from adapterlab.methods.composite import _vision
from adapterlab.methods.composite._vision import PatchEmbedding, Tower
from adapterlab.methods.composite.longlora import LongLoRA
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register

_IMAGES, _KEY = "pixel_values", "image"


@register
class VoRA(Method):
    """Let a language model see: LoRA in its first blocks takes the place of a vision tower.

    An image `[c, h, w]` becomes (h / p) (w / p) tokens: x = W_out (norm(P patch) + position), with P a convolution of
    kernel and stride p, `norm` an RMSNorm and W_out `[d, width]`. They stand where `input_ids` has `image_token`, once
    for each patch; those positions bear no label. A position sees what is before it, and all patches of its own image:
    allowed(i, j) = (j ≤ i) or image(i) = image(j). In the first N blocks each linear layer has a LoRA of scale 1 that
    all tokens, text too, go through.

    Distillation: with a `teacher`, a frozen vision transformer of N blocks, each of the first N blocks learns to return
    what that block of the teacher returns: L = L_text + distill / N · Σ_i mean over patches of 1 − cos(h_i(z_i), t_i),
    h_i an RMSNorm and a linear map `[d_teacher, d]`, z_i the output of block i. (The authors' code takes the input of
    block i for z_i; the block's own updates have no share in that.) Teacher and maps h_i are not saved.

    Batches: `input_ids` and `pixel_values`, `[images, c, h, w]` with at most one image a row, or
    `[rows, images, c, h, w]` with the same number in each row. Without `pixel_values` the batch is text.

    Where it attaches: around a decoder-only language model, inside its attention (`sdpa` or `eager`), at its blocks and
    linear layers.

    Start: B = 0, so text is answered as the base does. The embedding begins with the teacher's patches and positions
    where these have the same shape, else at random. Positions are resized for images of another shape than the table's.

    Trainable parameters: Σ r (in + out) + width (c p² + 2 + positions + d); in training d + d d_teacher for each h_i.

    Inference: LoRA merges, and a saved merged model is the language model alone; in memory the embedding stays and
    works with the merged weights. `carry` puts it on a merged model that was loaded from a folder. Rows are padded, not
    packed.

    Rate: 2e-4, as in the authors' pre-training.

    Reference: "Vision as LoRA", arXiv 2503.20680.

    Example:
        >>> from adapterlab.methods.composite.vora import VoRA
        >>> VoRA(image_token=7, patch_size=14, image_size=448, width=1536).r
        1024
    """

    formula: ClassVar[str] = "Σ r (in + out) + width (c p² + 2 + positions + d)"
    scaffold: ClassVar[tuple[str, ...]] = ("auxiliary",)

    image_token: int = Field(ge=0, description="token id that stands for a patch in input_ids: one that text never has")
    r: int = Field(1024, ge=0, description="rank of the updates; 0: none, as after merging them")
    blocks: int | None = Field(
        None, ge=1, description="how many of the first blocks are adapted; default: as many as the teacher has, or all"
    )
    targets: Targets | None = Field(None, description="modules with LoRA in those blocks; default: all linear layers")
    teacher: str | None = Field(None, description="vision tower to learn from: a folder, or a name given to `hold`")
    distill: float = Field(1.0, ge=0, description="weight of the distillation")
    patch_size: int | None = Field(None, ge=1, description="side of a patch in pixels; default: the teacher's")
    image_size: int | None = Field(
        None, ge=1, description="side in pixels of the image that the table of positions is for; default: the teacher's"
    )
    width: int | None = Field(None, ge=1, description="width of the patch embedding; default: the teacher's")

    @model_validator(mode="after")
    def _sizes_are_known(self) -> VoRA:
        given = {"patch_size": self.patch_size, "image_size": self.image_size, "width": self.width}
        lacking = [key for key, value in given.items() if value is None]
        if self.teacher is None and lacking:
            raise ValueError(f"without a teacher to take them from, {' and '.join(lacking)} must be given")
        if self.patch_size and self.image_size and self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        return self

    @staticmethod
    def hold(name: str, tower: nn.Module) -> str:
        """Give a vision tower in memory a name that `teacher` can use in this process; it is kept until `release`."""
        return _vision.hold(name, tower)

    @staticmethod
    def release(name: str) -> None:
        """Forget a tower given to `hold`."""
        _vision.release(name)

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Images of four patches; a token that the suite's texts have not."""
        return {"image_token": 2, "r": 4, "patch_size": 8, "image_size": 16, "width": 8}

    @classmethod
    def example_batch(cls, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let an image stand in the place of the first four tokens of each row."""
        if "input_ids" not in batch:
            return batch
        ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
        ids[:, :4], labels[:, :4] = cls.example(model)["image_token"], -100
        draw = torch.Generator().manual_seed(0)
        return {**batch, "input_ids": ids, "labels": labels, _IMAGES: torch.randn(len(ids), 3, 16, 16, generator=draw)}

    # ------------------------------------------------------------------ attaching

    def attach(self, host: Carrier, name: str) -> None:
        """Make the embedding, begin it with the teacher's, and put everything on.

        Raises:
            AttachError: the model is no decoder-only language model, or the teacher does not suit.
        """
        table = self._table(host)
        tower = None if self.teacher is None else _vision.tower(self.teacher)
        image = self._embedding(tower, table.embedding_dim)
        if tower is not None:
            image.copy_from(tower)
        self._put(host, name, image, self._depth(host, tower))

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach as it was: the sizes are those of the tensors, and no teacher is asked for."""
        self._table(host)
        lead = f"shared.{_KEY}."
        image = PatchEmbedding.like({k.removeprefix(lead): v for k, v in tensors.items() if k.startswith(lead)})
        places = [host.layer_of(key.removeprefix("lora/adapter."))[1] for key in tensors if key.startswith("lora/")]
        depth = 1 + max((layer for layer in places if layer is not None), default=len(host.layers) - 1)
        self._put(host, name, image, depth)
        for path, part in host.adapters(name).items():
            head = tensors.get(f"adapter.{path}.auxiliary.1.weight")
            if isinstance(part, Pupil) and head is not None:  # of a run that goes on
                part.study(len(head))

    def _table(self, host: Carrier) -> nn.Embedding:
        """The embedding of words; refuse what is no language model that images could enter."""
        model, table = host.model, input_table(host.model)
        arguments = host.site(model).arguments
        if not isinstance(table, nn.Embedding) or is_encoder_decoder(model) or "inputs_embeds" not in arguments:
            raise AttachError(
                f"vora: images enter a decoder-only language model in the place of words, and {type(model).__name__} "
                "is none. Load a model with a language-model head (...ForCausalLM)."
            )
        if _IMAGES in arguments:
            raise AttachError(
                f"vora: {type(model).__name__} takes {_IMAGES} by itself: it has a vision tower. Adapt that with LoRA, "
                "or load the language model alone."
            )
        if self.image_token >= table.num_embeddings:
            raise ConfigError(f"image_token={self.image_token}: the model's ids are 0 to {table.num_embeddings - 1}.")
        return table

    def _embedding(self, tower: Tower | None, out: int) -> PatchEmbedding:
        """The embedding of the sizes that are set, or the teacher's."""
        width = self.width or (tower.width if tower else 0)
        patch = self.patch_size or (int(tower.patches.kernel_size[0]) if tower else 0)
        side = self.image_size or (tower.side if tower else None)
        if side is None or side % patch:
            raise AttachError(f"vora: the teacher's image size is {side}, no multiple of {patch}. Set image_size.")
        channels = tower.patches.in_channels if tower else 3
        return PatchEmbedding(channels, width, patch, (side // patch) ** 2, out)

    def _depth(self, host: Carrier, tower: Tower | None) -> int:
        """How many of the first blocks are adapted; a block that learns from the teacher is one of them."""
        there, needed = len(host.layers), len(tower.blocks) if tower and self.distill else 1
        depth = self.blocks or (len(tower.blocks) if tower else there)
        if not needed <= depth <= there:
            raise AttachError(
                f"vora: {depth} blocks are to be adapted, of {there} in {type(host.model).__name__}, for a teacher of "
                f"{needed}. Set blocks between {needed} and {there}, choose a teacher that is not deeper, or distill=0."
            )
        return depth

    def _put(self, host: Carrier, name: str, image: PatchEmbedding, depth: int) -> None:
        """Put everything on, with the updates in the first blocks."""
        attentions, site = self._attentions(host), host.site(host.model)
        host.share(name, _KEY, image.to(site.device, site.dtype))
        eyes = Eyes(self, site, host.state, name)
        eyes.refer(_KEY, image)
        host.wrap(name, site, eyes)
        for module in attentions:
            host.attend(name, module, BothWays(host.site(module), host.state, name))
        for i, block in enumerate(host.layers):
            host.wrap(name, block, Pupil(host.site(block), host.state, name, i))
        if self.r:
            host.compose(name, "lora", self.updates(depth))

    def updates(self, depth: int) -> LoRA:
        """The LoRA of the first blocks, B A with the factor 1."""
        targets = self.targets or Targets(include=("all-linear",))
        if targets.layers is None:
            targets = targets.replace(layers=tuple(range(depth)))
        return LoRA(r=self.r, alpha=self.r, targets=targets)

    @staticmethod
    def _attentions(host: Carrier) -> list[nn.Module]:
        """The attention modules, which must be causal and take a mask."""
        found, name = [m for m in host.attentions if LongLoRA.fits(m)], type(host.model).__name__
        if not found:
            raise AttachError(
                f"vora: images enter a causal language model, and no attention of {name} is causal. Load a model that "
                "generates text (...ForCausalLM)."
            )
        other = next((k for m in found if (k := attention_implementation(m)) not in ("sdpa", "eager")), None)
        if other is not None:
            raise AttachError(
                f"vora: patches of an image see each other, which needs attention that takes a mask, and {name} "
                f"computes it by {other!r}. Load it with attn_implementation='sdpa' or 'eager'."
            )
        return found

    # ------------------------------------------------------------------ a run, and after it

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Fetch the teacher, and give the blocks that learn from it their maps."""
        super().begin(host, name, steps)
        if self.teacher is None or not self.distill:
            return
        tower = _vision.tower(self.teacher)
        self._depth(host, tower)
        tower.model.to(host.site(host.model).device)
        for part in host.adapters(name).values():
            if isinstance(part, Eyes):
                part.teacher = [tower]
            elif isinstance(part, Pupil) and part.index < len(tower.blocks):
                part.weight = self.share(len(tower.blocks))
                part.study(tower.width)

    def share(self, blocks: int) -> float:
        """What the loss of one of so many blocks counts: the mean over them, times its weight."""
        return self.distill / blocks

    def finish(self, host: Carrier, name: str) -> None:
        """Let go of the teacher and of the maps."""
        super().finish(host, name)
        for part in host.adapters(name).values():
            if isinstance(part, Eyes):
                part.teacher = []
            elif isinstance(part, Pupil):
                part.auxiliary = None

    @staticmethod
    def carry(host: Carrier, name: str, merged: nn.Module) -> Any:
        """Put the embedding and the mask of an adapter on a model that holds its LoRA merged.

        Args:
            host: of the model with the adapter.
            name: of the adapter.
            merged: the base with the LoRA in its weights, such as a merged folder gives.

        Returns:
            The host of `merged`, whose adapter of that name has r = 0 and is saved and loaded like any other.
        """
        from adapterlab.hosts import Host
        from adapterlab.hosts import host as host_of

        method, tensors = host.methods[name], {k: v for k, v in host.tensors(name).items() if k.startswith("shared.")}
        image = PatchEmbedding.like({key.removeprefix(f"shared.{_KEY}."): value for key, value in tensors.items()})
        rest = method.replace(
            r=0, blocks=None, targets=None, teacher=None, patch_size=image.patch, width=image.patches.out_channels,
            image_size=image.patch * int(len(image.positions) ** 0.5),
        )  # fmt: skip
        found = host_of(merged) or Host(merged)
        found.attach(rest, name, saved=tensors)
        return found


@dataclass(frozen=True)
class Sight:
    """What a call sees: left by the entrance for the parts inside.

    Attributes:
        places: `[rows, tokens]`, true where a patch stands.
        same: `[rows, 1, tokens, tokens]`, true where both are patches of one image.
        before: tokens in the cache.
        targets: for each block of the teacher what it returns `[patches of all images, width]`, or None.
    """

    places: Tensor
    same: Tensor
    before: int
    targets: list[Tensor] | None


class Eyes(Entrance):
    """Stands around the whole model and puts images in the place of their tokens."""

    rowwise: ClassVar[bool] = False  # images are not counted by rows
    takes: ClassVar[tuple[str, ...]] = (_IMAGES,)
    image: PatchEmbedding

    def __init__(self, method: VoRA, site: Site, state: State, key: str):
        super().__init__(site)
        self.token, self.state, self.key = method.image_token, state, key
        self.teacher: list[Tower] = []  # no submodule: it is neither saved nor trained

    @contextlib.contextmanager
    def entering(self, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Embed words and images together, and let the parts inside know where images are."""
        pixels = given.get(_IMAGES)
        given = {key: value for key, value in given.items() if key != _IMAGES}
        if pixels is None:
            self._check_text(given)
            yield given
            return
        self._check(given)
        images, places, before = self._images(pixels), self._places(given), held_tokens(cache_in(given))
        count = self.image.count(images)
        if before and (not bool(places.any()) or places.shape[1] == 1 < count):
            yield given  # generation may show the images again with each token; they are in the cache
            return
        self._check_places(places, pixels, count)
        self._check_labels(given.get("labels"), places)
        x = self.embedded(given["input_ids"], images, places)
        self.state.taps[self.key] = Sight(places, self.same(places, count), before, self.targets(images, count))
        try:
            yield {**given, "input_ids": None, "inputs_embeds": x}
        finally:
            self.state.taps.pop(self.key, None)

    def embedded(self, ids: Tensor, images: Tensor, places: Tensor) -> Tensor:
        """Words from the model's table, patches from the embedding: `[rows, tokens, d]`."""
        words: Tensor = input_table(self.site.module)(ids)
        return words.masked_scatter(places[..., None], self.image(images.to(self.image.out.weight)).to(words.dtype))

    @staticmethod
    def same(places: Tensor, count: int) -> Tensor:
        """Say which pairs of positions are patches of one image: `[rows, 1, tokens, tokens]`."""
        number = (places.cumsum(1) - 1) // count
        pairs = places[:, :, None] & places[:, None, :] & (number[:, :, None] == number[:, None, :])
        return pairs[:, None]

    def targets(self, images: Tensor, count: int) -> list[Tensor] | None:
        """What the teacher's blocks return, while a run is listening."""
        if not self.teacher or not self.training or self.state.losses is None:
            return None
        return [state.flatten(0, 1) for state in self.teacher[0].states(images, count)]

    @staticmethod
    def _images(pixels: Tensor) -> Tensor:
        if pixels.dim() not in (4, 5) or not len(pixels):
            raise DataError(
                f"{_IMAGES}: [images, channels, height, width] or [rows, images, channels, height, width] is wanted, "
                f"and {list(pixels.shape)} was given. Leave it out of a batch without images."
            )
        return pixels.flatten(0, 1) if pixels.dim() == 5 else pixels

    def _places(self, given: dict[str, Any]) -> Tensor:
        """Where patches stand; what the attention mask hides is filling."""
        ids = given["input_ids"]
        mask = plain_mask(given, text_config(self.site.module))
        found: Tensor = ids == self.token
        return found if mask is None else found & mask[:, -ids.shape[1] :].bool()

    def _check(self, given: dict[str, Any]) -> None:
        if given.get("input_ids") is None:
            raise DataError(f"{_IMAGES} stand where input_ids has the image token, and there are no input_ids.")
        if given.get("cu_seq_lens_q") is not None:
            raise DataError("Rows with images cannot be packed. Pad them: training.packing=false.")
        adapters = adapters_of(self.site.module).items()
        others = [n for n, a in adapters if isinstance(a, Eyes) and n in self.state.active and a is not self]
        if others:
            raise AttachError(
                f"{self.key!r} and {others[0]!r} are both live, and each would embed the images. Make one of them "
                "active with host.activate or host.using."
            )

    def _check_places(self, places: Tensor, pixels: Tensor, count: int) -> None:
        """Require a place for each patch, and a patch for each place."""
        here = places.sum(1).tolist()
        if pixels.dim() == 5:
            good = here == [pixels.shape[1] * count] * len(pixels)
        else:
            good = all(n in (0, count) for n in here) and sum(here) == count * len(pixels)
        if not good:
            raise DataError(
                f"{_IMAGES} {list(pixels.shape)} hold images of {count} patches, and the rows of input_ids have the "
                f"image token {self.token} {here} times. Write it once for each patch; several images in a row are "
                "given as [rows, images, ...]. A model that generates the token itself is kept from it by "
                f"generate(suppress_tokens=[{self.token}])."
            )

    @staticmethod
    def _check_labels(labels: Tensor | None, places: Tensor) -> None:
        """Require that words alone are trained."""
        count = 0 if labels is None else int((labels[places] != -100).sum())
        if count:
            raise DataError(
                f"{count} positions of images bear labels, and the loss is for words alone. Set the labels to -100 "
                "where input_ids has the image token."
            )

    def _check_text(self, given: dict[str, Any]) -> None:
        """Refuse places of images without images; the token by itself may be a word."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or ids.shape[1] < 2 or torch.compiler.is_compiling():
            return
        here = ids == self.token
        if isinstance(mask, Tensor) and mask.dim() == 2:
            here = here & mask[:, -ids.shape[1] :].bool()
        if bool((here[:, 1:] & here[:, :-1]).any()):
            raise DataError(
                f"input_ids have places for an image (the token {self.token}, repeated), and the batch has no "
                f"{_IMAGES}. Give them; a collator or trainer may have dropped the column."
            )


class BothWays(Adapter):
    """Lets the patches of an image see each other inside one attention module."""

    resident: ClassVar[bool] = True
    outlives: ClassVar[bool] = True

    def __init__(self, site: Site, state: State, key: str):
        super().__init__(site)
        self.state, self.key = state, key

    def around(self, run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kwargs: Any) -> Any:
        """Open the mask where this call sees images."""
        sight = self.state.taps.get(self.key)
        if sight is None:
            return run(q, k, v, mask, **kwargs)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise AttachError(
                f"{self.site.path} has attention of the kind {attention_implementation(self.site.module)!r}, whose "
                "mask cannot let patches see each other. Load the model with attn_implementation='sdpa'."
            )
        given = {**kwargs, "is_causal": False} if "is_causal" in kwargs else kwargs
        opened = self.opened(mask, sight, q.shape[2], k.shape[2])
        return run(q, k, v, understood(self.site.module, opened, q.dtype), **given)

    def opened(self, mask: Tensor | None, sight: Sight, queries: int, keys: int) -> Tensor:
        """The mask `[rows, 1, queries, keys]` that shows what it showed, and all patches of one image to each other."""
        behind = keys - sight.before - queries  # empty places of a static cache
        if behind < 0 or sight.same.shape[-1] != queries:
            raise AttachError(
                f"{self.site.path} sees {keys} keys, fewer than {sight.before} in the cache and {queries} tokens: "
                "images cannot follow what has left a window of attention. Begin with an empty cache."
            )
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=sight.same.device).tril(sight.before)[None, None]
        same = F.pad(sight.same, (sight.before, behind))
        mask = mask[..., :keys]
        return mask | same if mask.dtype == torch.bool else mask.masked_fill(same, 0.0)


class Pupil(Adapter):
    """Compares what a block returns for patches with what the teacher's block returns."""

    resident: ClassVar[bool] = True
    outlives: ClassVar[bool] = True
    weight: float = 0.0

    def __init__(self, site: Site, state: State, key: str, index: int):
        super().__init__(site)
        self.state, self.key, self.index = state, key, index
        self.auxiliary: nn.Module | None = None

    def study(self, width: int) -> None:
        """Get a map h to the teacher's width, if there is none yet."""
        if self.auxiliary is None:
            own = text_config(self.state.carrier.model).hidden_size
            self.auxiliary = self.head(own, width).to(self.site.device, self.site.dtype)

    @staticmethod
    def head(own: int, width: int) -> nn.Sequential:
        """A map h from the block's width to the teacher's."""
        return nn.Sequential(nn.RMSNorm(own, eps=1e-5), nn.Linear(own, width, bias=False))

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block, and emit the loss where there are targets."""
        out = run(*args, **kwargs)
        sight = self.state.taps.get(self.key)
        if sight is not None and sight.targets is not None and self.auxiliary is not None:
            state = out[0] if isinstance(out, tuple) else out
            self.state.emit(self.weight * self.distance(state[sight.places], sight.targets[self.index]))
        return out

    def distance(self, state: Tensor, target: Tensor) -> Tensor:
        """The mean over patches of 1 − cos(h(z), t), z `[patches, d]`, t `[patches, d_teacher]`."""
        assert self.auxiliary is not None
        seen = self.auxiliary(state.to(self.dtype))
        return (1 - F.cosine_similarity(seen, target.to(seen.dtype), dim=-1)).mean()

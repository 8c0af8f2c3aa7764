"""What a method that teaches a language model to see is made of: images as tokens, and a frozen tower to learn from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.engine.modes import evaluating
from adapterlab.errors import AttachError, DataError
from adapterlab.foreign.model import main_stacks
from adapterlab.paths import user_path

_HELD: dict[str, nn.Module] = {}


class PatchEmbedding(nn.Module):
    """Images as tokens: out(norm(patches(image)) + positions).

    Args:
        channels: of an image.
        width: of a patch's vector before the last map.
        patch: side of a patch in pixels.
        table: number of positions, a square.
        out: width of the language model.
    """

    def __init__(self, channels: int, width: int, patch: int, table: int, out: int):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.positions = nn.Parameter(torch.zeros(table, width))
        self.out = nn.Linear(width, out, bias=False)

    @classmethod
    def like(cls, tensors: dict[str, Tensor]) -> PatchEmbedding:
        """Make one of the shape of saved tensors."""
        (width, channels, patch, _), out = tensors["patches.weight"].shape, len(tensors["out.weight"])
        return cls(channels, width, patch, len(tensors["positions"]), out)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.patches.kernel_size[0])

    def forward(self, images: Tensor) -> Tensor:
        """`[images, channels, height, width]` to `[images, patches, out]`."""
        cut = self.cut(images)
        return self.project(self.normed(cut) + self.place(cut.shape[-2], cut.shape[-1]))

    def cut(self, images: Tensor) -> Tensor:
        """The patches, each mapped to a vector: `[images, width, rows, columns]`."""
        found: Tensor = self.patches(images)
        return found

    def normed(self, cut: Tensor) -> Tensor:
        """The same, row after row, at length one on average: `[images, patches, width]`."""
        found: Tensor = self.norm(cut.flatten(2).transpose(1, 2))
        return found

    def place(self, rows: int, columns: int) -> Tensor:
        """Positions of a grid `[rows · columns, width]`: the table, resized where it has another shape."""
        side = math.isqrt(len(self.positions))
        if (rows, columns) == (side, side):
            return self.positions
        table = self.positions.T.reshape(1, -1, side, side)
        return F.interpolate(table, (rows, columns), mode="bilinear", align_corners=False)[0].flatten(1).T

    def project(self, x: Tensor) -> Tensor:
        """To the width of the language model."""
        found: Tensor = self.out(x)
        return found

    def count(self, images: Tensor) -> int:
        """Return how many tokens an image becomes.

        Raises:
            DataError: there is another number of channels, or a side is no multiple of the patch's.
        """
        _, channels, height, width = images.shape
        if channels != self.patches.in_channels or height % self.patch or width % self.patch:
            raise DataError(
                f"pixel_values: images of {channels} channels and {height} x {width} pixels do not divide into patches "
                f"of {self.patches.in_channels} channels and {self.patch} x {self.patch}. Resize or crop them, for "
                f"example to {max(1, height // self.patch) * self.patch} x {max(1, width // self.patch) * self.patch}."
            )
        return (height // self.patch) * (width // self.patch)

    @torch.no_grad()
    def copy_from(self, tower: Tower) -> None:
        """Begin with the tower's patches, their norm and its positions, where it has them in the same shape."""
        pairs: list[tuple[Tensor, Tensor]] = [*zip(self.patches.parameters(), tower.patches.parameters(), strict=False)]
        pairs += [(self.norm.weight, tower.norm)] if tower.norm is not None else []
        pairs += [(self.positions, tower.positions)] if tower.positions is not None else []
        for own, theirs in pairs:
            if own.shape == theirs.shape:
                own.copy_(theirs)


class Tower:
    """A frozen vision tower, and what its blocks return for the patches of an image.

    Attributes:
        model: the tower; neither trained nor changed.
        blocks: in order.
        patches: the convolution that reads the image.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model: Any = getattr(model, "vision_model", model)
        self.name, stack = name, main_stacks(self.model)
        found = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        if found is None or not stack:
            raise AttachError(
                f"The teacher {name!r} is {type(self.model).__name__}, which has no "
                f"{'list of blocks' if found is not None else 'convolution that cuts an image into patches'}. Give a "
                "vision transformer, such as the tower of CLIP, SigLIP or AIMv2."
            )
        self.blocks, self.patches = list(stack[0]), found

    @property
    def width(self) -> int:
        """Of the vectors that blocks return."""
        return int(self.patches.out_channels)

    @property
    def side(self) -> int | None:
        """Side in pixels of the images it was trained on, or None."""
        size = getattr(getattr(self.model, "config", None), "image_size", None)
        return int(size if isinstance(size, int) else size[0]) if size else None

    @property
    def leading(self) -> tuple[int, ...]:
        """How many tokens may stand before those of the patches: none, one for the class, and registers."""
        return 0, 1, 1 + int(getattr(self.model.config, "num_register_tokens", 0) or 0)

    @property
    def norm(self) -> Tensor | None:
        """The scale of a norm without a bias that stands right behind the patches `[width]`, or None."""
        holder = next(m for m in self.model.modules() if self.patches in m._modules.values())
        found = [m for m in holder.children() if list(dict(m.named_parameters(recurse=False))) == ["weight"]]
        return next((m.weight for m in found if m.weight.shape == (self.width,)), None)  # type: ignore[return-value]

    @property
    def positions(self) -> Tensor | None:
        """The table of positions without those of leading tokens `[patches, width]`, or None."""
        if self.side is None:
            return None
        count = (self.side // self.patches.kernel_size[0]) ** 2
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        for p in self.model.parameters():
            if id(p) not in inside and p.ndim in (2, 3) and p.shape[-1] == self.width:
                table = p.detach().reshape(-1, self.width)
                if len(table) - count in self.leading:
                    return table[-count:]
        return None

    def states(self, images: Tensor, patches: int) -> list[Tensor]:
        """Return what each block returns for an image's patches: `[images, patches, width]` a block.

        Raises:
            DataError: it does not take such images, or cuts them into another number of patches.
        """
        seen: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _m, _a, out: seen.append(_first(out))) for block in self.blocks]
        weight = self.patches.weight
        try:
            with evaluating(self.model):
                self.model(pixel_values=images.to(weight.device, weight.dtype))
        except (ValueError, RuntimeError) as error:
            raise DataError(
                f"The teacher {self.name!r} does not take images of {tuple(images.shape[1:])}: {error} Prepare the "
                "images as the teacher wants them, or train without it (distill=0)."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return [self.of_patches(state, patches).to(images.device) for state in seen]

    def of_patches(self, state: Tensor, patches: int) -> Tensor:
        """Leave out the tokens before those of the patches."""
        extra = state.shape[1] - patches
        if extra not in self.leading:
            raise DataError(
                f"The teacher {self.name!r} makes {state.shape[1]} tokens of an image and the embedding {patches}: "
                f"their patches differ. Set patch_size to the teacher's {self.patches.kernel_size[0]}, or leave it out."
            )
        return state[:, extra:]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def hold(name: str, model: nn.Module) -> str:
    """Keep a tower in memory under a name."""
    _HELD[name] = model
    return name


def release(name: str) -> None:
    """Forget one that was held."""
    _HELD.pop(name, None)


def tower(name: str) -> Tower:
    """Return the tower that is held under a name, or lies in a folder.

    Raises:
        AttachError: there is none, or it is no vision transformer.
    """
    if name in _HELD:
        return Tower(_HELD[name], name)
    folder = user_path(name)
    if not (folder / "config.json").is_file():
        raise AttachError(
            f"teacher={name!r} is neither the folder of a model nor a name of one in memory "
            f"(those are: {', '.join(_HELD) or 'none'}). Give a folder with config.json and weights, or hold the "
            "module under this name first."
        )
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Tower(model, name)

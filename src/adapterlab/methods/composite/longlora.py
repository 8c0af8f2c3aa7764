"""LongLoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.engine.attention import understood
from adapterlab.engine.positions import Positions, position_sites
from adapterlab.errors import AttachError
from adapterlab.foreign.model import is_encoder_decoder
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.registry import register


@register
class LongLoRA(Method):
    """Train on long inputs with attention inside shifted groups, beside LoRA and trained embeddings and norms.

    Of N tokens, half of the heads attend inside groups of G, `[0, G), [G, 2G), ...`, the others inside groups moved by
    G / 2, `[0, G/2), [G/2, 3G/2), ...`, so that information crosses every border. No token sees a later one, and none
    sees the other end of the sequence.

    Where it attaches: inside the causal self-attention, after positions are applied (groups); LoRA on q, k, v and o;
    all embeddings and norms in place (a tied head trains with its embedding). `stretch = f` divides rotary positions
    by f, in training and after.

    Start: equal to the base in evaluation, with `stretch = 1`.

    Trainable parameters: Σ r (in + out) + V d + norms.

    Inference: full attention. LoRA merges as usual; embeddings and norms are in place. With `stretch`, set the factor
    in the model's own configuration instead before merging.

    Rate: 2e-5, as in the authors' runs.

    Reference: "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", arXiv 2309.12307.

    Example:
        >>> from adapterlab.methods.composite.longlora import LongLoRA
        >>> LongLoRA().group(8192), LongLoRA(group_size=512).group(8192)
        (2048, 512)
    """

    formula: ClassVar[str] = "Σ r (in + out) + V d + norms"

    r: int = Field(8, ge=1, description="rank of the LoRA part")
    alpha: float = Field(16.0, gt=0, description="scale numerator of the LoRA part")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the LoRA part")
    targets: Targets | None = Field(None, description="modules with LoRA; default: the attention's q, k, v and o")
    group_size: int | None = Field(None, ge=2, multiple_of=2, description="tokens in a group; default: by ratio")
    ratio: float = Field(0.25, gt=0, le=1, description="group size as a share of the input's length")
    shift: bool = Field(True, description="move the groups of half of the heads; without it groups stay apart")
    stretch: float = Field(1.0, ge=1, description="factor by which rotary positions are divided")

    def group(self, length: int) -> int:
        """Return the group size for an input: an even number."""
        return self.group_size or 2 * max(1, round(length * self.ratio / 2))

    def attach(self, host: Carrier, name: str) -> None:
        """Compose the parts."""
        attentions = [m for m in host.attentions if self.fits(m)]
        if not attentions or is_encoder_decoder(host.model):
            raise AttachError(
                f"LongLoRA groups the causal self-attention of a decoder, and {type(host.model).__name__} is none. "
                "Choose LoRA with modules_to_save for its norms and embeddings instead."
            )
        for module in attentions:
            host.attend(name, module, self.Layer(self, host.site(module)))
        if self.stretch != 1:
            for site in position_sites(host):
                host.wrap(name, site, Positions(site, factor=self.stretch))
        roles = {site.role for site in host.all_sites()}
        targets = self.targets or Targets(include=tuple(r for r in ("q", "k", "v", "qkv", "o") if r in roles))
        host.compose(name, "lora", LoRA(r=self.r, alpha=self.alpha, dropout=self.dropout, targets=targets))
        for site in host.all_sites():
            if site.kind in ("norm", "embedding"):
                for leaf, _ in site.module.named_parameters(recurse=False):
                    host.own(name, f"{site.path}.{leaf}")

    @staticmethod
    def fits(module: Any) -> bool:
        """Say whether an attention module is causal self-attention."""
        return bool(getattr(module, "is_causal", False)) and not getattr(module, "is_cross_attention", False)

    class Layer(Adapter):
        """The groups of one attention module; it has no tensors, and nothing to merge."""

        not_linear: ClassVar[str] = "it changes who attends to whom"
        resident: ClassVar[bool] = True

        def __init__(self, method: LongLoRA, site: Site):
            super().__init__(site)
            self.group, self.shift = method.group, method.shift
            config: Any = site.module.config
            heads: int = config.num_attention_heads
            self.splits = (getattr(config, "num_key_value_heads", None) or heads) % 2 == 0
            if heads % 2:
                raise AttachError(f"{site.path} has {heads} heads, which cannot be halved into two kinds of groups.")

        def around(
            self, run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: Any
        ) -> Any:
            """In training attend inside groups; otherwise, and with a cache, as the model does."""
            length = q.shape[2]
            size = self.group(length)
            if not self.training or length != k.shape[2] or length <= size:
                return run(q, k, v, mask, **kwargs)
            # An odd number of key-value heads cannot be halved: then both kinds of groups are computed for all heads.
            halves = [t.chunk(2, 1) if self.splits else (t, t) for t in (q, k, v)]
            heads = q.shape[1] // 2
            outputs = []
            for i in (0, 1):
                parts = (halves[0][i], halves[1][i], halves[2][i])
                shift = size // 2 if i and self.shift else 0
                out = self.grouped(run, *parts, mask, size, shift, kwargs)
                outputs.append(out if self.splits else out[:, :, i * heads : (i + 1) * heads])
            return torch.cat(outputs, 2), None

        def grouped(
            self,
            run: Callable[..., Any],
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None,
            size: int,
            shift: int,
            kwargs: dict[str, Any],
        ) -> Tensor:
            """Attend inside groups that begin `shift` tokens before the input; `[batch, tokens, heads, head_dim]`.

            The groups lie in the batch, so that `size` scores are computed for each token and not as many as there are
            tokens.
            """
            batch, _, length, _ = q.shape
            back = -(length + shift) % size
            pad = (shift, back)
            folded = [_folded(F.pad(t, (0, 0, *pad)), size) for t in (q, k, v)]
            visible = understood(self.site.module, self.visible(mask, q, size, pad), q.dtype)
            given = {**kwargs, "is_causal": False} if "is_causal" in kwargs else kwargs
            out: Tensor = run(*folded, visible, **given)[0]
            return out.reshape(batch, -1, *out.shape[2:])[:, shift : shift + length]

        def visible(self, mask: Tensor | None, q: Tensor, size: int, pad: tuple[int, int]) -> Tensor:
            """Return who attends to whom `[batch · groups, 1, size, size]`: the model's mask inside groups."""
            length = q.shape[2]
            whole = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None, None]
            whole = whole if mask is None else mask[..., :length]
            hidden = False if whole.dtype == torch.bool else torch.finfo(whole.dtype).min
            blocks = _blocks(F.pad(whole, (*pad, *pad), value=hidden), size)
            # A row without any visible key has no softmax: filling sees itself.
            itself = torch.eye(size, dtype=torch.bool, device=q.device)
            empty = (~blocks if blocks.dtype == torch.bool else blocks <= hidden).all(-1, keepdim=True)
            blocks = blocks.masked_fill(empty & itself, True if blocks.dtype == torch.bool else 0.0)
            return blocks.repeat(len(q), 1, 1, 1) if len(whole) == 1 else blocks


def _folded(t: Tensor, size: int) -> Tensor:
    """`[batch, heads, groups · size, d]` to `[batch · groups, heads, size, d]`."""
    batch, heads, length, width = t.shape
    return t.view(batch, heads, length // size, size, width).transpose(1, 2).reshape(-1, heads, size, width)


def _blocks(mask: Tensor, size: int) -> Tensor:
    """The diagonal blocks of `[batch, 1, n, n]` as `[batch · groups, 1, size, size]`."""
    batch, heads, length, _ = mask.shape
    groups = length // size
    cut = mask.view(batch, heads, groups, size, groups, size).diagonal(dim1=2, dim2=4)
    return cut.permute(0, 4, 1, 2, 3).reshape(batch * groups, heads, size, size)

"""The loss of one batch, by the cheapest way that is right for the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import noop_context_fn

from adapterlab.core.host import host
from adapterlab.core.wrapping import adapters_of
from adapterlab.ops.cross_entropy import linear_cross_entropy, module_cross_entropy


class Loss:
    """Token cross-entropy of a language model, normalised by a number of tokens that the caller gives.

    For a decoder whose logits are `head(backbone(x))` only the positions that bear a label reach the head, chunk by
    chunk. Whether that holds (some models scale or cap their logits or add other losses, some adapters change the whole
    model) is not guessed from the class: it is tried once on a few tokens.

    Attributes:
        path: `chunked`, or `model` when the model's own forward computes the loss.
        why: the reason, for the log line of a run.
    """

    path: Literal["chunked", "model"]
    why: str

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.why = self._obstacle()
        self.path = "model" if self.why else "chunked"
        self.why = self.why or "logits exist for label-bearing positions only, one chunk at a time"

    def __call__(self, batch: Mapping[str, Tensor], total: int | Tensor | None = None) -> Tensor:
        """Return (sum of the batch's token losses) / total.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` (−100 bears no label), and whatever the model takes.
            total: number of label-bearing tokens of the whole optimizer step; default: of this batch.
        """
        count = self.tokens(batch)
        total = count if total is None else total
        if self.path == "model":
            loss: Tensor = self.model(**batch).loss
            return loss * (count / total)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        hidden = self.model.base_model(**inputs, use_cache=False)[0]
        labels = batch["labels"][:, 1:]
        bears = labels != -100
        return self._head_loss(hidden[:, :-1][bears], labels[bears]) / total

    def tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Number of positions of a batch that bear a label."""
        labels = batch["labels"] if self.seq2seq else batch["labels"][:, 1:]
        return int((labels != -100).sum())

    def _head_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        frozen = not any(p.requires_grad for p in head.parameters())
        if frozen and type(head) is nn.Linear and "forward" not in head.__dict__:
            return linear_cross_entropy(hidden.to(head.weight.dtype), head.weight, head.bias, labels)
        carrier = host(self.model)
        contexts = carrier.recomputation if carrier else noop_context_fn
        return module_cross_entropy(hidden, head, labels, head.out_features, contexts)

    def _obstacle(self) -> str:
        """Return why the chunked way cannot be used, or ""."""
        head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        backbone: Any = getattr(self.model, "base_model", self.model)
        if self.seq2seq:
            return "an encoder-decoder computes its own loss"
        if not isinstance(head, nn.Linear) or backbone is self.model:
            return f"{type(self.model).__name__} has no linear output head on a backbone"
        if adapters_of(self.model):
            return "an adapter stands around the whole model"
        return "" if self._agrees(head) else f"{type(self.model).__name__} does more to its logits than its output head"

    @torch.no_grad()
    def _agrees(self, head: nn.Module) -> bool:
        """Put known logits in the head's place: the model must return them as they are, and their plain loss."""
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.arange(1, 7, device=next(self.model.parameters()).device)[None] % vocabulary
        seen: list[Tensor] = []
        probes: list[Tensor] = []

        def replace(_: nn.Module, args: Any, logits: Tensor) -> Tensor:
            steps = torch.arange(logits.numel(), device=logits.device).view(logits.shape)
            seen.append(args[0])
            probes.append((30 * steps.sin()).to(logits.dtype))  # large enough for a cap to show
            return probes[-1]

        mode = self.model.training
        self.model.eval()
        handle = head.register_forward_hook(replace)
        try:
            found = self.model(input_ids=ids, labels=ids, use_cache=False)
            handle.remove()
            hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]
        finally:
            handle.remove()
            self.model.train(mode)
        if len(seen) != 1 or seen[0].shape != hidden.shape or probes[0].shape[:2] != ids.shape:
            return False
        plain = F.cross_entropy(probes[0][0, :-1].float(), ids[0, 1:])
        same_loss = torch.allclose(found.loss.float(), plain, rtol=1e-5)  # auxiliary losses can be small
        pairs = ((found.logits, probes[0]), (seen[0], hidden))
        return same_loss and all(torch.allclose(a, b.to(a.dtype), rtol=1e-3, atol=1e-4) for a, b in pairs)

"""The loss of one batch, by the cheapest way that is right for the model."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Entrance
from adapterlab.engine.attachments import attachments
from adapterlab.engine.recompute import recomputation
from adapterlab.engine.wrapping import adapters_of
from adapterlab.errors import AttachError, ConfigError
from adapterlab.foreign.model import input_device, is_encoder_decoder, output_head, plain_class, text_config
from adapterlab.ops.cross_entropy import (
    IGNORED,
    PLAIN,
    TokenForm,
    linear_cross_entropy,
    logits_cross_entropy,
    module_cross_entropy,
)

_HUGE, _TINY = 6e4, 2.0**-14  # one meets a cap, the other does not feel it; both exist in half precision


class Loss:
    """Token cross-entropy of a language model, normalised by a number of tokens that the caller gives.

    For a decoder whose logits are `head(backbone(x))`, scaled or capped or as they are, only the positions that bear a
    label reach the head, chunk by chunk. Whether that holds (some models add other losses, some adapters change the
    whole model) is not guessed from the class: it is tried once on a few tokens, and scale and cap are measured.

    Args:
        model: a language model of transformers, with or without adapters.
        smoothing: label smoothing, as in `TokenForm`.
        z_loss: coefficient of the squared logsumexp of the logits.

    Attributes:
        form: the loss of a token, with the model's scale and cap; without them on the path `model`.
        path: `chunked`, or `model` when the model's own forward computes the loss.
        why: the reason, for the log line of a run.
    """

    path: Literal["chunked", "model"]
    why: str

    form: TokenForm

    def __init__(self, model: nn.Module, smoothing: float = 0.0, z_loss: float = 0.0):
        self.model: Any = model
        self.form = PLAIN._replace(smoothing=smoothing, z_loss=z_loss)
        self.seq2seq = is_encoder_decoder(model)
        self.why = self._obstacle()
        self.path = "model" if self.why else "chunked"
        self.why = self.why or "logits exist for label-bearing positions only, one chunk at a time" + self._shape()

    def __call__(self, batch: Mapping[str, Tensor], total: int | Tensor | None = None) -> Tensor:
        """Return (sum of the batch's token losses) / total.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` (−100 bears no label), and whatever the model takes.
            total: number of label-bearing tokens of the whole optimizer step; default: of this batch.

        Raises:
            ConfigError: smoothing or z_loss are set for a model that computes its own loss and gives no logits for it.
        """
        count = self.tokens(batch)
        total = count if total is None else total
        if self.path == "model":
            output = self.model(**batch)
            loss: Tensor = output.loss * (count / total)
            return loss if self.form == PLAIN else loss + self._surplus(output, batch["labels"]) / total
        return self.of(self.hidden(batch), batch["labels"], total)

    def plain(self) -> Loss:
        """Return the same without smoothing and z_loss, as evaluations take it."""
        found = copy.copy(self)
        found.form = self.form._replace(smoothing=0.0, z_loss=0.0)
        return found

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the backbone's hidden states `[rows, tokens, width]`, of which the chunked way makes the loss."""
        with contextlib.ExitStack() as calls:
            inputs = dict(batch)
            for entrance in self._entrances():
                inputs = calls.enter_context(entrance.entering(inputs))
            inputs.pop("labels", None)
            hidden: Tensor = self.model.base_model(**inputs, use_cache=False)[0]
            return hidden

    def of(self, hidden: Tensor, labels: Tensor, total: int | Tensor) -> Tensor:
        """Return (sum of the token losses) / total of hidden states by the chunked way.

        Args:
            hidden: `[rows, tokens, width]`.
            labels: `[rows, tokens]`, each of the token that stands there.
            total: as for a call.
        """
        labels = labels[:, 1:].to(hidden.device)  # a model may be spread over several
        bears = labels != IGNORED
        return self._head_loss(hidden[:, :-1][bears], labels[bears], bears) / total

    def tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Number of positions of a batch that bear a label."""
        labels = batch["labels"] if self.seq2seq else batch["labels"][:, 1:]
        return int((labels != IGNORED).sum())

    def _surplus(self, output: Any, labels: Tensor) -> Tensor:
        """What smoothing and z_loss add to the model's own loss, which may have further terms and keeps them."""
        logits = getattr(output, "logits", None)
        if logits is None or logits.shape[:-1] != labels.shape:
            given = "no logits" if logits is None else f"logits {list(logits.shape)} for labels {list(labels.shape)}"
            raise ConfigError(
                f"label_smoothing={self.form.smoothing:g} and z_loss={self.form.z_loss:g} need the logits of every "
                f"label. {type(self.model).__name__} computes its own loss ({self.why}) and gives {given}. Set "
                "training.label_smoothing and training.z_loss to 0."
            )
        if not self.seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
        bears = labels != IGNORED
        logits, labels = logits[bears], labels[bears]
        return logits_cross_entropy(logits, labels, self.form) - logits_cross_entropy(logits, labels)

    def _head_loss(self, hidden: Tensor, labels: Tensor, bears: Tensor) -> Tensor:
        """The loss of the positions that bear a label, `hidden[bears]`."""
        head: Any = output_head(self.model)
        hooked = head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__
        if plain_class(head) is nn.Linear and not hooked and not self._live(head):
            return linear_cross_entropy(hidden.to(head.weight.dtype), head.weight, head.bias, labels, self.form)
        carrier = attachments(self.model)
        if carrier is None:
            return module_cross_entropy(hidden, head, labels, head.out_features, form=self.form)
        state, whole = carrier.state, max(1, len(hidden))
        segments = None if state.segments is None else state.segments.tokens(len(bears), 1 + bears.shape[1])
        left = None if segments is None else segments.chosen(_padded(bears).flatten().cpu())

        @contextlib.contextmanager
        def portion(rows: slice) -> Iterator[None]:
            """The head is given some of the positions that are left."""
            count = len(labels[rows])
            with state.portion(count / whole):
                if left is None:
                    yield
                else:
                    with state.showing(left.chosen(rows), None):
                        yield

        again = functools.partial(recomputation, carrier)
        return module_cross_entropy(hidden, head, labels, head.out_features, again, self.form, portion)

    def _entrances(self) -> list[Entrance]:
        """What changes the arguments of the whole model, the outermost first."""
        carrier = attachments(self.model)
        held = [
            adapter for adapter in self._live(self.model)[::-1] if isinstance(adapter, Entrance) and not adapter.idle
        ]
        if held and carrier is not None and carrier.state.segments is not None:
            raise AttachError(
                f"{type(held[-1]).__qualname__} changes what the whole model is called with, for all rows alike. Train "
                "its rows in a batch of their own, with host.using."
            )
        return held

    def _live(self, module: nn.Module) -> list[Adapter]:
        """The live adapters that stand around a module."""
        carrier = attachments(self.model)
        live = carrier.state.active if carrier is not None else ()
        return [adapter for key, adapter in adapters_of(module).items() if key in live]

    def _shape(self) -> str:
        scale, cap = self.form.scale, self.form.cap
        scaled = "" if scale == 1 else f"; the model multiplies them by {scale:g}"
        return scaled if cap is None else f"{scaled}; the model caps them at {cap:g}"

    def _obstacle(self) -> str:
        """Return why the chunked way cannot be used, or ""."""
        head: Any = output_head(self.model)
        backbone: Any = getattr(self.model, "base_model", self.model)
        if self.seq2seq:
            return "an encoder-decoder computes its own loss"
        if not isinstance(head, nn.Linear) or backbone is self.model:
            return f"{type(self.model).__name__} has no linear output head on a backbone"
        if not all(isinstance(adapter, Entrance) for adapter in self._live(self.model)):
            return "an adapter stands around the whole model"
        try:
            agrees = self._agrees(head)
        except AttachError:
            return "an adapter takes none of the made-up rows on which it would be tried"
        return "" if agrees else f"{type(self.model).__name__} does more to its logits than its output head"

    @torch.no_grad()
    def _agrees(self, head: nn.Module) -> bool:
        """Put known logits in the head's place: the model must return them scaled and capped, and their plain loss.

        The known logits are float32, so that scale and cap are exact for models in half precision too.
        """
        vocabulary = text_config(self.model).vocab_size
        ids = torch.arange(1, 7, device=input_device(self.model))[None] % vocabulary
        seen: list[Tensor] = []
        probes: list[Tensor] = []

        def replace(_: nn.Module, args: Any, logits: Tensor) -> Tensor:
            seen.append(args[0])
            probes.append(_known(logits))
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
        if not torch.allclose(seen[0], hidden.to(seen[0]), rtol=1e-3, atol=1e-4):
            return False
        form = _measure(found.logits[0, -1])
        probe = probes[0].to(found.logits.device)
        plain = logits_cross_entropy(probe[0, :-1], ids[0, 1:].to(probe.device), form) / (ids.shape[1] - 1)
        agrees = torch.allclose(found.loss.float().to(plain.device), plain, rtol=1e-5)  # auxiliary losses can be small
        agrees &= torch.allclose(found.logits.float(), _apply(form, probe), rtol=1e-5, atol=1e-5)
        if agrees:
            self.form = self.form._replace(scale=form.scale, cap=form.cap)
        return agrees


def _padded(bears: Tensor) -> Tensor:
    """Which positions of the model bear a label: nothing is predicted at the last one of a row."""
    return torch.cat([bears, bears.new_zeros(len(bears), 1)], 1)


def _known(logits: Tensor) -> Tensor:
    """Logits that betray what is done to them; the last position, whose loss is not asked for, is for measuring."""
    steps = torch.arange(logits.numel(), device=logits.device).view(logits.shape)
    known = 30 * steps.sin()
    known[0, -1, 0], known[0, -1, 1] = _HUGE, _TINY
    return known.to(logits.dtype).float()  # survives a cast to the model's dtype


def _measure(found: Tensor) -> TokenForm:
    """Scale and cap, to six digits, from what became of a huge and a tiny logit."""
    huge, tiny = found[:2].tolist()
    scale = float(f"{tiny / _TINY:.6g}")
    capped = abs(huge) < 0.5 * abs(scale) * _HUGE
    return TokenForm(scale, float(f"{huge:.6g}") if capped and huge > 0 else None)


def _apply(form: TokenForm, logits: Tensor) -> Tensor:
    scaled = form.scale * logits
    return scaled if form.cap is None else form.cap * (scaled / form.cap).tanh()

"""Steering a model at decoding time by what tuning changed in a small one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.engine.attachments import attachments
from adapterlab.engine.wrapping import plain_copy
from adapterlab.errors import AttachError
from adapterlab.foreign.cache import Companion, accompany, cache_argument, cache_in, cache_out, companion, plain_mask
from adapterlab.foreign.model import is_encoder_decoder, output_head
from adapterlab.registry import register

_HELD: dict[str, nn.Module] = {}
_FOR_ALL = ("attention_mask", "position_ids", "logits_to_keep")


@register
class ProxyTuning(Method):
    """Add to the next-token logits of a large model what tuning changed in the logits of a small one.

    p = softmax(s_M + alpha · (s_expert − s_anti)), s: `[batch, time, V]`; the sum is computed in float32.

    The expert is a tuned model and the anti-expert the same one untuned; both read the same token ids as the base and
    keep key-value caches of their own. Without `anti_expert` it is the expert with its adapters switched off: two
    passes over one set of weights. Attaching several under different names adds their differences.

    Where it attaches: around a whole decoder-only model.

    Start: nothing trains; with alpha = 0, or an expert equal to the anti-expert, the output equals the base's.

    Trainable parameters: 0.

    Inference: not mergeable; each step runs three models.

    Models are named by folder or catalogue name and loaded when the method is attached, in the base's precision and on
    its device; a module that is in memory is first given a name with `ProxyTuning.hold`. Saving keeps the names, and
    loading fetches none of them; a model that brings code of its own is loaded by you and held.

    Rate: 2e-5, at which the authors train their expert; here nothing trains.

    Reference: "Tuning Language Models by Proxy", arXiv 2401.08565.

    Example:
        >>> from adapterlab.methods.side_network.proxy_tuning import ProxyTuning
        >>> ProxyTuning(expert="small-tuned", anti_expert="small").alpha
        1.0
    """

    formula: ClassVar[str] = "0"
    starts_at_base: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    derived: ClassVar[float] = 1e6  # whole models, whose sizes are checked when they are loaded

    expert: str = Field(description="the tuned small model: folder, catalogue name, or name given to `hold`")
    anti_expert: str | None = Field(
        None, description="the same model untuned; without it, the expert with its adapters switched off"
    )
    expert_adapter: str | None = Field(None, description="folder of an adapter to put on the expert")
    alpha: float = Field(1.0, description="weight of the difference; 0 is the base alone")

    @staticmethod
    def hold(name: str, model: nn.Module) -> str:
        """Give a model in memory a name that `expert` and `anti_expert` can use in this process.

        Args:
            name: to know it by; an earlier model of that name is forgotten.
            model: a decoder-only model of `transformers`. It is kept until `release(name)`.

        Returns:
            The name.
        """
        _HELD[name] = model
        return name

    @staticmethod
    def release(name: str) -> None:
        """Forget a model given to `hold`; adapters that use it keep it."""
        _HELD.pop(name, None)

    @classmethod
    def example(cls, model: Any) -> dict[str, Any]:
        """Steer by two copies of the model with other values."""
        copies = {}
        for seed, part in enumerate(("expert", "anti_expert"), 1):
            copies[part] = plain_copy(model)
            draw = torch.Generator().manual_seed(seed)
            for value in copies[part].parameters():
                if value.is_floating_point():
                    value.data += 0.1 * torch.randn(value.shape, generator=draw).to(value)
        return {part: cls.hold(f"example-{part}", copy) for part, copy in copies.items()}

    def attach(self, host: Carrier, name: str) -> None:
        """Load the two models and stand around the whole base model.

        Raises:
            AttachError: the base is not a decoder-only language model, a vocabulary differs, or there is no untuned
                model to compare the expert with.
        """
        _vocabulary(host.model, "the base model")
        expert, anti = self._models(host.model)
        for label, model in (("expert", expert), ("anti_expert", anti)):
            size, own = _vocabulary(model, label), _vocabulary(host.model, "the base model")
            if size != own:
                raise AttachError(
                    f"proxy_tuning: {label} ({getattr(self, label) or self.expert}) has a vocabulary of {size} tokens "
                    f"and the base model one of {own}. Logits can be added only when token i means the same in both: "
                    "choose models of one family, or cut added tokens off with resize_token_embeddings."
                )
        host.wrap(name, host.model, self.Around(self, host.site(host.model), name, expert, anti))

    def _models(self, base: Any) -> tuple[nn.Module, nn.Module]:
        from adapterlab.hosts import load

        expert = _load(self.expert, base)
        if self.expert_adapter is not None:
            if self.expert in _HELD:
                raise AttachError(
                    f"proxy_tuning: {self.expert!r} is held in memory, so its adapter is put on it by you: "
                    f"adapterlab.load(model, {self.expert_adapter!r}), without expert_adapter here."
                )
            load(expert, Path(self.expert_adapter))
        if self.anti_expert is not None:
            return expert, _load(self.anti_expert, base)
        if attachments(expert) is None:
            raise AttachError(
                f"proxy_tuning: the expert {self.expert!r} carries no adapter that could be switched off, and no "
                "anti_expert is named. Give anti_expert (the untuned model) or expert_adapter (a folder)."
            )
        return expert, expert

    class Around(Adapter):
        """Runs the three models and adds up their logits."""

        not_linear: ClassVar[str] = "its output is a sum of the logits of three models"
        rowwise: ClassVar[bool] = False  # the other models' caches belong to the batch as a whole

        def __init__(self, method: ProxyTuning, site: Site, name: str, expert: nn.Module, anti: nn.Module):
            super().__init__(site)
            self.alpha, self.name = method.alpha, name
            # In a list, so that they are no submodules: they are neither saved nor trained nor counted.
            self.models = [expert.eval(), anti.eval()]

        def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kwargs = self.site.bound(args, kwargs)
            as_tuple, labels = kwargs.pop("return_dict", None) is False, kwargs.pop("labels", None)
            pasts = [companion(cache_in(kwargs), f"{self.name}/{i}") for i in (0, 1)]
            given = self._given(kwargs, pasts[0])
            out = run(**kwargs, return_dict=True)
            expert, anti = (self._logits(i, given, pasts[i], cache_out(out), out.logits) for i in (0, 1))
            out.logits = out.logits.float() + self.alpha * (expert - anti)
            if labels is not None:
                module: Any = self.site.module
                extra = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
                out["loss"] = module.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1], **extra)
                out.move_to_end("loss", last=False)
            return out.to_tuple() if as_tuple else out

        @torch.no_grad()
        def _logits(self, i: int, given: dict[str, Any], past: Companion | None, lead: Any, like: Tensor) -> Tensor:
            """Float32 logits of one small model; its cache goes on beside the base's."""
            model = self.models[i]
            device = next(model.parameters()).device
            given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
            given |= {"use_cache": lead is not None}
            if past is not None:
                given[str(cache_argument(model))] = past.cache
            carrier = attachments(model) if i == 1 and model is self.models[0] else None
            with contextlib.nullcontext() if carrier is None else carrier.using():
                out = model(**given)
            if lead is not None and past is None:
                accompany(lead, f"{self.name}/{i}", cache_out(out), given["attention_mask"])
            return out.logits.to(like.device, torch.float32)

        def _given(self, given: dict[str, Any], note: Companion | None) -> dict[str, Any]:
            """What the small models are called with; they build their own masks."""
            if given.get("input_ids") is None:
                raise AttachError(
                    "proxy_tuning: the small models read token ids and the base was called without input_ids "
                    f"(received {', '.join(sorted(given))}). Call it with input_ids, or inside host.using()."
                )
            found = {key: given[key] for key in ("input_ids", *_FOR_ALL) if key in given}
            return {**found, "attention_mask": plain_mask(given, self.site.module.config, note)}


def _load(name: str, base: Any) -> nn.Module:
    """Return a held model, or load one as the base was loaded."""
    from adapterlab.models import load_model

    if name in _HELD:
        return _HELD[name]
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(base.dtype, "fp32")
    return load_model(name, precision=precision, device=base.device)[0].requires_grad_(False)


def _vocabulary(model: Any, label: str) -> int:
    """Number of logits of a decoder-only language model.

    Raises:
        AttachError: it is not one.
    """
    head = output_head(model)
    if head is None or is_encoder_decoder(model):
        raise AttachError(
            f"proxy_tuning: {label} is {type(model).__name__}, and next-token logits are added up for decoder-only "
            "language models (...ForCausalLM). Load the model with its language-model head."
        )
    return int(head.weight.shape[0])

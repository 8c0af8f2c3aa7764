"""Prompt tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, FormatError
from adapterlab.foreign.cache import accompany, cache_in, cache_out, companion, make_room, plain_mask
from adapterlab.foreign.model import input_table, is_causal, is_encoder_decoder, plain_class, text_config
from adapterlab.foreign.peft_task import task_of
from adapterlab.foreign.roles import role_of
from adapterlab.methods.prompt._virtual_tokens import PROMPT, SIZES, peft_prompt, peft_sizes, word_ids
from adapterlab.registry import register


@register
class PromptTuning(Method):
    """Put P trained vectors in front of the embedded input of a frozen model.

    X' = [E ; Emb(ids)], with E `[P, d]`; what the backbone returns for the P virtual tokens is cut off again.

    Where it attaches: around the backbone, so that heads, labels and losses never see a virtual token; around the
    encoder of an encoder-decoder, whose cross-attention sees the prompt. The P positions count: a model with learned
    positions takes P tokens fewer. The prompt stands right at the front, and positions follow the attention mask, so
    that padding on the left takes none.

    Start: not the base's output: rows of the embedding table (`vocab`: drawn from its first 5000 tokens; `words`: those
    given; `labels`: the mean of each label's tokens, the rest drawn), or uniform in ±0.5.

    Trainable parameters: P d.

    Inference: not mergeable; P more positions. In generation only the first step embeds the prompt; later ones find it
    in the cache. Models that pool the first position (BERT) pool the first real one; `pool="virtual"` pools the first
    virtual one instead, which is what HF PEFT does.

    Rate: 1e-2; HF PEFT's comparison has 1e-3 with Adam, the authors 0.3 with Adafactor.

    Reference: "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.

    Example:
        >>> from adapterlab.methods.prompt.prompt_tuning import PromptTuning
        >>> PromptTuning(length=8, init="words", words=(17, 4)).length
        8
    """

    formula: ClassVar[str] = "P d"
    starts_at_base: ClassVar[bool] = False

    length: int = Field(20, ge=1, description="number of virtual tokens P")
    init: Literal["vocab", "words", "labels", "uniform"] = Field("vocab", description="what the vectors start from")
    words: tuple[int, ...] = Field((), description="token ids of the text for init='words', cut or tiled to the length")
    labels: tuple[tuple[int, ...], ...] = Field((), description="token ids of each class label for init='labels'")
    pool: Literal["real", "virtual"] = Field("real", description="the first position that a pooler reads")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "PROMPT_TUNING",
        fields={"length": "num_virtual_tokens"},
        tensors={},
        prefix="base_model.",
        ignores=(
            *SIZES, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
        ),
        implies={"init": "uniform", "pool": "virtual"},
        pack=lambda host, name: _pack(host, name),
        unpack=lambda host, name, tensors: _unpack(host, name, tensors),
        differs=lambda host: _differs(host),
    )  # fmt: skip

    @model_validator(mode="after")
    def _starts_agree(self) -> PromptTuning:
        for kind in ("words", "labels"):
            given = getattr(self, kind)
            if bool(given) != (self.init == kind):
                raise ValueError(f"init={self.init!r} and {kind}={given!r} disagree: give {kind} with init={kind!r}")
        if not all(self.labels) or len(self.labels) > self.length:
            raise ValueError(f"{len(self.labels)} labels need as many of the {self.length} vectors, and tokens each")
        return self

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the backbone, or the encoder and what must know that its output is longer."""
        module = host.backbone
        two_stacks = is_encoder_decoder(host.model)
        if two_stacks:
            module = host.model.get_encoder()
            host.wrap(name, host.model.get_decoder(), _LongerMask(host.site(host.model.get_decoder())))
        layer = (_EncoderLayer if two_stacks else self.Layer)(self, host.site(module), self.start(host), name)
        if self.pool == "virtual" and _head_reads_first(host):
            layer.trims = False
        host.wrap(name, module, layer)

    @torch.no_grad()
    def start(self, host: Carrier) -> Tensor:
        """Return the vectors to start from `[P, d]`."""
        ids = word_ids(host, self.words, self.length)
        if ids is None:
            raise AttachError(
                f"{type(host.model).__name__} reads no tokens, so there is no input to put virtual tokens before. "
                "Choose a method inside the layers, such as PrefixTuning, LoRA or an adapter."
            )
        table = input_table(host.model)
        # The module's output and not its weight: some models scale it there.
        rows: Tensor = table(ids).float()
        for i, label in enumerate(self.labels):
            rows[i] = table(word_ids(host, label, len(label))).float().mean(0)
        return torch.rand_like(rows) - 0.5 if self.init == "uniform" else rows.clone()

    class Layer(Adapter):
        """The prompt `[P, d]` of one backbone or encoder."""

        not_linear: ClassVar[str] = "it adds positions to the input"
        trims: bool = True

        def __init__(self, method: PromptTuning, site: Site, start: Tensor, key: str):
            super().__init__(site)
            self.key = key
            plain: Any = plain_class(site.module)
            if "inputs_embeds" not in self.site.arguments:
                raise AttachError(f"{plain.__name__} takes no embedded input, so no prompt can be put before it.")
            self.prompt = nn.Parameter(start.to(site.device, site.dtype))
            self.pool = method.pool
            self.table_size = _learned_positions(site.module)

        def vectors(self) -> Tensor:
            """The prompt as it is put before the input, `[P, d]`."""
            return self.prompt

        def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            """Put the prompt in front on the first pass; later passes find it in the cache."""
            given = self.site.bound(args, kwargs)
            as_tuple = given.get("return_dict") is False
            note = companion(cache_in(given), self.key)
            first = note is None
            mask = plain_mask(given, self.site.module.config, note, 0 if first else len(self.vectors()))
            given = self.extended({**given, "attention_mask": mask}, first)
            output = run(**given, **({"return_dict": True} if as_tuple else {}))
            if first and cache_out(output) is not None:
                accompany(cache_out(output), self.key, mask=mask)
            output = self.trimmed(output) if first and self.trims else output
            return output.to_tuple() if as_tuple else output

        def extended(self, given: dict[str, Any], first: bool) -> dict[str, Any]:
            """Return the arguments with room for the virtual tokens."""
            given = {key: value for key, value in given.items() if key != "return_dict"}
            prompt = self.vectors()
            if first:
                make_room(cache_in(given), len(prompt), self.site.module.config)
                x = given.get("inputs_embeds")
                if x is None:
                    x = input_table(self.site.module)(given["input_ids"])  # type: ignore[operator]
                self.check_room(x.shape[1] + len(prompt))
                given |= {
                    "input_ids": None,
                    "inputs_embeds": torch.cat([prompt.to(x.dtype).expand(len(x), -1, -1), x], 1),
                }
                if given.get("token_type_ids") is not None:
                    given["token_type_ids"] = _before(given["token_type_ids"], len(prompt), 0)
            count = (given.get("inputs_embeds") if first else given["input_ids"]).shape[1]  # type: ignore[union-attr]
            mask = given["attention_mask"]
            if mask is not None:
                given["attention_mask"] = mask = _before(mask, len(prompt), 1)
            if given.get("position_ids") is not None:
                given["position_ids"] = self.shifted(given["position_ids"], len(prompt), first)
            elif mask is not None and "position_ids" in self.site.arguments and self.table_size != -1:
                given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
            return given

        @staticmethod
        def shifted(ids: Tensor, count: int, first: bool) -> Tensor:
            """Move the real positions back, behind those of the prompt."""
            ids = ids + count
            if not first:
                return ids
            front = torch.arange(count, device=ids.device, dtype=ids.dtype).expand(*ids.shape[:-1], -1)
            return torch.cat([front, ids], -1)

        def check_room(self, count: int) -> None:
            """Raise AttachError where a learned table has too few positions."""
            if 0 < self.table_size < count:
                raise AttachError(
                    f"{count - len(self.prompt)} tokens and {len(self.prompt)} virtual ones need more than the "
                    f"{self.table_size} learned positions of this model. Shorten the inputs or the prompt."
                )

        def trimmed(self, output: Any) -> Any:
            """Cut the virtual positions off everything that has positions; keys in the cache stay."""
            cut = len(self.vectors())
            for key in ("last_hidden_state", "hidden_states"):
                if output.get(key) is not None:
                    output[key] = _each(output[key], lambda h: h[:, cut:])
            if output.get("attentions") is not None:
                output["attentions"] = _each(output["attentions"], lambda a: a[:, :, cut:])
            if output.get("pooler_output") is not None and self.pool == "real":
                output["pooler_output"] = self.site.module.pooler(output["last_hidden_state"])  # type: ignore[operator]
            return output


class _EncoderLayer(PromptTuning.Layer):
    """The prompt of an encoder, whose output keeps the virtual tokens: the decoder attends to them."""

    trims = False
    rowwise: ClassVar[bool] = False  # prompts of different lengths make outputs of different lengths


class _LongerMask(Adapter):
    """Lets a decoder see all of an encoder's output: the mask it is given knows the real tokens only."""

    not_linear: ClassVar[str] = "it belongs to a prompt"

    def __init__(self, site: Site):
        super().__init__(site)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self.site.bound(args, kwargs)
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is not None and states is not None:
            if mask.dim() != 2:
                raise AttachError(
                    f"A prompt needs an encoder mask [batch, tokens], and received one that is expanded already, "
                    f"{list(mask.shape)}. Pass the plain mask."
                )
            given["encoder_attention_mask"] = _before(mask, states.shape[1] - mask.shape[1], 1)
        return run(**given)


def _before(x: Tensor, count: int, value: int) -> Tensor:
    """Put `count` columns in front of `[batch, tokens]`."""
    return torch.cat([x.new_full((len(x), count), value), x], 1)


def _each(value: Any, cut: Callable[[Tensor], Tensor]) -> Any:
    return tuple(v if v is None else cut(v) for v in value) if isinstance(value, tuple) else cut(value)


def _learned_positions(module: nn.Module) -> int:
    """Return the size of a learned table of positions, 0 without one, -1 where the model numbers positions itself."""
    tables = [m for path, m in module.named_modules() if role_of(path) == "position" and isinstance(m, nn.Embedding)]
    if not tables:
        return 0
    # RoBERTa and its kin begin after the padding id.
    return -1 if tables[0].padding_idx is not None else tables[0].num_embeddings


def _layer(host: Carrier, name: str) -> tuple[str, PromptTuning.Layer]:
    return next((path, a) for path, a in host.adapters(name).items() if isinstance(a, PromptTuning.Layer))


def _head_reads_first(host: Carrier) -> bool:
    """Say whether the head reads the first hidden state itself: it classifies an encoder that has no pooler."""
    alone = getattr(host.backbone, "pooler", None) is None and not is_encoder_decoder(host.model)
    return alone and task_of(host.model) == "SEQ_CLS" and not is_causal(host.backbone)


def _differs(host: Carrier) -> str:
    """Say why PEFT's prompt computes something else on a model, or ""."""
    mean = _head_reads_first(host) and getattr(host.model.config, "classifier_pooling", None) == "mean"
    return "the head reads the mean of all tokens, its virtual ones among them" if mean else ""


def _pack(host: Carrier, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return PEFT's sizes and `[P, d]`; None where what is pooled is at another position than in PEFT."""
    method, (_, layer) = host.methods[name], _layer(host, name)
    assert isinstance(method, PromptTuning)
    pooled = getattr(layer.site.module, "pooler", None) is not None or _head_reads_first(host)
    if method.pool == "real" and pooled:
        return None
    config = text_config(host.model)
    # One submodule: of an encoder-decoder PEFT would otherwise expect a second prompt, which it does not use.
    sizes = peft_sizes(1, layer.prompt.shape[1], config.num_attention_heads, config.num_hidden_layers)
    return sizes, {PROMPT: layer.vectors().detach()}


def _unpack(host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the first P rows: of an encoder-decoder PEFT stores as many again, which it does not use."""
    (path, layer), found = _layer(host, name), peft_prompt(tensors)
    length, width = layer.prompt.shape
    twice = is_encoder_decoder(host.model) and len(found) == 2 * length
    if found.dim() != 2 or found.shape[1] != width or (len(found) != length and not twice):
        raise FormatError(f"{PROMPT} is {tuple(found.shape)}, and this model needs {(length, width)}.")
    return {f"adapter.{path}.prompt": found[:length]}

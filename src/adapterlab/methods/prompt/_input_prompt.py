"""What methods with virtual tokens at the input share: where the vectors go, and what must not notice them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Front
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.errors import AttachError, FormatError
from adapterlab.foreign.cache import accompany, cache_in, cache_out, companion, make_room, plain_mask
from adapterlab.foreign.model import input_table, is_causal, is_encoder_decoder, plain_class, text_config
from adapterlab.foreign.peft_task import task_of
from adapterlab.foreign.roles import role_of
from adapterlab.methods.prompt._virtual_tokens import PROMPT, SIZES, peft_prompt, peft_sizes, reads_tokens, token_table


class InputPrompt(Method):
    """Put P vectors in front of the embedded input of a frozen model, or into a template; subclasses make them."""

    formula: ClassVar[str] = "P d"
    starts_at_base: ClassVar[bool] = False

    length: int = Field(20, ge=1, description="number of virtual tokens P")
    pool: Literal["real", "virtual"] = Field("real", description="the first position that a pooler reads")

    def attach(self, host: Carrier, name: str) -> None:
        """Wrap the backbone, or the encoder and what must know that its output is longer."""
        self.put(host, name, self.Layer(self, host, name))

    def put(self, host: Carrier, name: str, layer: InputPrompt.Layer) -> None:
        """Wrap the module that a layer was made for."""
        front = layer.placeholder is None
        if front and is_encoder_decoder(host.model):
            host.wrap(name, host.model.get_decoder(), _LongerMask(host.site(host.model.get_decoder())))
            # The decoder attends to the virtual tokens; prompts of different lengths make outputs of different lengths.
            layer.trims = vars(layer)["rowwise"] = False
        elif not front or (self.pool == "virtual" and head_reads_first(host)):
            layer.trims = False
        host.wrap(name, layer.site, layer)

    class Layer(Adapter):
        """What stands around one backbone or encoder.

        Attributes:
            key: of the adapter.
            placeholder: token id that marks the places of the virtual tokens in a row; None: they stand in front.
            trims: the output is cut to the real tokens.
        """

        not_linear: ClassVar[str] = "it adds positions to the input"
        trims: bool = True
        placeholder: int | None = None

        def __init__(self, method: InputPrompt, host: Carrier, name: str):
            if token_table(host) is None or not reads_tokens(host):
                raise AttachError(
                    f"{type(host.model).__name__} reads no tokens, so there is no input to put virtual tokens before. "
                    "Choose a method inside the layers, such as PrefixTuning, LoRA or an adapter."
                )
            two_stacks = is_encoder_decoder(host.model)
            super().__init__(host.site(host.model.get_encoder() if two_stacks else host.backbone))
            self.key, self.pool, self.length = name, method.pool, method.length
            if "inputs_embeds" not in self.site.arguments:
                plain: Any = plain_class(self.site.module)
                raise AttachError(f"{plain.__name__} takes no embedded input, so no prompt can be put before it.")
            self.room, self.begin = _learned_positions(self.site.module)

        def vectors(self) -> Tensor:
            """The prompt as it is put before the input, `[P, d]`."""
            raise NotImplementedError

        def for_rows(self, x: Tensor) -> Tensor:
            """The prompt of each row of an embedded input, `[batch, P, d]`."""
            return self.vectors().to(x.dtype).expand(len(x), -1, -1)

        def serving(self) -> Front | None:
            """The prompt, unless its places are marked in the row."""
            if self.placeholder is not None:
                return None
            like = self.table.weight.new_empty(1, 0, self.table.embedding_dim)
            return Front(embedded=self.for_rows(like)[0], shift=self.count)

        @property
        def count(self) -> int:
            """How many positions the prompt takes."""
            return self.length

        @property
        def table(self) -> Any:
            """The module that embeds tokens."""
            return input_table(self.site.module)

        def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            """Put the prompt in front on the first pass; later passes find it in the cache."""
            given = self.site.bound(args, kwargs)
            as_tuple = given.pop("return_dict", None) is False
            note = companion(cache_in(given), self.key)
            first, mask = note is None, None
            if self.placeholder is not None:
                given = self.filled(given) if first else given
            else:
                mask = plain_mask(given, self.site.module.config, note, 0 if first else self.count)
                given = self.extended({**given, "attention_mask": mask}, first)
            output = run(**given, **({"return_dict": True} if as_tuple else {}))
            if first and cache_out(output) is not None:
                accompany(cache_out(output), self.key, mask=mask)
            output = self.trimmed(output) if first and self.trims else output
            return output.to_tuple() if as_tuple else output

        def filled(self, given: dict[str, Any]) -> dict[str, Any]:
            """Return the arguments with the vectors at the placeholders of each row, in order."""
            ids = given.get("input_ids")
            if ids is None:
                raise AttachError(
                    "The places of the virtual tokens are marked in the token ids, and the model was called without "
                    f"(received {', '.join(sorted(k for k, v in given.items() if v is not None))}). Call it with "
                    "input_ids."
                )
            here = ids == self.placeholder
            self.check_places(here)
            x = self.table(ids.masked_fill(here, 0))
            order = (here.long().cumsum(1) - 1).clamp(0, self.count - 1)
            placed = self.for_rows(x).gather(1, order[..., None].expand(-1, -1, x.shape[2]))
            return {**given, "input_ids": None, "inputs_embeds": torch.where(here[..., None], placed, x)}

        def check_places(self, here: Tensor) -> None:
            """Raise AttachError where a row marks some other number of places than there are virtual tokens, or 0."""
            if torch.compiler.is_compiling():
                return
            found = here.sum(1)
            wrong = ((found != self.count) & (found != 0)).nonzero()
            if len(wrong):
                row = int(wrong[0])
                raise AttachError(
                    f"Row {row} has the placeholder {self.placeholder} {int(found[row])} times, and there are "
                    f"{self.count} virtual tokens. Mark {self.count} places in each row, or none in one that is to be "
                    "read without them."
                )

        def extended(self, given: dict[str, Any], first: bool) -> dict[str, Any]:
            """Return the arguments with room for the virtual tokens."""
            count = self.count
            if first:
                make_room(cache_in(given), count, self.site.module.config)
                x = given.get("inputs_embeds")
                x = self.table(given["input_ids"]) if x is None else x
                self.check_room(x.shape[1])
                given |= {"input_ids": None, "inputs_embeds": torch.cat([self.for_rows(x), x], 1)}
                if given.get("token_type_ids") is not None:
                    given["token_type_ids"] = _before(given["token_type_ids"], count, 0)
            queries = (given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]).shape[1]
            mask = given["attention_mask"]
            if mask is not None:
                given["attention_mask"] = mask = _before(mask, count, 1)
            if given.get("position_ids") is not None:
                given["position_ids"] = self.shifted(given["position_ids"], first)
            elif mask is not None and "position_ids" in self.site.arguments:
                given["position_ids"] = self.positions(mask)[:, -queries:]
            return given

        def positions(self, mask: Tensor) -> Tensor:
            """Number the real tokens of each row; in models that begin after the padding id, padding has that id."""
            found = mask.long().cumsum(-1) - 1
            return found.clamp(min=0) if not self.begin else torch.where(mask > 0, found, -1) + self.begin

        def shifted(self, ids: Tensor, first: bool) -> Tensor:
            """Move the real positions back, behind those of the prompt."""
            ids = ids + self.count
            if not first:
                return ids
            front = torch.arange(self.count, device=ids.device, dtype=ids.dtype) + self.begin
            return torch.cat([front.expand(*ids.shape[:-1], -1), ids], -1)

        def check_room(self, tokens: int) -> None:
            """Raise AttachError where a learned table has too few positions."""
            if 0 < self.room < tokens + self.count:
                raise AttachError(
                    f"{tokens} tokens and {self.count} virtual ones need more than the {self.room} learned positions "
                    "of this model. Shorten the inputs or the prompt."
                )

        def trimmed(self, output: Any) -> Any:
            """Cut the virtual positions off everything that has positions; keys in the cache stay."""
            cut = self.count
            for key in ("last_hidden_state", "hidden_states"):
                if output.get(key) is not None:
                    output[key] = _each(output[key], lambda h: h[:, cut:])
            if output.get("attentions") is not None:
                output["attentions"] = _each(output["attentions"], lambda a: a[:, :, cut:])
            if output.get("pooler_output") is not None and self.pool == "real":
                output["pooler_output"] = self.site.module.pooler(output["last_hidden_state"])  # type: ignore[operator]
            return output


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


def _learned_positions(module: nn.Module) -> tuple[int, int]:
    """Return how many positions a learned table has, 0 without one, and the number of the first."""
    tables = [m for path, m in module.named_modules() if role_of(path) == "position" and isinstance(m, nn.Embedding)]
    if not tables:
        return 0, 0
    table: Any = tables[0]
    # RoBERTa and its kin begin after the padding id; others have rows in front that they skip by themselves.
    begin = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - begin - getattr(table, "offset", 0), begin


def head_reads_first(host: Carrier) -> bool:
    """Say whether the head reads the first hidden state itself: it classifies an encoder that has no pooler."""
    alone = getattr(host.backbone, "pooler", None) is None and not is_encoder_decoder(host.model)
    return alone and task_of(host.model) == "SEQ_CLS" and not is_causal(host.backbone)


# ---------------------------------------------------------------------- PEFT's format


def layer_of(host: Carrier, name: str) -> InputPrompt.Layer:
    """Return an adapter's layer."""
    return next(a for a in host.adapters(name).values() if isinstance(a, InputPrompt.Layer))


def differs(host: Carrier) -> str:
    """Say why PEFT's prompt computes something else on a model, or ""."""
    mean = head_reads_first(host) and getattr(host.model.config, "classifier_pooling", None) == "mean"
    return "the head reads the mean of all tokens, its virtual ones among them" if mean else ""


def peft_has(host: Carrier, name: str) -> bool:
    """Say whether PEFT can have this prompt: in front, on a frozen base, and pooled at the same position."""
    method, layer = host.methods[name], layer_of(host, name)
    pooled = getattr(layer.site.module, "pooler", None) is not None or head_reads_first(host)
    return layer.placeholder is None and not host.patches[name] and not (method.pool == "real" and pooled)


def sizes(host: Carrier, count: int, width: int) -> dict[str, int]:
    """PEFT's options that repeat sizes."""
    config = text_config(host.model)
    # One submodule: of an encoder-decoder PEFT would otherwise expect a second prompt, which it does not use.
    found = peft_sizes(1, width, config.num_attention_heads, config.num_hidden_layers)
    return {**found, "num_virtual_tokens": count}


def pack(host: Carrier, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return PEFT's sizes and `[P, d]`, the tensors it is made of beside it; None for what PEFT does not have."""
    if not peft_has(host, name):
        return None
    layer = layer_of(host, name)
    made = layer.vectors().detach()
    # PEFT keeps the result alone and ignores what stands beside it; training goes on from the rest.
    beside = {} if "prompt" in layer._parameters else host.tensors(name)
    return sizes(host, *made.shape), {**beside, PROMPT: made}


def unpack(host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read PEFT's tensor as an adapter's `prompt`."""
    layer = layer_of(host, name)
    found = first_rows(host, peft_prompt(tensors), layer.count, layer.table.embedding_dim)
    return {f"adapter.{layer.site.path}.prompt": found}


def first_rows(host: Carrier, found: Tensor, count: int, width: int) -> Tensor:
    """Take the first P rows: of an encoder-decoder PEFT stores as many again, which it does not use.

    Raises:
        FormatError: the shape is another.
    """
    twice = is_encoder_decoder(host.model) and len(found) == 2 * count
    if found.dim() != 2 or found.shape[1] != width or (len(found) != count and not twice):
        raise FormatError(f"{PROMPT} is {tuple(found.shape)}, and this model needs {(count, width)}.")
    return found[:count]


def codec(
    peft_type: str,
    *ignores: str,
    pack: Callable[[Carrier, str], tuple[dict[str, Any], dict[str, Tensor]] | None] = pack,
    unpack: Callable[[Carrier, str, Mapping[str, Tensor]], dict[str, Tensor]] = unpack,
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    **implies: Any,
) -> HFCodec:
    """Return the codec of a prompt that PEFT stores as `[P, d]`.

    Args:
        peft_type: PEFT's name of the method.
        ignores: options of PEFT that may have any value.
        pack: as in `HFCodec`.
        unpack: likewise.
        derived: likewise.
        implies: fields that every adapter of PEFT's has at this value.
    """
    return HFCodec(
        peft_type,
        fields={"length": "num_virtual_tokens"},
        tensors={},
        prefix="base_model.",
        ignores=(*SIZES, *ignores),
        implies={"pool": "virtual", **implies},
        derived=derived,
        pack=pack,
        unpack=unpack,
        differs=differs,
    )


# What makes a plain prompt in a way that PEFT does not have is read by PEFT as one, and stays one when it comes back.
InputPrompt.hf = codec("PROMPT_TUNING")

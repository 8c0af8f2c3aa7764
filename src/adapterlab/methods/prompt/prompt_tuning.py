"""Prompt tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.foreign.model import input_table
from adapterlab.methods.prompt._input_prompt import InputPrompt, codec
from adapterlab.methods.prompt._virtual_tokens import word_ids
from adapterlab.registry import register


@register
class PromptTuning(InputPrompt):
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

    Labels: a decoder's first token has no token before it, and so none is learned, as in the base. HF PEFT keeps the
    prediction of the last virtual token and learns the first token's label from it; give the row a token in front where
    that matters.

    Rate: 1e-2; HF PEFT's comparison has 1e-3 with Adam, the authors 0.3 with Adafactor.

    Reference: "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.

    Example:
        >>> from adapterlab.methods.prompt.prompt_tuning import PromptTuning
        >>> PromptTuning(length=8, init="words", words=(17, 4)).length
        8
    """

    init: Literal["vocab", "words", "labels", "uniform"] = Field("vocab", description="what the vectors start from")
    words: tuple[int, ...] = Field((), description="token ids of the text for init='words', cut or tiled to the length")
    labels: tuple[tuple[int, ...], ...] = Field((), description="token ids of each class label for init='labels'")

    hf: ClassVar[HFCodec | None] = codec(
        "PROMPT_TUNING",
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
        init="uniform",
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

    @torch.no_grad()
    def start(self, host: Carrier) -> Tensor:
        """Return the vectors to start from `[P, d]`."""
        ids = word_ids(host, self.words, self.length)
        table = input_table(host.model)
        # The module's output and not its weight: some models scale it there.
        rows: Tensor = table(ids).float()
        for i, label in enumerate(self.labels):
            rows[i] = table(word_ids(host, label, len(label))).float().mean(0)
        return torch.rand_like(rows) - 0.5 if self.init == "uniform" else rows.clone()

    class Layer(InputPrompt.Layer):
        """The prompt `[P, d]` of one backbone or encoder."""

        def __init__(self, method: PromptTuning, host: Carrier, name: str):
            super().__init__(method, host, name)
            self.prompt = nn.Parameter(method.start(host).to(self.site.device, self.site.dtype))

        def vectors(self) -> Tensor:
            """The prompt `[P, d]`."""
            return self.prompt

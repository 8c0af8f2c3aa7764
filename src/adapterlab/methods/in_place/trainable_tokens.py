"""Trainable tokens: train chosen rows of the embedding table."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Method
from adapterlab.core.rows import Tokens, train_rows
from adapterlab.core.targets import Targets
from adapterlab.registry import register


@register
class TrainableTokens(Method):
    """Train the vectors of some tokens, new ones or old ones, and freeze everything else.

    E[t] = R[i] where t is the i-th of the k tokens, else E₀[t]; R `[k, d]`. In a head with the table W `[V, d]` the
    output for that token is R[i] · h + b[t].

    Where it attaches: what embeds the model's input, and every module that holds the same weight, such as a tied head,
    which all use the same rows. `targets` may name other tables: `["embed", "head"]` trains rows of both where they are
    not tied. Nothing but the rows is stored, has a gradient or a state of the optimizer.

    Tokens are given by id, or by text: their name in the vocabulary of the tokenizer that lies with the model, or what
    is one token of it. For new tokens call `model.resize_token_embeddings` first, before loading too; the numbers that
    it fills in there do not matter, as R holds values and not differences.

    Start: the rows of the base, so the first output equals the base's.

    Trainable parameters: k d, and as many again for a head of its own.

    Inference: the rows can be merged into the table, at no cost; what is tied stays tied.

    Rate: 5e-3, as in the authors' code for one word, which multiplies it with the batch; HF PEFT's comparison has 0.2.

    Reference: "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
    arXiv 2208.01618; rows in HF PEFT: its trainable tokens.

    Example:
        >>> from adapterlab.methods.in_place.trainable_tokens import TrainableTokens
        >>> TrainableTokens(tokens=[32000, "<image>"]).tokens
        (32000, '<image>')
    """

    formula: ClassVar[str] = "k d for each table of its own"

    tokens: Tokens = Field(min_length=1, description="ids or texts of the tokens whose rows train")
    targets: Targets | None = Field(None, description="tables to train rows of; null: what embeds the model's input")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "TRAINABLE_TOKENS",
        fields={"tokens": "token_indices"},
        tensors={"rows": "trainable_tokens_delta"},
        accepts={"init_weights": (True, False)},
        copies=False,
    )

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Every other token."""
        return {"tokens": tuple(range(1, 128, 2))}

    def attach(self, host: Carrier, name: str) -> None:
        """Put the rows beside the tables."""
        train_rows(host, name, self, self.targets)

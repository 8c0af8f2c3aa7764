"""P-tuning."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.kept import Kept
from adapterlab.core.method import MakeOptimizer
from adapterlab.core.site import Site
from adapterlab.methods.prompt._input_prompt import InputPrompt, codec, first_rows, layer_of
from adapterlab.methods.prompt._virtual_tokens import check_words, peft_prompt
from adapterlab.registry import register

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class PTuning(InputPrompt):
    """Let a small network make the P vectors of a prompt, so that they depend on each other, and mix them into text.

    V = network(E) `[P, d]` from a table E `[P, d]`; with `encoder="mlp"` W3 relu(W2 relu(W1 E + b1) + b2) + b3, W1
    `[h, d]`, W2 `[h, h]`, W3 `[d, h]`; with `lstm` two layers of a bidirectional LSTM with h states in each direction,
    then W2 relu(W1 H + b1) + b2, W1 `[2 h, 2 h]`, W2 `[d, 2 h]`. `encoder=None` trains V itself. The network reads no
    input: after training V is computed once and the network is dropped, unless `keep_encoder`.

    Where it attaches: around the backbone, or the encoder of an encoder-decoder, as prompt tuning. The vectors stand in
    front of the input, with the `anchors` (real words, which do not train) between them. With `placeholder` they stand
    where a row has that token id: its first place gets the first vector, and so on, so that a template may have them in
    front, in the middle and at the end, at other places in each row; all other tokens of a row are the anchors, and
    positions, labels and masks stay as they are. Take a reserved token, which rows of data can spell; where you make
    the ids yourself the placeholder may lie outside the vocabulary. A row without places is read as the base reads it;
    any other number than P is refused.

    Start: not the base's output: E from a standard normal distribution, the network from torch's defaults.

    Trainable parameters: P d after training; during it also the network's: with `mlp` 2 d h + h² + 2 h + d.

    The base is frozen, which is the first of the paper's two forms (knowledge probing). `train_base` trains it
    together with the prompt (the few-shot form): the run's rate is the base's, the prompt's is `ratio` times that and
    without weight decay.

    Inference: not mergeable; P more positions, or none with places in the input. In generation only the first step sees
    the vectors; later ones find them in the cache. Poolers and padding as in prompt tuning. `torch.compile` makes no
    single graph of an LSTM; without it, as after training, it does.

    Rate: 1e-4, as in HF PEFT's comparison, which tries 5e-5 to 5e-3 too; the authors take 1e-5 with a frozen base, and
    1e-4 for the prompt beside 1e-5 for the base in the second form.

    Reference: "GPT Understands, Too", arXiv 2103.10385.

    Example:
        >>> from adapterlab.methods.prompt.p_tuning import PTuning
        >>> PTuning(length=9, encoder="lstm", placeholder=30522).length
        9
    """

    formula: ClassVar[str] = "P d + the network's while it trains"

    encoder: Literal["mlp", "lstm"] | None = Field("mlp", description="network that makes the vectors; null: none")
    hidden: int | None = Field(
        None, ge=1, description="width h of the network; default: that of the model, half of it for each LSTM direction"
    )
    layers: int = Field(2, ge=1, description="layers of the LSTM, or hidden layers of the MLP")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout between the layers of the LSTM")
    keep_encoder: bool = Field(False, description="keep the network after training, so that training can go on")
    anchors: dict[int, int] = Field(
        {}, description="real words between vectors in front: place in the prompt, counted from 0 -> token id"
    )
    placeholder: int | None = Field(
        None, ge=0, description="token id that marks the places of the vectors in a row; default: they stand in front"
    )
    train_base: bool = Field(False, description="train the base together with the prompt")
    ratio: float = Field(10.0, gt=0, description="with train_base: rate of the prompt over that of the base")

    hf: ClassVar[HFCodec | None] = codec(
        "P_TUNING",
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
        unpack=lambda host, name, tensors: _unpack(host, name, tensors),
        encoder=None,
    )  # fmt: skip

    @model_validator(mode="after")
    def _places_agree(self) -> Self:
        if self.anchors and self.placeholder is not None:
            raise ValueError("anchors stand between vectors in front; with `placeholder` write them into the rows")
        if wrong := [place for place in self.anchors if not 0 <= place < self.length + len(self.anchors)]:
            raise ValueError(
                f"anchors: {self.length} vectors and {len(self.anchors)} words make places 0 to "
                f"{self.length + len(self.anchors) - 1}; received {wrong[0]}"
            )
        if self.dropout and (self.encoder != "lstm" or self.layers < 2):
            raise ValueError(f"dropout={self.dropout:g} acts between the layers of an LSTM: encoder='lstm', layers=2")
        return self

    def attach(self, host: Carrier, name: str) -> None:
        """Put the prompt on the model, and train the base with it if that is asked for."""
        layer = self.Layer(self, host, name)
        if self.encoder is not None:
            layer.network = Encoder(self, layer.table.embedding_dim, layer.site)
        else:
            layer.plain(nn.init.normal_(torch.empty(self.length, layer.table.embedding_dim)))
        self.put(host, name, layer)
        for path in host.base_parameters(self.modules_to_save) if self.train_base else ():
            host.own(name, path)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach without the network where it was not saved."""
        kept = any(".network." in key for key in tensors)
        (self if kept else self.replace(encoder=None, dropout=0.0)).attach(host, name)

    def brief(self) -> Self:
        """The same with places that no made-up row has by chance."""
        return self if self.placeholder is None else self.replace(placeholder=2**31 - 1)  # type: ignore[no-any-return]

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """The prompt in a group of its own beside the base."""
        if not self.train_base:
            return super().optimizer(host, name, make)
        named = host.named_parameters(name)
        inside = [p for key, p in named.items() if key.startswith(f"adapter.{layer_of(host, name).site.path}.")]
        rest = [p for p in named.values() if not any(p is other for other in inside)]
        apart: dict[str, Any] = {"params": inside, "lr_factor": self.ratio, "weight_decay": 0.0}
        return make([apart, {"params": rest}])

    def finish(self, host: Carrier, name: str) -> None:
        """Compute the vectors once and drop the network."""
        layer = layer_of(host, name)
        assert isinstance(layer, PTuning.Layer)
        if not self.keep_encoder and layer.network is not None:
            layer.eval()
            layer.plain(layer.trained().detach())

    class Layer(InputPrompt.Layer):
        """The prompt of one backbone or encoder: `network`, or `prompt` `[P, d]`.

        Attributes:
            anchors: place in the prompt -> token id.
        """

        network: Encoder | None

        def __init__(self, method: PTuning, host: Carrier, name: str):
            super().__init__(method, host, name)
            self.placeholder, self.anchors = method.placeholder, dict(method.anchors)
            check_words(host, list(self.anchors.values()))
            self.kept = Kept()
            self.network = None

        def plain(self, vectors: Tensor) -> None:
            """Train or keep these vectors `[P, d]` themselves, without a network."""
            self.network = None
            self.prompt = nn.Parameter(vectors.to(self.site.device, self.site.dtype).clone())

        @property
        def count(self) -> int:
            """How many positions the prompt takes, anchors included."""
            return self.length + len(self.anchors)

        @property
        def free(self) -> list[int]:
            """The places of the prompt that are no anchors."""
            return [place for place in range(self.count) if place not in self.anchors]

        def trained(self) -> Tensor:
            """The vectors V `[P, d]`; outside of training they are computed once."""
            if self.network is None:
                return self.prompt
            if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return self.network()  # type: ignore[no-any-return]
            return self.kept.once("vectors", self.network, *self.network.parameters())

        def vectors(self) -> Tensor:
            """The prompt `[P + anchors, d]`."""
            made = self.trained()
            if not self.anchors:
                return made
            places, words = zip(*self.anchors.items(), strict=True)
            rows = self.table(torch.tensor(words, device=made.device)).to(made.dtype)
            order = torch.tensor([*self.free, *places], device=made.device).argsort()
            return torch.cat([made, rows])[order]

        def train(self, mode: bool = True) -> Self:
            """Switch between training and evaluation; forget the vectors."""
            self.kept.clear()
            return super().train(mode)


class Encoder(nn.Module):
    """The network that makes the vectors: a table, for `lstm` a bidirectional LSTM, and a network of ReLUs."""

    def __init__(self, method: PTuning, width: int, site: Site):
        super().__init__()
        made: dict[str, Any] = {"device": site.device, "dtype": site.dtype}
        self.embedding = nn.Embedding(method.length, width, **made)
        recurrent = method.encoder == "lstm"
        hidden = method.hidden or (max(1, width // 2) if recurrent else width)
        self.lstm = (
            nn.LSTM(width, hidden, method.layers, dropout=method.dropout, bidirectional=True, batch_first=True, **made)
            if recurrent
            else None
        )
        widths = [2 * hidden, 2 * hidden] if recurrent else [width, *[hidden] * method.layers]
        inner = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b, **made), nn.ReLU())]
        self.mlp = nn.Sequential(*inner, nn.Linear(widths[-1], width, **made))

    def forward(self) -> Tensor:
        """Compute all vectors, `[P, d]`."""
        return self.mlp(self.read(self.embedding.weight))  # type: ignore[no-any-return]

    def read(self, x: Tensor) -> Tensor:
        """Let the rows `[P, d]` know of each other, where there is an LSTM."""
        return x if self.lstm is None else self.lstm(x[None])[0][0]


def _unpack(host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read PEFT's tensor, which has the anchors as vectors too."""
    layer = layer_of(host, name)
    assert isinstance(layer, PTuning.Layer)
    found = first_rows(host, peft_prompt(tensors), layer.count, layer.table.embedding_dim)
    return {f"adapter.{layer.site.path}.prompt": found[layer.free]}

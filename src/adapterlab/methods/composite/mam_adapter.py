"""Mix-and-match: a short prefix in attention and a large parallel adapter beside the feed-forward sublayer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from adapterlab.core.carrier import Carrier
from adapterlab.core.hub import HubCodec, union
from adapterlab.core.method import Composite, Method
from adapterlab.errors import FormatError
from adapterlab.methods.bottleneck.adapter_parallel import AdapterParallel
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.registry import register


@register
class MAMAdapter(Composite):
    """Spend few parameters on attention, as a prefix, and most on the feed-forward sublayer, as a parallel adapter.

    Attention: K ← [P_k ; K], V ← [P_v ; V], with l pairs in every attention module. For a query q that is
    (1 − λ) · Attn(q, K, V) + λ · softmax(q P_kᵀ / √hd) P_v, λ the prefix's part of the softmax mass.
    Feed-forward: y = FFN(x) + s · (W_u relu(W_d x + b_d) + b_u), W_d `[m, d]`, W_u `[d, m]`.

    Where it attaches: inside every attention module (of an encoder-decoder three kinds), and beside every feed-forward
    sublayer. The prefix takes places in the key-value cache and no positions.

    Start: the adapter's is the base's output; the prefix draws attention to itself from the beginning.

    Trainable parameters: 2 l n_kv hd for each attention module, and 2 m d + m + d for each feed-forward sublayer.

    Inference: not mergeable; l more keys, and one bottleneck network that can run at the same time as the sublayer.

    Rate: 1e-4, as in the authors' runs on GLUE; 5e-5 for summarisation.

    Reference: "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366.

    Example:
        >>> from adapterlab.methods.composite.mam_adapter import MAMAdapter
        >>> MAMAdapter(length=16, m=16, scale=2).length
        16
    """

    formula: ClassVar[str] = "2 l n_kv hd for each attention + 2 m d + m + d for each block"
    starts_at_base: ClassVar[bool] = False

    length: int = Field(30, ge=1, description="number of key-value pairs l in front of the real ones")
    init: Literal["words", "normal", "zeros"] = Field(
        "words", description="start of the prefix: keys and values of real words, standard normal numbers, or zeros"
    )
    hidden: int | None = Field(
        None, ge=1, description="width of the network that makes the prefix; none by default, 800 in the paper"
    )
    m: int = Field(512, ge=1, description="width of the bottleneck")
    scale: float = Field(4.0, gt=0, description="factor s of the adapter; 4 suits m = 512, 2 suits m = 16")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout in the bottleneck")
    reads: Literal["input", "residual"] = Field(
        "input", description="what the adapter reads: the sublayer's input, or the residual stream before its norm"
    )

    hub: ClassVar[HubCodec | None] = union(
        {"prefix": cast(HubCodec, PrefixTuning.hub), "adapter": cast(HubCodec, AdapterParallel.hub)},
        fields=lambda parts: _read(**parts),
    )

    def parts(self, host: Carrier) -> dict[str, Method]:
        """The prefix and the adapter."""
        return {
            "prefix": PrefixTuning(length=self.length, init=self.init, hidden=self.hidden, offset=0),
            "adapter": AdapterParallel(m=self.m, scale=self.scale, dropout=self.dropout, reads=self.reads),
        }


def _read(prefix: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """The fields of a union of AdapterHub's that is a prefix and a parallel adapter."""
    if prefix.pop("dropout") or adapter.pop("activation") != "relu" or adapter.pop("learn_scale", False):
        raise FormatError(
            "Dropout on the prefix, other nonlinearities than relu and a learned scale have no form here."
        )
    return {"length": prefix["length"], "init": "zeros", **adapter}

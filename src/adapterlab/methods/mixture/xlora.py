"""A mixture of trained low-rank adapters, weighed token by token by what the model itself makes of the text."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.adapter import Adapter, Delta
from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.kept import Kept
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.core.state import State
from adapterlab.errors import AttachError, FormatError
from adapterlab.foreign.cache import Companion, accompany, cache_in, cache_out, companion, twin, with_cache
from adapterlab.foreign.model import is_encoder_decoder, output_head, text_config
from adapterlab.foreign.peft_task import CAUSAL, task_of
from adapterlab.methods.low_rank.lora import LoRA
from adapterlab.methods.mixture._saved_adapters import Entry, compose, compose_saved
from adapterlab.registry import register

_MIXED = "mixed"  # the place of adapters that are computed by the one that mixes them
_KEYS = "base_model.internal_xlora_classifier.layers."  # what PEFT's keys begin with
_EXAMPLES: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


@register
class XLoRA(Method):
    """Freeze n trained low-rank adapters and train a small classifier that scales each of them for each token.

    The model runs twice over the same input. The first pass, without gradient and with every adapter scaled by
    `scaling_pass_value`, gives its last hidden states H `[batch, tokens, d]`, as a head would read them. The classifier
    makes scales of them: S = softmax(MLP(H) / temperature) over the n adapters, `[batch, tokens, L, n]`. The second
    pass computes each adapted module l as y = W x + b + g · Σ_i S_li s_i B_i A_i drop_i(x), with s_i and the dropout as
    adapter i was trained with and g = `global_weight`.

    MLP: `depth` linear layers with biases, of width `size` between them, each but the last with ReLU and dropout. With
    `layerwise` it gives n scales for each of the L adapted modules, else the same for all. With `top_k` the smaller
    scales of a token become 0, without scaling up the others; `softmax_topk` takes a softmax over those that are left,
    token by token.

    Where it attaches: around the model without its head, and at the linear layers and embeddings of the adapters in
    `adapters`. These are folders of trained adapters, names of adapters on the model, of which copies are made, or
    settings of new ones. Ranks, scales and targets may differ: a module that an adapter does not have gets nothing from
    it. Heads that they trained are left behind, and heads cannot be among their targets: the passes end before.

    Start: the classifier's layers begin at random, so the scales are near 1 / n and the output differs from the base's.

    Trainable parameters: d n + n; with `layerwise` (d + 1) L n; with more depth (d + 1) size + (depth − 2) (size + 1)
    size and a last layer of width size in place of d. With `use_trainable_adapters` those of the adapters too.

    Inference: not mergeable, since the scales depend on the token. Each pass has a key-value cache of its own, so a new
    token costs two passes over one token: S at a token depends on the tokens up to it alone. (The authors' code and HF
    PEFT read the whole text again for every token.) Beams, padding, static and sliding caches work as without it.

    Scales are computed in float32 at least, products in the dtype of x. The gradient does not go back through the
    first pass. Rows of a batch may be packed, or have other adapters; the latter without a cache.

    Rate: 5e-4, LoRA's, as the authors' runs could not be read.

    Reference: "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with
    Applications in Protein Mechanics and Molecular Design", arXiv 2402.07148; the second softmax of `softmax_topk` is
    HF PEFT's, over the scales of a token; the authors' code takes it over all of a batch.

    Example:
        >>> from adapterlab.methods.mixture.xlora import XLoRA
        >>> sorted(XLoRA(adapters={"math": "runs/math/best", "code": "runs/code/best"}, depth=2).adapters)
        ['code', 'math']
    """

    formula: ClassVar[str] = "d n + n for n adapters and hidden states of width d, at depth 1 and not layerwise"
    starts_at_base: ClassVar[bool] = False
    derived: ClassVar[float] = 8.0  # the adapters come from folders, each of which is held to a bound of its own

    adapters: dict[str, Entry] = Field(
        min_length=1, description="by the name of each part: the folder of a trained adapter, or its name on the model"
    )
    depth: int = Field(1, ge=1, description="linear layers of the classifier")
    size: int = Field(2048, ge=1, description="width between its layers; nothing at depth 1")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout between its layers; nothing at depth 1")
    softmax: bool = Field(True, description="scales of a token sum to 1; without it they are what the classifier gives")
    temperature: float = Field(1.0, gt=0, description="divides what the softmax takes; lower is sharper")
    top_k: int | None = Field(None, ge=1, description="adapters that are used for a token; None: all")
    softmax_topk: bool = Field(False, description="a softmax over the scales that top_k leaves")
    layerwise: bool = Field(False, description="scales for each adapted module, not the same for all")
    global_weight: float = Field(1.0, description="factor g of what the adapters add, in both passes")
    scaling_pass_value: float | None = Field(
        0.0, description="scale of every adapter in the first pass; 0: the base alone; None: 1 / n"
    )
    use_trainable_adapters: bool = Field(False, description="train the adapters as well")

    hf: ClassVar[HFCodec | None] = HFCodec(
        "XLORA",
        fields={
            "depth": "xlora_depth",
            "size": "xlora_size",
            "dropout": "xlora_dropout_p",
            "softmax": "enable_softmax",
            "temperature": "softmax_temperature",
            "top_k": "top_k_lora",
            "softmax_topk": "enable_softmax_topk",
            "layerwise": "layerwise_scalings",
            "global_weight": "global_scaling_weight",
            "scaling_pass_value": "scaling_pass_value",
            "use_trainable_adapters": "use_trainable_adapters",
        },
        tensors={},
        copies=False,
        ignores=("hidden_size", "adapters"),
        folders=("adapters", "adapters"),
        derived=lambda config: _from_peft(config),
        pack=lambda host, name: _pack(host, name),
        unpack=lambda host, name, tensors: _unpack(host, name, tensors),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k is not None and self.top_k > len(self.adapters):
            raise ValueError(f"top_k={self.top_k} is more than the {len(self.adapters)} adapters; lower it")
        if self.softmax_topk and self.top_k is None:
            raise ValueError("softmax_topk=True is a softmax over what top_k leaves: set top_k too")
        return self

    @property
    def pass_value(self) -> float:
        """The scale of every adapter in the first pass."""
        return 1 / len(self.adapters) if self.scaling_pass_value is None else self.scaling_pass_value

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Mix two adapters of other ranks, with random values, from folders."""
        _EXAMPLES.append(tempfile.TemporaryDirectory(prefix="adapterlab-example-"))
        return {"adapters": _example_adapters(model, Path(_EXAMPLES[-1].name))}

    # ------------------------------------------------------------------ attaching

    def attach(self, host: Carrier, name: str) -> None:
        """Attach the adapters as parts, and what mixes them.

        Raises:
            FormatError: a folder holds no adapter, or one that does not fit the model.
            AttachError: the model has two stacks, or an adapter does something else than adding low-rank updates to
                what linear layers and embeddings of the backbone return.
        """
        _check_model(host)
        compose(host, name, self, self.adapters)
        self._mix(host, name)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        _check_model(host)
        compose_saved(host, name, self, self.adapters, tensors)
        self._mix(host, name)

    def _mix(self, host: Carrier, name: str) -> None:
        held = [host.adapters(f"{name}/{part}") for part in self.adapters]
        _check(host, name, dict(zip(self.adapters, held, strict=True)))
        places = [site for site in host.all_sites() if any(site.path in adapters for adapters in held)]
        for index, site in enumerate(places):
            parts: dict[int, Any] = {i: adapters[site.path] for i, adapters in enumerate(held) if site.path in adapters}
            for part in parts.values():
                part.place = _MIXED
                part.requires_grad_(self.use_trainable_adapters)
            host.wrap(name, site, Mixed(self, site, parts, index, host.state, name))
        site = host.site(host.backbone)
        host.wrap(name, site, Gate(self, site, _width(host.model), len(places), host.state, name))


class Gate(Adapter):
    """Stands around the backbone: runs it twice, and makes the scales for the second time of the first."""

    not_linear: ClassVar[str] = "it weighs the adapters anew for every token"
    tokenwise: ClassVar[bool | None] = True

    def __init__(self, method: XLoRA, site: Site, width: int, modules: int, state: State, key: str):
        super().__init__(site)
        self.state, self.key, self.pass_value, self.width = state, key, method.pass_value, width
        self.count, self.p = len(method.adapters), method.dropout
        self.softmax, self.temperature = method.softmax, method.temperature
        self.top_k, self.softmax_topk = method.top_k, method.softmax_topk
        sizes = [width, *[method.size] * (method.depth - 1), self.count * (modules if method.layerwise else 1)]
        self.classifier = nn.ModuleList(nn.Linear(into, out) for into, out in itertools.pairwise(sizes))
        self.classifier.to(site.device, site.dtype)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the backbone for the scales, then with them; each pass has its own cache, that of the first beside."""
        given = self.site.bound(args, kwargs)
        as_tuple = given.pop("return_dict", None) is False
        past = companion(cache_in(given), self.key)
        first = self.first(run, given, past)
        out = self.scaled(run, given, self.scales(self.read(first)))
        lead = cache_out(out)
        if lead is not None and past is None:
            accompany(lead, self.key, cache_out(first))
        return out.to_tuple() if as_tuple else out

    def first(self, run: Callable[..., Any], given: dict[str, Any], past: Companion | None) -> Any:
        """Run the first pass."""
        given = {key: value for key, value in given.items() if not key.startswith("output_")}
        cache = cache_in(given)
        if cache is not None:
            given = with_cache(given, twin(cache) if past is None else past.cache)
        with torch.no_grad():
            return self.scaled(run, given, self.pass_value)

    def scaled(self, run: Callable[..., Any], given: dict[str, Any], scales: Tensor | float) -> Any:
        """Run the backbone with scales for the modules inside to find."""
        self.state.taps[self.key] = scales
        try:
            return run(**given, return_dict=True)
        finally:
            self.state.taps.pop(self.key, None)

    def read(self, out: Any) -> Tensor:
        """The last hidden states `[batch, tokens, d]` that a pass returned."""
        hidden = getattr(out, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[-1] != self.width:
            what = list(hidden.shape) if isinstance(hidden, Tensor) else "no last_hidden_state"
            raise AttachError(
                f"The classifier reads hidden states [batch, tokens, {self.width}], and "
                f"{type(self.site.module).__name__} gave {what}. Attach to the language model alone."
            )
        return hidden

    def scales(self, hidden: Tensor) -> Tensor:
        """The scales of each token `[batch, tokens, L or 1, n]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            z = self.classify(hidden.to(self.dtype)).unflatten(-1, (-1, self.count))
            s = self.normalised(z) if self.softmax else z
            return s if self.top_k is None else self.chosen(s)

    def classify(self, h: Tensor) -> Tensor:
        """What the classifier makes of hidden states: `[..., L n]` or `[..., n]`."""
        *inner, last = self.classifier
        for layer in inner:
            h = F.dropout(torch.relu(layer(h)), self.p, self.training)
        made: Tensor = last(h)
        return made

    def normalised(self, z: Tensor) -> Tensor:
        """softmax(z / temperature) over the adapters."""
        return (z / self.temperature).softmax(-1)

    def chosen(self, s: Tensor) -> Tensor:
        """The largest scales of each token and module, the others 0."""
        top = s.topk(self.top_k or self.count, -1)
        values = top.values.softmax(-1) if self.softmax_topk else top.values
        return torch.zeros_like(s).scatter(-1, top.indices, values)


class Mixed(Adapter):
    """The adapters at one module, with the scales that the pass around them has left."""

    not_linear: ClassVar[str] = Gate.not_linear
    counts_tokens: ClassVar[bool] = True
    columns: Tensor

    def __init__(self, method: XLoRA, site: Site, parts: Mapping[int, Delta], index: int, state: State, key: str):
        super().__init__(site)
        self.state, self.key, self.weight = state, key, method.global_weight
        self.index = index if method.layerwise else 0
        self.names = [f"part{i}" for i in parts]
        for name, part in zip(self.names, parts.values(), strict=True):
            self.refer(name, part)
        # Each column of A x belongs to an adapter, whose scale it takes.
        columns = [i for i, part in parts.items() for _ in _factors(part)[0]]
        self.register_buffer("columns", torch.tensor(columns, device=site.device), persistent=False)
        # Of several modules in a list inside a block a router may choose, and tokens come in its order then.
        inside = site.path.removeprefix(f"{site.stack}.{site.layer}.").split(".")
        self.may_be_chosen = any(part.isdigit() for part in inside)
        self.kept = Kept()

    @property
    def parts(self) -> list[Any]:
        """The adapters that are mixed, in order."""
        return [self.__dict__[name] for name in self.names]

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; forget what is kept."""
        self.kept.clear()
        return super().train(mode)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add what the adapters add for this pass; nothing where all of them are scaled by 0."""
        scales = self.state.taps.get(self.key)
        if scales is None:
            raise AttachError(
                f"{self.site.path} was called without the model around it, so no scales of {self.key!r} are there. "
                "Call the model, or switch the adapter off (host.using()). Activations that are computed again know "
                "them with host.recompute or training.recompute only; leave the model's own gradient checkpointing off."
            )
        y: Tensor = run(*args, **kwargs)
        if isinstance(scales, float):
            return y + self.mixture(args[0], scales).to(y.dtype) if scales else y
        own = self.of_tokens(args[0], scales)
        if self.site.kind != "embedding":
            self.state.observe(self.site.path, args[0], own)
        return y + self.mixture(args[0], own[..., self.columns]).to(y.dtype)

    def of_tokens(self, x: Tensor, scales: Tensor) -> Tensor:
        """What each adapter counts for each token that this module is given `[..., n]`."""
        own = self.own(scales)
        lead = x.shape if self.site.kind == "embedding" else x.shape[:-1]
        if lead == own.shape[:2]:
            return own
        if lead == (own.shape[0] * own.shape[1],) and not self.may_be_chosen:
            return own.flatten(0, 1)
        raise AttachError(
            f"{self.site.path} gets {list(x.shape)}, where there are scales for {own.shape[0]} rows of {own.shape[1]} "
            "tokens: it sees other positions, or tokens that a router chose. Mix adapters without this module (exclude "
            "it from their targets and train them again)."
        )

    def own(self, scales: Tensor) -> Tensor:
        """The scales of this module: `[batch, tokens, L or 1, n]` to `[batch, tokens, n]`."""
        return scales[..., self.index, :]

    def mixture(self, x: Tensor, scales: Tensor | float) -> Tensor:
        """G · Σ_i S_i s_i B_i A_i drop_i(x)."""
        a, b = self.factors(x.dtype if x.is_floating_point() else _factors(self.parts[0])[0].dtype)
        h = self.projected(x, a)
        return self.site.mix(h * (scales.to(h.dtype) if isinstance(scales, Tensor) else scales), b)

    def projected(self, x: Tensor, a: Tensor) -> Tensor:
        """A_i drop_i(x) of all adapters behind each other `[..., R]`; each has a mask of its own."""
        drops = [part.p if part.training else 0.0 for part in self.parts]
        if not any(drops):
            return self.site.op(x, a)
        blocks = a.split([len(_factors(part)[0]) for part in self.parts])
        return torch.cat([self.site.op(F.dropout(x, p), each) for p, each in zip(drops, blocks, strict=True)], -1)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A_i below each other `[R, in]`, and all g · s_i B_i beside each other `[out, R]`."""
        tensors = [p for part in self.parts for p in part.parameters()]
        lives = torch.is_grad_enabled() and any(p.requires_grad for p in tensors)
        if self.training or lives or torch.compiler.is_compiling():
            return self.stacked(dtype)
        with torch.no_grad():
            return self.kept.once("factors", lambda: self.stacked(dtype), *tensors, given=dtype)

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make them."""
        found = [(_factors(part), self.weight * part.scale) for part in self.parts]
        a = torch.cat([a for (a, _), _ in found])
        b = torch.cat([scale * b for (_, b), scale in found], 1)
        return a.to(dtype), b.to(dtype)


def _factors(part: Delta) -> tuple[Tensor, Tensor]:
    found = part.factors()
    assert found is not None
    return found


def _width(model: Any) -> int:
    """The width of the last hidden states: of what the head reads, where there is one."""
    width: int = getattr(output_head(model), "in_features", None) or text_config(model).hidden_size
    return width


# ---------------------------------------------------------------------- what does not fit


def _check_model(host: Carrier) -> None:
    config = text_config(host.model)
    if is_encoder_decoder(host.model) or not hasattr(config, "hidden_size"):
        fault = "has two stacks" if is_encoder_decoder(host.model) else "does not say how wide they are"
        raise AttachError(
            "xlora: the scales are made of the last hidden states of one stack of layers, and "
            f"{type(host.model).__name__} {fault}. Load a language model of one stack (...ForCausalLM), or put the "
            "adapters together with al.Average."
        )


def _check(host: Carrier, name: str, held: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse parts that are more than low-rank updates of what the two passes compute."""
    backbone = {id(module) for module in host.backbone.modules()}
    for part, adapters in held.items():
        key = f"{name}/{part}"
        method, owned = host.part_methods(name.partition("/")[0])[key], host.patches[key]
        acts = [what for what, does in method.capabilities().items() if does and what in _ACTS]
        wrong = {path: why for path, adapter in adapters.items() if (why := _misfit(adapter, backbone))}
        if owned:
            what = f"changes {next(iter(owned))}, a weight of the base that all adapters share"
        elif acts:
            what = f"is a {method.id} adapter, which acts in steps of training"
        elif wrong or not adapters:
            what = "{1} at {0}".format(*next(iter(wrong.items()))) if wrong else "adapts no module"
        else:
            continue
        raise AttachError(
            f"{part!r} {what}: xlora mixes what low-rank adapters add to linear layers and embeddings inside "
            f"{type(host.backbone).__name__}. Take a LoRA of those modules; `adapterlab export --as lora` makes one of "
            "other adapters."
        )


_ACTS = ("has_events", "extra_loss", "own_gradient", "changes_rate")


def _misfit(adapter: Any, backbone: set[int]) -> str:
    """Say why an adapter cannot be a part, or ""."""
    kind = type(adapter).__qualname__
    site = adapter.site
    if not isinstance(adapter, Delta) or not adapter.is_its_factors or adapter.factors() is None:
        return f"has a {kind}"
    if adapter.added_bias is not None:
        return f"has a bias beside its factors, which no scale would reach ({kind})"
    if site.kind not in ("linear", "embedding") or site.grouped:
        return f"adapts a module of kind {site.kind} ({kind})"
    if site.is_head or id(site.module) not in backbone:
        return f"adapts a head, which comes after both passes ({kind})"
    return ""


# ---------------------------------------------------------------------- PEFT's format


def _slots(method: Any) -> list[int]:
    """Numbers of the linear layers in PEFT's sequence, in which ReLU and dropout have numbers too."""
    return [i * (3 if method.dropout else 2) for i in range(method.depth)]


def _gate(host: Carrier, name: str) -> tuple[str, Gate]:
    return next((path, adapter) for path, adapter in host.adapters(name).items() if isinstance(adapter, Gate))


def _pack(host: Carrier, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return PEFT's sizes and classifier; None where PEFT cannot load the adapters or computes something else."""
    method, (_, gate) = host.methods[name], _gate(host, name)
    mixed = [adapter for adapter in host.adapters(name).values() if isinstance(adapter, Mixed)]
    paths = [adapter.site.path for adapter in mixed]
    # PEFT finds the modules of its experts by cutting their names at `model.`; its packed layers know no scales.
    found = all(path.startswith("model.") and not path.startswith("model.model.") for path in paths)
    plain = not any(adapter.site.quantized for adapter in mixed)
    if task_of(host.model) != CAUSAL or not found or not plain or _peft_chooses_first(method.top_k, method.pass_value):
        return None
    sizes = {"hidden_size": gate.width, "scaling_pass_value": method.pass_value}
    return sizes, {
        f"{_KEYS}{slot}.{leaf}": value
        for slot, layer in zip(_slots(method), gate.classifier, strict=True)
        for leaf, value in layer.state_dict(keep_vars=True).items()
    }


def _unpack(host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read PEFT's classifier; the adapters are loaded already.

    Raises:
        FormatError: a part of it is not there.
    """
    method, (path, gate) = host.methods[name], _gate(host, name)
    ours = {
        f"{_KEYS}{slot}.{leaf}": f"adapter.{path}.classifier.{i}.{leaf}"
        for i, slot in enumerate(_slots(method))
        for leaf in gate.classifier[i].state_dict()
    }
    if lost := [key for key in ours if key not in tensors]:
        raise FormatError(
            f"The classifier of this PEFT adapter lacks {', '.join(lost[:4])}. PEFT 0.21 drops tensors when it saves "
            "whose numbers are names of experts, and fills them at random when it loads. Where the model is still at "
            "hand, write the file again with all of base_model.internal_xlora_classifier.state_dict() under names that "
            f"begin with {_KEYS.removesuffix('layers.')}"
        )
    parts = {key: value for key, value in host.tensors(name).items() if "/" in key}
    return {**parts, **{ours.get(key, key): value for key, value in tensors.items()}}


def _from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read where PEFT's experts are, in their order: by number, which its file, sorted as text, has lost."""
    adapters = dict(config.get("adapters") or {})
    if set(adapters) != set(map(str, range(len(adapters)))):
        raise FormatError(
            f"This PEFT adapter calls its experts {', '.join(adapters) or 'nothing'}. PEFT itself calls them 0, 1, ... "
            "and finds none of other names, so its classifier was trained without them. Train it again."
        )
    if _peft_chooses_first(config.get("top_k_lora"), config.get("scaling_pass_value")):
        raise FormatError(
            f"This PEFT adapter has top_k_lora={config['top_k_lora']} and scaling_pass_value="
            f"{config['scaling_pass_value']}: PEFT chooses among equal scales in its first pass too, and which "
            "adapters it takes there is chance. Use it with PEFT itself, or train it with scaling_pass_value=0."
        )
    return {"adapters": {name: adapters[name] for name in sorted(adapters, key=int)}}


def _peft_chooses_first(top_k: int | None, pass_value: float | None) -> bool:
    """Say whether PEFT leaves some adapters out of the first pass, where all have the same scale."""
    return top_k is not None and bool(pass_value)


# ---------------------------------------------------------------------- an example


def _example_adapters(model: nn.Module, folder: Path) -> dict[str, Entry]:
    """Write two adapters with random values that suit a model."""
    from adapterlab.hosts import Host
    from adapterlab.hosts import host as host_of

    other = copy.deepcopy(model)
    host, layers = host_of(other) or Host(other), text_config(model).num_hidden_layers
    targets = {"include": ("all-linear",), "layers": tuple(range(layers))}
    for seed, (part, r) in enumerate((("first", 4), ("second", 3))):
        host.attach(LoRA(r=r, targets=targets), part)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in host.parameters(part):
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
        host.save(folder / part, part)
    return {part: str(folder / part) for part in ("first", "second")}

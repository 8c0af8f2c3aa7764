"""Every name of transformers, accelerate and their kin that we use without a promise behind it.

Nobody else imports one (tests/core/test_private.py). Names of caches are in `cache.py`.

| name | what for | what replaces it when it goes |
|---|---|---|
| `sdpa_attention_forward` | recognising the plain attention function, which our kernel may stand for | `ALL_ATTENTION_FUNCTIONS["sdpa"]` at import |
| `no_init_weights` | plans build a model without drawing its weights | building on the meta device |
| `render_jinja_template` | which tokens of a conversation the template marks as the model's; the sandbox, to bound it | `apply_chat_template(..., return_assistant_tokens_mask=True)`, row by row |
| `attention_implementation` | which attention function a model looks up | the argument given when it was loaded |
| `attention_mapping` | where an attention function is registered for one model or for all | `ALL_ATTENTION_FUNCTIONS.register`, for all |
| `kept_in_float32` | modules that quantization leaves out | the quantizer's own list |
| `forget_accelerate` | a second run in one process starts afresh | a process for each run |
| `FILLED` | which parameters a checkpoint filled, so that a new head is known | `output_loading_info` of `from_pretrained`, where we load |
| `change_checkpoints` | checkpointing that a trainer switched on gets contexts | contexts in a trainer's settings |
| `trl_reference` | the base under adapters is the reference model of TRL's trainers, instead of a second copy | their argument `ref_model`, where they have one |
| `trl_head` | the fused head of TRL's trainers, which reads the head's weight, sees the adapters there | their refusing it, as they do for PEFT's |
| `trl_tokens` | what that head returns for each token, of which a trainer makes its loss | its taking the model's loss |
| `TRAINABLE_FLAG` | Trainer lets a model with packed weights train | none: Trainer refuses such models unless they are PEFT's |
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from types import MethodType, SimpleNamespace
from typing import Any

from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import chat_template_utils

from adapterlab.foreign.templates import bounded

__all__ = [
    "FILLED", "TRAINABLE_FLAG", "attention_implementation", "attention_mapping", "change_checkpoints",
    "forget_accelerate", "kept_in_float32", "no_init_weights", "render_jinja_template", "sdpa_attention_forward",
    "trl_head", "trl_reference", "trl_tokens",
]  # fmt: skip

TRAINABLE_FLAG = "_hf_peft_config_loaded"
FILLED = "_is_hf_initialized"
_RENDERING = threading.RLock()
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@functools.lru_cache(maxsize=1)
def _sandbox(compile_: Any) -> Any:
    return compile_("").environment


@functools.lru_cache(maxsize=32)
def _compiled(compile_: Any, source: str) -> Any:
    return bounded(_sandbox(compile_), source)


def render_jinja_template(**options: Any) -> Any:
    """Render conversations as transformers does, with a template that ends: what takes too much is an error."""
    with _RENDERING:
        plain = chat_template_utils._compile_jinja_template
        chat_template_utils._compile_jinja_template = functools.partial(_compiled, plain)
        try:
            return chat_template_utils.render_jinja_template(**options)
        finally:
            chat_template_utils._compile_jinja_template = plain


def attention_implementation(module: Any) -> str:
    """Name of the attention function that a model or attention module looks up: `eager`, `sdpa` and so on."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"


def attention_mapping(cls: Any, name: str) -> MutableMapping[str, Any]:
    """The registry in which modules of a class find the attention function of a name."""
    interface = getattr(sys.modules[cls.__module__], _INTERFACE)
    return interface._local_mapping if name in interface._local_mapping else interface._global_mapping


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Names of modules that transformers neither rounds nor packs."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def forget_accelerate(*, anyway: bool = False) -> None:
    """Let the next accelerator of this process choose its settings anew; one of several processes keeps its own.

    Args:
        anyway: also one of several, whose talk is over.
    """
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and (anyway or AcceleratorState().num_processes == 1):
        AcceleratorState._reset_state(reset_partial_state=True)


_TRL_LOADS = "create_model_from_path"


_CHECKPOINTS = "_gradient_checkpointing_func"


def change_checkpoints(model: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the options with which the blocks of a model call `torch.utils.checkpoint`, where it is switched on."""
    for module in model.modules():
        called = vars(module).get(_CHECKPOINTS)
        if isinstance(called, functools.partial) and getattr(module, "gradient_checkpointing", False):
            setattr(module, _CHECKPOINTS, functools.partial(called.func, *called.args, **change(called.keywords)))


@contextlib.contextmanager
def trl_reference(model: Any, make: Callable[[], Any]) -> Iterator[None]:
    """Let trainers of TRL that are made inside take `make()` where they would load the model's base once more.

    They load it by the name in the model's configuration; models of other names are loaded as ever.
    """
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    trainers = [vars(m) for name, m in sys.modules.items() if name.startswith("trl.") and name.endswith("_trainer")]
    before = [(names, names[_TRL_LOADS]) for names in trainers if _TRL_LOADS in names]

    def load(plain: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        return make() if name == base else plain(name, *args, **kwargs)

    try:
        for names, plain in before:
            names[_TRL_LOADS] = functools.partial(load, plain)
        yield
    finally:
        for names, plain in before:
            names[_TRL_LOADS] = plain


_TRL_FUSED, _SEEING = "fused_lm_head", "_adapterlab_sees_head"


def trl_head(model: Any, seen: Callable[[Any, Any], tuple[Any, Any] | None]) -> None:
    """Let the fused head that trainers of TRL give a model see what its head really does.

    They multiply with the weight of the head's module, which they do not call.

    Args:
        model: that a trainer was made of; others are left alone.
        seen: returns weight and bias for a model and its head, or None for those of the module itself.
    """
    plain = vars(model).get("forward")
    if plain is None or hasattr(plain, _SEEING) or not any(map(_takes_fused, _layers(plain))):
        return
    inner = getattr(plain, "__func__", None)

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = plain if inner is None else functools.partial(inner, self)
        found = seen(self, self.get_output_embeddings()) if kwargs.get(_TRL_FUSED) else None
        if found is None:
            return run(*args, **kwargs)
        self.get_output_embeddings = lambda: SimpleNamespace(weight=found[0], bias=found[1])
        try:
            return run(*args, **kwargs)
        finally:
            del self.get_output_embeddings

    setattr(forward, _SEEING, True)
    model.forward = MethodType(forward, model)


def trl_tokens(out: Any) -> tuple[str, Any] | None:
    """The name of the log-probabilities in what the fused head returns, and which of them have a label; or None."""
    bears = out.get("label_mask")
    return None if bears is None or out.get("log_probs") is None else ("log_probs", bears)


def _layers(function: Any) -> Iterator[Any]:
    """A function and those that it stands around."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _takes_fused(function: Any) -> bool:
    return _TRL_FUSED in inspect.signature(function, follow_wrapped=False).parameters

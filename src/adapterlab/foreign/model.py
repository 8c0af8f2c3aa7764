"""Facts about a model of transformers, or any other, asked in one place.

They come from the model's configuration and its structure: from what holds what and what calls what, never from the
names of classes or the look of a path.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from adapterlab.foreign.calls import calls
from adapterlab.foreign.private_transformers import FILLED
from adapterlab.foreign.written_attention import written_out

# Names of the submodules that hold adapters: in the module they adapt, where FSDP shards them, and at the root.
ADAPTERS, SHARED = "_adapters", "_adapterlab_shared"
PLAIN = "_adapterlab_plain"  # attribute of a wrapped class that holds the class it was made from
_COPY = "_adapterlab_copy"  # attribute of a model that came from a copy that is not the hub's
# Under these names torch.compile, torch's checkpointing and FSDP1 hold the module that they stand around. A wrapper
# answers for it in everything, so no path speaks of one: names are the same before compiling and after.
_AROUND = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(module: Any) -> Any:
    """Return the module inside of what torch put around it without computing anything else."""
    for key in _AROUND if module._modules else ():
        if (inside := module._modules.get(key)) is not None:
            return unwrapped(inside)
    return module


def plain_path(path: str) -> str:
    """Return the name of a module or parameter without the wrappers on the way to it."""
    return ".".join(part for part in path.split(".") if part not in _AROUND)


def plain_class(module: nn.Module) -> Any:
    """Return the class that a module had before adapters came to it."""
    return getattr(type(module), PLAIN, type(module))


# ---------------------------------------------------------------------- configuration


def config_of(model: Any) -> Any:
    """Return the configuration of a model, or None; a configuration is its own."""
    return model if isinstance(model, PretrainedConfig) else getattr(model, "config", None)


def text_config(model: Any) -> Any:
    """Return the configuration of the language model inside a model or configuration; its own if there is no other."""
    config = config_of(model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def tying_configs(model: Any) -> list[Any]:
    """Return the configurations of a model, its own and that of its text, which say that tables are tied."""
    found = {id(config): config for config in (config_of(model), text_config(model)) if config is not None}
    return [config for config in found.values() if getattr(config, "tie_word_embeddings", False)]


def computes_by_ties(model: nn.Module) -> bool:
    """Say whether a model's forward asks whether tables are tied: some scale the head's input then."""
    try:
        return "tie_word_embeddings" in inspect.getsource(plain_class(model).forward)
    except (OSError, TypeError):
        return False


def attention_limits(model: Any) -> dict[str, int]:
    """Return what keeps tokens of a model from seeing all tokens before them, and how many they see."""
    config = text_config(model)
    named = ("sliding_window", "attention_chunk_size")
    return {name: width for name in named if (width := getattr(config, name, None))}


def is_causal(model: nn.Module) -> bool:
    """Say whether tokens see those before them alone, as the attention modules of a model tell, or their form."""
    return any(
        getattr(module, "is_causal", False) or written_out(plain_class(module)) for _, module in base_modules(model)
    )


def is_encoder_decoder(model: Any) -> bool:
    """Say whether a model, or the model of a configuration, has an encoder whose output a decoder attends to."""
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def shifts_labels(model: Any) -> bool:
    """Say whether the loss of a model compares position t with the label of t + 1."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss  # with scipy

    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not is_encoder_decoder(model)


def divides_by_count(model: Any) -> bool:
    """Say whether the loss of a model is divided by the number of labels that its caller gives; some ignore it."""
    return "loss_function" in calls(plain_class(unwrapped(model))).called


def base_name(model: Any) -> str | None:
    """Return the hub id or folder that a model was loaded from, or None."""
    return getattr(config_of(model), "_name_or_path", None) or None


def base_revision(model: Any) -> str | None:
    """Return the revision of the hub repository that a model was loaded from, or None."""
    return getattr(config_of(model), "_commit_hash", None)


def base_copy(model: Any) -> str | None:
    """Return the name of the copy that a model was loaded from, where that is not the hub's, or None."""
    found: str | None = vars(model).get(_COPY)
    return found


def name_base(model: Any, name: str, *, commit: str | None = None, copy: str | None = None) -> None:
    """Let a model say what it was loaded from.

    Args:
        model: of transformers.
        name: its hub id or folder.
        commit: of the hub repository.
        copy: name of the copy, where that is not the hub's.
    """
    model.name_or_path = model.config.name_or_path = name
    model.config._commit_hash = commit
    setattr(model, _COPY, copy)


# ---------------------------------------------------------------------- parts


def output_head(model: Any) -> Any:
    """Return the module that makes logits over the vocabulary, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def fresh_heads(model: nn.Module) -> list[str]:
    """Return the paths of task heads that a model's checkpoint did not have: their numbers are random.

    A head over the vocabulary is none of them. Where nothing tells what was loaded (a model made from its
    configuration, or a deep copy), there are none.
    """
    backbone = backbone_of(model)
    if backbone is model or not any(hasattr(p, FILLED) for p in backbone.parameters()):
        return []
    found = _outside(model, lambda p: hasattr(p, FILLED))
    return [*found, *_new_on_the_way(model)] if found else []


def task_heads(model: Any) -> list[str]:
    """Return the paths of a model's task head, new or not: what classifies, and the pooler before it.

    A model with a head over the vocabulary has none.
    """
    backbone = backbone_of(model)
    if backbone is model or output_head(model) is not None:
        return []
    found = _outside(model, lambda _: False)
    pooler: Any = getattr(backbone, "pooler", None)
    path = next((path for path, module in base_modules(model) if module is pooler), None)
    return [*found, path] if found and path is not None and any(True for _ in pooler.parameters()) else found


def _outside(model: Any, known: Callable[[torch.Tensor], bool]) -> list[str]:
    """Outermost modules outside the backbone that hold parameters of which none is known, the vocabulary's head aside.

    Args:
        model: with a head.
        known: says which parameters are not asked for.
    """
    output, inside = output_head(model), {id(p) for p in backbone_of(model).parameters()}
    found: list[str] = []
    for path, module in base_modules(model):
        own = [p for _, part in base_modules(module) for p in part._parameters.values() if p is not None]
        new = bool(own) and not any(id(p) in inside or known(p) for p in own)
        if new and path and module is not output and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def _new_on_the_way(model: nn.Module) -> list[str]:
    """Linear layers that no checkpoint filled between the layers and a new head, such as the pooler of BERT."""
    among = stacks(model)
    backbone = {id(module) for _, module in base_modules(backbone_of(model))}
    return [
        path
        for path, module in base_modules(model)
        if id(module) in backbone
        and isinstance(module, nn.Linear)
        and place_in_stack(path, among) == (None, None)
        and not any(hasattr(p, FILLED) for p in module._parameters.values())
    ]


def input_table(model: Any) -> Any:
    """Return the module that embeds what the model reads, or None."""
    try:
        return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        return None


def vocabulary(model: Any) -> tuple[int | None, int | None]:
    """Return how many token ids a model can read and write; None where it has no table that tells."""
    return _rows(input_table(model)), _rows(output_head(model))


def _rows(table: Any) -> int | None:
    """Rows of a table; packed weights have another shape than the module says."""
    for name in ("num_embeddings", "out_features"):
        if isinstance(size := getattr(table, name, None), int):
            return size
    weight = getattr(table, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else None


def input_device(model: Any) -> torch.device:
    """Return the device that a batch has to be on."""
    table = input_table(model)
    first = next(model.parameters()) if table is None else next(table.parameters())
    place = elsewhere(table) if table is not None else None
    device: torch.device = first.device if place is None else place
    return device


def places(model: nn.Module) -> dict[str, Any]:
    """Return where accelerate has placed the parts of a model, by their paths; nothing where it is on one device."""
    found: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    return found if len({*found.values()}) > 1 else {}


def elsewhere(module: nn.Module) -> torch.device | None:
    """Return where accelerate brings a module's weights for each call, if it keeps them elsewhere in between."""
    hook: Any = module.__dict__.get("_hf_hook")
    away = hook is not None and any(p is not None and p.is_meta for p in module._parameters.values())
    return torch.device(hook.execution_device) if away else None


@contextlib.contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Let a module have its weights inside the context, where accelerate keeps them elsewhere between calls."""
    if elsewhere(module) is None:
        yield
        return
    hook: Any = module.__dict__["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def backbone_of(model: Any) -> Any:
    """Return the model without its output or task head: the module that the head's model calls.

    Some heads call a part of what transformers names the base model, past its own forward.
    """
    base = getattr(model, "base_model", model)
    if base is model:
        return model
    path, called = model.base_model_prefix, calls(plain_class(model)).called
    inner = [name for name in called if name.startswith(f"{path}.")]
    if path in called or not inner:
        return base
    found = [module for name in inner if (module := _submodule(model, name)) is not None and stacks(module)]
    return found[0] if len(found) == 1 else base


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def is_adapter_path(path: str) -> bool:
    """Say whether a parameter's name belongs to an adapter and not to the base."""
    return not {ADAPTERS, SHARED}.isdisjoint(path.split("."))


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk over a model's own modules, adapters and wrappers left out; a module that is reached twice is named once."""
    seen: set[int] = set()
    ahead = [("", model)]  # the next one last
    while ahead:
        path, module = ahead.pop()
        module = unwrapped(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        lead = f"{path}." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and name not in (ADAPTERS, SHARED):
                ahead.append((lead + name, child))


def weight_reads(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, bool]]:
    """Return which modules' weights are read without a call of the module.

    Args:
        modules: every module of a model by path.

    Returns:
        By path: the class of the reader, and whether the module is called too, by torch, on another path.
    """
    found: dict[str, tuple[str, bool]] = {}
    called: set[str] = set()
    for path, module in modules.items():
        by = plain_class(module)
        seen, lead = calls(by), f"{path}." if path else ""
        called |= {lead + name for name in seen.called}
        for name in seen.read:
            if lead + name in modules:
                found[lead + name] = (by.__name__, by.__module__.startswith("torch."))
    return {path: (by, path in called) for path, (by, torchs) in found.items() if torchs or path not in called}


def head_width(attention: nn.Module) -> int | None:
    """Return how wide a head of an attention module is, or None where it does not say."""
    names = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    found = (getattr(attention, name, None) for name in names)
    return next((width for width in found if isinstance(width, int)), None)


# ---------------------------------------------------------------------- layers


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the stacks of layers by path: lists of modules that lie in no other list, such as parts of a block."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in base_modules(model):
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{p}.") for p in found):
            found[path] = module
    return found


def place_in_stack(path: str, among: dict[str, nn.ModuleList]) -> tuple[str | None, int | None]:
    """Return the stack a module belongs to, and the index of its layer there; (None, None) outside all stacks."""
    for stack in among:
        lead = f"{stack}." if stack else ""
        if path.startswith(lead):
            index = path[len(lead) :].partition(".")[0]
            return stack, int(index)
    return None, None


def main_stacks(model: Any) -> list[nn.ModuleList]:
    """Return the stacks that a model's text, or whatever it reads, goes through: two for an encoder-decoder.

    Of a model with several towers it is that of the language model: the part whose configuration is the text's.
    """
    if is_encoder_decoder(model):
        halves = [model.get_encoder(), model.get_decoder()]
        return [stack for half in halves for stack in _longest(half)]
    whole, text = config_of(model), text_config(model)
    if text is not whole:
        inside = [m for _, m in base_modules(model) if m is not model and getattr(m, "config", None) is text]
        held = next((m for m in inside if stacks(m)), None)
        if held is not None:
            return _longest(held)
    return _longest(backbone_of(model))


def _longest(module: nn.Module) -> list[nn.ModuleList]:
    found = list(stacks(module).values())
    return [max(found, key=len)] if found else []

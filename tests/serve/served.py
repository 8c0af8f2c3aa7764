"""A tiny model with saved adapters of several kinds, and what `generate` says with each of them by itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapterlab as al
from adapterlab.errors import MergeError
from adapterlab.serve import Request, Sampling

METHODS: dict[str, Callable[[], Any]] = {
    "low": lambda: al.LoRA(r=2, targets="all-linear"),
    "low2": lambda: al.LoRA(r=4, alpha=16.0, modules_to_save=("lm_head",)),
    "low3": lambda: al.LoRA(r=2, targets="all-linear"),
    "table": lambda: al.LoRA(r=2, modules_to_save=("embed_tokens",)),
    "moved": lambda: al.PiSSA(r=2),
    "scaled": lambda: al.IA3(),
    "after": lambda: al.AdapterPfeiffer(m=4),
    "norms": lambda: al.LNTuning(),
    "before": lambda: al.PrefixTuning(length=3),
    "words": lambda: al.PromptTuning(length=5),
}


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def filled(host: Any, seed: int = 0, size: float = 0.3) -> Any:
    """Give the tensors of the adapter "a" other values."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in host.tensors("a").values():
            value.add_(torch.randn(value.shape, generator=draw) * size)
    return host


class Alone:
    """Adapters in folders, and greedy answers of the model with one of them by itself."""

    def __init__(self, root: Path):
        self.root, self.model = root, tiny_llama()
        for seed, (name, method) in enumerate(METHODS.items()):
            self.save(name, method(), seed)
        self._answers: dict[Any, list[int]] = {}

    def save(self, name: str, method: Any, seed: int, size: float = 0.3) -> Path:
        host = filled(al.attach(tiny_llama(), method, "a"), seed, size)
        folder: Path = host.save(self.root / name, "a", overwrite=True)
        return folder

    @functools.cached_property
    def host(self) -> Any:
        for name in METHODS:
            host = al.load(self.model, self.root / name, name, active=False)
        return host

    def answer(self, name: str | None, prompt: tuple[int, ...], tokens: int = 10) -> list[int]:
        """What `generate` gives, up to and with the end token."""
        key = (name, prompt, tokens)
        if key not in self._answers:
            with self.host.using(*([] if name is None else [name])):
                self._answers[key] = greedy(self.model, prompt, tokens)
        return self._answers[key]


class Merged:
    """Greedy answers of models that have one adapter each in their weights, of those that can be merged."""

    def __init__(self, root: Path):
        self.root, self._models = root, dict[str, Any]()
        for name in METHODS:
            host = al.load(tiny_llama(), root / name, "a")
            with contextlib.suppress(MergeError):
                host.merge("a")
                self._models[name] = host.model

    def __contains__(self, name: str | None) -> bool:
        return name in self._models

    def answer(self, name: str, prompt: tuple[int, ...]) -> list[int]:
        return greedy(self._models[name], prompt, 10)


def greedy(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """What `generate` gives, up to and with the end token."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens, do_sample=False,
        )  # fmt: skip
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def ask(prompt: tuple[int, ...], adapter: str | None = None, tenant: str | None = None, **sampling: Any) -> Request:
    """A request, greedy unless it is said otherwise."""
    return Request(prompt, adapter, Sampling(**{"temperature": 0, "max_tokens": 10, **sampling}), tenant)

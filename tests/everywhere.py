"""One method in every loop: our own, `transformers.Trainer` and TRL's; whole, in parts, in pieces and by processes.

All of them train the same tiny model on the same rows in the same order, at the same rates.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

import adapterlab as al
from adapterlab.core.adapter import Adapter
from adapterlab.core.carrier import Carrier
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.data import Collator
from adapterlab.foreign.model import ADAPTERS, SHARED
from adapterlab.hosts import Host
from adapterlab.optim import adamw
from adapterlab.testing.models import tiny
from adapterlab.train import Loop, Training
from adapterlab.train.sampler import Sampler

NAME, STEPS, BATCH, PARTS, HALF = "default", 5, 2, 2, 2
LR, EPS = 1e-2, 1e-4  # of Adam: a gradient that is nothing but rounding makes no step
SAME = 5e-4  # share of the largest change: sums in another order; an event too many makes a hundred times that
EVENTS = ("begin", "before_step", "penalty", "after_backward", "after_step", "finish")
State = dict[str, Tensor]
Log = list[tuple[Any, ...]]


def _rows() -> list[dict[str, list[int]]]:
    """Rows of several lengths with labels on some tokens, so that a mean of means would be another loss."""
    draw = random.Random(0)
    made = []
    for _ in range(16):
        ids = [draw.randrange(3, 60) for _ in range(draw.randrange(5, 12))]
        asked = draw.randrange(1, 4)
        made.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return made


ROWS = _rows()
COLLATE = Collator(0)


def attached(method: Method, precision: str = "fp32") -> Host:
    """The method on the tiny model, as it is before the first step."""
    model = tiny("llama", precision).train()
    torch.manual_seed(0)
    host = al.attach(model, method, NAME)
    method.prepare(host, NAME, [COLLATE(ROWS[i : i + 4]) for i in (0, 4)])
    return host


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Trainers collect garbage at every start: leave out what has been there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def state_of(host: Host) -> State:
    """Everything that the model holds: adapters, and the base with what was changed in it.

    Entries that train are told by what they change of their parameter: positions are no numbers to be compared.
    """
    places = (f"{ADAPTERS}.{NAME}.index.", f"{ADAPTERS}.{NAME}.values.", f"{SHARED}.{NAME}.entries.")
    state = host.model.state_dict().items()
    found = {key: value.detach().clone() for key, value in state if not any(place in key for place in places)}
    for path, patch in host.patches[NAME].items():
        if patch.index is not None and patch.original is not None:
            values = patch.value(host.model).flatten()
            change = values.new_zeros(host.model.get_parameter(path).numel())
            change[patch.index] = values - patch.original.flatten().to(values.dtype)
            found[f"change of {path}"] = change
    return found


class Emitting(al.LoRA):
    """A LoRA whose updates are to be small: c times the mean square over the real tokens is a loss at each module."""

    id = "emitting"
    hf = None
    weight: float = 3.0

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        layer = self.Layer(self, site)
        layer.state, layer.weight = host.state, self.weight
        return layer

    class Layer(al.LoRA.Layer):
        counts_tokens = True
        state: al.State
        weight: float

        def added(self, x: Tensor) -> Tensor:
            y = super().added(x)
            if self.state.listening:
                real, square = self.state.real_tokens(x), y.square().mean(-1)
                self.state.emit(self.weight * (square if real is None else square[real]).mean())
            return y


# ---------------------------------------------------------------------- loops


def own(host: Host, parts: int = PARTS, processes: int = 1, lr: float = LR) -> Loop:
    """Our own loop; a step has the same rows however they are divided."""
    size = BATCH * PARTS // (parts * processes)
    settings = Training(
        steps=STEPS, batch_size=size, accumulation=parts, lr=lr, eps=EPS, weight_decay=0.1, schedule="linear",
        warmup=0,
        clip=0.5, packing=False,
    )  # fmt: skip
    return Loop(host, NAME, ROWS, settings, prepare=False)


class InOrder:
    """What makes a trainer take the rows as they come."""

    train_dataset: Any

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class PlainTrainer(InOrder, Trainer):  # type: ignore[misc]
    """`Trainer`."""


def foreign(
    host: Host,
    folder: Path,
    parts: int = PARTS,
    lr: float = LR,
    kind: type[Trainer] = PlainTrainer,
    more: Any = None,
    **options: Any,
) -> Trainer:
    """Another's trainer with the events of the method and its optimizer."""
    sampler = Sampler([len(row["input_ids"]) for row in ROWS], 0, BATCH, PARTS)
    rows = [ROWS[i] for step in range(STEPS) for batch in sampler.step(step) for i in batch]
    settings = options.pop("settings", TrainingArguments)(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, gradient_accumulation_steps=parts,
        learning_rate=lr, lr_scheduler_type="linear", max_grad_norm=0.5, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", **{"save_strategy": "no", "bf16": False, **options},
    )  # fmt: skip
    make: Any = functools.partial(adamw, lr=lr, eps=EPS, weight_decay=0.1)
    with al.hf_trainable(host.model):
        trainer = kind(
            host.model, settings, data_collator=COLLATE, train_dataset=rows,  # type: ignore[arg-type]
            callbacks=[al.AdapterlabCallback(host, NAME)],
            optimizers=(host.methods[NAME].optimizer(host, NAME, make), None), **(more or {}),
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl(host: Host, folder: Path, **options: Any) -> Trainer:
    """TRL's trainer, which computes activations again by default."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    class Ordered(InOrder, SFTTrainer):  # type: ignore[misc]
        def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any):
            super().__init__(*args, train_dataset=Dataset.from_list(train_dataset), **kwargs)

    words = Tokenizer(models.WordLevel({"<p>": 0, "<s>": 1, "<e>": 2, "<u>": 3}, unk_token="<u>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<p>", eos_token="<e>", unk_token="<u>")
    return foreign(
        host, folder, kind=Ordered, more={"processing_class": tokenizer}, settings=SFTConfig,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, **options,
    )  # fmt: skip


# ---------------------------------------------------------------------- pieces


def in_pieces(method: Method) -> Loop:
    """A run of our own loop that was stopped in the middle and went on from what was saved, in a new model."""
    first, saved = own(attached(method)), io.BytesIO()
    for _ in range(HALF):
        first.step()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    host = Host(tiny("llama"))
    host.attach(method, NAME, saved=state["adapter"])
    loop = own(host)
    loop.load_state_dict(state)
    loop.run()
    return loop


# ---------------------------------------------------------------------- what happened


def listen(patch: pytest.MonkeyPatch, cls: type[Method]) -> Log:
    """Return the list into which the events of a method will be written, with the step that they are told."""
    log: Log = []
    for event in EVENTS:
        if cls.overrides(event):
            patch.setattr(cls, event, _telling(log, event, getattr(cls, event)))
    return log


def _telling(log: Log, event: str, plain: Any) -> Any:
    def told(self: Method, host: Host, name: str, *rest: Any) -> Any:
        log.append((event, *rest[:1]))
        return plain(self, host, name, *rest)

    return told


def expected(cls: type[Method], first: int = 0) -> Log:
    """The events of a run, or of one that goes on from a step: each once a step, whatever a step is made of."""
    log: Log = [("begin", STEPS)]
    for step in range(first, STEPS):
        log += [("before_step", step), ("penalty",), ("after_backward", step), ("after_step", step)]
    return [entry for entry in [*log, ("finish",)] if cls.overrides(entry[0])]


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """The largest difference of two states, as a share of the largest change since the start.

    What a method put in the place of its tensors at the end was not there then, and counts from zero.
    """
    assert found.keys() == wanted.keys()
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}
    moved = max(_distance(wanted[key], before) for key, before in _before(wanted, start).items())
    assert moved > 1e-3, "nothing was trained"
    return max(_distance(found[key], wanted[key]) for key in wanted) / moved


def check(method: Method, folder: Path) -> None:
    """Require that a method is the same in our own loop and in `Trainer`, and in both after a stop, to the bit."""
    start, loop, host, again = state_of(attached(method)), own(attached(method)), attached(method), attached(method)
    loop.run()
    assert apart(state_of(in_pieces(method).host), state_of(loop.host), start) == 0
    foreign(host, folder, save_strategy="steps", save_steps=HALF).train()
    assert apart(state_of(host), state_of(loop.host), start) < SAME
    foreign(again, folder / "more").train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
    assert apart(state_of(again), state_of(host), start) == 0


def far(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """The norm of the difference of two states, as a share of the norm of the change since the start."""
    off, moved = (
        math.hypot(*(float((left[key].double() - wanted[key].double()).norm()) for key in wanted))
        for left in (found, _before(wanted, start))
    )
    return off / moved


def _before(wanted: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> State:
    """What each tensor was at the start; zero where it was not there, or was another one."""
    there = {key for key in wanted if key in start and start[key].shape == wanted[key].shape}
    return {key: start[key] if key in there else torch.zeros_like(value) for key, value in wanted.items()}


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).abs().max()) if left.numel() else 0.0

"""Methods that act while they train do the same in every loop, over parts of a step, over processes and after a stop.

Which methods these are is told by what they override; of several that override the same by the same, the first counts.
One more emits losses on activations.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import everywhere
from adapterlab import registry
from adapterlab.core.method import Method
from adapterlab.errors import ConfigError
from everywhere import HALF, PARTS, State, apart, attached, expected, far, foreign, in_pieces, listen, own, state_of

WORLD = PARTS
SAME = everywhere.SAME
ACTING = (*everywhere.EVENTS, "rate", "optimizer")
CLASSES = [method for method in map(registry.method, registry.ids()) if method.trains]
THEIRS = {m: tuple(getattr(m, hook) for hook in ACTING) for m in CLASSES}
# Methods that need more than tokens, such as pictures, are tried by their claims.
ACTIVE = [
    m
    for m in CLASSES
    if any(map(m.overrides, ACTING)) and not (m.overrides("gradient") or m.overrides("example_batch"))
]
ALIKE = list({THEIRS[m]: m for m in reversed(ACTIVE)}.values())[::-1]  # whatever the batches of a step are
DYNAMIC = [*ALIKE, everywhere.Emitting]
dynamic = pytest.mark.parametrize("cls", DYNAMIC, ids=lambda cls: cls.id)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with everywhere.quick():
        yield


def made(cls: type[Method]) -> Method:
    """The method with settings that let it act in a few steps, and without noise, which every process draws anew."""
    quiet = {key: value for key, value in {"dropout": 0.0, "experts": 1}.items() if key in cls.model_fields}
    return cls(**cls.example(everywhere.tiny("llama")), **quiet)


@functools.cache
def start(cls: type[Method], precision: str = "fp32") -> State:
    return state_of(attached(made(cls), precision))


ALONE: dict[type[Method], State] = {}


def alone(cls: type[Method]) -> State:
    """What our own loop makes in one process, a step in parts."""
    if cls not in ALONE:
        loop = own(attached(made(cls)))
        loop.run()
        ALONE[cls] = state_of(loop.host)
    return ALONE[cls]


@pytest.mark.parametrize("cls", ALIKE, ids=lambda cls: cls.id)
def test_our_own_loop_tells_events_once_a_step_and_parts_change_nothing(
    cls: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = listen(monkeypatch, cls)
    assert log == []
    whole = own(attached(made(cls)), parts=1)
    whole.run()
    assert log == expected(cls)
    log.clear()
    ALONE.pop(cls, None)
    alone(cls)
    assert log == expected(cls)
    assert apart(state_of(whole.host), alone(cls), start(cls)) < SAME


@dynamic
def test_a_run_that_was_stopped_is_the_one_that_was_not(cls: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    log = listen(monkeypatch, cls)
    found = state_of(in_pieces(made(cls)).host)
    assert log[-len(expected(cls, HALF)) :] == expected(cls, HALF)
    assert apart(found, alone(cls), start(cls)) == 0


@dynamic
def test_the_trainer_of_transformers_does_the_same(
    cls: type[Method], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = listen(monkeypatch, cls)
    host = attached(made(cls))
    foreign(host, tmp_path, save_strategy="steps", save_steps=HALF).train()
    assert log == expected(cls)
    straight = state_of(host)
    assert apart(straight, alone(cls), start(cls)) < SAME
    log.clear()
    again = attached(made(cls))
    foreign(again, tmp_path / "more").train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert log == expected(cls, HALF)
    assert apart(state_of(again), straight, start(cls)) == 0


@dynamic
def test_the_trainer_of_trl_does_the_same(cls: type[Method], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = listen(monkeypatch, cls)
    host = attached(made(cls))
    trainer = everywhere.trl(host, tmp_path)
    try:
        trainer.train()
    except ConfigError:  # TRL multiplies with the head outside of the model
        if "" in host.adapters(everywhere.NAME):
            return
        raise
    assert log == expected(cls)
    assert apart(state_of(host), alone(cls), start(cls)) < SAME


@dynamic
def test_a_base_in_half_precision_is_trained_alike(cls: type[Method], tmp_path: Path) -> None:
    ours, theirs = attached(made(cls), "bf16"), attached(made(cls), "bf16")
    own(ours, lr=1e-3).run()
    foreign(theirs, tmp_path, lr=1e-3).train()
    assert far(state_of(theirs), state_of(ours), start(cls, "bf16")) < 0.3  # rounding may choose other entries


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in place.items()})  # accelerate reads them
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    with everywhere.quick():
        for cls in DYNAMIC:
            for kind in ("own", "Trainer"):
                host = attached(made(cls))
                try:
                    if kind == "own":
                        own(host, parts=1, processes=WORLD).run()
                    else:
                        foreign(host, Path(folder) / "trainer", parts=1).train()
                    found[f"{cls.id} {kind}"] = state_of(host)
                except Exception:
                    found[f"{cls.id} {kind}"] = traceback.format_exc(limit=-4)
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    """One test for all methods: a pair of processes takes as long to start as all of them to train."""
    mp.start_processes(_work, args=(str(tmp_path),), nprocs=WORLD, start_method="spawn")
    pair = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for cls in DYNAMIC:
        for kind in ("own", "Trainer"):
            case = f"{cls.id} {kind}"
            first, second = (found[case] for found in pair)
            assert not isinstance(first, str), f"{case}: {first}"
            assert apart(first, alone(cls), start(cls)) < SAME, case
            assert all(torch.equal(first[key], second[key]) for key in first), case

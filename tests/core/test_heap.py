"""Memory that is freed goes back to the system, when it is worth it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import adapterlab as al
from adapterlab.foreign import process_memory as heap
from adapterlab.foreign.process_memory import Heap
from adapterlab.testing import models

MIB = 1 << 20
# Large tensors that come and go while small ones stay, as in a backward pass whose gradients stay.
ROUNDS = """
import json, sys, torch
from adapterlab.foreign.process_memory import Heap, resident
torch.set_num_threads(1)
heap, kept, before = Heap(), [], resident()
for _ in range(100):
    if sys.argv[1] == "tidy":
        heap.tidy()
    large = []
    for _ in range(8):
        large.append(torch.ones(600_000))
        kept.extend(torch.empty(8) for _ in range(4))
    del large
print(json.dumps((resident() - before) / 2**20))
"""


def _growth(how: str) -> float:
    run = subprocess.run([sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True)
    grown: float = json.loads(run.stdout)
    return grown


@pytest.mark.skipif(heap._malloc_trim() is None, reason="the C library is not glibc")
def test_holes_of_freed_tensors_do_not_add_up() -> None:
    alive = 8 * 600_000 * 4 / MIB
    assert _growth("tidy") < alive + 2 * heap._LEAST / MIB
    if _growth("leave") < 150:
        pytest.skip("this glibc fills the holes itself")


class _Process:
    """A process whose memory is what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.held, self.trims = 0, 0
        monkeypatch.setattr(heap, "resident", lambda: self.held * MIB)
        monkeypatch.setattr(heap, "_malloc_trim", lambda: self._trim)

    def _trim(self, _: int) -> int:
        self.trims += 1
        return 1


def test_only_growth_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    process = _Process(monkeypatch)
    tidy = Heap()
    for held, trims in [
        (100, 0), (160, 0), (165, 1),  # 64 MiB over the first round
        (100, 1), (160, 1), (170, 2),  # what the round after takes is no growth; from there on it is
        (110, 2), (90, 2), (150, 2), (160, 3),  # less than before lowers the mark
    ]:  # fmt: skip
        process.held = held
        tidy.tidy()
        assert process.trims == trims, held


def test_large_processes_may_grow_by_a_sixteenth(monkeypatch: pytest.MonkeyPatch) -> None:
    process = _Process(monkeypatch)
    tidy = Heap()
    for held, trims in [(7000, 0), (7450, 0), (7500, 1)]:
        process.held = held
        tidy.tidy()
        assert process.trims == trims, held


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    monkeypatch.setattr(heap, "resident", lambda: pytest.fail("was asked for"))
    with Heap().tidied():
        pass


def test_full_recomputation_tidies_at_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama").train()
    host = al.attach(model, al.LoRA(r=2))
    calls: list[int] = []
    monkeypatch.setattr(Heap, "tidy", lambda _: calls.append(1))
    host.recompute("full")
    model(**models.batch(model)).loss.backward()
    assert len(calls) == 2 * len(host.layers)  # before the first pass of each block and before it is computed again

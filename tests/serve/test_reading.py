"""Files of adapters are read ahead, in order, within a bound; who runs does not wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from served import METHODS, ask
from test_bookkeeping import Books

from adapterlab.errors import FormatError, UnusableAdapterError
from adapterlab.serve import Token, reading
from adapterlab.serve.adapters import Version
from adapterlab.serve.reading import Reader


def version(uid: int, size: int = 10) -> Version:
    return Version(uid, f"a{uid}", None, 1, f"folder{uid}", "some", size)


class Disk:
    """Files that are read when they may be."""

    def __init__(self) -> None:
        self.may, self.read, self.threads = threading.Event(), list[str](), set[str]()

    def __call__(self, folder: str) -> Any:
        self.read.append(folder)
        self.threads.add(threading.current_thread().name)
        self.may.wait(10)
        if folder == "folder9":
            raise FormatError("It is damaged.")
        return folder


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(reading, "read", made)
    yield made
    made.may.set()


def test_what_is_wanted_is_read_by_another_thread_as_far_as_it_fits(disk: Disk) -> None:
    reader = Reader(25)
    first, second, third = (version(i) for i in (1, 2, 3))
    reader.want([first, second, third])
    assert [reader.is_reading(one) for one in (first, second, third)] == [True, True, False]
    reader.want([first, third])  # nobody waits for the second any more
    assert not reader.is_reading(second)
    disk.may.set()
    assert reader.take(first) == "folder1"
    assert reader.take(third) == "folder3"
    assert reader.take(second) == "folder2"
    assert sorted(disk.read) == ["folder1", "folder2", "folder3"]
    assert len(disk.threads) == 2
    damaged = version(9)
    reader.want([damaged])
    with pytest.raises(FormatError):
        reader.take(damaged)
    reader.close()


def test_who_runs_does_not_wait_for_a_file_and_nobody_else_is_there_it_is_waited_for() -> None:
    books = Books()
    for name in ("warm", "cold"):
        books.adapters.add(name, None, "plain", "lora", 10)
    books.loader.late.update(v.uid for v in books.adapters.seen_by(None))
    warm = books.ask([1] * 4, 12, "warm")
    assert books.step() == [warm]
    cold = books.ask([2] * 4, 2, "cold")
    assert [books.step() for _ in range(8)] == [[warm]] * 8, "also when it is overdue"
    assert not cold.ended
    books.loader.late.clear()
    assert books.step() == [warm, cold]
    books.drain()


def test_an_engine_reads_while_it_computes(alone: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by, read = dict[str, str](), reading.read

    def noted(folder: Any) -> Any:
        by[str(folder).rpartition("/")[2]] = threading.current_thread().name
        time.sleep(0.05)
        return read(folder)

    monkeypatch.setattr(reading, "read", noted)
    one = engine("low", "low3", "scaled")
    running = one.submit(ask((5, 9, 31), "low", max_tokens=50, ignore_end=True))
    assert isinstance(running.next_event(60), Token)
    prompt = (5, 9, 31)
    handles = {name: one.submit(ask(prompt, name)) for name in ("low3", "scaled")}
    gone = one.register("gone", alone.save("gone", METHODS["low"](), 3))
    (alone.root / "gone" / "adapter_model.safetensors").unlink()
    with pytest.raises(UnusableAdapterError):
        one.submit(ask(prompt, gone.name)).result(60)
    for name, handle in handles.items():
        assert handle.result(60)[0].ids == alone.answer(name, prompt)
    assert {by[name].rpartition("_")[0] for name in ("low3", "scaled")} == {"adapterlab-reader"}
    assert one.drain(60)

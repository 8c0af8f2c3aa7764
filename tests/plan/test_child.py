"""Functions in child processes: results, errors, deaths."""

from __future__ import annotations

import json
import operator
import os
import signal

import pytest

from adapterlab.errors import ConfigError
from adapterlab.plan.child import Child, apart, called, each, prepared, shared
from adapterlab.plan.device import Device


def test_a_child_calls_and_raises_what_the_function_raises(child: Child) -> None:
    pid = child.call(os.getpid)
    assert pid != os.getpid()
    assert child.call(os.getpid) == pid
    with pytest.raises(ConfigError, match=r"rtx4091.*rtx4090"):
        child.call(Device.parse, "rtx4091")
    with pytest.raises(json.JSONDecodeError):
        child.call(json.loads, "{")
    assert child.call(os.getpid) == pid


def test_what_is_printed_does_not_disturb_the_answers(child: Child) -> None:
    assert child.call(print, "x" * 100_000) is None
    assert child.call(operator.add, 1, 2) == 3


def test_a_death_is_an_error_that_names_the_signal_and_the_next_call_works(child: Child) -> None:
    with pytest.raises(ConfigError, match=r"died.*SIGSEGV.*--dry-run"):
        child.call(signal.raise_signal, signal.SIGSEGV)
    assert child.call(operator.add, 1, 2) == 3


def test_a_death_costs_one_row() -> None:
    jobs = {
        "good": (operator.add, (1, 2), {}),
        "dies": (os._exit, (3,), {}),
        "refused": (Device.parse, ("rtx4091",), {}),
        "after": (operator.mul, (3, 4), {}),
    }
    told: list[int] = []
    found, errors = each(jobs, 1, lambda key, count: told.append(count))
    assert found == {"good": 3, "after": 12}
    assert list(errors) == ["dies", "refused"]
    assert "exit code 3" in str(errors["dies"])
    assert told == [1, 2, 3, 4]


def test_what_cannot_travel_is_done_here() -> None:
    with apart():
        assert called(lambda: os.getpid()) == os.getpid()


def test_a_prepared_child_takes_the_last_item_and_then_the_jobs() -> None:
    here = os.getpid()
    call, items = operator.methodcaller("__call__"), [os.getpid, os.getpid]
    assert shared(call, items) == [here, here]
    with prepared():
        first, there = shared(call, items)
        assert first == here != there
        assert shared(lambda item: item, [1, 2]) == [1, 2]
        found, _ = each({"a": (os.getpid, (), {})}, 1)
        assert found == {"a": there}
        assert shared(call, items) == [here, here]  # it ended with the jobs
    assert shared(call, items) == [here, here]

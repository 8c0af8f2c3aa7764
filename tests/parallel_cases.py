"""What a pair of processes does for tests: many cases in one start, since a start takes as long as they do."""

from __future__ import annotations

import contextlib
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn

from adapterlab import registry
from adapterlab.errors import AdapterlabError, ConfigError, RankError
from adapterlab.foreign.sharding import is_part, local
from adapterlab.plan import before_run
from adapterlab.testing.parallel import KINDS, Single, apart, loop_of, measured, talking, trained
from adapterlab.train import Listener, fit, run
from adapterlab.train.parallel.replicated import Replicated
from tiny_runs import make_config

STOPPED = 5  # step after which a run is killed; its last checkpoint is of step 4


def sampled() -> list[str]:
    """The first trained method of each family, and those whose form of training is another one."""
    methods = [method for method in map(registry.method, registry.ids()) if method.trains]
    first = {method.family: method.id for method in reversed(methods)}
    return [*dict.fromkeys([*first.values(), "full", "galore", "lisa"])]


def config(folder: Path, output: str, **more: Any) -> dict[str, Any]:
    """A run of six steps that trains the whole base, split by rows."""
    made = make_config(folder, steps=6, batch_size=2, accumulation=2, save_every=2, eval_every=3, lr=1e-3)
    return {**made, "method": {"name": "full"}, "parallel": "fsdp", "output": str(folder / output), **more}


class Killed(Exception):
    """Stands for a signal that cannot be caught."""


class Killer(Listener):
    def stepped(self, loop: Any, record: dict[str, Any]) -> None:
        if record["step"] == STOPPED:
            raise Killed


def runs(rank: int, folder: Path) -> dict[str, Any]:
    """Train whole, killed and resumed; leave a copy of what the kill left."""
    whole = fit(config(folder, "whole"), quiet=True)
    with contextlib.suppress(Killed, RankError):  # the slower rank hears of the other one's end
        fit(config(folder, "killed"), quiet=True, callbacks=[Killer()])
    dist.barrier()
    if rank == 0:
        shutil.copytree(folder / "killed", folder / "left")
    dist.barrier()
    again = fit(config(folder, "killed"), quiet=True, resume=True)
    assert whole is not None
    assert again is not None
    return {"whole": whole.eval_loss, "again": again.eval_loss}


def refusal(rank: int, folder: Path) -> str:
    """What each process says of a run whose weights cannot fit, none of which may be loaded."""
    loads = mock.patch.object(run, "load_model", side_effect=AssertionError("weights were loaded"))
    small = mock.patch.object(before_run, "_left", return_value=1000)
    with loads, small, mock.patch.object(before_run, "_TRIFLE", 0.0):
        try:
            fit(config(folder, "refused"), quiet=True)
        except ConfigError as error:
            return str(error)
    return "nothing was refused"


def shares(rank: int, folder: Path) -> dict[str, Any]:
    """Gradients that some processes lack, and how often processes talk."""
    with talking(folder, "shares") as accelerator:
        parallel = Replicated(accelerator)
        given = [nn.Parameter(torch.zeros(3)) for _ in range(40)]
        for i, p in enumerate(given[:30]):
            p.grad = torch.full((3,), float(i + rank)) if rank == 0 or i % 2 else None
        before = [p.grad for p in given]
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
            parallel.share(given)
        own = all(grad is None or grad is p.grad for grad, p in zip(before, given, strict=True))
        return {
            "in place": own,
            "calls": calls.call_count,
            "grads": [None if p.grad is None else p.grad.tolist() for p in given],
        }


def split(rank: int, folder: Path) -> dict[str, Any]:
    """What of a base that trains is on this process, and what is refused."""
    with talking(folder, "split") as accelerator:
        loop = loop_of(registry.method("full"), "fsdp", accelerator)
        loop.run()
        here = [(p, state) for p, state in loop._raw.state.items() if is_part(p)]
        held = {
            "parts": len(here), "of": len(loop.parameters()),
            "weights": sum(local(p).numel() for p, _ in here) / sum(p.numel() for p, _ in here),
            "moments": sum(local(s["exp_avg"]).numel() for _, s in here) / sum(p.numel() for p, _ in here),
        }  # fmt: skip
    refused = {}
    for id, options in {"full": {"anchor": 0.1}, "far": {}}.items():
        with talking(folder, f"refused-{id}") as accelerator:
            try:
                loop_of(registry.method(id), "fsdp", accelerator, settings=options)
            except AdapterlabError as error:
                refused[id] = str(error)
    return {**held, "refused": refused}


def ways(rank: int, folder: Path) -> dict[str, float]:
    """How far other ways to train a split base are from one process: kept whole, computed again, in half precision."""
    every: dict[str, tuple[str, str, dict[str, Any]]] = {
        "zero2": ("full", "zero2", {}),
        "recompute": ("full", "fsdp", {"recompute": "full"}),
        "cheap": ("lora", "fsdp", {"recompute": "cheap"}),
        "bf16": ("lora", "fsdp", {"precision": "bf16"}),
        "bf16 masters": ("full", "fsdp", {"precision": "bf16"}),
        "bf16 projected": ("galore", "fsdp", {"precision": "bf16"}),
    }
    found = {}
    for name, (id, kind, options) in every.items():
        method, precision = registry.method(id), options.get("precision", "fp32")
        with talking(folder, name.replace(" ", "-")) as accelerator:
            start = loop_of(method, "auto", Single(), precision=precision).host.state_dict("one")
            alone = trained(method, "auto", Single(), precision=precision)
            found[name] = apart(trained(method, kind, accelerator, **options), alone, start)
    return found


def methods(rank: int, folder: Path) -> dict[str, Any]:
    """A method of each family in every kind, beside one process."""
    return measured(sampled(), KINDS, rank, folder)


def work(rank: int, folder: Path) -> dict[str, Any]:
    """Every case, or what it raised."""
    cases: dict[str, Callable[[int, Path], Any]] = {
        "shares": shares,
        "split": split,
        "ways": ways,
        "runs": runs,
        "refusal": refusal,
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            if name in ("runs", "refusal"):
                with talking(folder, name):
                    found[name] = case(rank, folder)
            else:
                found[name] = case(rank, folder)
        except Exception:
            found[name] = traceback.format_exc(limit=-6)
    return found

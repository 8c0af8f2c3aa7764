"""Methods over processes: each kind of training in parallel against one process, in a pair of processes for all.

The pair takes as long to start as many methods to train, so `pair` runs whatever it is given in one. Processes talk
through files and the local machine; each case has a group of its own, so that one that hangs ends alone.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes

from adapterlab.core.method import Method
from adapterlab.data import Collator
from adapterlab.errors import AdapterlabError
from adapterlab.foreign.private_transformers import forget_accelerate
from adapterlab.hosts import Host
from adapterlab.registry import method as method_by_id
from adapterlab.testing.case import Case
from adapterlab.testing.suite import Status
from adapterlab.train.config import Training
from adapterlab.train.loop import Loop
from adapterlab.train.parallel import kind_of

KINDS = ("ddp", "fsdp")
WORLD = 2
STEPS, ROWS = 4, 4  # of a step
TOLERANCE = 5e-3  # of the largest change: sums in another order, which the first steps of Adam magnify
_PATIENCE = datetime.timedelta(seconds=60)
Cell = dict[str, str]
Work = Callable[[int, Path], Any]


class Single:
    """What a loop needs of accelerate, for one process among others that do the same."""

    distributed_type, num_processes, process_index = DistributedType.NO, 1, 0
    is_main_process, scaler, device, mixed_precision = True, None, torch.device("cpu"), "no"

    def prepare_optimizer(self, optimizer: Any, **_: Any) -> Any:
        """Return the optimizer in the form that loops expect."""

        def step() -> None:
            optimizer.step()

        return SimpleNamespace(step=step, zero_grad=optimizer.zero_grad, step_was_skipped=False)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is cast."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, largest: float) -> Tensor:
        """Clip as accelerate does."""
        return torch.nn.utils.clip_grad_norm_(parameters, largest)


# ---------------------------------------------------------------------- processes


def pair(work: Work, folder: Path, world: int = WORLD) -> list[Any]:
    """Run a function of rank and folder in each of several new processes, and return what it returns in each."""
    start_processes(_run, args=(work, str(folder), world), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, work: Work, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in place.items()})  # accelerate reads them
    found = work(rank, Path(folder))
    torch.save(found, Path(folder) / f"result-{rank}.pt")


@contextlib.contextmanager
def talking(folder: Path, key: str) -> Iterator[Accelerator]:
    """Let the processes of a pair talk inside the context, and no longer."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{folder}/store-{key}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=_PATIENCE)
    forget_accelerate(anyway=True)
    try:
        yield Accelerator(cpu=True)
    finally:
        forget_accelerate(anyway=True)
        dist.destroy_process_group()


# ---------------------------------------------------------------------- a method in each kind


def rows() -> list[dict[str, list[int]]]:
    """Rows with labels on more and fewer tokens, so that a mean of means would be another loss."""
    draw = torch.Generator().manual_seed(3)
    made = torch.randint(3, 60, (3 * ROWS, 9), generator=draw).tolist()
    return [{"input_ids": ids, "labels": [-100] * (1 + i % 5) + ids[1 + i % 5 :]} for i, ids in enumerate(made)]


def loop_of(
    method: type[Method],
    kind: str,
    accelerator: Any,
    settings: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    **training: Any,
) -> Loop:
    """A loop for a method with its example settings, and others, on a tiny model, ready to run."""
    case = Case(method, precision=precision)
    model = case.model()
    torch.manual_seed(0)
    host = Host(model)
    host.attach(method(**{**method.example(model), **(settings or {})}), "one")
    host.methods["one"].prepare(host, "one", [case.batch(model)])
    world = accelerator.num_processes
    options: dict[str, Any] = {
        "steps": STEPS, "batch_size": ROWS // WORLD, "accumulation": WORLD // world, "lr": 1e-2, "eps": 1e-4,
        "schedule": "linear", "warmup": 0, "weight_decay": 0.1, "clip": 0.5, "packing": False, **training,
    }  # fmt: skip
    collate = functools.partial(_completed, method, model) if method.overrides("example_batch") else None
    given = rows()
    return Loop(
        host, "one", given, Training(**options), eval_rows=given[:3], collate=collate, accelerator=accelerator,
        parallel=kind_of(accelerator, model, kind), prepare=False,
    )  # fmt: skip


def _completed(method: type[Method], model: Any, given: Any) -> dict[str, Tensor]:
    return method.example_batch(model, Collator(0)(given))


def trained(
    method: type[Method], kind: str, accelerator: Any, draws: int | None = None, **options: Any
) -> dict[str, Tensor]:
    """Train, perhaps with other random numbers, and return the adapter's tensors and the last losses."""
    loop = loop_of(method, kind, accelerator, **options)
    if draws is not None:
        set_seed(draws)
    status = loop.run()
    losses = torch.tensor([status.train_loss, status.eval_loss or 0.0])
    return {**loop.host.state_dict("one"), "losses": losses}


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """The largest difference of two results, as a share of the largest change since the start.

    Raises:
        AssertionError: they have other tensors, or numbers that are not finite or no numbers to be near.
    """
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
        raise AssertionError("the adapter has other tensors or shapes than after training in one process")
    moved, off = 1e-3, 0.0
    for key, value in wanted.items():
        if not value.is_floating_point():
            if not torch.equal(found[key], value):
                raise AssertionError(f"{key} holds other positions than after training in one process")
            continue
        if not bool(found[key].isfinite().all()):
            raise AssertionError(f"{key} holds numbers that are not finite")
        if value.numel():
            off = max(off, float((found[key].double() - value.double()).abs().max()))
            if key in start and start[key].shape == value.shape:
                moved = max(moved, float((value.double() - start[key].double()).abs().max()))
    return off / moved


def measured(ids: list[str], kinds: tuple[str, ...], rank: int, folder: Path) -> dict[str, dict[str, Cell]]:
    """Every method in every kind; for the processes of a `pair`."""
    found: dict[str, dict[str, Cell]] = {}
    for id in ids:
        method = method_by_id(id)
        if not method.trains:
            found[id] = {kind: _cell("not applicable", "nothing trains by gradients") for kind in kinds}
            continue
        found[id] = _one(method, kinds, folder)
        torch.save(found, folder / f"so-far-{rank}.pt")
    return found


def _one(method: type[Method], kinds: tuple[str, ...], folder: Path) -> dict[str, Cell]:
    """A method that draws random numbers in a step is compared with the same draws: those of data parallelism."""
    found: dict[str, Cell] = {}
    alone: Any = _alone(method) if os.environ["RANK"] == "0" else None
    wanted: Mapping[str, Tensor] | None = None
    for kind in kinds:
        try:
            with talking(folder, f"{method.id}-{kind}") as accelerator:
                alone = _told(alone)
                if isinstance(alone, str):
                    return {kind: _cell("refused", alone) for kind in kinds}
                result = trained(method, kind, accelerator)
                first = _told(result)
                if wanted is None and not _draws(method, first, alone):
                    wanted = alone["end"]
            found[kind] = _verdict(result, wanted, first, alone["start"])
            wanted = wanted or (result if found[kind]["status"] == "passed" else None)
        except AdapterlabError as error:
            found[kind] = _cell("refused", _said(error))
        except Exception as error:
            found[kind] = _cell("failed", f"{type(error).__name__}: {error} {traceback.format_exc(limit=-2)}")
    return found


def _told(value: Any) -> Any:
    """What the first process has."""
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def _alone(method: type[Method]) -> dict[str, Any] | str:
    """What one process makes of a method, and from what; or why it cannot."""
    try:
        loop = loop_of(method, "auto", Single())
        start = loop.host.state_dict("one")
        end = trained(method, "auto", Single())
    except AdapterlabError as error:
        return _said(error)
    return {"start": start, "end": end}


def _draws(method: type[Method], found: Mapping[str, Tensor], alone: Mapping[str, Any]) -> bool:
    """Whether the difference to what one process trains is that of other random numbers, or of other examples."""
    if method.overrides("example_batch"):  # what it makes up depends on the number of rows
        return True
    if _distance(found, alone["end"], alone["start"]) <= TOLERANCE:
        return False
    again = trained(method, "auto", Single(), draws=1) if os.environ["RANK"] == "0" else None
    return bool(_told(again is not None and _distance(again, alone["end"], alone["start"]) > TOLERANCE))


def _distance(*states: Mapping[str, Tensor]) -> float:
    """The distance; without a bound where there is none."""
    try:
        return apart(*states)
    except AssertionError:
        return float("inf")


def worse(*cells: Cell) -> Cell:
    """Of what processes say about the same case: that it failed, if it did for one, and the longer reason."""
    order = ("failed", "refused", "not applicable", "passed")
    return min(cells, key=lambda cell: (order.index(cell["status"]), -len(cell["detail"])))


def _verdict(result: Any, wanted: Any, first: Any, start: Any) -> Cell:
    if any(not torch.equal(result[key], first[key]) for key in result if key != "losses"):
        return _cell("failed", "the processes end with different tensors")
    try:
        off = apart(result, wanted if wanted is not None else first, start)
    except AssertionError as error:
        return _cell("failed", str(error))
    if off > TOLERANCE:
        return _cell("failed", f"{off:.2g} of the largest change away from what one process trains")
    return _cell("passed", "" if wanted is not None else "what it draws differs by process; the processes agree")


def _cell(status: Status, detail: str) -> Cell:
    return {"status": status, "detail": detail}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

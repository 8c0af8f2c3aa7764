"""Two processes give what one gives: gradients, a step through accelerate, a saved adapter."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adapterlab import registry
from adapterlab.core.method import Method
from adapterlab.errors import AttachError, MergeError, OutputError
from adapterlab.hosts import Host, attach
from adapterlab.testing import Case, batch

WORLD = 2
KINDS = ("data parallel", "fully sharded")
LORA = registry.method("lora")


def representatives() -> list[type[Method]]:
    """The first trained method of each family."""
    methods = [method for method in map(registry.method, registry.ids()) if method.trains]
    return list({method.family: method for method in reversed(methods)}.values())


def _gradients(host: Host, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**given).loss.backward()
    found = {}
    for key, parameter in host.named_parameters("one").items():
        if parameter.grad is not None:
            grad = parameter.grad
            found[key] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found


def _shard(host: Host) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in host.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(host.model, mesh=mesh)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _check_saving(alone: Host, shared: Host, folder: Path, rank: int) -> None:
    """Files of a sharded adapter are those of a whole one, and one process writes them; values go back into it."""
    shared.save(folder / "sharded", "one")  # a folder for each process shows which of them write
    assert (folder / "sharded").exists() is (rank == 0)
    if rank == 0:
        alone.save(folder / "alone", "one")
        assert _digests(folder / "sharded") == _digests(folder / "alone")
    kept, doubled = (_doubled(host.state_dict("one")) for host in (shared, alone))
    assert all(torch.equal(kept[key], doubled[key]) for key in doubled)
    shared.load_state_dict("one", doubled)
    assert all(torch.equal(value, doubled[key]) for key, value in shared.state_dict("one").items())


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: 2 * value if value.is_floating_point() else value for key, value in tensors.items()}


@lru_cache(maxsize=1)
def _alone(method: type[Method]) -> tuple[Host, dict[str, Tensor], dict[str, Tensor]]:
    """The adapter in one process, a batch for it, and its gradients; all kinds of sharing compare with these."""
    host = Case(method).attach()
    rows = batch(host.model, rows=2 * WORLD, padding=False)
    return host, rows, _gradients(host, host.model, rows)


def _distance(method: type[Method], kind: str, rank: int, folder: Path) -> float:
    """Largest difference to the gradients of one process, relative to the largest gradient."""
    alone, rows, wanted = _alone(method)
    shared = Case(method).attach()
    mine = {key: value[rank::WORLD] for key, value in rows.items()}
    model = shared.model
    if kind == "data parallel":
        model = DistributedDataParallel(model)
    else:
        _shard(shared)
    got = _gradients(shared, model, mine)
    assert got.keys() == wanted.keys(), f"gradients of other tensors: {sorted(got.keys() ^ wanted.keys())[:4]}"
    if kind == "fully sharded":
        _check_saving(alone, shared, folder / f"{method.id} {rank}", rank)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    return max(float((got[key] - wanted[key]).abs().max()) for key in wanted) / largest


def _step(host: Host, rows: dict[str, Tensor], rank: int | None = None, accelerator: Any = None) -> dict[str, Tensor]:
    """The adapter after one optimizer step; SGD, because Adam would hide a wrong scale of the gradients."""
    model, optimizer = host.model, torch.optim.SGD(host.parameters("one"), lr=1.0)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    loss = model(**{key: value if rank is None else value[rank::WORLD] for key, value in rows.items()}).loss
    loss.backward() if accelerator is None else accelerator.backward(loss)
    optimizer.step()
    return host.state_dict("one")


def _through_accelerate(sharded: bool, rank: int) -> float:
    """Largest difference between the weights that two processes and one have after a step."""
    alone, shared = Case(LORA).attach(), Case(LORA).attach()
    rows = batch(alone.model, rows=2 * WORLD, padding=False)
    before, wanted = alone.state_dict("one"), _step(alone, rows)
    moved = max(float((wanted[key] - before[key]).abs().max()) for key in wanted)
    assert moved > 1e-3, f"the step moves nothing: {moved}"
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type is DistributedType.MULTI_CPU
    if sharded:
        # accelerate reads an FSDP plugin on accelerators only and would silently run data parallel on CPUs, although
        # all it does afterwards works there: tell its state what it does not find out by itself.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator.state.distributed_type = DistributedType.FSDP
    got = _step(shared, rows, rank, accelerator)
    assert any(isinstance(p, DTensor) for p in shared.parameters("one")) is sharded
    AcceleratorState._reset_state()  # the next one is of another kind
    return max(float((got[key] - wanted[key]).abs().max()) for key in wanted)


def _refusals(rank: int, folder: Path) -> float:
    host = Case(LORA).attach()
    before = host.state_dict("one")
    _shard(host)
    with pytest.raises(AttachError, match=r"'two' \(lora\) cannot join.*Attach, then shard, then build the optimizer"):
        host.attach(Case(LORA).make(host.model), "two")
    assert list(host.methods) == ["one"]
    plain = Case(LORA).model()
    keys = set(plain.state_dict())
    fully_shard(plain, mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(AttachError, match="before fully_shard"):
        attach(plain, Case(LORA).make(plain))
    assert set(plain.state_dict()) == keys
    with pytest.raises(
        MergeError, match=r"'one' cannot be merged here: the weights are split.*Gather first: host.save"
    ):
        host.merge("one")
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict("one").items())
    flat = Case(LORA).attach()
    FullyShardedDataParallel(flat.model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(OutputError, match=r"flat parameter of FSDP1.*fsdp_version=2"):
        flat.save(folder / f"flat {rank}", "one")
    assert not (folder / f"flat {rank}").exists()
    return 0.0


def _tasks(rank: int, folder: Path) -> dict[str, Callable[[], float]]:
    """What the processes do, by name; each gives a distance from what one process has."""
    tasks: dict[str, Callable[[], float]] = {}
    for method in (LORA, *representatives()):
        for kind in KINDS:
            tasks[f"{method.id}, {kind}"] = partial(_distance, method, kind, rank, folder)
    tasks["accelerate, data parallel"] = partial(_through_accelerate, False, rank)
    tasks["accelerate, fully sharded"] = partial(_through_accelerate, True, rank)
    tasks["refusals"] = partial(_refusals, rank, folder)
    return tasks


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in place.items()})  # accelerate reads them
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    for key, task in _tasks(rank, Path(folder)).items():
        try:
            results[key] = task()
        except Exception:
            results[key] = traceback.format_exc(limit=-3)
        (Path(folder) / f"results-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    mp.start_processes(_work, args=(str(tmp_path),), nprocs=WORLD, start_method="spawn")
    for rank in range(WORLD):
        results = json.loads((tmp_path / f"results-{rank}.json").read_text())
        assert results.keys() == _tasks(rank, tmp_path).keys()
        wrong = {key: value for key, value in results.items() if isinstance(value, str) or not value < 1e-5}
        assert not wrong, "\n".join(f"{key}: {value}" for key, value in wrong.items())

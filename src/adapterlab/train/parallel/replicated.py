"""Data parallelism: every process has the whole model, and its own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from adapterlab.errors import ConfigError
from adapterlab.foreign.sharding import is_part
from adapterlab.hosts import Host
from adapterlab.train.parallel.alone import Alone, Item
from adapterlab.train.parallel.flat import add_up, broadcast

_SHOWN = 16  # numbers of each tensor that are compared among processes


class Replicated(Alone):
    """Copies of the model; the gradients of a step are summed over processes.

    By this class instead of torch's DistributedDataParallel: adapters are small, and methods may compute gradients in
    their own way or leave some out.
    """

    kind = "ddp"

    def __str__(self) -> str:
        return f"{self.accelerator.num_processes} processes, each with the whole model"

    def spread(self, host: Host, name: str) -> None:
        """Begin everywhere with what the first process has.

        Raises:
            ConfigError: the processes have different bases.
        """
        base = {path: p for path, p in host.model.named_parameters() if not host.is_adapter_path(path)}
        _check_alike(base, self.accelerator.device)
        kind = self.accelerator.device.type
        broadcast([tensor.data for tensor in host.tensors(name).values() if tensor.device.type == kind])
        host.refresh(name)

    def evened(self, batches: Sequence[Item], spare: Callable[[], Item]) -> list[tuple[Item, bool]]:
        """Fill up with batches that do not count: who has less would wait meanwhile, and parts of a model cannot."""
        lacking = self.passes(len(batches)) - len(batches)
        return [(batch, True) for batch in batches] + [(spare(), False) for _ in range(lacking)]

    def passes(self, batches: int) -> int:
        """The most that any process has."""
        count = torch.tensor(batches, device=self.accelerator.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return int(count)

    def share(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum them in few large pieces; a gradient that no process has stays away, as in one process."""
        mine = [p for p in parameters if p.requires_grad and not is_part(p)]
        if not mine:
            return
        there = torch.tensor([p.grad is not None for p in mine], dtype=torch.uint8, device=mine[0].device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        used = [p for p, some in zip(mine, there.tolist(), strict=True) if some]
        for p in used:
            p.grad = _dense(p)
        add_up([p.grad for p in used if p.grad is not None])


def _check_alike(base: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Require that all processes loaded the same base, of which the beginnings of its tensors tell."""
    if empty := [path for path, p in base.items() if p.is_meta]:
        raise ConfigError(
            f"This process has no weights of the base, first {empty[0]}. Load the model in every process."
        )
    sums = torch.stack([_beginning(p) for p in base.values()]).to(device)
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if other := [path for path, low, high in zip(base, lowest, highest, strict=True) if low != high]:
        raise ConfigError(
            f"The processes have different bases: {len(other)} tensors differ, first {other[0]}. Load the same model, "
            "whole, in every process (FSDP_CPU_RAM_EFFICIENT_LOADING=false where accelerate was started for FSDP)."
        )


def _beginning(p: Tensor) -> Tensor:
    first = p.detach().reshape(-1)[:_SHOWN].cpu().double().nan_to_num()
    return (first * torch.arange(1, len(first) + 1)).sum()


def _dense(p: nn.Parameter) -> Tensor:
    """This process's gradient, or zeros where others have one."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.is_sparse else p.grad

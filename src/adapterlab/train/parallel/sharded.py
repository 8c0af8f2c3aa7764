"""FSDP2: the base is split among processes, layer by layer; each layer is whole only while it computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch import distributed as dist

from adapterlab.engine.sparse import Entries
from adapterlab.errors import ConfigError
from adapterlab.foreign.quantized import is_plain
from adapterlab.foreign.sharding import called, is_part, laid_out, local, reshard
from adapterlab.hosts import Host
from adapterlab.train.parallel.alone import Item, Result, refused
from adapterlab.train.parallel.replicated import Replicated

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """How FSDP2 works here; what accelerate's own configuration says comes as these too.

    Attributes:
        offload: the parts wait in the CPU's memory, and moments and steps are there too.
        reshard: a layer is given back after its forward pass and fetched again for its backward pass; without it, the
            gathered model stays from the forward to the backward pass.
    """

    offload: bool = False
    reshard: bool = True

    @classmethod
    def of(cls, accelerator: Accelerator, offload: bool = False, *, reshard: bool = True) -> Options:
        """Read accelerate's options, if it was started with some.

        Raises:
            ConfigError: it asks for FSDP1, or for what is set here elsewhere.
        """
        plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return cls(offload, reshard)
        if plugin.fsdp_version != 2:
            raise ConfigError(
                f"accelerate was started with FSDP{plugin.fsdp_version}, whose flat parameters adapters cannot live "
                "beside. Set fsdp_version: 2 in its configuration."
            )
        if plugin.activation_checkpointing:
            raise ConfigError(
                "accelerate was started with fsdp_activation_checkpointing. Leave it out and set training.recompute, "
                "which keeps what adapters see alike in both passes."
            )
        held: Any = plugin.cpu_offload
        offloads = bool(held) and type(held).__name__ != "OffloadPolicy"
        return cls(offload or offloads, reshard and plugin.reshard_after_forward is not False)


class Sharded(Replicated):
    """The base, what of it trains, its gradients and moments are split; what a method adds is whole everywhere.

    What is added is small, and methods look at it between steps; its gradients are summed as in `Replicated`.
    """

    kind = "fsdp"

    def __init__(self, accelerator: Accelerator, options: Options | None = None):
        super().__init__(accelerator)
        self.options = options or Options()
        self.model: Any = None

    def __str__(self) -> str:
        return f"{self.accelerator.num_processes} processes, each with a part of the base"

    # ------------------------------------------------------------------ beginning

    def check(self, host: Host, name: str) -> None:
        """Refuse packed weights, methods that need the base whole, and what FSDP2 cannot group."""
        for key, method in {name: host.methods[name], **host.part_methods(name)}.items():
            if why := method.unsplit(host, key):
                raise refused(self.kind, method.id, why, "Use parallel=ddp, or another method")
        packed = [path for path, p in self._base(host) if not is_plain(p) or not p.dtype.is_floating_point]
        if packed:
            raise refused(
                self.kind, host.methods[name].id, f"{packed[0]} is packed, and packed weights cannot be split by rows",
                "Leave quantize out: split in bf16 a base takes as much as packed whole from four processes on",
            )  # fmt: skip
        if self.accelerator.scaler is not None:
            raise ConfigError("parallel=fsdp has no loss scaling for float16. Set precision to bf16 or fp32.")
        if not host.layers:
            raise ConfigError(f"parallel=fsdp splits layer by layer, and {type(host.model).__name__} has no layers.")
        self._check_dtypes(host)

    def _check_dtypes(self, host: Host) -> None:
        base = {id(p): p for _, p in self._base(host)}
        for layer in (*host.layers, host.model):  # the model has what no layer has
            group = [p for key in map(id, layer.parameters()) if (p := base.pop(key, None)) is not None]
            dtypes = {str(p.dtype) for p in group if p.requires_grad}
            if len(dtypes) > 1:
                raise ConfigError(
                    f"parallel=fsdp: parameters of {', '.join(sorted(dtypes))} train in one {type(layer).__name__}, "
                    "and FSDP2 deals out gradients of one dtype. Load the model in fp32."
                )

    def spread(self, host: Host, name: str) -> None:
        """Split what every process has, and keep of each parameter its own rows."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        self.model, device = host.model, self.accelerator.device
        self._bring_added(host)
        super().spread(host, name)
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        offloads = self.options.offload and device.type != "cpu"
        added = {p for path, p in host.model.named_parameters() if host.is_adapter_path(path)}
        options: dict[str, Any] = {
            "mesh": mesh, "ignored_params": added, "reshard_after_forward": self.options.reshard,
            "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
        }  # fmt: skip
        if any(p.dtype in _HALF for _, p in self._base(host)):
            options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for layer in host.layers:
            fully_shard(layer, **options)
        # What stands around the layers is whole from the first use to the end of the backward pass.
        fully_shard(host.model, **{**options, "reshard_after_forward": False})
        for module in self._units():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if hasattr(module, "set_reduce_scatter_unused_params"):
                module.set_reduce_scatter_unused_params(True, recurse=False)
        for patch in replaced(host, name):
            patch.original = laid_out(patch.original, host.model.get_parameter(patch.path))
        for module in host.model.modules():
            if isinstance(module, Entries):
                module.fetched = True

    def _bring_added(self, host: Host) -> None:
        """Put what methods added on the device; FSDP2 brings what it splits."""
        named = (*host.model.named_parameters(), *host.model.named_buffers())
        for tensor in (tensor for path, tensor in named if host.is_adapter_path(path)):
            tensor.data = tensor.data.to(self.accelerator.device)

    def device(self, model: nn.Module) -> torch.device:
        """The process's own, wherever the parts wait."""
        return self.accelerator.device

    def _units(self) -> Iterator[Any]:
        from torch.distributed.fsdp import FSDPModule

        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def _base(self, host: Host) -> Iterator[tuple[str, nn.Parameter]]:
        return ((path, p) for path, p in host.model.named_parameters() if not host.is_adapter_path(path))

    # ------------------------------------------------------------------ a step

    def called(self, compute: Callable[[], Result]) -> Result:
        """Inside the model's own call, so that what stands around the layers is whole, the head too."""
        found = called(self.model, compute)
        if not torch.is_grad_enabled():
            reshard(self.model)
        return found

    def share(self, parameters: Sequence[nn.Parameter]) -> None:
        """Those of the base are summed and dealt out in the backward pass; the others here."""
        reshard(self.model)
        super().share(parameters)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float | None) -> float:
        """Norms of parts are added over processes, those of whole tensors counted once."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for gradient in filter(is_part, gradients):
            total += _square(local(gradient)).to(total.device)
        dist.all_reduce(total)
        for gradient in itertools.filterfalse(is_part, gradients):
            total += _square(gradient).to(total.device)
        norm = math.sqrt(float(total))
        factor = min(1.0, (limit or math.inf) / (norm + 1e-6))
        if factor < 1:  # as torch.nn.utils.clip_grad_norm_
            for gradient in gradients:
                local(gradient).mul_(factor)
        return norm

    # ------------------------------------------------------------------ saving

    def gathered(self, value: Item) -> list[Item]:
        """What each process found."""
        found: list[Item] = gather_object([value])
        return found

    @property
    def saves_together(self) -> bool:
        """Parts are gathered by all, and written by the first."""
        return True

    def taken_apart(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[Any, ...], Tensor]]:
        """Parts stay out."""
        parts: dict[tuple[Any, ...], Tensor] = {}

        def walked(value: Any, way: tuple[Any, ...]) -> Any:
            if is_part(value):
                parts[way] = value
                return torch.zeros((), dtype=value.dtype).expand(value.shape)
            if isinstance(value, Mapping):
                return {key: walked(inner, (*way, key)) for key, inner in value.items()}
            return value

        return walked(state, ()), parts


def replaced(host: Host, name: str) -> list[Any]:
    """Base parameters that an adapter owns whole, or replaces, with their originals."""
    held = [patch for key in host.parts(name) for patch in host.patches[key].values()]
    return [patch for patch in held if patch.original is not None and (patch.entire or patch.chosen is None)]


def _square(gradient: Tensor) -> Tensor:
    """Of the norm, without a copy in another dtype."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=wide).double().square()

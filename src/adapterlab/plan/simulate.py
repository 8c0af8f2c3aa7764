"""One training step of the library's own loop, on tensors without contents (or, for comparison, on real ones)."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from adapterlab.data import Collator
from adapterlab.engine import attention
from adapterlab.engine.loss import Loss
from adapterlab.errors import ConfigError, require
from adapterlab.foreign import pretrained
from adapterlab.foreign.model import is_encoder_decoder, text_config
from adapterlab.foreign.private_torch import TorchDispatchMode, graph_task_id, tree_iter
from adapterlab.foreign.private_transformers import no_init_weights
from adapterlab.hosts import Host
from adapterlab.models.loading import PRECISIONS
from adapterlab.ops import cross_entropy, rms_norm
from adapterlab.plan.packed import pack
from adapterlab.plan.parallel import SPLIT
from adapterlab.plan.setup import Setup
from adapterlab.plan.tracker import Moment, Tracker, contentless
from adapterlab.train import rng
from adapterlab.train.loop import Loop, nothing_to_train
from adapterlab.train.parallel.sharded import Sharded, replaced

NAME = "default"
BASE, ADAPTER, GRADIENTS, STATE, LOSS = "base weights", "adapter", "gradients", "optimizer state", "logits and loss"
INPUT, BACKWARD, UPDATE, CHECKS = "inputs and masks", "backward pass", "update", "checks and clipping"
ACTIVATIONS = "activations"
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # a plan is for steps that leave no layer out
_MANY = 1_000_000  # steps of a run whose number is not known; those that are simulated are few
_SHAPING = {"_to_copy", "slice", "view", "alias", "detach"}
_SCALING = _SHAPING | {"mul", "mul_", "div", "div_", "tanh", "tanh_"}


class Piece(NamedTuple):
    """A parameter, as far as dividing it among devices goes.

    Attributes:
        rows: entries of the first dimension, 0 where it has none; numel: of all.
        size: bytes; dtype: name of the type of its numbers.
        part: `BASE` or `ADAPTER`; trained: whether it trains.
        added: a method brought it along, so that it is whole in every process, as is all that belongs to it.
        moments: bytes of the optimizer's numbers in its shape.
        original: bytes of the base's value that is kept while it trains.
    """

    rows: int
    numel: int
    size: int
    dtype: str
    part: str
    trained: bool
    added: bool = False
    moments: int = 0
    original: int = 0


Group = tuple[Piece, ...]


@dataclass(frozen=True)
class Trace:
    """What one step did.

    Attributes:
        moments: fullest moment of each window, in the steady state: the optimizer has its state already.
        resting: live bytes by part between two steps.
        flops: floating-point operations of a step.
        layers: number of layers.
        trainable: number of trainable scalars.
        base: bytes of the base weights.
        loss: way the loss was computed.
        simulated: layers of the deepest model that was simulated.
        groups: parameters of each layer, and last of what is in no layer.
    """

    moments: dict[str, Moment]
    resting: dict[str, int]
    flops: float
    layers: int
    trainable: int
    base: int
    loss: str = ""
    simulated: int = 0
    groups: tuple[Group, ...] = ()

    @property
    def peak(self) -> Moment:
        """The fullest moment of all."""
        return max(self.moments.values(), key=lambda moment: moment.total)


def simulate(setup: Setup, *, real: bool = False, steps: int = 1) -> Trace:
    """Run training steps under the tracker.

    Args:
        setup: what to train.
        real: with numbers, on the CPU, to check the simulation.
        steps: how many; more than one only with `real`.
    """
    with tracked(setup, real=real) as tracker:
        return _Simulation(setup, tracker).run(steps)


@contextlib.contextmanager
def tracked(setup: Setup, *, real: bool = False) -> Iterator[Tracker]:
    """Count all that is computed inside, on tensors without contents; what libraries keep of them is forgotten after.

    Args:
        setup: for its device, and for whether weights are packed.
        real: with numbers.
    """
    if setup.quantize:
        require("bitsandbytes", "quantized", f"for quantize={setup.quantize!r}")
        importlib.import_module("bitsandbytes")  # a tracker counts the operators of what is loaded when it is made
    before = rng.state()
    gc.collect()  # models of earlier simulations must not be destroyed while the modes of this one are active
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_silence())
            fake = None
            if not real:
                fake = stack.enter_context(contentless())
                stack.enter_context(patch.object(nn.Module, "_apply", _converted))
                stack.enter_context(patch.object(Loss, "_agrees", _head_is_all))
                if setup.kind != "cpu":  # tensors without contents are on the CPU, whose own kernels others lack
                    stack.enter_context(patch.object(attention, "pays", lambda *_: False))
                    stack.enter_context(patch.object(cross_entropy, "block_rows", len))
                    stack.enter_context(patch.object(rms_norm, "block_rows", torch.Tensor.numel))
            yield stack.enter_context(Tracker(fake, setup.granularity, setup.kind))
    finally:
        rng.restore(before)
        _forget()
        gc.collect()


@dataclass
class _Simulation:
    setup: Setup
    tracker: Tracker
    hooks: list[Any] = field(default_factory=list)

    def run(self, steps: int) -> Trace:
        setup, tracker = self.setup, self.tracker
        if setup.method.steps_of_run(1) == 0:
            raise ConfigError(f"{nothing_to_train(setup.method.id)} There is no step to plan.")
        tracker.enter("setup", BASE)
        model = build(setup, tracker.fake is None)
        base = tracker.total
        tracker.enter("setup", ADAPTER)
        host = Host(model)
        layers = host.layers
        host.attach(setup.method if tracker.fake is None else setup.method.brief(), NAME)
        loop = self._loop(host)
        gc.collect()
        self._watch(host, layers)
        tracker.moments.clear()
        tracker.flops = 0
        for _ in range(steps):
            resting, adapter = tracker.total, tracker.live[ADAPTER]
            tracker.enter(INPUT)
            loop.step()
            tracker.rename(UPDATE, STATE)
            tracker.enter("rest", UPDATE)
        groups = _groups(host, layers, tracker, loop.optimizer.current)
        del loop.optimizer.current
        grown = tracker.total - resting
        if steps == 1:  # from the second step on, what the first has left is there from its start
            _settle(tracker, grown, adapter)
        return Trace(
            {key: moment for key, moment in tracker.moments.items() if key != "rest"},
            tracker.snapshot(),
            tracker.flops / steps,
            len(layers),
            host.summary(NAME).trainable,
            base,
            loop.loss.path,
            len(layers),
            groups,
        )

    def _loop(self, host: Host) -> Loop:
        setup = self.setup
        accelerator: Any = Alone(self.tracker)
        if setup.parallel is not None and setup.parallel.kind in SPLIT:
            Sharded(accelerator).check(host, NAME)
        vocabulary = text_config(setup).vocab_size
        ids = [i % vocabulary for i in range(1, setup.length + 1)]
        bare = round((1 - setup.labelled) * setup.length)
        read = {column: torch.tensor((allowed or (0,))[0]) for column, allowed in setup.method.columns.items()}
        rows: list[Any] = [{"input_ids": ids, "labels": [-100] * bare + ids[bare:], **read}]
        rows *= setup.batch * setup.accumulation
        seq2seq = is_encoder_decoder(setup)
        # The rows are those of one step; a method's schedule must find the room that it has in the run.
        # What rows have in common nobody knows here, so they share nothing.
        changes = {"steps": setup.training.steps or _MANY, "epochs": None, "shared_openings": False}
        training = setup.training.model_copy(update=changes)
        loop = Loop(
            host, NAME, rows, training, collate=Collator(0, seq2seq=seq2seq), accelerator=accelerator,
        )  # fmt: skip
        return loop

    def _watch(self, host: Host, layers: list[nn.Module]) -> None:
        """Tell the tracker where the step is."""
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(self._enters, index))
            layer.register_forward_hook(functools.partial(self._leaves, index, index == len(layers) - 1))
        for parameter in host.parameters(NAME):
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _enters(self, index: int, module: nn.Module, args: Any) -> None:
        if graph_task_id() < 0:  # not while the backward pass computes it again
            self.tracker.enter(f"forward, layer {index}", f"{ACTIVATIONS}, layer {index}")

    def _leaves(self, index: int, last: bool, module: nn.Module, args: Any, out: Any) -> None:
        if graph_task_id() >= 0:
            return
        self.tracker.enter(LOSS) if last else self.tracker.enter(INPUT)
        tensor = next((t for t in tree_iter(out) if isinstance(t, Tensor) and t.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(lambda _: self.tracker.enter(f"backward, layer {index}", BACKWARD))

    def _arrived(self, parameter: Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.is_sparse:
            self.tracker.assign(parameter.grad, GRADIENTS)


def _groups(host: Host, layers: list[nn.Module], tracker: Tracker, optimizer: Any) -> tuple[Group, ...]:
    """The parameters of each layer and of the rest, each where it comes first."""
    added = {id(p) for path, p in host.model.named_parameters() if host.is_adapter_path(path)}
    originals = {id(host.model.get_parameter(patch.path)): patch.original for patch in replaced(host, NAME)}
    seen: set[int] = set()
    found = []
    for module in [*layers, host.model]:
        new = {id(p): p for p in module.parameters() if id(p) not in seen}
        seen |= new.keys()
        found.append(
            tuple(
                _piece(p, tracker.part_of(p), key in added, optimizer.state.get(p, {}), originals.get(key))
                for key, p in new.items()
            )
        )
    return tuple(found)


def _piece(parameter: Tensor, part: str, added: bool, state: Mapping[str, Any], original: Tensor | None) -> Piece:
    moments = (v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape)
    return Piece(
        parameter.shape[0] if parameter.dim() else 0, parameter.numel(), _bytes(parameter),
        str(parameter.dtype).removeprefix("torch."), part, parameter.requires_grad, added, sum(map(_bytes, moments)),
        0 if original is None else _bytes(original),
    )  # fmt: skip


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def build(setup: Setup, real: bool = False) -> Any:
    """Make the model, with the weights stored as they will be."""
    config = copy.deepcopy(setup.config)
    dtype = PRECISIONS[setup.precision]
    for name in _LAYERDROP:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    try:
        with contextlib.nullcontext() if real else no_init_weights():
            model: Any = pretrained.build(config, dtype=dtype, trust_remote_code=setup.trust_remote_code)
        model.tie_weights()
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise ConfigError(
            f"No model can be made of this configuration of {getattr(config, 'model_type', '?')!r}: {error}. Check "
            "its config.json."
        ) from error
    if setup.quantize:
        pack(model, setup.quantize, dtype)
    return model.eval()


class Alone:
    """What the loop needs of accelerate, for one process; tells the tracker where the step is."""

    distributed_type, num_processes, process_index = DistributedType.NO, 1, 0
    is_main_process, scaler, device = True, None, torch.device("cpu")

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    def prepare_optimizer(self, optimizer: Any, **_: Any) -> Any:
        """Return the optimizer, with its steps announced."""

        def step() -> None:
            self.tracker.enter(UPDATE)
            optimizer.step()

        return SimpleNamespace(step=step, zero_grad=optimizer.zero_grad, step_was_skipped=False, current=optimizer)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is cast."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()
        self.tracker.enter(CHECKS)

    def clip_grad_norm_(self, parameters: Any, largest: float) -> Tensor:
        """Clip as accelerate does."""
        return torch.nn.utils.clip_grad_norm_(parameters, largest)


def _settle(tracker: Tracker, grown: int, adapter: int) -> None:
    """Put what stays after the first step into the windows before the update."""
    for window, moment in tracker.moments.items():
        if window not in (UPDATE, "rest"):
            moment.total += grown
            state = tracker.live[STATE]
            moment.parts[STATE] = moment.parts.get(STATE, 0) + state
            moment.parts[ADAPTER] = moment.parts.get(ADAPTER, 0) + grown - state


class _Stages(TorchDispatchMode):
    """Notes the names of operators by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, set[str]] = defaultdict(set)
        self.stage = "backbone"

    def enter(self, stage: str) -> None:
        """Begin a stage."""
        self.stage = stage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":  # questions, such as for the device
            self.names[self.stage].add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


_HEADS: dict[tuple[type, str], bool] = {}


def _head_is_all(loss: Loss, head: nn.Module) -> bool:
    """Say whether the logits are those of the head; models of one class and configuration are alike in that."""
    values = text_config(loss.model).to_dict()
    plain = {key: v for key, v in values.items() if isinstance(v, (int, float, str)) and key != "num_hidden_layers"}
    key = (type(loss.model), repr(plain))
    if key not in _HEADS:
        _HEADS[key] = _scales_and_caps(loss, head)
    return _HEADS[key]


@torch.no_grad()
def _scales_and_caps(loss: Loss, head: nn.Module) -> bool:
    """Say whether logits are the head's, perhaps scaled and capped; without numbers, operators must tell."""
    stages = _Stages()
    backbone = loss.model.base_model
    handles = [
        backbone.register_forward_hook(lambda *_: stages.enter("between")),
        head.register_forward_pre_hook(lambda *_: stages.enter("head")),
        head.register_forward_hook(lambda *_: stages.enter("after")),
    ]
    try:
        with stages:
            loss.model(input_ids=torch.arange(1, 7)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return stages.stage == "after" and stages.names["between"] <= _SHAPING and stages.names["after"] <= _SCALING


def _converted(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """Convert a module's tensors as torch does, which exchanges objects and cannot where they have no contents."""
    for child in module.children() if recurse else ():
        _converted(child, fn)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = fn(parameter.data)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _forget() -> None:
    """Empty the caches of the library's functions: they may hold tensors without contents now."""
    for name, module in list(sys.modules.items()):
        if name.startswith("adapterlab."):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide what libraries say about models without weights."""
    loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # an operator's refusal is logged as an error before it is raised
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # used to notice changes
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

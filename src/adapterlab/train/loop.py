"""The training loop. It knows no method and no file: methods act through their events, files through listeners."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from adapterlab.core.usage import LOAD, shares
from adapterlab.data import Collator, placed
from adapterlab.data.batching import count_tokens
from adapterlab.data.mixture import Named
from adapterlab.data.vocabulary import check_ids
from adapterlab.engine.float_products import fast_products
from adapterlab.engine.loss import Loss
from adapterlab.engine.modes import fast_passes
from adapterlab.engine.packing import choose
from adapterlab.engine.recompute import offloading
from adapterlab.engine.verify import check_gradient_passes
from adapterlab.errors import ConfigError, DataError, TrainingError
from adapterlab.evaluate.lengths import lengths_of, longest_of, stages_of, unchecked
from adapterlab.evaluate.loss import evaluate_loss
from adapterlab.foreign.process_memory import give_back
from adapterlab.hosts import Host
from adapterlab.io.finite import not_finite
from adapterlab.optim import adamw, factor, schedule
from adapterlab.train import rng
from adapterlab.train.config import Training
from adapterlab.train.course import Course, carried_out
from adapterlab.train.memory import Meter
from adapterlab.train.parallel import Alone, kind_of
from adapterlab.train.proof import Proof
from adapterlab.train.sampler import Sampler, order
from adapterlab.train.signals import Interrupted, Stopping, stop_on_signals

Row = Mapping[str, Sequence[int]]
Record = dict[str, Any]
_SMALL, _OFTEN = 4096, 100  # rows of a step that are never too many; how often a row may count in larger ones


@dataclass
class Status:
    """How far a run is; part of every checkpoint.

    Attributes:
        step: steps done.
        tokens: input tokens seen, padding not counted.
        seconds: time spent in training steps.
        train_loss: of the last step, in nats a token.
        eval_loss: of the last evaluation.
        evaluated: step of the last evaluation.
        best_loss: lowest evaluation loss.
        best_step: where it was.
        stale: evaluations in a row without a new lowest loss.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan
    eval_loss: float | None = None
    evaluated: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0


class Listener:
    """Is told what happens in a loop; override what you need. Called on every process."""

    def started(self, loop: Loop) -> None:
        """Called before the first step of this process."""

    def stepped(self, loop: Loop, record: Record) -> None:
        """Called after each step with its metrics."""

    def evaluated(self, loop: Loop, record: Record, improved: bool) -> None:
        """Called after each evaluation; `improved` says that the loss is the lowest so far."""

    def settled(self, loop: Loop) -> None:
        """Called when a step and what belongs to it are over: the moment to save a checkpoint."""

    def interrupted(self, loop: Loop) -> None:
        """Called when training stops early because it was asked to."""

    def trained(self, loop: Loop) -> None:
        """Called after the last step, before the method's `finish`."""

    def finished(self, loop: Loop) -> None:
        """Called at the very end, after the method's `finish`."""

    def closed(self, loop: Loop) -> None:
        """Called last, also after an error."""


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step: what one forward and backward pass is made of.

    Attributes:
        loop: whose it is.
        batch: what the model takes.
        labels: label-bearing tokens of the whole step, over all processes.
        first: of its step.
        counts: it is of rows of the step, and not there for the sake of other processes, which have one more.
        used: where to note how much the parts of mixtures are used; None: nobody looks.
    """

    loop: Loop
    batch: Mapping[str, Any]
    labels: int
    first: bool
    used: dict[str, Tensor] | None
    counts: bool = True

    def whole(self, loss: Tensor, emitted: Sequence[Tensor]) -> Tensor:
        """Return what the pass differentiates: its loss, what adapters emitted, and once a step the penalty.

        Args:
            loss: the batch's token losses, divided by `labels`.
            emitted: by adapters, each a mean over the batch.
        """
        loop = self.loop
        value = loss + sum(each.to(loss.device) for each in emitted) * (loop.loss.tokens(self.batch) / self.labels)
        value = value if self.counts else 0.0 * value
        penalty = loop.method.penalty(loop.host, loop.name) if self.first else None
        if penalty is None:
            return value
        return value + penalty.to(value.device) / loop.accelerator.num_processes


class Loop:
    """One run: construct it, load a state if there is one, `run` it.

    Whoever drives several runs takes them apart: `course` asks for steps, and `stepping` for micro-batches.

    With `prepare=False` the method does not look at data again before the first step.

    Attributes:
        status: how far it is.
        total: steps of the whole run.
        batching: whether rows are packed or padded, and why.
        loss: how the loss is computed.
        parallel: how the model is spread over processes and devices.
        proof: that everything trains.
        meter: of memory.
        load: shares of the parts of mixtures when they were last looked at, by the path of the module.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        rows: Sequence[Row],
        training: Training | None = None,
        *,
        eval_rows: Sequence[Row] = (),
        collate: Callable[[Sequence[Row]], Mapping[str, Tensor]] | None = None,
        listeners: Sequence[Listener] = (),
        accelerator: Accelerator | None = None,
        parallel: Alone | None = None,
        prepare: bool = True,
    ):
        if not rows:
            raise DataError("There are no rows to train on.")
        if name not in host.active:
            raise ConfigError(
                f"The adapter {name!r} is not active, so it would not train. host.activate({name!r}) first."
            )
        check_ids(host.model, [*unchecked(rows), *unchecked(eval_rows)])
        self.host, self.name, self.method = host, name, host.methods[name]
        if self.method.trains:
            check_gradient_passes(host)
        self.training = training = training or Training()
        self.eval_rows, self.listeners = eval_rows, listeners
        fixed = self.method.rows_of_run(len(rows))
        if fixed is not None:
            rows = [rows[i] for i in sorted(order([1] * len(rows), training.seed, 0)[:fixed])]
        self.rows = rows
        self.accelerator = accelerator or Accelerator(cpu=_device(host.model).type == "cpu")
        self.parallel = parallel or kind_of(self.accelerator, host.model)
        self.parallel.check(host, name)
        self.collate = collate or Collator(getattr(host.model.config, "pad_token_id", None) or 0)
        self.device = self.parallel.device(host.model)
        give_back()  # loading a model converts weights, and leaves the room of the old ones free in the heap
        self.meter = Meter(self.device)
        self.sampler = Sampler(
            lengths_of(rows, now=training.group_by_length),
            training.seed,
            training.batch_size,
            training.accumulation * self.accelerator.num_processes,
            None if training.steps or fixed is not None else training.row_limit(len(rows)),
            training.group_by_length,
            fixed is not None,
            stages_of(rows),
        )
        _check_step(self.sampler.per_step, len(rows))
        self.total = self._length()
        self.eval_every = training.eval_every or math.ceil(self.total / 10)
        self.status = Status()
        self.load: dict[str, list[float]] = {}
        self.method.begin(host, name, self.total)
        self._prepare(prepare)

    def _length(self) -> int:
        """Number of steps: what training says, unless the method decides."""
        total = self.training.total_steps(len(self.rows), self.sampler.per_step)
        asked = None if self.training.steps is None and self.training.epochs is None else total
        own = self.method.steps_of_run(asked)
        return total if own is None else own

    def _prepare(self, from_data: bool) -> None:
        training, host, model = self.training, self.host, self.host.model
        set_seed(training.seed)
        if training.recompute != "none":
            host.recompute(training.recompute)
        offloading(model, training.offload)  # refused here already
        model.train()
        if from_data:  # a checkpoint's adapter has the structure that data once decided
            with fast_products(model):
                self.method.prepare(host, self.name, Batches(self))
        longest = max(longest_of(self.rows), longest_of(self.eval_rows))
        self.collate, self.batching = choose(model, self.collate, longest, training.packing, training.shared_openings)
        self.loss = Loss(model, training.label_smoothing, training.z_loss)  # evaluation uses the plain loss
        self.parallel.spread(host, self.name)
        make = functools.partial(
            adamw, lr=training.lr, weight_decay=training.weight_decay, betas=training.betas, eps=training.eps
        )
        self._raw = self.method.optimizer(host, self.name, make) if self.total else _idle()
        if self.accelerator.scaler is not None and any(p.dtype is torch.float16 for p in self.parameters()):
            raise ConfigError("float16 parameters cannot be trained with loss scaling. Set precision to bf16 or fp32.")
        self.optimizer = self.parallel.optimizer(self._raw)
        plain = functools.partial(
            factor,
            total=max(1, self.total),
            kind=training.schedule,
            warmup=training.warmup_steps(self.total) if self.method.trains else 0,
            floor=training.min_lr / training.lr if training.lr else 0.0,
        )
        self.schedule = schedule(self._raw, lambda step: self.method.rate(step, self.total, plain))
        turns = max(method.turns() for method in (self.method, *host.part_methods(self.name).values()))
        self.proof = Proof(host, self.name, training.proof_steps * turns, self.parallel.gathered)
        # Whatever came before, dropout depends on seed and process alone.
        set_seed(training.seed + self.accelerator.process_index)

    # ------------------------------------------------------------------ running

    def run(self) -> Status:
        """Train to the end.

        Raises:
            TrainingError: loss, gradient or adapter are not finite.
            NotTrainingError: something that should train does not.
            Interrupted: a signal asked for the end; the step was finished first.
        """
        return carried_out(self.course(), operator.methodcaller("step"))

    def course(self, stopping: Stopping = stop_on_signals) -> Course[Loop, Record, Status]:
        """The whole run, which yields itself whenever a step is due, and is sent the metrics of that step.

        Args:
            stopping: context that says whether to stop after a step.
        """
        status = self.status
        try:
            self._tell("started")
            # Entered here once: each step finds it on, without a walk over the modules.
            model = self.host.model
            with stopping() as asked, fast_passes(model):
                if not self.total and self.eval_rows:
                    self.evaluate()
                while status.step < self.total and not self.out_of_patience:
                    record = yield self
                    self._tell("stepped", record)
                    if self.eval_rows and (status.step % self.eval_every == 0 or status.step == self.total):
                        self.evaluate()
                    self._tell("settled")
                    if self._sum(float(asked())) and status.step < self.total:
                        self._tell("interrupted")
                        raise Interrupted(status.step)
            self.proof.close(self._raw)
            self.check_weights()
            self._tell("trained")
            self.method.finish(self.host, self.name)
            self.host.model.eval()
            self._tell("finished")
        finally:
            self._tell("closed")
        return status

    @property
    def out_of_patience(self) -> bool:
        """Whether evaluation has stopped improving."""
        return self.training.patience is not None and self.status.stale >= self.training.patience

    def step(self) -> Record:
        """Do one optimizer step and return its metrics."""
        model = self.host.model
        with fast_passes(model):
            return carried_out(self.stepping(), self.compute)

    def stepping(self) -> Generator[Part, float, Record]:
        """One optimizer step, which yields its micro-batches and is sent the loss of each, once gradients are there.

        Returns:
            The metrics of the step.
        """
        # accelerate keeps one answer for the whole process; another trainer may have left it in mid-accumulation, where
        # an optimizer makes no step without a word.
        self.accelerator.sync_gradients = True
        began, index, status = time.perf_counter(), self.status.step, self.status
        batches = self._batches(index)
        labels = int(self._sum(sum(self.loss.tokens(batch) for batch, counts in batches if counts)))
        if not labels:
            raise DataError(f"Step {index + 1} has no token with a label. Check the labels of the rows.")
        self.method.before_step(self.host, self.name, index, self._raw)
        self.proof.begin(self._raw)
        used: dict[str, Tensor] | None = {} if self._is_shown(index + 1) else None
        value = 0.0
        for i, (batch, counts) in enumerate(batches):
            value += yield Part(self, batch, labels, i == 0, used if counts else None, counts)
        value = self._sum(value)
        self._check_finite("loss", value, index)
        self.parallel.share(self.parameters())
        self.method.after_backward(self.host, self.name, index)
        self.proof.gradients()
        norm = self.parallel.clip(self.parameters(), self.training.clip)
        if self.accelerator.scaler is None:  # with loss scaling an overflow is part of finding the scale
            self._check_finite("gradient norm", norm, index)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.proof.end(self._raw)
            self.schedule.step()
        self.method.after_step(self.host, self.name, index, self._raw)
        self.optimizer.zero_grad()
        status.step, status.train_loss = index + 1, value
        status.tokens += int(self._sum(sum(count_tokens(batch) for batch, counts in batches if counts)))
        status.seconds += time.perf_counter() - began
        return {
            "step": status.step, "epoch": round(self.sampler.epoch(status.step), 4), "loss": value, "lr": rate,
            "grad_norm": norm, "tokens": status.tokens, "seconds": round(status.seconds, 3),
            "memory": self.meter.sample(), **self._usage(used),
        }  # fmt: skip

    def _is_shown(self, step: int) -> bool:
        """Whether somebody is told of a step what parts of mixtures are used in it."""
        return bool(self.listeners) and (step % self.training.log_every == 0 or step == self.total)

    def _usage(self, used: dict[str, Tensor] | None) -> Record:
        """The shares of the parts over all processes, for the line of a step."""
        if used is None:
            return {}
        found = {path: sums.tolist() for path, sums in used.items()}
        self.load = shares(gather_object([found]) if self.accelerator.num_processes > 1 else [found])
        return {LOAD: self.load} if self.load else {}

    def evaluate(self) -> float:
        """Compute the exact mean token loss of the evaluation rows, note it and return it."""
        status = self.status
        parts = self.eval_rows.named if isinstance(self.eval_rows, Named) else {"": self.eval_rows}
        found = {name: self._evaluated(rows) for name, rows in parts.items()}
        total, tokens = (sum(column) for column in zip(*found.values(), strict=True))
        loss, tokens = total / tokens, int(tokens)
        each = {name: part / count for name, (part, count) in found.items() if name}
        self._check_finite("evaluation loss", loss, status.step - 1)
        improved = status.best_loss is None or loss < status.best_loss
        status.eval_loss, status.evaluated = loss, status.step
        status.stale = 0 if improved else status.stale + 1
        if improved:
            status.best_loss, status.best_step = loss, status.step
        record = {"step": status.step, "eval_loss": loss, "eval_tokens": tokens}
        self._tell("evaluated", record | ({"eval_losses": each} if each else {}), improved)
        return loss

    def _evaluated(self, rows: Sequence[Row]) -> tuple[float, float]:
        """The summed loss of rows over all processes, and the number of tokens that bear a label."""
        world = self.accelerator.num_processes
        alone = len(rows) < world  # fewer rows than processes: each evaluates all
        mine = rows if alone else rows[self.accelerator.process_index :: world]
        size = self.training.eval_batch_size or self.training.batch_size
        loss, tokens = evaluate_loss(
            self.host.model, mine, self.collate, size, packing=False,  # chosen already
            loss=self.loss.plain(), spread=self.parallel,
        )  # fmt: skip
        return self._sum(loss * tokens), self._sum(tokens)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact continuation needs. Call it on every process.

        What is split among processes is in it as each one's part; see `Alone.taken_apart`.

        Raises:
            TrainingError: the adapter is not finite, so that nothing could continue from it.
        """
        self.check_weights()
        scaler = self.accelerator.scaler
        self.host.check_intact(self.name)
        tensors = self.host.tensors(self.name)
        return {
            "status": dict(vars(self.status)),
            "adapter": {key: tensor.detach().clone() for key, tensor in tensors.items()},
            "trainable": {key: t.requires_grad for key, t in tensors.items() if isinstance(t, nn.Parameter)},
            "optimizer": self._raw.state_dict(),
            "optimized": self._optimized(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "rng": gather_object([rng.state()]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.host.load_state_dict(self.name, state["adapter"])
        for key, tensor in self.host.tensors(self.name).items():
            if key in state["trainable"]:
                tensor.requires_grad_(state["trainable"][key])
        if state.get("optimized", now := self._optimized()) != now:
            raise TrainingError(
                "The optimizer of this checkpoint holds the adapter's tensors in another order or number than they "
                "have now, so its moments would go to the wrong ones. Train from the start, or go on with the "
                "version of adapterlab that wrote it."
            )
        self._raw.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.accelerator.num_processes:  # else no numbers are those of the run before
            rng.restore(state["rng"][self.accelerator.process_index])
        vars(self.status).update(state["status"])

    def tensor_at(self, way: Sequence[Any]) -> Tensor:
        """Return the tensor that keys of a state lead to, or the parameter that it is about."""
        if way[0] == "adapter":
            return self.host.tensors(self.name)[way[1]]
        return self.parameters()[way[2]]  # "optimizer", "state", number of the parameter

    def _optimized(self) -> list[str]:
        """What the optimizer trains, by the keys of `Host.tensors`; those without one are only counted."""
        keys = {id(tensor): key for key, tensor in self.host.tensors(self.name).items()}
        return [keys.get(id(parameter), "") for parameter in self.parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer trains."""
        return [p for group in self._raw.param_groups for p in group["params"]]

    # ------------------------------------------------------------------ parts of a step

    def _batches(self, step: int) -> list[tuple[Mapping[str, Tensor], bool]]:
        """This process's batches of a step, and which of them count."""
        every = self.sampler.step(step)
        mine = every[self.accelerator.process_index :: self.accelerator.num_processes]
        batches = [batch for part in mine if self.loss.tokens(batch := self.batch(part))]
        return self.parallel.evened(batches, lambda: batches[0] if batches else self._spare(every))

    def _spare(self, every: Sequence[Sequence[int]]) -> Mapping[str, Tensor]:
        """A row of the step that bears a label, for a process that has none."""
        found = (batch for part in every for i in part if self.loss.tokens(batch := self.batch([i])))
        return next(found)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Collate training rows and put them where the model is."""
        return placed(self.collate([self.rows[i] for i in indices]), self.device)

    def compute(self, part: Part) -> float:
        """Compute the loss of a micro-batch, add its gradients to those of the step, and return it."""
        state = self.host.state

        def loss() -> Tensor:
            offload = offloading(self.host.model, self.training.offload)
            with self.accelerator.autocast(), state.collect() as emitted, offload:
                return part.whole(self.loss(part.batch, part.labels), emitted)

        called = functools.partial(self.parallel.called, loss)
        with contextlib.nullcontext() if part.used is None else state.observing(part.used):
            return float(self.method.gradient(self.host, self.name, called, self.parallel.backward))

    def _sum(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(total, "sum"))

    def _check_finite(self, what: str, value: float, index: int) -> None:
        if not math.isfinite(value):
            rate = max(group["lr"] for group in self._raw.param_groups)
            raise TrainingError(
                f"The {what} is {value} at step {index + 1} (learning rate {rate:g}). Likely causes: the learning rate "
                "is too high (lower training.lr or lengthen training.warmup), fp16 overflowed (use bf16 or fp32), or "
                "the base weights hold numbers that are not finite. What was saved before is kept."
            )

    def check_weights(self) -> None:
        """Check what is about to be saved.

        Raises:
            TrainingError: the adapter holds values that are not finite.
        """
        found = self.parallel.gathered(not_finite(self.host.tensors(self.name)))
        if (key := next(filter(None, found), None)) is not None:
            raise TrainingError(
                f"After step {self.status.step} (training.lr={self.training.lr:g}) {key} holds values that are not "
                "finite, and is not saved. Lower training.lr or lengthen training.warmup. What was saved before is "
                "kept."
            )

    def _tell(self, event: str, *details: Any) -> None:
        for listener in self.listeners:
            getattr(listener, event)(self, *details)


class Batches:
    """The training batches of the first epoch, as often as wanted: what `Method.prepare` receives."""

    def __init__(self, loop: Loop):
        self.loop = loop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        sampler = self.loop.sampler
        for step in range(math.ceil(len(self.loop.rows) / sampler.per_step)):
            for part in sampler.step(step):
                yield self.loop.batch(part)


def train(host: Host, name: str, rows: Sequence[Row], training: Training | None = None, **options: Any) -> Status:
    """Train an adapter in memory: no files are written unless a listener does.

    Args:
        host: of the model.
        name: of an active adapter.
        rows: each with `input_ids` and `labels` (-100 bears no label).
        training: how to train.
        options: `eval_rows`, `collate`, `listeners`, `accelerator`, `prepare`, as for `Loop`.

    Returns:
        How it went.

    Raises:
        ConfigError: the method has nothing to train.
        TrainingError: training cannot go on, or something does not train.
        DataError: there is nothing to train on.
    """
    loop = Loop(host, name, rows, training, **options)
    if not loop.total:
        raise ConfigError(nothing_to_train(loop.method.id))
    return loop.run()


def nothing_to_train(id: str) -> str:
    """Say that a method is ready as it is, and what can be done with it."""
    return (
        f"{id} has nothing to train: attached it is ready. Evaluate it (adapterlab evaluate, compare), save it with "
        "host.save, or train adapters that it is made of."
    )


def _idle() -> torch.optim.Optimizer:
    """An optimizer of nothing."""
    return torch.optim.SGD([torch.zeros(0, requires_grad=True)], lr=0.0)


def _check_step(per_step: int, rows: int) -> None:
    """Refuse a step in which every row counts a hundred times: a slip of the keys that would fill the memory."""
    if per_step > max(_SMALL, _OFTEN * rows):
        raise ConfigError(
            f"A step is batch_size x accumulation x processes = {per_step:,} rows, and there are {rows:,}: each would "
            "count many times in one step. Lower training.batch_size or training.accumulation."
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

"""What a PEFT method is: hyperparameters as fields, behaviour as methods of one frozen class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.errors import ConfigError
from adapterlab.settings import Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from adapterlab.core.carrier import Carrier
    from adapterlab.core.codec import HFCodec
    from adapterlab.core.hub import HubCodec

Batches = Iterable[Mapping[str, Tensor]]
MakeOptimizer = Callable[[list[dict[str, Any]] | list[nn.Parameter]], "Optimizer"]


class Method(Settings):
    """Base class of all methods. Subclasses are registered by the name of their file and are keyword-only.

    Class attributes:
        id: name of the file.
        family: one of the kinds listed in the architecture page.
        paper: title; year: of first publication; arxiv: id, or "" when there is none.
        formula: the number of trainable parameters, in the letters of the page.
        status: `stable` or `experimental`.
        hf: how HF PEFT stores it, or None.
        hub: how AdapterHub's library stores it, or None.
        starts_at_base: the model computes what the base does until a step is made.
        trains: it has tensors that train by gradients.
        typical_lr: a learning rate to begin a search with.
        scaffold: parts of the names of tensors that a run needs and nobody after it: they are in checkpoints and not
            in saved adapters.
        derived: numbers that attaching may make for each number of the base, beside those that are saved; sizes in a
            file that ask for more are refused.
    """

    id: ClassVar[str]
    family: ClassVar[str] = "other"
    paper: ClassVar[str] = ""
    year: ClassVar[int] = 0
    arxiv: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    status: ClassVar[Literal["stable", "experimental"]] = "stable"
    hf: ClassVar[HFCodec | None] = None
    hub: ClassVar[HubCodec | None] = None
    starts_at_base: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    typical_lr: ClassVar[float] = 5e-4
    scaffold: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[float] = 0.5

    modules_to_save: tuple[str, ...] = Field(
        (), description="modules trained in full beside the adapter, such as a new classifier head"
    )

    def attach(self, host: Carrier, name: str) -> None:
        """Put the method on the model with the four verbs of `host`.

        Where the model or files decide settings, such as words of a vocabulary as ids, `host.settle` says what the
        method has become: whoever loads the adapter need not look them up again.
        """
        raise NotImplementedError

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the method on the model as it was when it was saved; the values are copied in afterwards.

        Methods whose structure is decided after `attach` (from data, or during training) read it from the names and
        shapes of `tensors`, which has the keys of `Carrier.tensors` (PEFT's where PEFT stores the method as a whole).
        """
        self.attach(host, name)

    def prepare(self, host: Carrier, name: str, batches: Batches) -> None:
        """Use data before training starts (Fisher masks, data-driven initialisation)."""
        for key, part in host.part_methods(name).items():
            part.prepare(host, key, batches)

    def learn_from(
        self, host: Carrier, name: str, tasks: Mapping[str, Batches], *, steps: int, lr: float | None = None
    ) -> list[float]:
        """Learn what trained adapters of other tasks share: the first phase of methods that have one.

        Args:
            host: of the model, which carries those adapters too.
            name: of the adapter that learns.
            tasks: names of the trained adapters, and batches of each one's task.
            steps: how many to make.
            lr: learning rate; default: the method's own for this phase.

        Returns:
            The loss of each step.

        Raises:
            ConfigError: the method has no such phase, or the adapters do not suit it.
        """
        raise ConfigError(
            f"{self.id} learns nothing from adapters of other tasks: it has one phase. Train it on rows as it is."
        )

    @property
    def columns(self) -> Mapping[str, tuple[int, ...]]:
        """Columns of the training rows that the method reads beside the text, and the numbers that may stand there.

        Each comes to the model as an argument of that name `[rows]`, which an adapter around the whole model takes.
        """
        return {}

    def with_entries(self, host: Carrier, entries: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, Tensor] | None:
        """Return the tensors of an adapter of this method that holds these entries of the base, as saving gives them.

        What is made of several adapters can then be one of theirs. Methods that own entries by their index need not say
        it: their form is known.

        Args:
            host: of the model.
            entries: by the parameter's name: flat ascending positions `[k]`, and float32 values `[k]`.

        Returns:
            The tensors; None: the method holds no such entries.
        """
        return None

    def brief(self) -> Self:
        """Return the same method with the shortest `prepare`: plans simulate it on tensors that hold no numbers."""
        return self

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What the optimizer does otherwise for some tensors, by the last part of their names.

        Such as `{"alpha": {"weight_decay": 0.0}}` for factors that start at one: decay would pull them to zero.
        """
        return {}

    def unsplit(self, host: Carrier, name: str) -> str:
        """Say why the base cannot be split among processes that train this adapter, or "".

        What a method adds is whole on every process, and so is every module while it computes. What looks at weights
        of the base, or changes them, between steps sees a part of their rows.
        """
        return ""

    def turns(self) -> int:
        """In how many steps each trained number has its turn; more than one where a step trains a part of a tensor."""
        return 1

    def steps_of_run(self, asked: int | None) -> int | None:
        """How many steps a run has where the method decides that: none if nothing trains.

        Args:
            asked: as many as the settings of training say; None if they leave it open.

        Returns:
            As many; None: as training says.
        """
        return None if type(self).trains else 0

    def rows_of_run(self, count: int) -> int | None:
        """Return of how many training rows each step consists, always the same; None: of batches of all in turn.

        For methods that compare the losses of steps with each other.

        Args:
            count: of the training rows.
        """
        return None

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Called before the first step of a run, also of one that continues: the run has so many steps in all.

        Raises:
            ConfigError: the method's schedule does not fit into them.
        """
        for key, part in host.part_methods(name).items():
            part.begin(host, key, steps)

    def optimizer(self, host: Carrier, name: str, make: MakeOptimizer) -> Optimizer:
        """Build the optimizer; `make` takes parameters or parameter groups."""
        groups: dict[Any, dict[str, Any]] = {}
        for key, method in {name: self, **host.part_methods(name)}.items():
            options = method.tensor_options()
            for tensor, p in host.named_parameters(key).items() if options else ():
                if own := options.get(tensor.rpartition(".")[2]):
                    groups.setdefault(tuple(sorted(own.items())), {"params": [], **own})["params"].append(p)
        apart = {id(p) for group in groups.values() for p in group["params"]}
        rest = [p for p in host.parameters(name) if id(p) not in apart]
        return make([*([{"params": rest}] if rest else []), *groups.values()] if groups else rest)

    def rate(self, step: int, steps: int, plain: Callable[[float], float]) -> float:
        """Factor of the learning rate in a step (counted from 0) of a run; methods that restart it override this.

        Args:
            step: which.
            steps: of the run.
            plain: the trainer's own factor at a step of its schedule, which covers the whole run.
        """
        return plain(step)

    def gradient(
        self, host: Carrier, name: str, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Compute the loss and its gradients; methods without back-propagation override this."""
        value = loss()
        backward(value)
        return value.detach()

    def penalty(self, host: Carrier, name: str) -> Tensor | None:
        """An extra loss on the parameters, added once a step."""
        losses = [part.penalty(host, key) for key, part in host.part_methods(name).items()]
        present = [loss for loss in losses if loss is not None]
        return torch.stack(present).sum() if present else None

    def before_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Called before the forward pass of a step."""
        for key, part in host.part_methods(name).items():
            part.before_step(host, key, step, optimizer)

    def after_backward(self, host: Carrier, name: str, step: int) -> None:
        """Called when the gradients of a step are complete."""
        for key, part in host.part_methods(name).items():
            part.after_backward(host, key, step)

    def after_step(self, host: Carrier, name: str, step: int, optimizer: Optimizer) -> None:
        """Called after the optimizer's step."""
        for key, part in host.part_methods(name).items():
            part.after_step(host, key, step, optimizer)

    def finish(self, host: Carrier, name: str) -> None:
        """Called once after training."""
        for key, part in host.part_methods(name).items():
            part.finish(host, key)

    def outcome(self, host: Carrier, name: str) -> dict[str, str]:
        """What training decided, to be shown with the result: a word and what it is."""
        parts = [part.outcome(host, key) for key, part in host.part_methods(name).items()]
        return {what: text for found in parts for what, text in found.items()}

    @classmethod
    def example(cls, model: nn.Module) -> dict[str, Any]:
        """Return settings that suit a model of a few thousand parameters; the conformance suite attaches them.

        Override it when the defaults are made for large models, or when a setting has no default.
        """
        return {}

    @classmethod
    def example_batch(cls, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch of the conformance suite with what else the method takes, so that all of it trains."""
        return batch

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Say whether the method has its own version of a hook."""
        own, plain = getattr(cls, hook), getattr(Method, hook)
        return getattr(own, "__func__", own) is not getattr(plain, "__func__", plain)

    @classmethod
    def capabilities(cls) -> dict[str, bool]:
        """What the method does, computed from what it overrides."""
        events = ("begin", "before_step", "after_backward", "after_step", "finish")
        return {
            "learns_from_adapters": cls.overrides("learn_from"),
            "needs_data": cls.overrides("prepare"),
            "changes_optimizer": cls.overrides("optimizer") or cls.overrides("tensor_options"),
            "changes_rate": cls.overrides("rate"),
            "own_gradient": cls.overrides("gradient"),
            "extra_loss": cls.overrides("penalty"),
            "has_events": any(cls.overrides(event) for event in events),
            "peft_format": cls.hf is not None,
        }


class LayerMethod(Method):
    """The common case: one adapter for each matching module. Subclasses define `Layer(method, site)`.

    Class attributes:
        kinds: of modules that it can adapt.
        usual: roles that are the targets by default, of which a model need not have all.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    usual: ClassVar[tuple[str, ...]] = ()
    Layer: ClassVar[Callable[[Any, Site], Adapter]]

    targets: Targets = Field(
        default_factory=lambda: Targets(include=("all-linear",)),
        description="which modules to adapt: roles, module names, patterns or all-linear",
    )

    def attach(self, host: Carrier, name: str) -> None:
        for site in host.sites(self.present(host), self.kinds):
            host.wrap(name, site, self.build(site, host, name))

    def present(self, host: Carrier) -> Targets:
        """Return the targets; of the usual ones, those that exist."""
        if not self.usual or self.targets.include != self.usual:
            return self.targets
        roles = {site.role for site in host.all_sites() if site.kind in self.kinds}
        return self.targets.replace(include=tuple(role for role in self.usual if role in roles) or self.usual)

    def build(self, site: Site, host: Carrier, name: str) -> Adapter:
        """Make the adapter for one site."""
        return type(self).Layer(self, site)


class Composite(Method):
    """Several methods at once: subclasses define `parts`; their tensors, hooks and switches are one adapter's."""

    def parts(self, host: Carrier) -> Mapping[str, Method]:
        """Return the methods by the name of the part, in the order of attachment."""
        raise NotImplementedError

    def attach(self, host: Carrier, name: str) -> None:
        for part, method in self.parts(host).items():
            host.compose(name, part, method)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach each part as it was when it was saved."""
        for part, method in self.parts(host).items():
            host.compose(name, part, method, saved=tensors)

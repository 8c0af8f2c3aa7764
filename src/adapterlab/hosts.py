"""The handle on a model that carries adapters: what users call, on top of what is attached.

The file is called hosts and not host because `adapterlab.host` is the function that finds one again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from adapterlab.core.method import Method
from adapterlab.engine.attachments import Attachments, attachments
from adapterlab.engine.float_products import fast_products
from adapterlab.engine.merge import merge
from adapterlab.engine.recompute import Mode, recompute
from adapterlab.engine.stacked import Stack, stacked
from adapterlab.engine.standpoint import bare
from adapterlab.engine.summary import Summary, summarise
from adapterlab.engine.verify import verify
from adapterlab.errors import FormatError
from adapterlab.foreign.saving import watch_saves
from adapterlab.io import folder as adapter_folder
from adapterlab.io import pretrained
from adapterlab.io.folder import Saved
from adapterlab.io.injected import ignore_injected, watch_injected
from adapterlab.paths import user_path


def attach(model: nn.Module, method: Method, name: str = "default") -> Host:
    """Put a method on a model, in place, and return the model's host.

    The base is frozen; the adapter becomes active, beside any that are active already. Only one copy of a module can be
    computed, so an adapter whose `modules_to_save` meet those of the new one is switched off.

    Args:
        model: any PyTorch model; role names and saving are made for those of `transformers`.
        method: for example `al.LoRA(r=16)`.
        name: of the adapter.

    Raises:
        TargetError: a target matches nothing.
        AttachError: the name is taken, or the method cannot work on this model. The model is left as it was.
    """
    found = host(model) or Host(model)
    found.attach(method, name)
    return found


def host(model: nn.Module) -> Host | None:
    """Return the host of a model that carries adapters, also after `copy.deepcopy`, else None."""
    return cast("Host | None", attachments(model))


def load(model: nn.Module, folder: str | Path | Saved, name: str | None = None, *, active: bool | None = None) -> Host:
    """Put a saved adapter on a model: one of ours, or one that HF PEFT wrote.

    Of a folder that `save_pretrained` of a model with several adapters wrote, all of them, or the one that is named.

    Args:
        model: the base model.
        folder: of the adapter, or what `io.folder.read` read of it.
        name: to give it; default: the name it was saved under.
        active: whether it becomes live beside the active ones; default: only if the model carries no other adapter.

    Returns:
        The model's host.

    Raises:
        FormatError: the folder is damaged, uses options that cannot be reproduced, or was made for another base
            model. The model is left as it was.
    """
    found = host(model) or Host(model)
    if isinstance(folder, Saved):
        adapter_folder.load(found, folder, name, active=active)
        return found
    together = pretrained.several(folder)
    if not together or name in together:
        adapter_folder.load(found, Path(folder) / name if name in together else folder, name, active=active)
        return found
    if name is not None:
        raise FormatError(f"{folder} holds the adapters {', '.join(together)}, and none is called {name!r}.")
    before = found.active
    loaded: list[str] = []
    try:
        for each in together:
            adapter_folder.load(found, Path(folder) / each, active=False)
            loaded.append(each)
        live = [each for each in loaded if (together[each] and not before if active is None else active)]
        found.activate(*before, *live)
    except BaseException:
        for each in loaded:
            found.detach(each)
        raise
    return found


class Host(Attachments):
    """A model and the adapters on it. Made by `attach` and `load`; `host(model)` finds it again."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        watch_saves(self.model, pretrained.save_pretrained)

    def attach(self, method: Method, name: str = "default", **options: Any) -> None:
        """Put a method on the model; see `Attachments.attach`."""
        super().attach(method, name, **options)
        watch_injected(self.model)

    def detach(self, name: str) -> None:
        """Remove an adapter; base values, classes and keys are as before, to the bit."""
        super().detach(name)
        if not self.methods:
            ignore_injected(self.model)

    def summary(self, name: str | None = None) -> Summary:
        """Count what an adapter trains; without a name, the one that is attached alone."""
        return summarise(self, self.only(name))

    def learn_from(
        self,
        tasks: Mapping[str, Iterable[Mapping[str, Tensor]]],
        name: str | None = None,
        *,
        steps: int,
        lr: float | None = None,
    ) -> list[float]:
        """Let an adapter learn what adapters of other tasks share: the first phase of methods that have two.

        Args:
            tasks: names of trained adapters on this model, and batches of each one's task.
            name: of the adapter that learns; default: the only one that is not among them.
            steps: how many to make.
            lr: learning rate; default: the method's own for this phase.

        Returns:
            The loss of each step.

        Raises:
            AttachError: there is no adapter of such a name.
            ConfigError: the method has no such phase, or the adapters do not suit it.
        """
        rest = [one for one in self.methods if one not in tasks]
        name = self.only(rest[0] if name is None and len(rest) == 1 else name)
        for one in tasks:
            self.check(one)
        with fast_products(self.model):
            return self.methods[name].learn_from(self, name, tasks, steps=steps, lr=lr)

    def stack(self, *names: str) -> contextlib.AbstractContextManager[Stack]:
        """Serve many low-rank adapters from stacked slots inside the context; see `engine.stacked`.

        `stack.rows(["a", None, "b"])` says who is in the next batch. It computes no loop over adapters, and under
        `torch.compile` every mix runs the same graph. The factors are copied: it is for inference.

        Raises:
            AttachError: an adapter is not made of plain low-rank updates of linear layers.
        """
        for name in names:
            self.check(name)
        return stacked(self, names)

    # ------------------------------------------------------------------ merging

    def merge(
        self,
        name: str | None = None,
        *,
        tied: Literal["error", "untie"] = "error",
        quantized: Literal["error", "dequantize"] = "error",
    ) -> None:
        """Write an adapter into the base's weights; it costs nothing at inference then.

        The merged weight is computed in float32 and rounded once.

        Args:
            name: of the adapter; needed when there are several.
            tied: what to do where a weight is shared with another module: refuse, or give the module its own.
            quantized: what to do with packed weights: refuse, or replace them by plain ones.

        Raises:
            MergeError: the adapter is not linear, a non-additive one stands inside it, or a weight is tied or packed
                and it was not said how to merge. Nothing is changed then.
        """
        name = self.only(name)
        self.check_uncomposed("merge")
        if name not in self.state.active:
            self.activate(*self.active, name)
        self.merged[name] = merge(self, name, tied, quantized)

    # ------------------------------------------------------------------ checks, recomputation, saving

    def recompute(self, mode: Mode = "full", *, compiled: bool = False) -> None:
        """Choose what the model computes again in the backward pass instead of keeping it.

        Gradients are the same in every mode. State that changes between two forward passes is recorded with each and
        shown again during its recomputation.

        Args:
            mode: `none` keeps everything; `cheap` keeps the results of products and attention and computes the rest
                (norms, activations, casts) again; `full` keeps the input of each block alone.
            compiled: use the form that works under `torch.compile`; it keeps no record of the state.

        Raises:
            ConfigError: the mode is unknown, or the model has no blocks that can be computed again.
        """
        recompute(self, mode, compiled=compiled)

    def verify(self, batch: Mapping[str, Tensor]) -> None:
        """Run one forward and backward pass and check that nothing attached is bypassed; see `engine.verify`.

        Args:
            batch: arguments of the model, with labels.

        Raises:
            NotTrainingError: nothing is trainable, an adapted module was never called, or a trainable tensor got no
                gradient.
        """
        verify(self, batch)

    def save(self, folder: str | Path, name: str | None = None, **options: Any) -> Path:
        """Write the adapter to a folder; see `adapterlab.io.save`."""
        return adapter_folder.save(self, folder, self.only(name), **options)

    def save_base(self, folder: str | Path) -> None:
        """Write the base model without any adapter's tensors, as `save_pretrained` does for a plain model.

        `model.save_pretrained` itself writes adapter folders while adapters are attached, see `io.pretrained`.
        """
        with self.using(), bare(self):
            self.model.save_pretrained(user_path(folder))

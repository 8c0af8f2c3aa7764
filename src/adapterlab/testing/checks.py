"""What every method must do: start, train, save, load, undo, refuse bad settings."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic.fields import FieldInfo
from torch import Tensor, nn

from adapterlab.core.method import Method
from adapterlab.data import Collator
from adapterlab.errors import AdapterlabError, AttachError, ConfigError
from adapterlab.hosts import Host, host, load
from adapterlab.testing import models
from adapterlab.testing.case import (
    Case,
    NotApplicable,
    base_tensors,
    changed,
    close,
    gradients,
    logits,
    perturb,
    require,
    same,
)  # fmt: skip
from adapterlab.testing.formula import evaluate
from adapterlab.testing.suite import check
from adapterlab.train import Training
from adapterlab.train.loop import Loop

_OTHERS = tuple(family for family in models.FAMILIES if family != "llama")
_UNFIT = (AttachError, ConfigError)  # how a method says that it cannot work on a kind of model


@check("starts_at_base")
def check_start(case: Case) -> None:
    """Before the first step the model answers as the base does."""
    model = case.model()
    batch = models.batch(model)
    before = logits(model, batch)
    close(logits(case.attach(model=model, fresh=True).model, batch), before, "start and base", case.tolerance)


@check()
def check_changes(case: Case) -> None:
    """With other values in its tensors the method changes what the model answers."""
    model = case.model()
    batch = models.batch(model)
    before = logits(model, batch)
    after = logits(case.attach(model=model).model, batch)
    require(float((after - before).abs().max()) > 1e-3, "the adapter has no effect: the model answers as the base does")


@check()
def check_count(case: Case) -> None:
    """The number of trainable parameters is what the method's formula says."""
    found = case.attach(fresh=True)
    method = found.methods["one"]
    trained = sum(p.numel() for p in found.parameters("one"))
    require(found.summary("one").trainable == trained, "summary() and parameters() count differently")
    require((trained > 0) == case.method.trains, f"{trained} parameters train, but trains = {case.method.trains}")
    fields = {k: v for k, v in method.model_dump().items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    sites = [a.site for key in found.parts("one") for a in found.adapters(key).values()]
    if not sites or any(site.kind not in ("linear", "embedding") for site in sites):
        raise NotApplicable("the formula counts something else than weights of linear modules")
    shapes = [dict(zip(("out", "in"), site.shape, strict=True)) for site in sites]
    wanted = sum(evaluate(case.method.formula, {**fields, **shape}) for shape in shapes)
    require(trained == wanted, f"{trained} parameters train, the formula {case.method.formula!r} gives {wanted}")


@check("trains")
def check_gradients(case: Case) -> None:
    """Every trainable tensor receives a finite gradient, also where a model changes in place what a module returns."""
    found = case.attach()
    batch = case.batch(found.model)
    wanted = _check_gradients(found, batch)
    for path in {path for key in found.parts("one") for path in found.adapters(key)}:
        module = found.model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, out: out.mul_(1))
    same(_check_gradients(found, batch), wanted, "gradients with and without changes in place")


@check("trains")
def check_only_declared(case: Case) -> None:
    """Three steps of AdamW with weight decay change the adapter, and no bit of the base that it does not own."""
    found = case.attach()
    before = base_tensors(found)
    loop = _loop(case, found, steps=3, weight_decay=0.1)
    began, owned = found.state_dict("one"), _owned(found)
    loop.run()
    after = base_tensors(found)
    for held in (owned, _owned(found)):  # a method may choose anew in between
        for path, parameter in found.model.named_parameters(remove_duplicate=False):
            if id(parameter) in held and path in before:
                for tensors in (before, after):
                    tensors[path] = _without(tensors[path], held[id(parameter)])
    same(after, before, "base tensors after training")
    moved = found.state_dict("one")
    require(changed(moved, began), "no tensor of the adapter changed")


@check("trains")
def check_loss_falls(case: Case) -> None:
    """The loss on four fixed rows falls within fifteen steps."""
    found = case.attach(fresh=True)
    loop = _loop(case, found, steps=15)
    losses = [loop.step()["loss"] for _ in range(15)]
    require(losses[-1] < 0.99 * losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")


@check()
def check_save_load(case: Case) -> None:
    """An adapter that was saved answers on a fresh model as it did before."""
    _check_saved(case, case.attach())


def _check_saved(case: Case, found: Host) -> None:
    batch = case.batch(found.model)
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder) / "adapter")
        torch.manual_seed(99)  # what is not saved must not be drawn again as it was
        again = load(case.model(), Path(folder) / "adapter")
    lasting = {
        key: value
        for key, value in found.state_dict("one").items()
        if not set(case.method.scaffold).intersection(key.split("."))
    }
    same(again.state_dict("one"), lasting, "saved and loaded tensors")
    close(logits(again.model, batch), logits(found.model, batch), "loaded and saved adapter", 1e-6)
    require(again.methods["one"] == found.methods["one"], "the loaded method has other settings")


@check()
def check_detach(case: Case) -> None:
    """Detaching leaves the base as it was: bits, keys, classes, requires_grad and no trace of the library."""
    base = _Base(case.model())
    found = case.attach(model=base.model)
    if case.method.trains:
        gradients(found, "one", [case.batch(base.model)])
    logits(base.model, base.batch)
    found.detach("one")
    base.check("detach")


class _Base:
    """A model before anything came to it: what a detach must bring back, and a refused attach must leave.

    Attributes:
        batch: of arguments.
        answer: to the batch.
    """

    def __init__(self, model: Any):
        self.model, self.batch = model, models.batch(model)
        self._print, self.answer = _fingerprint(model), logits(model, self.batch)
        self._tensors = {key: value.clone() for key, value in model.state_dict().items()}

    def check(self, what: str) -> None:
        """Require the model to be as it was, to the bit, after something."""
        same(self.model.state_dict(), self._tensors, f"base tensors after {what}")
        require(host(self.model) is None, f"after {what} the model still has a host")
        left = sorted({str(change) for change in _fingerprint(self.model).items() ^ self._print.items()})
        require(not left, f"{what} left changes behind: {'; '.join(left[:4])}")
        same({"logits": logits(self.model, self.batch)}, {"logits": self.answer}, f"answers after {what}")


@check()
def check_switching(case: Case) -> None:
    """Of two adapters each answers as it does alone, and with neither the base answers."""
    model = case.model()
    batch = models.batch(model)
    base = logits(model, batch)
    alone = [logits(case.attach(model=model).model, batch)]
    found = case.attach("two", model=model)
    perturb(found, "two", seed=5)
    alone.append(logits(model, batch))
    for name, wanted in zip(("one", "two", "one"), (*alone, alone[0]), strict=True):
        with found.using(name):
            same({name: logits(model, batch)}, {name: wanted}, f"{name!r} after switching")
    with found.using():
        same({"base": logits(model, batch)}, {"base": base}, "the base with all adapters off")
    require(not case.method.trains or not torch.equal(*alone), "two adapters with other values answer alike")


@check()
def check_names(case: Case) -> None:
    """A name that is taken or malformed is refused, and the model stays as it was."""
    found = case.attach()
    batch = models.batch(found.model)
    before = logits(found.model, batch)
    for name in ("one", "a b"):
        message = _message(AttachError, lambda name=name: found.attach(case.make(found.model), name))
        require(name in message, f"the error does not name {name!r}: {message}")
    same({"logits": logits(found.model, batch)}, {"logits": before}, "answers after a refused name")


@check()
def check_fields(case: Case) -> None:
    """Settings that are out of range, of no known choice or misspelled give an error that names field and value."""
    given = case.method.example(case.model())
    for name, field in case.method.model_fields.items():
        require(bool(field.description), f"the field {name!r} has no description")
        for value in _invalid(field):
            message = _message(ConfigError, lambda name=name, value=value: case.method(**{**given, name: value}))
            require(name in message, f"{name}={value!r}: the error does not name the field: {message}")
            require(repr(value) in message, f"{name}={value!r}: the error does not name the value: {message}")
        wrong = f"{name}_"
        message = _message(ConfigError, lambda wrong=wrong: case.method(**{**given, wrong: 1}))
        require(wrong in message, f"the error does not name the unknown field {wrong!r}: {message}")
        require(name in message.replace(wrong, ""), f"the error for {wrong!r} does not suggest {name!r}: {message}")


@check()
def check_copies(case: Case) -> None:
    """`copy.deepcopy` and `pickle` give an independent model that answers the same."""
    found = case.attach()
    batch = case.batch(found.model)
    wanted = logits(found.model, batch)
    for how, made in (("deepcopy", copy.deepcopy), ("pickle", lambda m: pickle.loads(pickle.dumps(m)))):
        other = made(found.model)
        carrier = host(other)
        require(carrier is not None and carrier.model is other, f"{how}: the copy has no host of its own")
        assert carrier is not None
        same({"logits": logits(other, batch)}, {"logits": wanted}, f"{how} and original")
        if case.method.trains:
            perturb(carrier, "one", seed=9)
            require(not torch.equal(logits(other, batch), wanted), f"{how}: the copy's tensors do not act on the copy")
        same({"logits": logits(found.model, batch)}, {"logits": wanted}, f"the original after changing the {how}")


@check("trains")
def check_resume(case: Case) -> None:
    """A run that is interrupted and continued ends in the same bits as one that is not."""
    whole = case.attach(fresh=True)
    loop = _loop(case, whole, steps=4, batch_size=2)
    for step in range(4):
        if step == 2:
            saved = pickle.dumps(loop.state_dict())
        loop.step()
    torch.manual_seed(99)  # the new process has other random numbers
    state, rest = pickle.loads(saved), case.attach(fresh=True)
    if rest.tensors("one").keys() != state["adapter"].keys():  # training has given it another structure
        rest = Host(case.model())
        rest.attach(case.make(rest.model), "one", saved=state["adapter"])
    again = _loop(case, rest, steps=4, batch_size=2)
    again.load_state_dict(state)
    for _ in range(2):
        again.step()
    same(rest.state_dict("one"), whole.state_dict("one"), "the continued and the uninterrupted run")


@check(families=_OTHERS, refuses=_UNFIT)
def check_smoke(case: Case) -> None:
    """On this kind of model the method starts, trains, is saved and loaded, and can be removed."""
    base = _Base(case.model())
    try:
        found = case.attach(model=base.model, fresh=True)
        start = logits(base.model, base.batch)
    except AdapterlabError:
        if host(base.model) is None:
            base.check("a refused attach")
        raise
    if case.method.starts_at_base:
        close(start, base.answer, "start and base", case.tolerance)
    perturb(found, "one")
    if case.method.trains:
        _check_gradients(found, case.batch(base.model))
    _check_saved(case, found)
    found.detach("one")
    base.check("detach")


def _check_gradients(found: Host, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    got = gradients(found, "one", [batch])
    silent = [key for key, grad in got.items() if grad is None]
    require(not silent, f"{len(silent)} trainable tensors get no gradient, for example {', '.join(silent[:4])}")
    wild = [key for key, grad in got.items() if grad is not None and not bool(grad.isfinite().all())]
    require(not wild, f"{len(wild)} gradients are not finite, for example {', '.join(wild[:4])}")
    arrived = {key: grad for key, grad in got.items() if grad is not None}
    require(any(bool(grad.any()) for grad in arrived.values()), "all gradients are zero")
    return arrived


def _loop(case: Case, found: Host, steps: int, batch_size: int = 4, weight_decay: float = 0.0) -> Loop:
    """Training on four fixed rows with a constant rate."""
    training = Training(
        steps=steps, batch_size=batch_size, lr=1e-2, schedule="constant", warmup=0, weight_decay=weight_decay, clip=None
    )
    collate = None
    if case.method.overrides("example_batch"):
        collate = functools.partial(_completed, case.method, found.model)
    return Loop(found, "one", models.token_rows(), training, collate=collate)


def _completed(method: type[Method], model: Any, rows: Any) -> dict[str, Tensor]:
    """A batch of rows with what else the method takes."""
    return method.example_batch(model, Collator(0)(rows))


def _owned(found: Host) -> dict[int, Tensor | None]:
    """The entries of base parameters that the adapter owns, by the parameter's identity; None: all."""
    every = [patch for key in found.parts("one") for patch in found.patches[key].values()]
    return {id(found.model.get_parameter(patch.path)): patch.index for patch in every}


def _without(tensor: Tensor, index: Tensor | None) -> Tensor:
    """A base tensor with what an adapter may change at zero."""
    kept = tensor.clone()
    kept.view(-1)[slice(None) if index is None else index] = 0
    return kept


def _fingerprint(model: Any) -> dict[str, object]:
    """What detaching must bring back, apart from values."""
    seen: dict[str, object] = {f"class of {path}": type(module) for path, module in model.named_modules()}
    seen |= {f"requires_grad of {path}": p.requires_grad for path, p in model.named_parameters()}
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        seen[f"hooks of {path}"] = sum(map(len, hooks))
        traces = [key for key in module.__dict__ if key.startswith("_adapterlab") or key == "forward"]
        seen[f"traces in {path}"] = tuple(traces)
    return seen


def _invalid(field: FieldInfo) -> Iterator[Any]:
    """Values just outside what a field's constraints allow."""
    for constraint in field.metadata:
        for bound, shift in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
            limit = getattr(constraint, bound, None)
            if limit is not None:
                yield limit + shift
    kinds = [field.annotation, *get_args(field.annotation)]
    if float in kinds and field.metadata:
        yield -math.inf
    if any(get_origin(kind) is Literal for kind in kinds):
        yield "no-such-choice"
    if int in kinds or float in kinds:
        yield "many"


def _message(kind: type[AdapterlabError], action: Any) -> str:
    """The text of the error that an action must raise."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"a {kind.__name__} was expected, and nothing was raised")

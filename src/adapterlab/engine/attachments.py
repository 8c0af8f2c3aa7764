"""The adapters on a model: what carries them, what they consist of, and which are live."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Copy
from adapterlab.core.method import Method
from adapterlab.core.site import UNMERGED, Site
from adapterlab.core.state import State
from adapterlab.core.targets import Targets
from adapterlab.engine.anatomy import Anatomy
from adapterlab.engine.attention import bridge
from adapterlab.engine.batch_rows import followed
from adapterlab.engine.heads import check_whole, say_random, without_home
from adapterlab.engine.intact import Place, check_heard, check_intact, hidden
from adapterlab.engine.joining import check_may_join
from adapterlab.engine.loading import stop_watching, watch_loads
from adapterlab.engine.patches import Patch
from adapterlab.engine.sparse import Entries
from adapterlab.engine.wrapping import HOST, adapters_of, plain_copy, put, take
from adapterlab.errors import AttachError, MergeError, nearest
from adapterlab.foreign.model import SHARED, base_modules, plain_path, unwrapped
from adapterlab.foreign.quantized import is_plain, is_quantized, keep_layout, misread
from adapterlab.foreign.sharding import fill, whole


def attachments(model: nn.Module) -> Attachments | None:
    """Return what a model carries, also after `copy.deepcopy`, or None."""
    return unwrapped(model).__dict__.get(HOST)  # type: ignore[no-any-return]


class Attachments(Anatomy):
    """The adapters on one model: put on, taken off, switched. `Host` adds merging, checking and saving.

    Attributes:
        state: what adapters share.
        methods: by the adapter's name.
        patches: base parameters that an adapter owns, by key (its name, or name/part of a composite) and path.
        places: what it came to, by key and path of the module or owned parameter, for `check_intact`.
        merged: what merging changed, by the adapter's name, in order.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.root: Any = self.model  # holds what is shared, wherever the model is seen from
        self.state = State(carrier=self)
        self.methods: dict[str, Method] = {}
        self.patches: dict[str, dict[str, Patch]] = {}
        self.places: dict[str, dict[str, Place]] = {}
        self.merged: dict[str, list[Any]] = {}
        self._parts: dict[str, dict[str, Method]] = {}
        self._trained_before: dict[str, bool] = {}

    # ------------------------------------------------------------------ attaching and detaching

    def attach(
        self,
        method: Method,
        name: str = "default",
        *,
        active: bool = True,
        saved: Mapping[str, Tensor] | None = None,
        like: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put a method on the model; see `attach`.

        Args:
            method: what to attach.
            name: of the adapter.
            active: make it live beside the active ones, or let it wait for `activate` or `using`. One that has a copy
                of a module where this one has something, or the other way round, is switched off for it.
            saved: tensors by the keys of `tensors`; the adapter gets the structure and the values they have.
            like: likewise, for the structure alone; the values are loaded afterwards.
        """
        check_may_join(self.model, self.methods, method, name)
        before, fresh = self.active, self.new if type(method).trains else ()
        by_default = saved is None and like is None and "modules_to_save" not in method.model_fields_set
        if fresh and by_default:
            method = method.model_copy(update={"modules_to_save": fresh})
        if not self.methods:
            if why := misread(self.model):
                raise AttachError(why)
            self._trained_before = {plain_path(path): p.requires_grad for path, p in self.model.named_parameters()}
            self.model.requires_grad_(False)
            watch_loads(self.model)
            keep_layout(self.model)
        self.methods[name], self.patches[name], self.places[name] = method, {}, {}
        self.model.__dict__[HOST] = self
        try:
            structure = saved if saved is not None else like
            if structure is None:
                method.attach(self, name)
            else:
                method.attach_saved(self, name, structure)
            self._save_modules(method, name, by_default)
            if saved is not None or like is not None:
                say_random(type(self.model).__name__, name, without_home(fresh, self.places[name]))
            if saved is not None:
                self.load_state_dict(name, saved)
            self.activate(*(n for n in before if not (active and self._hide(n, name))), *((name,) if active else ()))
        except BaseException:
            self.detach(name)
            raise

    def detach(self, name: str) -> None:
        """Remove an adapter; base values, classes and keys are as before, to the bit."""
        self.check(name)
        if name in self.merged:
            self.restore(name)
        self.activate(*(n for n in self.active if n != name))
        for key in self.parts(name):
            self.places.pop(key, None)
            for patch in self.patches.pop(key, {}).values():
                patch.undo(self.model, keep=False)
                others = [p for patches in self.patches.values() for p in patches.values() if p.live]
                if patch.index is None and not any(patch.clashes(other) for other in others):
                    self.model.get_parameter(patch.path).requires_grad_(False)
            for path in self.adapters(key):
                take(self.module(path), key)
            held = self.model._modules.get(SHARED)
            if held is not None:
                held._modules.pop(key, None)
                if not held._modules:
                    del self.model._modules[SHARED]
        self._parts.pop(name, None)
        del self.methods[name]
        if not self.methods:
            self.model.__dict__.pop(HOST, None)
            stop_watching(self.model)
            for path, parameter in self.model.named_parameters():
                parameter.requires_grad_(self._trained_before.get(plain_path(path), parameter.requires_grad))

    def _save_modules(self, method: Method, name: str, by_default: bool) -> None:
        """Give the adapter full trainable copies of the modules in `modules_to_save`, or of heads that are new."""
        if by_default and method.modules_to_save:
            check_whole(method.modules_to_save, self.places[name])
            left = without_home(method.modules_to_save, self.places[name])
            method = self.methods[name] = method.model_copy(update={"modules_to_save": tuple(left)})
        if not method.modules_to_save:
            return
        targets = Targets(include=method.modules_to_save)
        for site in self.sites(targets):
            inner = [
                path for path, _ in base_modules(site.module) if path and adapters_of(site.module.get_submodule(path))
            ]
            if name in adapters_of(site.module) or inner:
                where = f" inside, at {inner[0]}" if inner else ""
                raise AttachError(
                    f"{site.path} is in modules_to_save and is also adapted{where}. Exclude it from targets, or leave "
                    "it out of modules_to_save."
                )
            packed = [path for path, module in base_modules(site.module) if is_quantized(module)]
            if packed:
                raise AttachError(
                    f"{site.path} is in modules_to_save and has packed weights, of which no copy can be "
                    "trained. Leave it out of modules_to_save and target it, or load the base without quantization."
                )
            self.wrap(name, site, Copy(site, plain_copy(site.module)))

    # ------------------------------------------------------------------ the four verbs

    def wrap(self, name: str, where: Site | nn.Module, adapter: Adapter) -> None:
        """Let an adapter stand around a module's call.

        Raises:
            AttachError: the adapter `name` has something at this module already.
        """
        module = unwrapped(where.module if isinstance(where, Site) else where)
        if adapter.place == "call" and adapter.site.bypassed:
            raise AttachError(
                f"{adapter.site.path}: {adapter.site.bypassed} reads its weight and never calls it, so an adapter "
                "around it would have no effect. Leave it out of the targets, or choose a method that trains in place."
            )
        if name in adapters_of(module):
            raise AttachError(f"{name!r} is attached to {self.path_of(module)} already: one adapter a module and name.")
        put(module, name, adapter.train(module.training), self.state)
        self.places[name][self.path_of(module)] = Place(module, adapter)

    def attend(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Let an adapter stand around the attention core of an attention module.

        `adapter.around(run, q, k, v, mask, **kwargs)` sees queries `[batch, heads, queries, head_dim]`, keys and
        values `[batch, kv_heads, keys, head_dim]` (cached ones included, heads not repeated) and the mask.

        Raises:
            AttachError: the module does not go through the attention interface of transformers.
        """
        bridge(module)
        adapter.place = "attention"
        self.wrap(name, module, adapter)

    def own(self, name: str, path: str, *, index: Tensor | None = None, keep: bool = True) -> nn.Parameter:
        """Train a base parameter in place, or some of its entries.

        Args:
            name: of the adapter.
            path: the parameter's name in the model.
            index: flat row-major positions `[k]` of the entries to train; None for all. Only these change, whatever the
                optimizer does, and only they cost gradient and optimizer memory.
            keep: store the original, so that the change can be undone and switched off; without it, detaching raises.

        Returns:
            The tensor that trains: the parameter itself, or the float32 vector `[k]` of its entries.

        Raises:
            AttachError: there is no such parameter, it is packed, or another live adapter owns it.
        """
        parameter, holders = self._base_parameter(path)
        original = parameter.detach() if index is None else parameter.detach().view(-1)[index]
        patch = Patch(path, original.clone() if keep else None, index)
        self._check_conflict(name, patch)
        self.patches[name].setdefault(path, patch)
        self.places[name][path] = Place(self.module(path.rpartition(".")[0]))
        if index is None:
            parameter.requires_grad_(True)
            return parameter
        # Every module that holds the tensor must see the entries: a tied weight has two.
        trained = self._entries(name, holders[0]).add(holders[0].rpartition(".")[2], index)
        for other in holders[1:]:
            self._entries(name, other).alias(other.rpartition(".")[2], index, trained)
        return trained

    def replace(self, name: str, path: str, derive: Callable[[Tensor], Tensor]) -> None:
        """Put another, frozen value in place of a base parameter while the adapter is live.

        The original is kept beside it and comes back to the bit when the adapter is switched off or detached.

        Args:
            name: of the adapter.
            path: the parameter's name in the model.
            derive: makes the value from the original; called again whenever the value is needed anew, so it must depend
                on nothing but its argument and saved tensors of the adapter. Must be picklable (a bound method is).

        Raises:
            AttachError: there is no such parameter, it is packed or tied, something is merged into it, or another live
                adapter owns it.
        """
        parameter, holders = self._base_parameter(path)
        if len(holders) > 1:
            raise AttachError(
                f"{path} is tied to {', '.join(p for p in holders if p != path)}, which would change with it. Exclude "
                "the module, or give it a weight of its own first."
            )
        if self._merged_into(path):
            raise AttachError(f"{path} has an adapter merged into it, so its original value is not there: restore it.")
        patch = Patch(path, parameter.detach().clone(), live=False, trains=False, derive=derive)
        self._check_conflict(name, patch)
        self.patches[name][path] = patch
        self.places[name][path] = Place(self.module(path.rpartition(".")[0]))
        patch.write(self.model)

    def refresh(self, name: str) -> None:
        """Derive replaced base values anew, after tensors of the adapter were changed from outside."""
        for key in self.parts(name):
            for patch in self.patches[key].values():
                patch.refresh(self.model)

    def unwrap(self, name: str, where: Site | nn.Module) -> None:
        """Take the adapter away from one module again, for methods that drop modules they have no use for."""
        module = unwrapped(where.module if isinstance(where, Site) else where)
        take(module, name)
        self.places[name].pop(self.path_of(module), None)

    def _merged_into(self, path: str) -> bool:
        """Say whether a merge has put another parameter in place of this one."""
        module, _, leaf = path.rpartition(".")
        found = self.module(module)
        before = found.__dict__.get(UNMERGED)
        return before is not None and before._parameters.get(leaf) is not found._parameters.get(leaf)

    def _base_parameter(self, path: str) -> tuple[nn.Parameter, list[str]]:
        """A base parameter whose value may be changed, and every name it has in the model."""
        every = {plain_path(p): t for p, t in self.model.named_parameters(remove_duplicate=False)}
        parameters = {p: t for p, t in every.items() if not self.is_adapter_path(p)}
        if path not in parameters:
            raise AttachError(f"{type(self.model).__name__} has no parameter {path!r}. {nearest(path, parameters)}")
        parameter = parameters[path]
        if not parameter.dtype.is_floating_point or not is_plain(parameter):
            raise AttachError(
                f"{path} is stored packed ({type(parameter).__name__}, {parameter.dtype}) and cannot be changed in "
                "place. Load the model without quantization, or choose a method that adds tensors beside the weight."
            )
        return parameter, [p for p, t in parameters.items() if t is parameter]

    def _entries(self, name: str, path: str) -> Entries:
        """The adapter that places chosen entries at the module of a parameter; made on first use."""
        module = self.module(path.rpartition(".")[0])
        found = adapters_of(module).get(name)
        if found is None:
            found = Entries(self.site(module))
            self.wrap(name, module, found)
        if not isinstance(found, Entries):
            raise AttachError(f"{name!r} already wraps {path.rpartition('.')[0]}: own its entries under a part's name.")
        return found

    def share(self, name: str, key: str, module: nn.Module) -> nn.Module:
        """Keep tensors of an adapter that belong to no single module; they live at the root of the model.

        Raises:
            AttachError: the adapter has shared something under this key already, or the root is a plain sequence.
        """
        if isinstance(self.model, nn.Sequential):
            raise AttachError(
                f"{type(self.model).__name__} calls every module it holds, so shared tensors cannot live at its root. "
                "Put it inside a module of your own and attach to that."
            )
        if SHARED not in self.model._modules:
            self.model.add_module(SHARED, nn.ModuleDict())
        held = self.model._modules[SHARED]
        group = held._modules.setdefault(name, nn.ModuleDict())  # type: ignore[union-attr]
        if key in group._modules:  # type: ignore[union-attr]
            raise AttachError(f"{name!r} shares {key!r} already; each key is shared once.")
        group.add_module(key, module)  # type: ignore[union-attr]
        return module

    def compose(self, name: str, part: str, method: Method, saved: Mapping[str, Tensor] | None = None) -> None:
        """Attach another method as a part of an adapter; parts are switched, saved and removed together.

        Args:
            name: of the adapter, as `Method.attach` received it.
            part: a name for the part, unique within the adapter.
            method: what to attach.
            saved: tensors of the adapter that is loaded; the part gets the structure that it has there.
        """
        top, key = name.partition("/")[0], f"{name}/{part}"
        self._parts.setdefault(top, {})[key] = method
        self.patches[key], self.places[key] = {}, {}
        if saved is None:
            method.attach(self, key)
        else:
            lead = f"{part}/"
            method.attach_saved(self, key, {k[len(lead) :]: v for k, v in saved.items() if k.startswith(lead)})

    def parts(self, name: str) -> list[str]:
        """Return the keys that an adapter consists of: its name, then those of its parts."""
        return [name, *self._parts.get(name, {})]

    def part_methods(self, name: str) -> dict[str, Method]:
        """Return the methods of a composite's parts by key."""
        return dict(self._parts.get(name, {}))

    # ------------------------------------------------------------------ what an adapter consists of

    def adapters(self, name: str) -> dict[str, Adapter]:
        """Return the adapter's parts by the path of their module, in model order."""
        return {p: held[name] for p, m in base_modules(self.model) if name in (held := adapters_of(m))}

    def shared(self, name: str) -> dict[str, nn.Module]:
        """Return what the adapter keeps at the root of the model, by key."""
        held = self.root._modules.get(SHARED)
        group = held._modules.get(name) if held is not None else None
        return dict(group._modules) if group is not None else {}  # type: ignore[arg-type]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return every tensor of the adapter: what saving must keep.

        Keys are `adapter.<module path>.<tensor>`, `shared.<key>.<tensor>` and `base.<parameter path>`; those of a
        composite's parts begin with `<part>/`.
        """
        self.check(name)
        found: dict[str, Tensor] = {}
        for key in self.parts(name):
            lead = key.removeprefix(name).removeprefix("/")
            found.update({(f"{lead}/" if lead else "") + k: value for k, value in self._tensors(key).items()})
        return found

    def _tensors(self, key: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, adapter in self.adapters(key).items():
            found.update({f"adapter.{path}.{k}": value for k, value in adapter.state_dict(keep_vars=True).items()})
        for shared, module in self.shared(key).items():
            found.update({f"shared.{shared}.{k}": value for k, value in module.state_dict(keep_vars=True).items()})
        whole = {path: p for path, p in self.patches[key].items() if p.index is None and p.derive is None}
        found.update({f"base.{path}": patch.value(self.model) for path, patch in whole.items()})
        return found

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return detached copies of `tensors(name)`; on a sharded model every process must call it and gets them whole.

        Raises:
            AttachError: the model was changed after attaching, see `check_intact`.
            OutputError: the model is sharded by FSDP1, see `foreign.sharding.whole`.
        """
        self.check(name)
        self.check_intact(name)
        return {key: whole(value).clone() for key, value in self.tensors(name).items()}

    @torch.no_grad()
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into the adapter.

        Raises:
            AttachError: names or shapes do not agree; nothing is copied then.
        """
        own = self.tensors(name)
        faults = [f"{key}: missing" for key in own if key not in tensors]
        faults += [f"{key}: not in this adapter" for key in tensors if key not in own]
        faults += [
            f"{key}: saved {tuple(tensors[key].shape)}, here {tuple(own[key].shape)}"
            for key in own
            if key in tensors and tensors[key].shape != own[key].shape
        ]
        if faults:
            more = f"\n  ... and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise AttachError(f"The tensors do not fit adapter {name!r}:\n  " + "\n  ".join(faults[:8]) + more)
        for key, value in tensors.items():
            fill(own[key], value)
        self.refresh(name)

    def named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the adapter's trainable tensors by the keys of `tensors`, each once."""
        seen: set[int] = set()
        found = {}
        for key, value in self.tensors(name).items():
            if isinstance(value, nn.Parameter) and value.requires_grad and id(value) not in seen:
                seen.add(id(value))
                found[key] = value
        return found

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the adapter's trainable tensors."""
        return list(self.named_parameters(name).values())

    # ------------------------------------------------------------------ switching

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the live adapters."""
        return tuple(name for name in self.state.active if name in self.methods)

    def activate(self, *names: str) -> None:
        """Make exactly these adapters live; none means the plain base model.

        Raises:
            AttachError: a name is unknown, two of them own the same base parameter, one's copy of a module hides what
                another has there, or one that would be switched off cannot be.
        """
        for name in names:
            self.check(name)
        check_heard({key: self.places[key] for name in names for key in self.parts(name)})
        self._switch(names)

    def _hide(self, one: str, other: str) -> bool:
        """Say whether one of two adapters has a copy of a module that keeps the other from being computed."""
        return hidden({key: self.places[key] for name in (one, other) for key in self.parts(name)}) is not None

    def _switch(self, names: Sequence[str]) -> None:
        leaving = [key for n in self.methods if n not in names for key in self.parts(n)]
        staying = [key for n in dict.fromkeys(names) for key in self.parts(n)]
        self._check_switch(leaving, staying)
        for key in leaving:
            for patch in self.patches[key].values():
                patch.undo(self.model)
        for key in staying:
            for patch in self.patches[key].values():
                patch.write(self.model)
        self.state.active = tuple(staying)

    def _check_switch(self, leaving: list[str], staying: list[str]) -> None:
        owners: dict[str, list[tuple[str, Patch]]] = {}
        for key in staying:
            for path, patch in self.patches[key].items():
                for other, theirs in owners.get(path, []):
                    if patch.clashes(theirs):
                        raise AttachError(f"{other!r} and {key!r} both own {path}: make only one of them active.")
                owners.setdefault(path, []).append((key, patch))
        for key in leaving:
            if key in self.merged:
                raise AttachError(f"{key!r} is merged into the weights: call host.restore({key!r}) first.")
            hidden = [p.path for p in self.patches[key].values() if p.live and self._merged_into(p.path)]
            if hidden:
                merged = ", ".join(self.merged)
                raise AttachError(f"{hidden[0]} has {merged} merged into what {key!r} put there: restore it first.")
            stuck = [p.path for p in self.patches[key].values() if p.original is None]
            if stuck and key in self.state.active:
                raise AttachError(
                    f"{key!r} trains {stuck[0]} in place and was attached without keeping the original, so it "
                    "cannot be switched off. Attach it with the originals kept, or load the base model again."
                )

    @contextlib.contextmanager
    def using(self, *names: str) -> Iterator[Self]:
        """Make exactly these adapters live inside the context; `using()` is the plain base model."""
        before = self.active
        self.activate(*names)
        try:
            yield self
        finally:
            self.activate(*before)

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | tuple[str, ...] | None]) -> Iterator[Self]:
        """Give each row of a batch its own adapter inside the context.

        Args:
            names: for each row the name of an adapter, several names, or None for the plain base.

        Raises:
            AttachError: a name is unknown, an adapter is merged, or one lives in the base's own weights (every row
                would see it).
        """
        wanted = [() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in names]
        used = list(dict.fromkeys(name for row in wanted for name in row))
        for name in used:
            self.check(name)
        resident = [n for n in used if any(self.patches[key] for key in self.parts(n))]
        if resident or self.merged:
            raise AttachError(
                f"{(resident or list(self.merged))[0]!r} lives in the base's own weights, which all rows share, so it "
                "cannot be mixed in a batch. Run its rows in a batch of their own with host.using, or restore it first."
            )
        rows = tuple(tuple(key for n in row for key in self.parts(n)) for row in wanted)
        for row in dict.fromkeys(rows):
            check_heard({key: self.places[key] for key in row})
        before = self.active
        self._switch(used)
        self.state.rows = rows
        paths = dict.fromkeys(path for name in used for path in self.adapters(name))
        try:
            with followed(self.model, paths, self.state, lambda: len(self.state.rows or rows)):
                yield self
        finally:
            self.state.rows = None
            self.activate(*before)

    # ------------------------------------------------------------------ checks

    def check_intact(self, name: str) -> None:
        """Require that everything attached under a name is still there, so that nothing less is saved or merged.

        Raises:
            AttachError: modules that the adapter came to were replaced, resized, packed or cut off.
        """
        check_intact(self.model, name, {key: self.places[key] for key in self.parts(name)})

    def restore(self, name: str | None = None) -> None:
        """Take a merged adapter out of the weights again, to the bit; it is live as before.

        Raises:
            MergeError: it is not merged, or another one was merged after it.
        """
        name = self.only(name)
        if name not in self.merged:
            raise MergeError(f"{name!r} is not merged. Merged: {', '.join(self.merged) or 'none'}.")
        if name != list(self.merged)[-1]:
            raise MergeError(f"{list(self.merged)[-1]!r} was merged after {name!r}: restore it first.")
        for record in reversed(self.merged.pop(name)):
            record.undo()
        for key in self.parts(name):
            for adapter in self.adapters(key).values():
                adapter.is_merged = False

    def _check_conflict(self, name: str, patch: Patch) -> None:
        path = patch.path
        for other in self.state.active:
            if other != name and path in self.patches[other] and patch.clashes(self.patches[other][path]):
                raise AttachError(
                    f"{path} is owned by adapter {other!r} already: two adapters cannot train one base parameter "
                    f"at the same time. Deactivate {other!r} first, or exclude the parameter."
                )

    def check(self, name: str) -> None:
        """Refuse a name that no adapter has.

        Raises:
            AttachError: there is none of this name.
        """
        if name not in self.methods:
            attached = ", ".join(self.methods) or "none"
            raise AttachError(f"There is no adapter {name!r} on this model. Attached: {attached}.")

    def only(self, name: str | None) -> str:
        """Return the name, or that of the one adapter there is.

        Raises:
            AttachError: there is none of this name, or none is named and there are several.
        """
        if name is None and len(self.methods) != 1:
            raise AttachError(f"Say which adapter: {', '.join(self.methods) or 'none is attached'}.")
        name = name if name is not None else next(iter(self.methods))
        self.check(name)
        return name

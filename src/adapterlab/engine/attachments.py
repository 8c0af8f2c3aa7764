"""The adapters on a model: what carries them, what they consist of, and which are live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterlab.core.adapter import Adapter, Copy
from adapterlab.core.method import Method
from adapterlab.core.site import Site
from adapterlab.core.targets import Targets
from adapterlab.engine import real_tokens
from adapterlab.engine.attention import bridge
from adapterlab.engine.heads import check_whole, say_random, without_home
from adapterlab.engine.intact import Place, check_intact
from adapterlab.engine.joining import check_may_join
from adapterlab.engine.loading import stop_watching, watch_loads
from adapterlab.engine.patches import Patch
from adapterlab.engine.sparse import Chosen, Entries, Trained
from adapterlab.engine.switching import Switching
from adapterlab.engine.wrapping import HOST, adapters_of, plain_copy, put, take
from adapterlab.errors import AttachError, MergeError, nearest
from adapterlab.foreign.model import SHARED, base_modules, elsewhere, plain_path, unwrapped
from adapterlab.foreign.quantized import is_plain, keep_layout, misread
from adapterlab.foreign.sharding import fill, is_part, whole


def attachments(model: nn.Module) -> Attachments | None:
    """Return what a model carries, also after `copy.deepcopy`, or None."""
    return unwrapped(model).__dict__.get(HOST)  # type: ignore[no-any-return]


class Attachments(Switching):
    """The adapters on one model: put on, taken off, switched. `Host` adds merging, checking and saving."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.root: Any = self.model  # holds what is shared, wherever the model is seen from
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
        self.check_uncomposed("attach")
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
            method = self.methods[name]
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
        self.check_uncomposed("detach")
        if name in self.merged:
            self.restore(name)
        self.activate(*(n for n in self.active if n != name))
        for key in self.parts(name):
            self.places.pop(key, None)
            for patch in self.patches.pop(key, {}).values():
                patch.undo(self.model, keep=False)
                others = [p for patches in self.patches.values() for p in patches.values() if p.live]
                if patch.entries is None and not any(patch.clashes(other) for other in others):
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
        real_tokens.leave(self.model, self.state)
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
        path = where.path if isinstance(where, Site) else self.path_of(module)
        self.places[name][path] = Place(module, adapter)
        if adapter.counts_tokens:
            real_tokens.watch(self.model, path, self.state)

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

    def own(
        self,
        name: str,
        path: str,
        *,
        index: Tensor | None = None,
        chosen: Chosen | None = None,
        entire: bool = False,
        keep: bool = True,
    ) -> nn.Parameter:
        """Train a base parameter in place, or some of its entries.

        Args:
            name: of the adapter.
            path: the parameter's name in the model.
            index: flat row-major positions `[k]` of the entries to train; None for all. Only these change, whatever the
                optimizer does, and only they cost gradient and optimizer memory.
            chosen: entries whose vector the method keeps, such as a part of one for many parameters. They may be chosen
                anew: `refresh` then gives the former ones their original values, and these theirs.
            entire: with `chosen`: own the whole parameter for the time being, until `narrow`.
            keep: store the original, so that the change can be undone and switched off; without it, detaching raises.

        Returns:
            The tensor that trains: the parameter itself, or the float32 vector `[k]` of its entries.

        Raises:
            AttachError: there is no such parameter, it is packed, or another live adapter owns it.
        """
        parameter, holders = self._base_parameter(path)
        whole = entire or (index is None and chosen is None)
        if index is None and chosen is not None and not whole:
            index = chosen.index()
        self._check_conflict(name, path, index)
        if chosen is None and index is not None:
            chosen = self._entries(name, holders[0]).add(holders[0].rpartition(".")[2], index)
        if isinstance(chosen, Trained):
            # Every module that holds the tensor must see the entries: a tied weight has two.
            for holder in holders:
                self._entries(name, holder).held[holder.rpartition(".")[2]] = chosen
        original = parameter.detach().clone() if whole else parameter.new_empty(0)
        patch = Patch(path, original if keep else None, chosen, entire, live=whole)
        self.patches[name].setdefault(path, patch)
        self.places[name][path] = Place(self.module(path.rpartition(".")[0]))
        if whole:
            parameter.requires_grad_(True)
            return parameter
        patch.write(self.model)
        return chosen.trained()[0] if isinstance(chosen, Trained) else parameter  # type: ignore[return-value]

    def narrow(self, name: str) -> None:
        """Let an adapter own the chosen entries of parameters that it owned entire: these have their originals back."""
        for patch in self.patches[name].values():
            patch.narrow(self.model)

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
        self._check_conflict(name, path, None)
        self.patches[name][path] = patch
        self.places[name][path] = Place(self.module(path.rpartition(".")[0]))
        patch.write(self.model)

    def refresh(self, name: str, *, entries: bool = False) -> None:
        """Put values that live in the base there anew, after tensors of the adapter were changed from outside.

        Args:
            name: of the adapter.
            entries: chosen entries alone, and not what is derived from the base.
        """
        for key in self.parts(name):
            for patch in self.patches[key].values():
                if not self._merged_into(patch.path) and not (entries and patch.chosen is None):
                    patch.refresh(self.model)

    def unwrap(self, name: str, where: Site | nn.Module) -> None:
        """Take the adapter away from one module again, for methods that drop modules they have no use for."""
        module = unwrapped(where.module if isinstance(where, Site) else where)
        take(module, name)
        self.places[name].pop(self.path_of(module), None)
        real_tokens.leave(self.model, self.state)

    def _base_parameter(self, path: str) -> tuple[nn.Parameter, list[str]]:
        """A base parameter whose value may be changed, and every name it has in the model."""
        every = {plain_path(p): t for p, t in self.model.named_parameters(remove_duplicate=False)}
        parameters = {p: t for p, t in every.items() if not self.is_adapter_path(p)}
        if path not in parameters:
            raise AttachError(f"{type(self.model).__name__} has no parameter {path!r}. {nearest(path, parameters)}")
        parameter = parameters[path]
        if not parameter.dtype.is_floating_point or not (is_plain(parameter) or is_part(parameter)):
            raise AttachError(
                f"{path} is stored packed ({type(parameter).__name__}, {parameter.dtype}) and cannot be changed in "
                "place. Load the model without quantization, or choose a method that adds tensors beside the weight."
            )
        if elsewhere(self.module(path.rpartition(".")[0])) is not None:
            raise AttachError(
                f"{path} is kept in another memory between calls (accelerate's device_map puts it on the CPU's or the "
                "disk's side), and a change of it would be lost. Exclude it, or choose a method that adds tensors "
                "beside the weight."
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

    def settle(self, name: str, method: Method) -> None:
        """Say what a method has become, where what it was attached with or to decided settings; this is saved.

        Args:
            name: of the adapter, as `Method.attach` received it.
            method: the same with these settings.
        """
        if name in self.methods:
            self.methods[name] = method
        else:
            self._parts[name.partition("/")[0]][name] = method

    # ------------------------------------------------------------------ what an adapter consists of

    def shared(self, name: str) -> dict[str, nn.Module]:
        """Return what the adapter keeps at the root of the model, by key."""
        held = self.root._modules.get(SHARED)
        group = held._modules.get(name) if held is not None else None
        return dict(group._modules) if group is not None else {}  # type: ignore[arg-type]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return every tensor of the adapter: what saving must keep.

        Keys are `adapter.<module path>.<tensor>`, `shared.<key>.<tensor>` and `base.<parameter path>`; those of a
        composite's parts begin with `<part>/`. The key of a part, `<name>/<part>`, stands for what is the part's alone.
        """
        if name in self.part_methods(name.partition("/")[0]):
            return self._tensors(name)
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
        # By name: what is attached from a file may share in another order than training did, and an optimizer counts.
        for shared, module in sorted(self.shared(key).items()):
            found.update({f"shared.{shared}.{k}": value for k, value in module.state_dict(keep_vars=True).items()})
        whole = {path: p for path, p in self.patches[key].items() if p.entries is None and p.derive is None}
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

    def _check_conflict(self, name: str, path: str, index: Tensor | None) -> None:
        for other in self.state.active:
            if other != name and path in self.patches[other] and self.patches[other][path].touches(index):
                raise AttachError(
                    f"{path} is owned by adapter {other!r} already: two adapters cannot train one base parameter "
                    f"at the same time. Deactivate {other!r} first, or exclude the parameter."
                )

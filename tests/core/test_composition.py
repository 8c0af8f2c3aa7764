"""Adapters put together as data, against the modules' own results, weights edited by hand, and separate runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import adapterlab as al
from adapterlab.errors import AttachError, ConfigError
from adapterlab.foreign.model import ADAPTERS

IDS = torch.randint(3, 100, (3, 8), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: al.LoRA(r=4, targets=["q", "down"]),
    "dora": lambda: al.DoRA(r=4, targets=["q", "up"]),
    "hra": lambda: al.HRA(r=4, targets=["q", "down"]),
    "ia3": lambda: al.IA3(),
    "parallel": lambda: al.AdapterParallel(m=4),
    "behind": lambda: al.AdapterPfeiffer(m=4),
    "prefix": lambda: al.PrefixTuning(length=3),
}


@pytest.fixture
def hosted(tiny: Any, randomise: Any) -> Callable[..., Any]:
    """`hosted("lora", "dora")`: a tiny Llama that carries such adapters, with values in all tensors."""

    def make(*kinds: str, family: str = "llama") -> Any:
        host: Any = None
        model = tiny(family)
        for kind in kinds:
            host = al.attach(model, KINDS[kind.rstrip("2")](), kind)
        randomise(host, size=0.3)
        return host

    return make


def answer(host: Any, *names: Any, ids: Any = IDS) -> Any:
    with torch.no_grad(), host.using(*names):
        return host.model(input_ids=ids, use_cache=False).logits


def at_module(host: Any, path: str, *names: Any, seed: int = 0, tokens: int = 8) -> Any:
    """What one module gives, with other modules out of the way."""
    module = host.module(path)
    x = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), host.using(*names):
        return module(x)


def test_a_stack_is_in_its_own_order(hosted: Any) -> None:
    host = hosted("behind", "behind2")
    path = next(iter(host.adapters("behind")))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with host.using():
            base = host.module(path)(x)
        for names in (["behind", "behind2"], ["behind2", "behind"]):
            expected = base
            for name in names:
                own = host.adapters(name)[path]
                hidden = torch.relu(expected @ own.down.T + own.down_bias)
                expected = expected + hidden @ own.up.T + own.up_bias
            with host.using(al.Stack(*names)):
                torch.testing.assert_close(host.module(path)(x), expected)
            assert torch.equal(answer(host, *(al.Stack(n) for n in names)), answer(host, al.Stack(*names)))
    assert torch.equal(answer(host, al.Stack("behind", "behind2")), answer(host, "behind2", "behind"))
    assert not torch.allclose(answer(host, al.Stack("behind2", "behind")), answer(host, "behind", "behind2"), atol=1e-3)


def test_an_average_of_updates_is_that_of_the_weights(hosted: Any) -> None:
    host = hosted("lora", "lora2")
    plain = copy.deepcopy(host.model)
    al.host(plain).detach("lora")
    al.host(plain).detach("lora2")
    with torch.no_grad():
        for path, one in host.adapters("lora").items():
            other = host.adapters("lora2")[path]
            plain.get_submodule(path).weight += 1.4 * one.delta() - 0.4 * other.delta()
        expected = plain(input_ids=IDS).logits
    found = answer(host, al.Average("lora", "lora2", weights=[0.7, -0.2]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kinds", [("lora", "dora"), ("hra", "dora"), ("ia3", "lora"), ("hra", "hra2")])
def test_modules_average_and_cut_what_the_parts_give(kinds: tuple[str, str], hosted: Any) -> None:
    host = hosted(*kinds)
    path = next(p for p in host.adapters(kinds[0]) if p.endswith(("q_proj", "k_proj")))
    one, other = (at_module(host, path, kind) for kind in kinds)
    nested = al.Average(al.Stack(*kinds), kinds[1])
    behind = at_module(host, path, al.Stack(*kinds))
    torch.testing.assert_close(at_module(host, path, al.Average(*kinds)), (one + other) / 2)
    torch.testing.assert_close(at_module(host, path, nested), (behind + other) / 2)
    split = at_module(host, path, al.Split(*kinds, sizes=[3, 5]))
    torch.testing.assert_close(split, torch.cat([one[:, :3], other[:, 3:]], 1))
    inside = at_module(host, path, al.Split(al.Average(*kinds), kinds[0], sizes=[6, 2]))
    torch.testing.assert_close(inside, torch.cat([(one + other)[:, :6] / 2, one[:, 6:]], 1))


def test_the_base_is_computed_once_for_parts_that_only_add(hosted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host = hosted("lora", "lora2", "hra")
    path = next(iter(host.adapters("lora")))
    calls: list[Any] = []
    weight, linear = host.module(path).weight, F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: calls.append(w) or linear(x, w, b))
    at_module(host, path, al.Average("lora", "lora2"))
    assert sum(w is weight for w in calls) == 1
    calls.clear()
    at_module(host, path, al.Average("lora", "lora2", "hra"))
    assert sum(w is weight for w in calls) == 2  # a rotation turns what the base is given


def test_attention_and_whole_models_of_an_average_of_one_kind(hosted: Any) -> None:
    """The average of an adapter with itself is the adapter, wherever its parts stand."""
    for kind in ("prefix", "behind", "parallel", "dora"):
        host = hosted(kind)
        expected = answer(host, kind)
        torch.testing.assert_close(answer(host, al.Average(kind, kind, weights=[0.25, 0.75])), expected, msg=kind)
        torch.testing.assert_close(answer(host, al.Split(kind, kind, sizes=[5, 3])), expected, msg=kind)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-tokens"])
def test_parallel_rows_equal_separate_runs(family: str, tiny: Any, randomise: Any, batch_for: Any, logits: Any) -> None:
    model = tiny(family)
    host = al.attach(model, al.LoRA(r=4), "one")
    host.attach(al.AdapterPfeiffer(m=4), "two")
    host.attach(al.PrefixTuning(length=3), "three")
    randomise(host, size=0.2)
    batch = batch_for(model)
    parts = ("one", al.Stack("two", "three"), al.Average("one", "two"))
    alone = []
    for part in parts:
        with host.using(part):
            alone.append(logits(model, batch))
    with torch.no_grad(), host.using(al.Parallel(*parts)):
        found = model(**batch).logits
        assert torch.equal(model(**batch).logits, found)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert host.state.segments is None
    assert min(float((a - b).abs().max()) for i, a in enumerate(alone) for b in alone[:i]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-tokens"])
def test_parallel_computes_layers_without_adapters_once(
    family: str, tiny: Any, randomise: Any, batch_for: Any, logits: Any
) -> None:
    """What the tasks share: layers in front of all adapters, those that are dropped among them."""
    model = tiny(family)
    host = al.attach(model, al.AdapterDrop(adapter="adapter_houlsby", settings={"m": 4, "norms": False}), "one")
    host.attach(al.LoRA(r=4, targets={"include": ["all-linear"], "layers": "1"}), "two")
    randomise(host, size=0.3)
    batch = {"use_cache": False, **batch_for(model)} if family != "bert-tokens" else batch_for(model)
    rows, layers = len(batch["input_ids"]), host.layers
    seen: list[int] = []
    for layer in layers:
        inner = next(m for path, m in layer.named_modules() if path and hasattr(m, "weight"))
        inner.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    for drop, wanted in ((0, [2 * rows, 2 * rows]), (1, [rows, 2 * rows])):
        host.methods["one"].choose(host, "one", drop)
        alone = []
        for part in ("one", "two"):
            with host.using(part):
                alone.append(logits(model, batch))
        seen.clear()
        with torch.no_grad(), host.using(al.Parallel("one", "two")):
            found = model(**batch).logits
        assert seen == wanted
        torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)
        assert float((alone[0] - alone[1]).abs().max()) > 1e-3
    if family != "bert-tokens":  # a cache holds rows of all layers alike
        seen.clear()
        with torch.no_grad(), host.using(al.Parallel("one", "two")):
            found = model(**{**batch, "use_cache": True}).logits
        assert seen == [2 * rows, 2 * rows]
        torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_rows_may_be_compositions(hosted: Any) -> None:
    host = hosted("lora", "hra", "behind")
    rows = ["lora", al.Average("lora", "hra", weights=[2, -1]), al.Stack("hra", "behind")]
    with torch.no_grad(), host.rows(rows):
        mixed = host.model(input_ids=IDS).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(mixed[i], answer(host, row)[i], atol=1e-4, rtol=1e-4)
    with torch.no_grad(), host.using("behind"):
        with host.rows([al.Stack("hra"), None, ("behind", "hra")]):
            mixed = host.model(input_ids=IDS).logits
        assert host.active == ("behind",)
    torch.testing.assert_close(mixed[0], answer(host, "hra")[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], answer(host)[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[2], answer(host, "hra", "behind")[2], atol=1e-4, rtol=1e-4)


def test_cached_generation_equals_full_forwards(hosted: Any) -> None:
    host = hosted("lora", "dora", "behind", "prefix")
    for what in (al.Average("lora", "dora"), al.Average("lora", al.Stack("behind", "prefix"))):
        with host.using(what):
            found = host.model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
            ids = IDS[:1]
            for _ in range(4):
                with torch.no_grad():
                    ids = torch.cat([ids, host.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, ids), str(what)


@pytest.mark.parametrize("mode", ["none", "full", "cheap"])
def test_gradients_reach_every_part_also_when_activations_are_computed_again(mode: str, hosted: Any) -> None:
    host = hosted("lora", "hra", "behind")
    what = al.Average("hra", al.Stack("lora", "behind"), weights=[0.5, 2])

    def gradients() -> list[Any]:
        with host.using(what):
            host.model.train()
            loss = host.model(input_ids=IDS, labels=IDS, use_cache=False).loss
        tensors = [p for name in host.methods for p in host.parameters(name)]
        return list(torch.autograd.grad(loss, tensors))

    plain = gradients()
    host.recompute(mode)
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(bool(g.abs().max() > 0) for g in plain)


def test_what_was_live_is_live_again(hosted: Any) -> None:
    host = hosted("lora", "hra")
    what = al.Average("lora", "hra")
    host.activate(what)
    assert host.active == ("lora", "hra")
    before = answer(host, what)
    with host.using(al.Stack("hra")):
        assert host.active == ("hra",)
    with host.rows([None, "lora", "hra"]):
        pass
    with host.using(al.Parallel("lora", "hra")):
        pass
    assert host.live == (what,)
    with torch.no_grad():
        assert torch.equal(host.model(input_ids=IDS, use_cache=False).logits, before)
        twin = copy.deepcopy(host.model)
        assert torch.equal(twin(input_ids=IDS, use_cache=False).logits, before)
    for change in (
        lambda: host.attach(al.LoRA(), "new"), lambda: host.detach("lora"), lambda: host.merge("lora"),
    ):  # fmt: skip
        with pytest.raises(AttachError, match=r"Average\(lora, hra\) is live.*plain names"):
            change()
    host.activate("lora")
    assert host.live == ("lora",)
    host.detach("lora")
    host.detach("hra")
    assert ADAPTERS not in dict(host.model.named_modules())


def test_samples_are_not_packed_under_a_split(hosted: Any) -> None:
    from adapterlab.data import Collator
    from adapterlab.engine.packing import obstacle

    host = hosted("lora", "lora2")
    for what, reason in ((al.Split("lora", "lora2", sizes=[4, 4]), "Split(lora, lora2) tells positions"), ("lora", "")):
        with host.using(what):
            assert obstacle(host.model, Collator(0), 8).startswith(reason)
            assert bool(reason) == bool(obstacle(host.model, Collator(0), 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: al.Stack(), r"Stack\(\) puts nothing together"),
        (lambda: al.Average("a", al.LoRA()), "takes names of adapters.*received LoRA"),
        (lambda: al.Average("a", "b", weights=[1]), r"2 parts and the weights \[1.0\]"),
        (lambda: al.Average("a", "b", weights=[1, float("nan")]), "finite"),
        (lambda: al.Average("a", "b", weights=[1, -1]), "must not be zero"),
        (lambda: al.Split("a", "b", sizes=[1, 0]), r"sizes \[1, 0\].*positive"),
        (lambda: al.Stack("a", al.Parallel("b", "c")), r"can only be the outermost.*Parallel\(Stack\(...\), ...\)"),
    ],
)
def test_what_cannot_be_put_together_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_cannot_be_computed_is_refused(hosted: Any) -> None:
    host = hosted("lora", "hra", "prefix")
    with pytest.raises(AttachError, match=r"no adapter 'x'.*lora"):
        host.activate(al.Average("lora", al.Stack("x")))
    with pytest.raises(AttachError, match="Parallel repeats the batch"):
        host.activate(al.Parallel("lora", "hra"))
    with pytest.raises(AttachError, match="Parallel makes rows"), host.rows([al.Parallel("lora", "hra")]):
        pass
    with host.using(al.Split("lora", "hra", sizes=[4, 5])), pytest.raises(AttachError, match="cuts rows of 9 tokens"):
        host.model(input_ids=IDS)
    with host.using(al.Parallel("lora", "hra")), pytest.raises(AttachError, match=r"generate.*host\.rows"):
        host.model.generate(IDS, max_new_tokens=2)
    host.attach(al.Full(), "full")
    with pytest.raises(AttachError, match="'full' lives in the base's own weights"):
        host.activate(al.Average("lora", "full"))
    host.activate(al.Stack("lora", "full"))
    assert host.active == ("lora", "full")

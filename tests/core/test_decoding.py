"""Adapters outside of training: factors that are kept cast, several at once, and rows of one batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import adapterlab as al
from adapterlab.engine import resting, wrapping
from adapterlab.engine.products import fastest
from adapterlab.ops.low_rank import low_rank_by_row

needs_compiler = pytest.mark.skipif(fastest("cpu")[0] is None, reason=fastest("cpu")[1] or "there is a kernel")
# The kernel takes no float64, which torch's products are compared in.
either_way = pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=needs_compiler)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the products without gradient were computed, and how."""
    seen: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(resting, "add_low_rank", noted("one", resting.add_low_rank))
    for name in ("low_rank_by_row", "add_low_rank_by_row"):
        monkeypatch.setattr(resting, name, noted("rows", getattr(resting, name)))
    prepared = resting.product
    monkeypatch.setattr(resting, "product", lambda *args: noted("kernel", prepared(*args)))
    return seen


@pytest.fixture(params=[pytest.param("kernel", marks=needs_compiler), "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How few tokens are multiplied in float32 and bfloat16."""
    if request.param == "torch":
        monkeypatch.setattr(resting, "fastest", lambda device: (None, "there is no compiler"))
    return str(request.param)


def close(found: Tensor, wanted: Tensor) -> None:
    """Compare in either dtype; a step makes some hidden states large."""
    tight = found.dtype is torch.float64
    size = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=1e-9 if tight else 1e-5, atol=1e-9 if tight else 1e-4 * size)


def updated(plain: Any, *adapters: dict[str, Any]) -> Any:
    """Write the updates into a copy of the model."""
    with torch.no_grad():
        for held in adapters:
            for path, layer in held.items():
                module = plain.get_submodule(path)
                a, b = layer.factors()
                module.weight += layer.site.stored(layer.scale * (b @ a)).to(module.weight)
    return plain


@either_way
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_at_once_are_one_product(
    family: str, dtype: torch.dtype, tiny: Any, batch_for: Any, randomise: Any, calls: Any
) -> None:
    """With different scales and ranks, and on transposed weights with a bias."""
    model, plain = tiny(family).to(dtype), tiny(family).to(dtype)
    batch = batch_for(model)
    host = al.attach(model, al.LoRA(r=2), "a")
    host.attach(al.LoRA(r=3, alpha=5.0), "b")
    randomise(host, "a", "b")
    host.activate("a", "b")
    with torch.no_grad():
        found = model(**batch).logits
    assert len(calls) == len(host.adapters("a"))
    wanted = updated(plain, host.adapters("a"), host.adapters("b"))(**batch).logits
    close(found, wanted)
    close(found, model(**batch).logits)
    assert set(calls) == {"one" if dtype is torch.float64 else "kernel"}


def test_what_is_kept_follows_every_change(tiny: Any, batch_for: Any, randomise: Any, calls: Any, way: str) -> None:
    """Of values, of what is live, of the mode, of the dtype; a wrong one would answer for another adapter."""
    torch.manual_seed(0)
    model = tiny("llama")
    batch = batch_for(model)
    host = al.attach(model, al.LoRA(r=2, dropout=0.5), "a")
    host.attach(al.LoRA(r=2), "b")
    randomise(host, "a", "b")

    def agree() -> Tensor:
        """Compare with what is computed where gradients are on, which keeps nothing."""
        calls.clear()
        with torch.no_grad():
            found = model(**batch).logits
        assert set(calls) == {"kernel" if way == "kernel" and found.dtype is torch.float32 else "one"}
        with torch.enable_grad():
            close(found, model(**batch).logits.detach())
        return found

    host.activate("a")
    seen = [agree()]
    with torch.no_grad():
        for parameter in host.parameters("a"):
            parameter.mul_(-2)
    seen.append(agree())
    saved = host.state_dict("a")
    host.load_state_dict("a", {key: 0.7 * value for key, value in saved.items()})
    seen.append(agree())
    for layer in host.adapters("a").values():
        layer.scale = 0.25
    seen.append(agree())
    host.activate("b")
    seen.append(agree())
    host.activate("a", "b")
    seen.append(agree())
    optimizer = torch.optim.SGD([p for name in "ab" for p in host.parameters(name)], lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    seen.append(agree())
    for parameter in host.parameters("b"):
        parameter.data = parameter.data * 3  # goes unseen until the mode changes
    model.eval()
    seen.append(agree())
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(seen) for other in seen[:i])
    model.double()
    agree()
    model.train()
    calls.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = model(**batch).logits
    torch.manual_seed(0)
    assert torch.equal(dropped, model(**batch).logits)  # with dropout, as training computes it
    assert not calls


def test_nothing_is_kept_of_what_moves(tiny: Any, batch_for: Any, calls: Any) -> None:
    """Tensors of inference mode do not count their changes."""
    with torch.inference_mode():
        model = tiny("llama")
        host = al.attach(model, al.LoRA(r=2))
        first = model(**batch_for(model)).logits
        for parameter in host.parameters("default"):
            parameter.fill_(0.1)
        assert not torch.allclose(model(**batch_for(model)).logits, first)
    assert not calls


@pytest.fixture
def usual_way(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compute logits without any plan."""

    def logits(model: Any, batch: Any) -> Tensor:
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(wrapping, "at_rest", lambda *_: None)
            return model(**batch).logits  # type: ignore[no-any-return]

    return logits


def _scaled(host: Any) -> None:
    for layer in host.adapters("a").values():
        layer.scale *= -3


def _idle(host: Any) -> None:
    for layer in host.adapters("a").values():
        layer.idle = not layer.idle


def _replaced(host: Any) -> None:
    for layer in host.adapters("b").values():
        layer.B = torch.nn.Parameter(layer.B.detach() + 0.3)


def _behind_its_back(host: Any) -> None:
    for layer in host.adapters("a").values():
        layer._parameters["A"] = torch.nn.Parameter(layer.A.detach() * 2)


def _patched(host: Any) -> None:
    for layer in host.adapters("a").values():
        layer.around = lambda run, x: 0.5 * run(x)


@torch.no_grad()
def _edited(host: Any) -> None:
    for parameter in host.parameters("b"):
        parameter.mul_(-2)


@torch.no_grad()
def _base_edited(host: Any) -> None:
    for layer in host.adapters("a").values():
        layer.site.module.weight.mul_(1.5)


def _base_replaced(host: Any) -> None:
    for layer in host.adapters("a").values():
        layer.site.module.weight = torch.nn.Parameter(layer.site.module.weight.detach() * 0.5, requires_grad=False)


CHANGES = [_scaled, _idle, _idle, _replaced, _behind_its_back, _edited, _base_edited, _base_replaced]


@either_way
def test_a_plan_gives_what_the_usual_way_gives(
    dtype: torch.dtype, tiny: Any, batch_for: Any, randomise: Any, usual_way: Any
) -> None:
    """After whatever changes adapters, base or what is live."""
    model = tiny("llama").to(dtype)
    batch = batch_for(model)
    host = al.attach(model, al.LoRA(r=2), "a")
    host.attach(al.LoRA(r=3, targets=["q", "up"]), "b")
    host.attach(al.IA3(), "c")
    randomise(host, "a", "b", "c")
    seen: list[Tensor] = []

    def agree() -> None:
        with torch.no_grad():
            found = model(**batch).logits
        close(found, usual_way(model, batch))
        assert all((found - other).abs().max() > 1e-6 for other in seen[-1:])
        seen.append(found)

    for live in (["a"], ["a", "b"], ["b", "c"], [], ["b"], [al.Stack("b", "a")], [al.Average("a", "b")], ["a", "b"]):
        host.activate(*live)
        agree()
    for change in CHANGES:
        change(host)
        agree()
    host.merge("a")
    seen.clear()  # merged it computes the same
    agree()
    host.restore("a")
    host.detach("b")
    agree()
    host.attach(al.LoRA(r=2), "b")
    host.activate("b", "a")
    randomise(host, "b")
    agree()
    twin = copy.deepcopy(model)
    assert torch.equal(usual_way(twin, batch), usual_way(model, batch))
    _edited(host)
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, seen[-1])  # it has plans of its own
    named = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        swapped = torch.func.functional_call(model, named, kwargs=batch).logits
    agree()
    model.load_state_dict(named, strict=False)
    agree()
    close(seen[-1], swapped)
    _patched(host)
    agree()
    model.float()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, usual_way(model, batch), rtol=1e-3, atol=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(**batch).logits, usual_way(model, batch))


@either_way
def test_a_plan_of_a_mixed_batch(
    dtype: torch.dtype, tiny: Any, randomise: Any, usual_way: Any, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Owners in another order, fewer or more of them, uneven runs, by row and by token; and what changes meanwhile."""
    if dtype is torch.float32:
        monkeypatch.setattr(fastest("cpu")[0], "long", 15, raising=False)  # so that there are runs of both kinds
    model = tiny("llama").to(dtype)
    host = al.attach(model, al.LoRA(r=2), "a")
    host.attach(al.LoRA(r=3, targets=["q", "up"]), "b")
    host.attach(al.LoRA(r=4, targets=["v", "down"]), "c")
    randomise(host, "a", "b", "c")
    ids = torch.randint(3, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    seen: set[str] = set()

    def agree() -> None:
        calls.clear()
        with torch.no_grad():
            found = model(ids).logits
        seen.update(calls)
        assert calls
        close(found, usual_way(model, {"input_ids": ids}))

    for rows in (["a", "b", "c", None], ["c", None, "a", "b"], ["a", "b", "b", "b"], [("a", "c"), "b", "a", "a"]):
        with host.rows(rows):
            agree()
    for runs in ([("a", 1), ("b", 20), (None, 2), ("c", 1)], [("c", 3), ("a", 1), ("c", 3), ("b", 17)], [("a", 24)]):
        with host.tokens(runs):
            agree()
    for change in CHANGES:
        with host.rows(["c", "b", "a", "a"]):
            agree()
            change(host)
            agree()
    with host.rows(["a", "b"]):  # beams are runs of each row
        agree()
    assert seen == ({"rows"} if dtype is torch.float64 else {"kernel", "one", "rows"})


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("rows", [["a", "b", None, "a"], ["a", "a", "b", "b"], ["b", ("a", "b"), "c", None]])
def test_rows_without_gradient(rows: Any, tokens: int, tiny: Any, randomise: Any, calls: Any) -> None:
    """Few and many positions, neighbours and scattered rows, several adapters of a row; ranks and targets differ."""
    model = tiny("llama").double()
    host = al.attach(model, al.LoRA(r=2), "a")
    host.attach(al.LoRA(r=3, alpha=5.0, targets=["q", "down"]), "b")
    host.attach(al.LoRA(r=4, targets=["v"]), "c")
    randomise(host, "a", "b", "c")
    ids = torch.randint(3, 100, (len(rows), tokens), generator=torch.Generator().manual_seed(0))
    with host.rows(rows):
        with torch.no_grad():
            found = model(ids).logits
        assert "rows" in calls
        mixed = model(ids).logits
        mixed.sum().backward()
    gradients = {name: [p.grad.clone() for p in host.parameters(name) if p.grad is not None] for name in "abc"}
    model.zero_grad()
    for row, name in enumerate(rows):
        with host.using(*(name if isinstance(name, tuple) else [name] if name else [])):
            alone = model(ids[row : row + 1]).logits
        torch.testing.assert_close(found[row], alone[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-9, atol=1e-9)
        if alone.requires_grad:
            alone.sum().backward()
    for name in "abc":
        wanted = [p.grad for p in host.parameters(name) if p.grad is not None]
        torch.testing.assert_close(gradients[name], wanted, rtol=1e-9, atol=1e-9)


def test_rows_in_half_precision(tiny: Any, randomise: Any, calls: Any, way: str) -> None:
    """On a CPU few tokens are multiplied in float32, many in the dtype of the model; beams are runs of a row."""
    model = tiny("llama").bfloat16()
    host = al.attach(model, al.LoRA(r=2), "a")
    host.attach(al.LoRA(r=3), "b")
    randomise(host, "a", "b", size=0.1)
    draw = torch.Generator().manual_seed(0)
    for tokens in (1, 30):
        ids = torch.randint(3, 100, (4, tokens), generator=draw)
        for rows in (["a", None, "b", ("a", "b")], ["a", "b"]):
            calls.clear()
            with host.rows(rows), torch.no_grad():
                found = model(ids).logits
            assert found.dtype == torch.bfloat16
            assert set(calls) == {"kernel" if way == "kernel" else "rows"}
            for row, name in enumerate(rows if len(rows) == 4 else ["a", "a", "b", "b"]):
                with host.using(*(name if isinstance(name, tuple) else [name] if name else [])):
                    alone = model(ids[row : row + 1]).logits
                assert (found[row] - alone[0]).float().norm() < 0.05 * alone.float().norm()


def test_factors_rounded_for_one_dtype_do_not_serve_another(
    tiny: Any, batch_for: Any, randomise: Any, way: str
) -> None:
    model = tiny("llama").bfloat16()
    batch = batch_for(model)
    host = al.attach(model, al.LoRA(r=2), "a")
    randomise(host, "a", size=0.1)
    own = {id(p) for p in host.parameters("a")}
    with torch.no_grad():
        model(**batch)
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        found = model(**batch).logits
    assert found.dtype is torch.float32
    close(found, model(**batch).logits.detach())


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_products_by_row(tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((3, 2, 5), (3, 2, 4), (3, tokens, 5)))
    wanted = torch.stack([x[i] @ a[i].T @ b[i] for i in range(3)])
    torch.testing.assert_close(low_rank_by_row(x, a, b), wanted, rtol=1e-12, atol=1e-12)
    half = low_rank_by_row(x.bfloat16(), a.float(), b.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, rtol=0.05, atol=0.05)


class Seen(TorchDispatchMode):
    """Counts the small products."""

    def __init__(self) -> None:
        super().__init__()
        self.thin = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.thin += any(isinstance(t, Tensor) and 2 in t.shape for t in args) and "mm" in str(function)
        return function(*args, **kwargs or {})


@needs_compiler
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_what_follows_a_computation_sees_it(tiny: Any, randomise: Any) -> None:
    """A kernel writes where no operator is seen; a trace, a derivative or a count would lack the adapter."""
    model = tiny("llama")
    host = al.attach(model, al.LoRA(r=2))
    randomise(host)
    module = next(iter(host.adapters("default").values())).site.module
    x, tangent = torch.randn(3, 2, module.in_features, generator=torch.Generator().manual_seed(0)), 0.5
    with torch.no_grad():
        wanted = module(x)
        assert module.__dict__[resting.RESTING]._short[6] is not None
        close(torch.vmap(module)(x), wanted)
        traced = torch.jit.trace(module, x, check_trace=False)
        close(traced(x), wanted)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent * x)))
        close(found.tangent, tangent * wanted)
        with Seen() as seen:
            close(module(x), wanted)
    assert seen.thin == 2

"""The chunked losses, every option: against float64, gradients by differences, half precision, memory, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapterlab.ops import cross_entropy
from adapterlab.ops.cross_entropy import (
    PLAIN,
    TokenForm,
    linear_cross_entropy,
    logits_cross_entropy,
    module_cross_entropy,
)

FORMS = {
    "plain": PLAIN,
    "scaled": TokenForm(scale=0.25),
    "negative scale": TokenForm(scale=-0.5),
    "capped": TokenForm(cap=2.0),
    "smoothed": TokenForm(smoothing=0.1),
    "z-loss": TokenForm(z_loss=0.01),
    "all": TokenForm(scale=0.5, cap=1.5, smoothing=0.2, z_loss=0.1),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def reference(u: Tensor, labels: Tensor, form: TokenForm) -> Tensor:
    """The sum of losses from torch's own functions."""
    z = u * form.scale
    z = z if form.cap is None else form.cap * torch.tanh(z / form.cap)
    loss = F.cross_entropy(z, labels, reduction="sum", label_smoothing=form.smoothing)
    return loss + form.z_loss * (z.logsumexp(-1).square() * (labels != -100)).sum()


def data(
    rows: int = 11, width: int = 6, vocabulary: int = 13, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    labels = torch.randint(0, vocabulary, (rows,), generator=draw)
    labels[1::4] = -100
    return hidden, weight, bias, labels


def ways(labels: Tensor, vocabulary: int, form: TokenForm) -> dict[str, Callable[..., Tensor]]:
    return {
        "linear": lambda h, w, b: linear_cross_entropy(h, w, b, labels, form),
        "logits": lambda h, w, b: logits_cross_entropy(F.linear(h, w, b), labels, form),
        "module": lambda h, w, b: module_cross_entropy(h, lambda x: F.linear(x, w, b), labels, vocabulary, form=form),
    }


@every_form
@pytest.mark.parametrize("elements", [1, 3 * 13, 10**6])  # 1, 3 and all rows a chunk
def test_values_and_gradients_of_every_way(elements: int, form: TokenForm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 2 * 13)
    *tensors, labels = data()
    expected = reference(F.linear(*tensors), labels, form)
    wanted = torch.autograd.grad(expected * 0.7, tensors)
    for name, way in ways(labels, 13, form).items():
        found = way(*tensors)
        assert found.dtype == torch.float64, name
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found * 0.7, tensors), wanted)
        with torch.no_grad():
            torch.testing.assert_close(way(*tensors), expected)


@every_form
def test_gradients_by_differences(form: TokenForm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2 * 7)
    *tensors, labels = data(5, 3, 7)
    for way in ways(labels, 7, form).values():
        assert torch.autograd.gradcheck(way, tensors)


@pytest.mark.parametrize("trains", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_only_what_trains_gets_a_gradient(trains: tuple[int, ...]) -> None:
    *tensors, labels = data()
    for tensor, train in zip(tensors, trains, strict=True):
        tensor.requires_grad_(bool(train))
    loss = linear_cross_entropy(*tensors, labels)
    assert loss.requires_grad == any(trains)
    if any(trains):
        loss.backward()
    assert [t.grad is not None for t in tensors] == [bool(t) for t in trains]


@every_form
def test_half_precision_is_no_worse_than_the_plain_path(form: TokenForm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 64 * 500)  # three chunks
    *tensors, labels = data(192, 32, 500, torch.bfloat16)
    double = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference(F.linear(*double), labels, form)
    plain = reference(F.linear(*tensors).float(), labels, form)
    exact_grads, plain_grads = torch.autograd.grad(exact, double), torch.autograd.grad(plain, tensors)
    for name, way in ways(labels, 500, form).items():
        found = way(*tensors)
        assert found.dtype == torch.float32
        assert abs(found.double() - exact) <= abs(plain.double() - exact) + 1e-6 * abs(exact), name
        grads = torch.autograd.grad(found, tensors)
        for kind, ours, usual, true in zip("hwb", grads, plain_grads, exact_grads, strict=True):
            assert ours.dtype == torch.bfloat16
            # a CPU rounds the product of each chunk for W; autograd adds the chunks of `module` in half precision
            slack = {("linear", "w"): 1.5, ("module", "w"): 2, ("module", "b"): 2}.get((name, kind), 1.02)
            error, usual_error = (ours.double() - true).norm(), (usual.double() - true).norm()
            assert error <= slack * usual_error, (name, kind, error / usual_error)


def test_the_factor_of_the_loss_is_not_rounded_to_half_precision() -> None:
    hidden, weight, _, labels = data(64, 16, 50, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, None, labels)
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 300.7, hidden)
    assert torch.equal(third, (whole.float() / 300.7).bfloat16())


@pytest.mark.parametrize("form", [PLAIN, TokenForm(smoothing=0.1), TokenForm(cap=30.0), TokenForm(z_loss=1e-4)])
def test_extreme_logits(form: TokenForm) -> None:
    u = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [40.0, 0.0, 1e4]], dtype=torch.float64)
    labels = torch.tensor([1, 0, 2, 2])
    double, single = u.clone().requires_grad_(), u.float().requires_grad_()
    expected, found = reference(double, labels, form), logits_cross_entropy(single, labels, form)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(expected, double)[0], torch.autograd.grad(found, single)[0].double()
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert grads[1].isfinite().all()


def test_a_loss_near_zero_keeps_its_digits_beside_a_large_logit() -> None:
    u = torch.tensor([[512.0, 500.0]])  # a logsumexp in float32 would only resolve 3e-5 here
    exact = F.cross_entropy(u.double(), torch.tensor([0]))
    found = logits_cross_entropy(u, torch.tensor([0]))
    assert abs(float(found) - float(exact)) < 0.02 * float(exact)


@every_form
@pytest.mark.parametrize("rows", [0, 1])
def test_no_position_and_one(rows: int, form: TokenForm) -> None:
    *tensors, labels = data(rows)
    expected = reference(F.linear(*tensors), labels, form)
    wanted = torch.autograd.grad(expected, tensors)
    for way in ways(labels, 13, form).values():
        found = way(*tensors)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, tensors), wanted)


def test_ignored_positions_alone_give_zero_even_where_logits_overflow() -> None:
    u = torch.tensor([[float("inf"), 0.0], [1.0, 2.0]], requires_grad=True)
    loss = logits_cross_entropy(u, torch.tensor([-100, -100]), FORMS["all"])
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, u)[0], torch.zeros(2, 2))


@every_form
def test_two_parts_make_the_whole(form: TokenForm) -> None:
    hidden, weight, bias, labels = data()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, labels, form), (hidden, weight, bias))
    parts = sum(linear_cross_entropy(hidden[r], weight, bias, labels[r], form) for r in (slice(0, 4), slice(4, 11)))
    torch.testing.assert_close(torch.autograd.grad(parts, (hidden, weight, bias)), whole)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, _, labels = data()
    loss = linear_cross_entropy(hidden, weight, None, labels).square()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def peak(step: Callable[[], Any]) -> int:
    """Largest number of bytes that live at once of all that are allocated during a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


@pytest.mark.parametrize("form", [PLAIN, FORMS["all"]])
@pytest.mark.parametrize("train_weight", [False, True])
def test_memory_is_linear_in_positions_and_independent_of_the_vocabulary(
    train_weight: bool, form: TokenForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2**15)
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 2**12)
    chunk = 4 * 2**15

    def bytes_for(rows: int, vocabulary: int) -> int:
        hidden, weight, _, labels = data(rows, 4, vocabulary, torch.float32)
        weight.requires_grad_(train_weight)
        own = weight.numel() * 4 if train_weight else 0  # its gradient, and the scaled copy that autograd receives

        def step() -> None:
            linear_cross_entropy(hidden, weight, None, labels, form).backward()

        return peak(step) - 2 * own

    for rows, vocabulary in ((64, 2048), (64, 8192), (1024, 8192)):
        blocks = 2 * 4 * max(2**12, 2 * vocabulary, torch.get_num_threads() * vocabulary)
        needed = bytes_for(rows, vocabulary)
        assert needed <= chunk + blocks + 4 * rows * 4 * 4 + 2**14, (rows, vocabulary)
        assert needed < rows * vocabulary * 4  # all logits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs", [[True, False, False], [True, True, True], [False, False, False]])
def test_the_operators_declare_themselves_rightly(bias: bool, needs: list[bool]) -> None:
    hidden, weight, shift, labels = (t.detach() for t in data(dtype=torch.float32))
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.adapterlab
    needs = [*needs[:2], needs[2] and bias]
    arguments = (hidden, weight, shift if bias else None, labels, *FORMS["all"], needs)
    torch.library.opcheck(operators.linear_cross_entropy.default, arguments, test_utils=checks)
    logits = hidden @ weight.T
    torch.library.opcheck(operators.logits_cross_entropy.default, (logits, labels, *PLAIN, needs[0]), test_utils=checks)


@pytest.mark.parametrize("form", [PLAIN, FORMS["all"]])
@pytest.mark.parametrize("way", ["linear", "logits"])
def test_it_compiles_as_one_graph(way: str, form: TokenForm) -> None:
    *tensors, labels = data(dtype=torch.float32)
    eager = ways(labels, 13, form)[way]
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    expected, found = eager(*tensors), compiled(*tensors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors))


def test_a_checkpoint_policy_sees_one_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    *tensors, labels = data()
    with Watch():
        linear_cross_entropy(*tensors, labels)
    assert [name for name in seen if "detach" not in name] == ["adapterlab.linear_cross_entropy.default"]

"""Products in half precision on a processor without instructions for it: right to one rounding, and none left out."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import adapterlab as al
from adapterlab.data import Collator
from adapterlab.engine import float_products
from adapterlab.engine.float_products import FloatProducts, fast_products
from adapterlab.evaluate.generation import generate
from adapterlab.evaluate.loss import evaluate_loss
from adapterlab.foreign import processor
from adapterlab.hosts import Host
from adapterlab.plan.tracker import Tracker
from adapterlab.registry import method
from adapterlab.testing import models
from adapterlab.train import Training
from adapterlab.train.loop import Listener, Loop
from adapterlab.train.together import Entrant, train_together

HALF = [torch.bfloat16, torch.float16]
ATEN = torch.ops.aten


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without instructions, however small a product is, and in small blocks."""
    monkeypatch.setattr(float_products, "slow_in", lambda dtype: dtype in HALF)
    monkeypatch.setattr(float_products, "_WORTH", 0)
    monkeypatch.setattr(float_products, "_BLOCK", 40)


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def check_rounded_once(found: Any, wanted: Tensor, dtype: torch.dtype) -> None:
    """Half a unit in the last place of the exact value, and what summing in float32 adds."""
    assert found.dtype is dtype
    bound = wanted.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-5
    assert bool(((found.double() - wanted).abs() <= bound).all()), (found.double() - wanted).abs().max()


class Seen(TorchDispatchMode):
    """Counts the operators of torch that multiply half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.half: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        multiplies = name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution") or "attention" in name
        if multiplies and func.namespace == "aten":
            self.half[func] += any(isinstance(value, Tensor) and value.dtype in HALF for value in args)
        return func(*args, **(kwargs or {}))


class Counted:
    """Products of half precision by who computed them."""

    def __init__(self) -> None:
        self.ours: Counter[Any] = Counter()
        self.torchs: Counter[Any] = Counter()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found, kernel = Counted(), float_products._kernel

    def counting(func: Any, computed: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
        def ours(usual: Any, *args: Any, **kwargs: Any) -> Any:
            def torchs(*given: Any, **others: Any) -> Any:
                found.torchs[func] += any(isinstance(t, Tensor) and t.dtype in HALF for t in given[:3])
                return usual(*given, **others)

            found.ours[func] += 1
            return computed(torchs, *args, **kwargs)

        return kernel(func, ours, keys, *args, **kwargs)

    monkeypatch.setattr(float_products, "_kernel", counting)
    return found


# ---------------------------------------------------------------------- operators

SHAPES = [(3, 5, 7), (17, 4, 9), (2, 30, 6), (1, 8, 1), (12, 12, 12), (64, 3, 2), (0, 4, 3), (4, 0, 3)]


def turned(t: Tensor) -> Tensor:
    """The same numbers, the other way round in memory."""
    return t.mT.contiguous().mT


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("a_turned", [False, True])
@pytest.mark.parametrize("b_turned", [False, True])
def test_products_of_matrices(dtype: torch.dtype, shape: tuple[int, ...], a_turned: bool, b_turned: bool) -> None:
    m, k, n = shape
    a, b = drawn(dtype, m, k), drawn(dtype, k, n, seed=1)
    a, b = turned(a) if a_turned else a, turned(b) if b_turned else b
    c, row, wanted = drawn(dtype, m, n, seed=2), drawn(dtype, n, seed=3), a.double() @ b.double()
    with FloatProducts():
        check_rounded_once(a @ b, wanted, dtype)
        out = a.new_empty(0)
        assert torch.mm(a, b, out=out) is out
        check_rounded_once(out, wanted, dtype)
        check_rounded_once(torch.addmm(row, a, b), row.double() + wanted, dtype)
        exact = 0.5 * c.double() - 2 * wanted
        check_rounded_once(torch.addmm(c, a, b, beta=0.5, alpha=-2), exact, dtype)
        check_rounded_once(torch.addmm(c, a, b, beta=0.5, alpha=-2, out=torch.empty_like(c)), exact, dtype)
        into = turned(c.clone())
        assert into.addmm_(a, b, beta=0.5, alpha=-2) is into
        check_rounded_once(into, exact, dtype)
        nan = torch.full_like(c, float("nan"))
        check_rounded_once(torch.addmm(nan, a, b, beta=0), wanted, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 5])
def test_products_of_batches(dtype: torch.dtype, shape: tuple[int, ...], batch: int) -> None:
    m, k, n = shape
    a, b, c = drawn(dtype, batch, m, k), turned(drawn(dtype, batch, k, n, seed=1)), drawn(dtype, batch, m, n, seed=2)
    wanted = a.double() @ b.double()
    with FloatProducts():
        check_rounded_once(torch.bmm(a, b), wanted, dtype)
        check_rounded_once(torch.bmm(a, b, out=torch.empty_like(c)), wanted, dtype)
        exact = 0.5 * c.double() - 2 * wanted
        check_rounded_once(torch.baddbmm(c, a, b, beta=0.5, alpha=-2), exact, dtype)
        check_rounded_once(torch.baddbmm(c[0], a, b), c[0].double() + wanted, dtype)
        into = c.clone()
        assert into.baddbmm_(a, b, beta=0.5, alpha=-2) is into
        check_rounded_once(into, exact, dtype)
        check_rounded_once(torch.einsum("bmk,bkn->bmn", a, b), wanted, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("quiet", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_calls_without_a_gradient(dtype: torch.dtype, quiet: Callable[[], Any], counted: Counted) -> None:
    x, weight, bias = drawn(dtype, 2, 6, 8), drawn(dtype, 5, 8), drawn(dtype, 5)
    q = drawn(dtype, 1, 2, 6, 4)
    with quiet(), FloatProducts():
        found = F.linear(x, weight, bias), x @ weight.T, F.scaled_dot_product_attention(q, q, q, is_causal=True)
    exact = x.double() @ weight.double().T
    check_rounded_once(found[0], exact + bias.double(), dtype)
    check_rounded_once(found[1], exact, dtype)
    check_rounded_once(found[2], F.scaled_dot_product_attention(*[q.double()] * 3, is_causal=True), dtype)
    assert len(counted.ours) == 3
    assert not +counted.torchs


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_and_convolutions(dtype: torch.dtype, masked: bool, counted: Counted) -> None:
    given = [drawn(dtype, 2, 3, 9, 8, seed=i) for i in range(3)]
    mask = drawn(dtype, 1, 1, 9, 9, seed=5) if masked else None
    images, kernels = drawn(dtype, 2, 3, 8, 8), drawn(dtype, 4, 3, 2, 2)

    def gradients(to: torch.dtype) -> list[Tensor]:
        leaves = [t.to(to).detach().requires_grad_() for t in (*given, images, kernels)]
        exact = None if mask is None else mask.to(to)
        attended = F.scaled_dot_product_attention(*leaves[:3], exact, is_causal=not masked)
        (attended * drawn(dtype, *attended.shape, seed=8).to(to)).sum().backward()
        convolved = F.conv2d(leaves[3], leaves[4], stride=2)
        (convolved * drawn(dtype, *convolved.shape, seed=9).to(to)).sum().backward()
        return [attended.detach(), convolved.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    with FloatProducts():
        found = gradients(dtype)
    assert len(counted.ours) == 4
    assert not +counted.torchs
    for one, exact in zip(found, gradients(torch.float64), strict=True):
        # The gradients of attention come from its rounded result.
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps * exact.abs().max())


def test_what_is_no_product_of_half_precision_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    a, whole = drawn(torch.float32, 4, 5), torch.arange(6).view(2, 3)
    with FloatProducts():
        assert torch.equal(a @ a.T, a @ a.T)
        assert (a.double() @ a.double().T).dtype is torch.float64
        assert torch.equal(whole @ whole.T, torch.tensor([[5, 14], [14, 50]]))
    monkeypatch.setattr(float_products, "_WORTH", 5)
    assert not counted.ours
    half = a.bfloat16()
    with FloatProducts():
        assert (half[:1] @ half.T).shape == torch.addmm(half[:1, :4], half[:1], half.T).shape == (1, 4)
    assert counted.torchs.total() == 2  # few numbers: to copy them costs more


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_operands_of_two_dtypes_are_refused_as_everywhere(other: torch.dtype) -> None:
    a, b = drawn(torch.bfloat16, 6, 8), drawn(other, 8, 5)
    with FloatProducts(), pytest.raises(RuntimeError, match="dtype"):
        a @ b


class Wrapped(Tensor):
    """A tensor that holds its numbers in another one, as packed and distributed tensors do."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]
        made.held = held
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(value.held if isinstance(value, Wrapped) else value for value in args), **(kwargs or {}))


def test_tensors_of_other_kinds_are_met_inside(counted: Counted) -> None:
    x, weight = drawn(torch.bfloat16, 6, 8), drawn(torch.bfloat16, 8, 5)
    with FloatProducts():
        found = x @ Wrapped(weight)
    check_rounded_once(found, x.double() @ weight.double(), torch.bfloat16)
    assert counted.ours == {ATEN.mm.default: 1}


def test_torchs_kernels_are_back_after_the_last_context(counted: Counted) -> None:
    a = drawn(torch.bfloat16, 6, 6)
    with FloatProducts():
        with pytest.raises(ZeroDivisionError), FloatProducts():
            raise ZeroDivisionError
        a @ a
    a @ a
    assert counted.ours == {ATEN.mm.default: 1}
    with FloatProducts():
        a @ a
    assert counted.ours == {ATEN.mm.default: 2}


# ---------------------------------------------------------------------- where it is on


def test_it_is_on_where_the_weights_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2)
    assert isinstance(fast_products(half), FloatProducts)
    assert isinstance(fast_products(nn.Sequential(whole, nn.Linear(2, 2).half())), FloatProducts)
    assert not isinstance(fast_products(whole), FloatProducts)
    assert not isinstance(fast_products(nn.Linear(2, 2, device="meta").bfloat16()), FloatProducts)
    monkeypatch.setattr(float_products, "slow_in", lambda dtype: False)
    assert not isinstance(fast_products(half), FloatProducts)


@pytest.mark.parametrize(("half", "slow"), [(2.9, False), (3.1, True)])
def test_a_processor_is_slow_in_what_takes_it_three_times_as_long(
    half: float, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_seconds", {torch.float32: 1.0, torch.bfloat16: half}.__getitem__)
    assert processor.slow_in.__wrapped__(torch.bfloat16) == slow


def test_a_processor_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "facts", lambda: {"model name": "Some CPU @ 3 GHz"})
    assert processor.named() == f"Some CPU @ 3 GHz, {torch.backends.cpu.get_cpu_capability()}"
    monkeypatch.setattr(processor, "facts", dict)
    assert len(processor.named().split(", ")[0]) > 2, "what Python says of the machine"


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.3},
    "dora": {},
    "molora": {},
    "adapter_houlsby": {},
    "prefix_tuning": {},
    "oft": {"block_size": 8},
    "vera": {},
    "full": {},
}


STEPS = [*((id, "none") for id in METHODS), *((id, how) for id in ("lora", "full") for how in ("cheap", "full"))]


@pytest.mark.parametrize(("id", "recompute"), STEPS)
def test_a_step_leaves_no_product_in_half_precision(
    id: str, recompute: Any, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    monkeypatch.setattr(float_products, "_BLOCK", 1000)
    host = al.attach(models.tiny(precision="bf16"), method(id)(**METHODS[id]))
    loop = Loop(host, "default", models.token_rows(8), Training(batch_size=4, steps=2, lr=1e-2, recompute=recompute))
    seen = Seen()
    with seen:
        loop.run()
    assert counted.ours[ATEN.mm.default]
    assert not +counted.torchs
    assert {func for func, times in seen.half.items() if times} <= float_products.OPERATORS


def test_runs_on_one_base_leave_none_while_any_of_them_goes_on(counted: Counted) -> None:
    host = Host(models.tiny(precision="bf16"))
    rows = models.token_rows(8)

    def entrant(name: str, steps: int) -> Entrant:
        def start(stopping: Any) -> Any:
            host.attach(al.LoRA(r=2), name)
            training = Training(batch_size=4, steps=steps, eval_every=9)
            return Loop(host, name, rows, training, listeners=[Ends()]).course(stopping)

        return Entrant(name, start)

    after: list[int] = []

    class Ends(Listener):
        def finished(self, loop: Loop) -> None:
            after.append(counted.ours.total())

    endings = train_together(host, [entrant("short", 1), entrant("long", 3)])
    assert [ending.error for ending in endings] == [None, None]
    assert 0 < after[0] < after[1]
    assert not +counted.torchs


def test_evaluation_and_answers_leave_none(counted: Counted) -> None:
    model = models.tiny(precision="bf16")
    al.attach(model, al.LoRA())
    seen = Seen()
    with seen:
        evaluate_loss(model, models.token_rows(4), Collator(0))
        generate(model, _Words(), [[1, 2, 3], [4, 5]], max_new_tokens=3)
    assert counted.ours
    assert not +counted.torchs
    assert {func for func, times in seen.half.items() if times} <= float_products.OPERATORS


def test_other_trainers_have_them_by_the_callback(tmp_path: Path, counted: Counted) -> None:
    model = models.tiny(precision="bf16")
    host = al.attach(model, al.LoRA())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=Collator(0), train_dataset=Dataset.from_list(models.token_rows(4)),
        callbacks=[al.AdapterlabCallback(host, "default")],
    )  # fmt: skip
    trainer.train()
    assert counted.ours[ATEN.mm.default]
    assert not +counted.torchs
    before = counted.ours.total()
    drawn(torch.bfloat16, 8, 8) @ drawn(torch.bfloat16, 8, 8)
    assert counted.ours.total() == before


class _Words:
    """As much of a tokenizer as answers need."""

    pad_token_id, eos_token_id, model_max_length, chat_template = 0, None, 64, None

    def decode(self, ids: Any, **_: Any) -> str:
        return str(ids)


def test_gradients_are_those_of_half_precision() -> None:
    """Nearer to those of the same weights in float32 than a bound of a few roundings, and none of them is copied."""
    kept: list[torch.dtype] = []

    def gradients(dtype: torch.dtype, context: Any) -> dict[str, Tensor]:
        model = models.tiny(precision="bf16").to(dtype)
        host = al.attach(model, al.LoRA(r=4))
        torch.manual_seed(0)
        with torch.no_grad():
            for p in host.parameters("default"):
                p.normal_(std=0.1)
        batch = models.batch(model, rows=4, length=12)

        def pack(t: Tensor) -> Tensor:
            if t.is_floating_point():
                kept.append(t.dtype)
            return t

        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**batch).loss.backward()
        return {key: p.grad.clone() for key, p in host.tensors("default").items() if p.grad is not None}

    exact = gradients(torch.float32, contextlib.nullcontext())
    kept.clear()
    plain = gradients(torch.bfloat16, contextlib.nullcontext())
    before, _ = Counter(kept), kept.clear()
    found = gradients(torch.bfloat16, FloatProducts())
    assert Counter(kept) == before
    off, usual = (sum(float((each[key] - exact[key]).norm()) for key in exact) for each in (found, plain))
    assert off <= 1.2 * usual


@pytest.mark.parametrize("shape", [(3, 5, 70), (70, 5, 3), (30, 4, 60), (6, 90, 8), (40, 50, 60)])
def test_a_plan_counts_the_copies(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_products, "_BLOCK", 200)
    m, k, n = shape
    a, b = drawn(torch.bfloat16, m, k), drawn(torch.bfloat16, k, n)
    out = a.new_empty(m, n)
    for compute, given in (
        (functools.partial(float_products._multiplied, out), (a, b)),
        (functools.partial(float_products._bmm, torch.bmm), (a.expand(9, -1, -1), b.expand(9, -1, -1))),
    ):
        tracker = Tracker()
        tracker._watch((*given, out))
        before = tracker.total
        with tracker:
            result = compute(*given)
        made = 0 if result is out else result.nbytes
        peak = max(moment.total for moment in tracker.moments.values())
        assert peak - before - made == float_products.copied(*given)
    assert not float_products.copied(a.float(), b.float())

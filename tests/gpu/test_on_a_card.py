"""On a CUDA device: fused forms against their formulas in float64, runs against those of a CPU, rows and decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterlab as al
from adapterlab.data import Collator, PackingCollator, placed
from adapterlab.ops.cross_entropy import linear_cross_entropy
from adapterlab.ops.experts import routed_low_rank
from adapterlab.ops.fourier import Entries, spectral_matrix, spectral_product, symmetric_entries
from adapterlab.ops.hadamard import walsh_hadamard
from adapterlab.ops.low_rank import Span, low_rank_linear, low_rank_spans
from adapterlab.ops.magnitude import magnitude_linear
from adapterlab.ops.rms_norm import Form, rms_norm
from adapterlab.ops.rotation import turned
from adapterlab.ops.sparse_update import sparse_linear
from adapterlab.registry import method
from adapterlab.testing.models import packed
from adapterlab.train import Loop, Training
from segmented_runs import with_triton

pytestmark = pytest.mark.gpu
TOKENS, IN, OUT, RANK = 24, 32, 48, 4
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
SIDES = symmetric_entries(torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(8))[:50], OUT, IN)
PLACES = torch.tensor([[0, 3, 3, 40], [1, 0, 31, 7]])


def like(held: Tensor, x: Tensor) -> Tensor:
    return held.to(x.device, x.dtype if held.is_floating_point() else held.dtype)


def added(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, like(WEIGHT, x)) + 1.5 * x @ a.T @ b.T


def two_spans(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return low_rank_spans(x, like(WEIGHT, x), None, [Span(0, 10, a, b, 1.5), Span(12, TOKENS, a, b, 0.5)])


def two_parts(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    share = torch.tensor([1.5] * 10 + [0.0] * 2 + [0.5] * (TOKENS - 12), dtype=x.dtype)[:, None]
    return F.linear(x, like(WEIGHT, x)) + share * (x @ a.T @ b.T)


def experts(x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
    return torch.einsum("te,eor,eri,ti->to", (x @ router.T).softmax(-1), b, a, x)


def rotated(x: Tensor, blocks: Tensor) -> Tensor:
    return x + torch.einsum("tni,nij->tnj", x.unflatten(-1, (len(blocks), -1)), blocks).flatten(1)


def butterflies(x: Tensor) -> Tensor:
    h = torch.ones(1, 1, dtype=x.dtype)
    while len(h) < x.shape[-1]:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return x @ h


def scattered(x: Tensor, values: Tensor) -> Tensor:
    return F.linear(x, like(WEIGHT, x).index_put(tuple(PLACES), values, accumulate=True))


def transformed(x: Tensor, values: Tensor) -> Tensor:
    sides = (Entries(*(like(field, x) for field in side)) for side in SIDES)
    return spectral_product(x, values.float(), *sides)  # trained values are never in half precision


def losses(hidden: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, like(WEIGHT, hidden)), torch.arange(TOKENS) * 2, reduction="sum")


FACTORS = [(TOKENS, IN), (RANK, IN), (OUT, RANK)]
# name: the fused form, the same written out, shapes of what both take
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "low rank": (lambda x, a, b: low_rank_linear(x, like(WEIGHT, x), None, a, b, 1.5), added, FACTORS),
    "spans": (two_spans, two_parts, FACTORS),
    "magnitude": (
        lambda x, a, b, gain: magnitude_linear(x, like(WEIGHT, x), None, a, b, 1.5, gain),
        lambda x, a, b, gain: gain * added(x, a, b),
        [*FACTORS, (OUT,)],
    ),
    "experts": (
        lambda x, a, b, router: routed_low_rank(x, a, b, router)[0],
        experts,
        [(TOKENS, IN), (3, RANK, IN), (3, OUT, RANK), (3, IN)],
    ),
    "rotation": (turned, rotated, [(TOKENS, IN), (4, 8, 8)]),
    "hadamard": (walsh_hadamard, butterflies, [(TOKENS, 256)]),
    "entries": (
        lambda x, values: sparse_linear(x, like(WEIGHT, x), None, values, like(PLACES, x), OUT),
        scattered,
        [(TOKENS, IN), (PLACES.shape[1],)],
    ),
    "fourier": (
        transformed,
        lambda x, values: x @ spectral_matrix(values, SIDES[0], IN).T,
        [(TOKENS, IN), (50,)],
    ),
    "cross entropy": (
        lambda h: linear_cross_entropy(h, like(WEIGHT, h), None, like(torch.arange(TOKENS) * 2, h)),
        losses,
        [(TOKENS, IN)],
    ),
}


def value_and_gradients(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    value = function(*leaves)
    upper = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    return [value, *torch.autograd.grad((value * upper).sum() if value.dim() else value, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_fused_form_is_its_formula(name: str, dtype: torch.dtype, card: str) -> None:
    fused, formula, shapes = CASES[name]
    draw = torch.Generator().manual_seed(3)
    given = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    found = value_and_gradients(fused, [t.to(card) for t in given])
    wanted = value_and_gradients(formula, [t.double() for t in given])
    for here, there in zip(found, wanted, strict=True):
        error = (here.cpu().double() - there).norm() / there.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_norm_has_the_bits_of_the_plain_one_and_its_gradient(card: str) -> None:
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(3)).to(card, torch.bfloat16).requires_grad_()
    weight = torch.linspace(0.5, 1.5, IN).to(x)
    n = x.float()
    wanted = weight * (n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    found = rms_norm(x, weight, Form(1e-6))
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(y.float().sin().sum(), x)[0].float() for y in (found, wanted)]
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


def trained(model: Any, id: str, card: str, **settings: Any) -> tuple[list[Tensor], float]:
    """The adapter and the loss after three steps of our loop, which proves that every tensor trains."""
    rows = [{"input_ids": [3 + i, 7, 9 + i, 11, 5], "labels": [-100, 7, 9 + i, 11, 5]} for i in range(8)]
    torch.manual_seed(0)
    host = al.attach(model.to(card), method(id)(**settings))
    loop = Loop(host, "default", rows, Training(steps=3, batch_size=4, lr=1e-2, warmup=0), collate=Collator(0))
    loop.run()
    return [t.detach().cpu().float() for t in host.tensors("default").values()], loop.status.train_loss


@pytest.mark.parametrize("id", ["lora", "dora"])
def test_a_run_is_that_of_the_cpu(id: str, card: str, tiny: Any) -> None:
    (found, loss), (wanted, expected) = (trained(tiny("llama"), id, place, r=4) for place in (card, "cpu"))
    assert loss == pytest.approx(expected, rel=1e-4)
    for here, there in zip(found, wanted, strict=True):
        assert (here - there).norm() < 0.05 * there.norm()


def test_rows_that_share_their_opening_have_the_gradients_of_whole_ones(card: str, tiny: Any, randomise: Any) -> None:
    host = al.attach(tiny("llama").to(card, torch.bfloat16), al.LoRA(r=2))
    randomise(host)
    rows = [{"input_ids": [*range(3, 23), 30 + i, 9], "labels": [-100] * 21 + [9]} for i in range(4)]
    found = []
    for share in (True, False):
        host.model.zero_grad()
        with al.fast_attention(host.model):
            al.Loss(host.model)(placed(PackingCollator(share=share)(rows), torch.device(card))).backward()
        found.append(torch.cat([p.grad.flatten() for p in host.parameters("default") if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 2e-2 * found[1].norm()


def test_a_packed_base_trains(card: str, tiny: Any) -> None:
    pytest.importorskip("bitsandbytes")
    if card == "cpu":
        pytest.skip("bitsandbytes packs narrower rows there than it can read")
    model = tiny("llama").to(card)
    for block in model.model.layers:
        for name, part in list(block.mlp.named_children()):
            if isinstance(part, nn.Linear):
                setattr(block.mlp, name, packed(part, "nf4"))
    _, loss = trained(model, "qlora", card, targets=["gate", "up", "down"], dropout=0.0)
    assert loss == pytest.approx(trained(tiny("llama"), "lora", card, targets=["gate", "up", "down"])[1], rel=0.1)


@pytest.fixture
def three(card: str, tiny: Any, randomise: Any) -> Any:
    """A model on the device with three LoRAs."""
    host = al.attach(tiny("llama").to(card), al.LoRA(r=2), "a")
    for name, r in (("b", 3), ("c", 4)):
        host.attach(al.LoRA(r=r), name)
    randomise(host, size=0.2)
    return host


def ids(card: str) -> Tensor:
    return torch.randint(3, 100, (4, 7), generator=torch.Generator().manual_seed(0)).to(card)


def answers(host: Any, tokens: Tensor) -> Tensor:
    return host.model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)


def test_rows_of_one_batch_have_their_own_adapters(three: Any, card: str) -> None:
    names, tokens = ["b", None, "a", "c"], ids(card)
    with torch.no_grad(), three.rows(names):
        mixed = three.model(tokens).logits
    with torch.no_grad(), three.stack("a", "b", "c") as stack:
        stack.rows(names)
        stacked = three.model(tokens).logits
    for row, name in enumerate(names):
        with torch.no_grad(), three.using(*([name] if name else [])):
            alone = three.model(tokens).logits[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stacked[row], alone, rtol=1e-4, atol=1e-4)


def test_decoding_gives_the_same_tokens_however_the_adapter_is_there(three: Any, card: str) -> None:
    tokens = ids(card)
    three.activate("b")
    beside = answers(three, tokens)
    with three.rows(["b"] * len(tokens)):
        assert torch.equal(answers(three, tokens), beside)
    three.merge("b")
    assert torch.equal(answers(three, tokens), beside)
    three.restore("b")
    assert torch.equal(answers(three, tokens), beside)
    three.activate()
    assert not torch.equal(answers(three, tokens), beside)


def test_tritons_products_of_runs_are_the_formula(card: str) -> None:
    pytest.importorskip("triton")
    if card == "cpu":
        pytest.skip("Triton compiles for a card; tests/ops has it interpreted")
    with_triton(card)

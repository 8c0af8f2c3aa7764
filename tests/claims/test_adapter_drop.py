"""AdapterDrop: drawing the number of dropped layers in training makes one adapter work with few layers of it."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from mutations import Mutation, fails_without
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from adapterlab.errors import AttachError, ConfigError, MergeError
from adapterlab.hosts import Host, attach
from adapterlab.methods.bottleneck import adapter_drop
from adapterlab.methods.bottleneck.adapter_drop import AdapterDrop
from adapterlab.optim import adamw

LAYERS = 6
NAME = "default"


@functools.cache
def task() -> tuple[Any, Tensor, Tensor]:
    """A frozen tiny encoder, inputs, and what one with other weights makes of them."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base, teacher = BertModel(config), BertModel(config)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        teacher.load_state_dict(base.state_dict())
        for p in teacher.encoder.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    ids = torch.randint(0, 64, (40, 12))
    with torch.no_grad():
        return base.state_dict(), ids, teacher.eval()(ids).last_hidden_state


def student() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config)
    model.load_state_dict(task()[0])
    return model.eval()


def error(model: Any, part: slice) -> Tensor:
    """Mean squared distance from the other encoder."""
    _, ids, wanted = task()
    return (model(ids[part]).last_hidden_state - wanted[part]).square().mean()


def steps(host: Host, count: int, decay: float = 0.0) -> None:
    """Train with all events of the method."""
    method = host.methods[NAME]
    optimizer = method.optimizer(host, NAME, lambda p: adamw(p, lr=1e-2, weight_decay=decay))
    for step in range(count):
        method.before_step(host, NAME, step, optimizer)
        error(host.model, slice(32)).backward()
        method.after_backward(host, NAME, step)
        optimizer.step()
        method.after_step(host, NAME, step, optimizer)
        optimizer.zero_grad()


@torch.no_grad()
def gains(robust: bool) -> list[float]:
    """What is left of the error with so many dropped layers, after training."""
    model = student()
    start = float(error(model, slice(32, None)))
    host = attach(model, AdapterDrop(settings={"m": 8}, robust=robust))
    with torch.enable_grad():
        steps(host, 150)
    method: Any = host.methods[NAME]
    left = []
    for n in range(LAYERS):
        method.choose(host, NAME, n)
        left.append(float(error(model, slice(32, None))) / start)
    return left


PLAIN = functools.cache(functools.partial(gains, False))


@pytest.mark.slow
def test_claim() -> None:
    """With half of the layers dropped robust adapters lose at most half of what others lose, and little with none."""
    plain, robust = PLAIN(), gains(True)
    half = LAYERS // 2
    assert plain[0] < 0.5
    assert robust[half] - plain[0] <= 0.5 * (plain[half] - plain[0]), (plain, robust)
    assert robust[0] < 1.5 * plain[0] + 0.05, (plain, robust)


def work(n: int) -> float:
    """Floating-point operations of a step with n dropped layers, of which the method has nothing to compute."""
    model = student()
    host = attach(model, AdapterDrop(settings={"m": 8}, drop=n, robust=False))
    with FlopCounterMode(display=False) as counter:
        steps(host, 1)
    return counter.get_total_flops()


def test_dropped_layers_have_no_backward_pass() -> None:
    assert work(3) < 0.8 * work(0)
    assert work(5) < 0.7 * work(0)


def test_robust_steps_save_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterDrop, "draw", lambda self, depth, step: 3)
    host = attach(student(), AdapterDrop(settings={"m": 8}))
    with FlopCounterMode(display=False) as counter:
        steps(host, 1)
    assert counter.get_total_flops() == work(3)


@pytest.mark.parametrize("n", [0, 2, 5])
def test_dropped_layers_are_the_base(n: int, randomise: Any) -> None:
    """As if the adapters of the first n layers added nothing and their norms were the base's."""
    model = student()
    host = attach(model, AdapterDrop(adapter="adapter_houlsby", settings={"m": 4}, drop=n))
    randomise(host)
    got = error(model, slice(8))
    method: Any = host.methods[NAME]
    method.choose(host, NAME, 0)
    if n:
        assert not torch.equal(error(model, slice(8)), got)
    with torch.no_grad():
        for path, adapter in host.adapters(f"{NAME}/adapter").items():
            if any(f".{i}." in path for i in range(n)):
                for key, p in adapter.named_parameters():
                    p.copy_(model.state_dict()[f"{path}.{key[5:]}"]) if key.startswith("copy.") else p.zero_()
    assert torch.allclose(error(model, slice(8)), got, atol=1e-6)


def test_draws() -> None:
    """Uniform over 0 .. L − 1, a function of seed and step."""
    method = AdapterDrop()
    found = Counter(method.draw(LAYERS, step) for step in range(3000))
    assert set(found) == set(range(LAYERS))
    assert all(400 < count < 600 for count in found.values())
    assert [method.draw(12, t) for t in range(20)] != [AdapterDrop(seed=1).draw(12, t) for t in range(20)]


def test_what_is_dropped_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither momentum nor decay reaches it, and evaluation between steps has all adapters."""
    host = attach(student(), AdapterDrop(settings={"m": 4}))
    drawn = [0, 4, 4]
    monkeypatch.setattr(AdapterDrop, "draw", lambda self, depth, step: drawn[step])
    steps(host, 1, decay=0.1)
    before = host.state_dict(NAME)
    for step in (1, 2):
        drawn[0] = drawn[step]
        steps(host, 1, decay=0.1)
    after = host.state_dict(NAME)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if ".4." in key or ".5." in key}
    assert not any(adapter.idle for adapter in host.methods[NAME].adapters(host, NAME))
    assert all(p.requires_grad for p in host.tensors(NAME).values())


def test_momentum_does_not_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    host = attach(student(), AdapterDrop(settings={"m": 4}))
    monkeypatch.setattr(AdapterDrop, "draw", lambda self, depth, step: 4 * (step > 0))
    method: Any = host.methods[NAME]
    optimizer = method.optimizer(host, NAME, lambda p: adamw(p, lr=1e-2, weight_decay=0.1))
    for step in range(3):
        method.before_step(host, NAME, step, optimizer)
        waits = {key for key in host.tensors(NAME) if not (".4." in key or ".5." in key)} if step else set()
        assert set(host.tensors(NAME)) - set(host.named_parameters(NAME)) == waits
        error(host.model, slice(8)).backward()
        before = host.state_dict(NAME)
        optimizer.step()
        method.after_step(host, NAME, step, optimizer)
        optimizer.zero_grad()
        after = host.state_dict(NAME)
        assert {key for key in before if torch.equal(before[key], after[key])} == waits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classes", "t5", "mixtral", "vit"])
def test_specialised_adapters_are_not_there(kind: str, tiny: Any, batch_for: Any, logits: Any, tmp_path: Any) -> None:
    model = tiny(kind)
    host = attach(model, AdapterDrop(settings={"m": 4}, drop=1, robust=False))
    assert host.summary().trainable == (2 if kind == "t5" else 1) * (2 * 4 * 32 + 4 + 32)
    batch = batch_for(model)
    host.verify(batch)
    again = tiny(kind)
    attach(again, AdapterDrop(settings={"m": 4}, drop=1, robust=False)).load_state_dict(NAME, host.state_dict(NAME))
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_any_adapters_in_layers_can_be_dropped(randomise: Any) -> None:
    """LoRA too; what is dropped is not merged either."""
    model = student()
    host = attach(model, AdapterDrop(adapter="lora", settings={"r": 2}, drop=4))
    randomise(host)
    live, weight = error(model, slice(8)), model.encoder.layer[0].output.dense.weight
    host.merge()
    assert torch.allclose(error(model, slice(8)), live, atol=1e-5)
    assert model.encoder.layer[0].output.dense.weight is weight
    host.restore()
    assert torch.equal(error(model, slice(8)), live)


@torch.no_grad()
def test_dropped_layers_in_a_mixed_batch(randomise: Any) -> None:
    """Each row has the layers of its own adapter; the base's rows have none."""
    model = student()
    host = attach(model, AdapterDrop(settings={"m": 4}, drop=3), "few")
    host.attach(AdapterDrop(settings={"m": 4}), "all")
    randomise(host)
    ids = task()[1][:3]
    with host.rows(["few", None, "all"]):
        mixed = model(ids).last_hidden_state
    for i, names in enumerate((["few"], [], ["all"])):
        with host.using(*names):
            assert torch.allclose(mixed[i], model(ids).last_hidden_state[i], atol=1e-5)


def test_tensors_of_the_adapters_keep_their_own_options(tiny: Any) -> None:
    """Scales that start at one are not decayed, whatever drops them."""
    host = attach(tiny("llama"), AdapterDrop(adapter="ia3"))
    made = host.methods[NAME].optimizer(host, NAME, lambda groups: adamw(groups, lr=1e-3, weight_decay=0.1))
    assert [group["weight_decay"] for group in made.param_groups] == [0.0]
    assert {id(p) for group in made.param_groups for p in group["params"]} == {id(p) for p in host.parameters(NAME)}


def test_refusals(tiny: Any) -> None:
    with pytest.raises(AttachError, match=r"drop = 2, and 2 layers.*Choose 0 to 1"):
        attach(tiny("llama"), AdapterDrop(drop=2))
    with pytest.raises(ConfigError, match=r"no method 'adapter_pfeifer'.*adapter_pfeiffer"):
        AdapterDrop(adapter="adapter_pfeifer")
    with pytest.raises(ConfigError, match="its own 'optimizer'"):
        AdapterDrop(adapter="adalora")
    with pytest.raises(ConfigError, match=r"adapter_pfeiffer.*m = 0"):
        AdapterDrop(settings={"m": 0})
    with pytest.raises(AttachError, match=r"changes .* in the base itself"):
        attach(tiny("gpt2"), AdapterDrop(adapter="bitfit"))
    host = attach(tiny("llama"), AdapterDrop())
    with pytest.raises(ConfigError, match="Choose 0 to 1"):
        host.methods[NAME].choose(host, NAME, 2)
    with pytest.raises(MergeError, match="nonlinear function"):
        host.merge()


DROP = AdapterDrop
BROKEN: dict[str, Mutation] = {
    "the last layers": (adapter_drop, "below", lambda adapter, n: (adapter.site.layer or 0) >= n),
    "one layer more": (adapter_drop, "below", lambda adapter, n: adapter.site.layer is not None
                       and adapter.site.layer <= n),
    "norms stay": (adapter_drop, "below", lambda adapter, n: hasattr(adapter, "down") and adapter.site.layer < n),
    "nothing is dropped": (adapter_drop, "below", lambda adapter, n: False),
    "L can be drawn": (DROP, "draw", lambda self, depth, step: step % (depth + 1)),
    "0 is never drawn": (DROP, "draw", lambda self, depth, step: 1 + step % (depth - 1)),
    "small n more often": (DROP, "draw", lambda self, depth, step: min(step % depth, step // depth % depth)),
    "the draw stays": (DROP, "after_step", lambda self, *rest: None),
    "the draw's frozen tensors stay": (DROP, "after_step", lambda self, host, name, *rest: self.choose(host, name, 0)),
    "what is dropped trains on": (adapter_drop, "train", lambda adapter, on: None),
    "gradients of zeros": (adapter_drop, "train", lambda adapter, on: [
        setattr(p, "grad", None if on else torch.zeros_like(p)) for p in adapter.parameters()
    ]),
}  # fmt: skip
test_the_claims_fail_when_a_line_is_broken = fails_without(
    functools.partial(test_dropped_layers_are_the_base, 2),
    test_draws,
    test_what_is_dropped_does_not_move,
    test_momentum_does_not_move_it,
    test_robust_steps_save_the_same,
    lines=BROKEN,
)


@pytest.mark.slow
def test_the_claim_fails_when_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DROP, "draw", lambda self, depth, step: 0)
    with pytest.raises(AssertionError):
        test_claim()

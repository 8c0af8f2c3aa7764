"""ReLoRA: the run is the written one, the sum of links has a high rank, and it learns what one LoRA cannot."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterlab as al
import everywhere
import links_by_hand as hand
from adapterlab.convert import export_lora
from adapterlab.errors import ConfigError, NotTrainingError
from adapterlab.methods.schedule import relora
from adapterlab.methods.schedule.relora import ReLoRA
from adapterlab.optim import adamw, factor
from links_by_hand import with_right as on

WARM, LINKS, RAMP, SHARE = 12, 4, 3, 0.9
STARTS = [12, 24, 36, 48]


def method(**fields: Any) -> Any:
    return al.ReLoRA(**{
        "r": hand.R, "alpha": hand.ALPHA, "links": LINKS, "warm_start": WARM, "restart_warmup": RAMP,
        "reset_share": SHARE, "targets": ["0"], **fields,
    })  # fmt: skip


def jagged(step: int) -> float:
    """The rate of the paper's figure: a ramp of RAMP steps up to the schedule at its end."""
    start = max((s for s in STARTS if s <= step), default=None)
    if start is None or step - start >= RAMP:
        return hand.plain(step)
    return (step - start + 1) / RAMP * hand.plain(start + RAMP)


def largest(moments: hand.Moments) -> None:
    sizes = moments["mean"].abs()
    for key in ("mean", "square"):
        moments[key][sizes <= torch.quantile(sizes, SHARE)] = 0


def holds() -> bool:
    """It is the written run; each link has rank r, their sum more; it ends below plain LoRA."""
    host, _, a = hand.ours(method())
    theirs = hand.written(a, STARTS, jagged, forget=largest, warm=WARM)
    close = bool((hand.weight(host) - theirs).abs().max() < 1e-4)
    host, *_ = hand.ours(method(warm_start=0, restart_warmup=1))
    total = hand.weight(host) - hand.task()[0][0].weight
    layer: Any = host.adapters("default")["0"]
    links = [hand.rank(b @ a) for a, b in zip(layer.A_past.split(hand.R), layer.B_past.split(hand.R, 1), strict=True)]
    ranks = set(links) == {hand.R} and hand.rank(total) >= 3 * hand.R
    long, alone = (hand.ours(method(warm_start=0, links=n), steps=320)[1][-1] for n in (8, 1))
    return close and ranks and long < alone / 2


def test_claim_it_is_the_written_run_and_the_sum_has_a_high_rank() -> None:
    assert holds()


MUTATIONS: dict[str, Any] = {
    "nothing is merged": lambda m: m.setattr(ReLoRA.Layer, "past", lambda self: 0 * self.delta().detach()),
    "merged without the scale": on(ReLoRA.Layer, "past", lambda right, self: right(self) / self.scale),
    "A stays": on(
        ReLoRA.Layer, "pass_on", lambda right, self, *args: self.A.copy_((self.A.clone(), right(self, *args))[0])
    ),
    "B stays": on(
        ReLoRA.Layer, "pass_on", lambda right, self, *args: self.B.copy_((self.B.clone(), right(self, *args))[0])
    ),
    "links overwrite each other": on(ReLoRA.Layer, "pass_on", lambda right, self, after, kept: right(self, 0, kept)),
    "nothing is forgotten": lambda m: m.setattr(relora, "thin_out", lambda *args: None),
    "everything is forgotten": lambda m: m.setattr(relora, "thin_out", lambda held, *args: [v.zero_() for v in held]),
    "any are forgotten": on(relora, "thin_out", lambda right, held, share, by: right(held, share, "random")),
    "fewer are forgotten": on(relora, "thin_out", lambda right, held, share, by: right(held, 0.5, by)),
    "those of the largest squares stay": on(relora, "thin_out", lambda right, held, *args: right(held[::-1], *args)),
    "one moment is forgotten": on(relora, "moments", lambda right, *args: right(*args)[:1]),
    "the count is forgotten": lambda m: m.setattr(ReLoRA, "forget", relora.Restarts.forget),
    "no ramp": lambda m: m.setattr(ReLoRA, "rate", lambda self, step, steps, plain: plain(step)),
    "a longer ramp": on(ReLoRA, "rate", lambda right, self, *args: right(self.replace(restart_warmup=5), *args)),
    "the schedule begins anew": lambda m: m.setattr(
        ReLoRA, "rate", lambda self, step, steps, plain: plain(self.place_in(step, steps)[1])
    ),
    "other parts of the run": on(
        ReLoRA, "place_in", lambda right, self, *args: right(self.replace(links=max(1, self.links - 1)), *args)
    ),
    "no warm start": on(ReLoRA, "place_in", lambda right, self, *args: right(self.replace(warm_start=0), *args)),
    "the warm start never ends": on(ReLoRA.Layer, "switch", lambda right, self, warm: right(self, True)),
    "the warm start is lost": on(
        ReLoRA.Layer, "past", lambda right, self: right(self) - (self.full.detach() if self.full is not None else 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", list(MUTATIONS))
def test_the_claim_fails_with(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[broken](monkeypatch)
    assert not holds()


def test_rates_of_the_official_schedule() -> None:
    """T = 400, R = 100, ramps of 10, warm-up of 20, floor of 0.1; one step earlier, since none has a rate of zero."""
    made = al.ReLoRA(links=4, restart_warmup=10)

    def official(step: float) -> float:
        if step < 20:
            return (step + 1) / 20
        return factor(step - 20, 380, kind="cosine", floor=0.1)

    found = {t: made.rate(t, 400, official) for t in (9, 99, 104, 109, 209)}
    wanted = {9: 0.5, 99: 0.9074, 104: 0.4405, 109: 0.8811, 209: 0.55}
    assert found == pytest.approx(wanted, abs=1e-4)
    assert min(made.rate(t, 400, official) for t in range(400)) > 0


def test_a_bfloat16_base_loses_nothing_that_was_merged() -> None:
    """Many small links: added to a bfloat16 weight one by one they would vanish."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    nn.init.constant_(model[0].weight, 1.0)
    host = al.attach(model, al.ReLoRA(r=1, alpha=1, links=65, targets=["0"]))
    made, layer = host.methods["default"], host.adapters("default")["0"]
    optimizer = torch.optim.SGD(host.parameters("default"), lr=0.1)
    for link in range(1, 65):
        with torch.no_grad():
            layer.A.fill_(1.0)
            layer.B.fill_(1e-3)
        made.restart(host, "default", link, optimizer)
    assert float(model[0].weight.float().mean()) == pytest.approx(1.064, abs=4e-3)
    assert layer.A_past.dtype == torch.float32
    host.detach("default")
    assert bool((model[0].weight == 1).all())


@pytest.mark.parametrize("in_base", [True, False])
def test_the_whole_is_one_lora_of_all_ranks_and_detaching_restores_every_bit(in_base: bool, tmp_path: Path) -> None:
    plain, x, _ = hand.task()
    before = plain[0].weight.detach().clone()
    host, *_ = hand.ours(method(warm_start=0, in_base=in_base))
    wanted = host.model(x)
    assert torch.equal(host.model[0].weight, before) != in_base
    made = export_lora(host, "default", into="whole")
    assert made.ranks == {"0": LINKS * hand.R}
    assert made.error < 1e-6
    less = export_lora(host, "default", rank=hand.R, into="less")
    assert 0.2 < less.energy < 0.99
    with host.using("whole"):
        assert torch.equal(host.model[0].weight, before)
        assert torch.allclose(host.model(x), wanted, atol=1e-4)
    host.save(tmp_path / "a", "default")
    again = al.load(copy.deepcopy(plain), tmp_path / "a")
    assert torch.equal(again.model(x), wanted)
    merged = copy.deepcopy(again.model)
    al.host(merged).merge()
    assert torch.allclose(merged(x), wanted, atol=1e-4)
    host.detach("whole")
    host.detach("less")
    host.detach("default")
    assert torch.equal(host.model[0].weight, before)


def test_with_a_warm_start_the_dense_change_is_exported_as_the_nearest_lora() -> None:
    host, *_ = hand.ours(method())
    made = export_lora(host, "default", rank=4, into="near")
    change = hand.weight(host) - hand.task()[0][0].weight.detach()
    values = torch.linalg.svdvals(change.double()).square()
    assert made.energy == pytest.approx(float(values[:4].sum() / values.sum()), abs=1e-4)


@pytest.mark.parametrize("at", [6, 24, 30])
def test_resumed_it_ends_in_the_same_bits(at: int) -> None:
    whole, *_ = hand.ours(method())
    hosts = [al.attach(hand.task()[0], method()) for _ in range(2)]
    optimizers = [torch.optim.Adam(host.parameters("default"), lr=hand.LR) for host in hosts]
    for host, optimizer, steps in zip(hosts, optimizers, (range(at), range(at, hand.STEPS)), strict=True):
        found, (_, x, target) = host.methods["default"], hand.task()
        found.begin(host, "default", hand.STEPS)
        if host is hosts[1]:
            host.load_state_dict("default", hosts[0].state_dict("default"))
            optimizer.load_state_dict(optimizers[0].state_dict())
        for step in steps:
            found.before_step(host, "default", step, optimizer)
            optimizer.param_groups[0]["lr"] = hand.LR * found.rate(step, hand.STEPS, hand.plain)
            optimizer.zero_grad()
            (host.model(x) - target).square().sum(1).mean().backward()
            optimizer.step()
    for key, value in whole.state_dict("default").items():
        assert torch.equal(hosts[1].state_dict("default")[key], value), key


def test_a_second_run_makes_room_for_its_links() -> None:
    host, *_ = hand.ours(method(warm_start=0, links=2, restart_warmup=1))
    _, x, _ = hand.task()
    wanted, found = host.model(x).detach(), host.methods["default"]
    optimizer = torch.optim.SGD(host.parameters("default"), lr=0.0)
    found.begin(host, "default", 4)
    for step in range(4):
        found.before_step(host, "default", step, optimizer)
    assert torch.allclose(host.model(x), wanted, atol=1e-5)
    assert len(host.adapters("default")["0"].A_past) == 2 * hand.R


def test_masters_and_counters_of_an_optimizer_follow() -> None:
    host = al.attach(hand.task()[0], method(warm_start=0, reset="all"))
    optimizer = adamw(host.parameters("default"), lr=0.1)
    for p in host.parameters("default"):
        p.grad = torch.ones_like(p)
    optimizer.step()
    host.methods["default"].restart(host, "default", 1, optimizer)
    assert not any(optimizer.state.values())


def test_what_does_not_fit_is_refused() -> None:
    host = al.attach(hand.task()[0], method())
    made, optimizer = host.methods["default"], torch.optim.SGD(host.parameters("default"), lr=0.1)
    with pytest.raises(NotTrainingError, match=r"begin\(host, 'default', steps\)"):
        made.before_step(host, "default", 0, optimizer)
    with pytest.raises(ConfigError, match=r"links=4 need a step each, and of this run's \d+ 2 are left.*1 to 2 links"):
        made.begin(host, "default", 14)
    with pytest.raises(ConfigError, match=r"run's 12 0 are left for them after the 12 before.*a shorter start"):
        made.begin(host, "default", 12)
    with pytest.raises(ConfigError, match=r"run's 9 0 are left for them after the 12 before.*a shorter start"):
        made.begin(host, "default", 9)
    with pytest.raises(ConfigError, match=r"restart_warmup=3 is no shorter than the 2 steps"):
        made.begin(host, "default", 20)
    with pytest.raises(ConfigError, match=r"init='pissa' cannot begin a link"):
        al.ReLoRA(init="pissa")
    with pytest.raises(ConfigError, match="lora_bias"):
        al.ReLoRA(lora_bias=True)


def test_start_and_count(tiny: Any, batch_for: Any, logits: Any) -> None:
    model = tiny("gpt2")
    batch = batch_for(model)
    base = logits(model, batch)
    host = al.attach(model, al.ReLoRA(r=4))
    assert torch.equal(logits(model, batch), base)
    assert host.summary().trainable == sum(4 * sum(a.site.shape) for a in host.adapters("default").values())
    assert math.isclose(host.methods["default"].rate(0, 100, lambda step: 1.0), 1.0)


@pytest.mark.parametrize(
    "method",
    [al.ReLoRA(links=2, warm_start=1, restart_warmup=1), al.ReLoRA(links=2, in_base=False, reset="random")],
)
def test_other_settings_are_alike_in_every_loop(method: al.Method, tmp_path: Path) -> None:
    everywhere.check(method, tmp_path)

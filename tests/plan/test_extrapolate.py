"""A few layers tell the truth about many: against simulations of every layer."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from adapterlab.plan.child import called
from adapterlab.plan.extrapolate import cut, extrapolated
from adapterlab.plan.planning import setup_of
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import Trace
from adapterlab.plan.simulate import simulate as simulated
from adapterlab.plan.tracker import NeedsNumbers

DEPTH = 13  # the fewest layers that are not all simulated
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def simulate(given: Setup) -> Trace:
    found: Trace = called(simulated, given)
    return found


def setup(method: Any, **options: Any) -> Setup:
    config = AutoConfig.for_model("llama", **SIZES)
    return setup_of(config, method, **{"batch": 2, "length": 40, "precision": "bf16", **options})


@pytest.mark.parametrize(
    "given",
    [
        setup("lora"),
        setup("lora", recompute="full"),
        setup("lora", recompute="cheap"),
        setup("full", recompute="full"),
        setup("ia3"),
        setup("prefix_tuning"),
        setup("vera", precision="fp32"),
    ],
    ids=lambda given: f"{given.method.id}-{given.training.recompute}",
)
def test_the_peak_is_exact_and_every_window_close(given: Setup) -> None:
    depths: list[int] = []

    def run(short: Setup) -> Any:
        depths.append(short.config.num_hidden_layers)
        return simulate(short)

    quick, whole = extrapolated(given, run), simulate(given)
    assert depths == [3, 4, 5]
    assert quick.peak.total == pytest.approx(whole.peak.total, abs=64)
    for window, moment in quick.moments.items():
        assert sum(moment.parts.values()) == pytest.approx(moment.total, abs=64), f"parts in {window}"
    assert quick.flops == whole.flops
    assert (quick.trainable, quick.layers) == (whole.trainable, whole.layers)
    assert quick.base == pytest.approx(whole.base, abs=64)
    for window, moment in quick.moments.items():
        # Away from the peak, another tensor may be the largest of a window.
        assert moment.total == pytest.approx(whole.moments[window].total, rel=0.02), window
    assert sum(quick.peak.parts.values()) == pytest.approx(quick.peak.total, abs=64)


def test_methods_that_treat_layers_unlike_are_simulated_whole() -> None:
    depths: list[int] = []

    def run(short: Setup) -> Any:
        depths.append(short.config.num_hidden_layers)
        return simulate(short)

    given = setup({"name": "lora", "targets": {"include": ["q", "v"], "layers": "8-10"}})
    trace = extrapolated(given, run)
    assert depths[-1] == DEPTH
    assert trace.trainable == simulate(given).trainable > 0


def test_what_depends_on_numbers_is_refused_without_trying_all_layers() -> None:
    depths: list[int] = []

    def run(short: Setup) -> Any:
        depths.append(short.config.num_hidden_layers)
        raise NeedsNumbers("chooses by value")

    with pytest.raises(NeedsNumbers):
        extrapolated(setup("lora"), run)
    assert len(depths) == 1


def test_cutting_keeps_the_pattern_of_layers() -> None:
    config = AutoConfig.for_model("gemma3_text", **{**SIZES, "num_hidden_layers": 24, "head_dim": 12})
    assert cut(config, 8).layer_types == config.layer_types[:8]
    assert cut(config, 8).num_hidden_layers == 8
    assert config.num_hidden_layers == 24

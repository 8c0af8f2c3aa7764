"""The simulation against real steps of the same models under the same tracker."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from adapterlab.hosts import attach
from adapterlab.plan.child import called
from adapterlab.plan.planning import make_method, setup_of
from adapterlab.plan.setup import Setup
from adapterlab.plan.simulate import ACTIVATIONS, ADAPTER, BASE, STATE, Trace, build
from adapterlab.plan.simulate import simulate as run
from adapterlab.plan.tracker import Tracker, contentless
from adapterlab.train import rng
from adapterlab.train.config import Training
from adapterlab.train.loop import Loop

SIZES: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def setup(method: Any = "lora", kind: str = "llama", **options: Any) -> Setup:
    config = AutoConfig.for_model(kind, **{**SIZES, **options.pop("sizes", {})})
    return setup_of(config, method, **{"batch": 2, "length": 48, "precision": "fp32", **options})


def simulate(given: Setup, **options: Any) -> Trace:
    found: Trace = called(run, given, **options)
    return found


@pytest.mark.parametrize(
    "given",
    [
        setup(),
        setup({"name": "lora", "dropout": 0.1}),
        setup("dora"),
        setup("full", precision="bf16"),
        setup("prefix_tuning"),
        setup("adapter_houlsby"),
        setup("lora", recompute="full"),
        setup("lora", recompute="cheap"),
        setup("lora", precision="bf16", batch=1, length=160),
        setup("lora", "gemma2", sizes={"head_dim": 16}),
        setup("lora", labelled=0.3),
        setup("lora", "mixtral", sizes=EXPERTS),
        setup("dora", "mixtral", precision="bf16", sizes={**EXPERTS, "output_router_logits": True}),
        setup("lora", "t5", sizes=T5),
        setup("full", "t5", recompute="full", sizes=T5),
        setup("lora", "bert", sizes={"is_decoder": True}),
        setup("lora", "gpt2"),
    ],
    ids=lambda given: f"{given.method.id}-{given.config.model_type}-{given.precision}-{given.training.recompute}",
)
def test_live_peak_is_that_of_a_real_run(given: Setup) -> None:
    fake, real = simulate(given), simulate(given, real=True, steps=2)
    assert fake.peak.total == pytest.approx(real.peak.total, rel=0.01)
    assert fake.flops == pytest.approx(real.flops, rel=0.01)
    assert fake.loss == real.loss


def test_parameter_and_optimizer_bytes_are_exact() -> None:
    given = setup("lora", precision="bf16")
    trace = simulate(given)
    model = build(given, real=True)
    base = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.state_dict().values()}
    host = attach(model, make_method("lora"))
    rows = [{"input_ids": list(range(1, 49)), "labels": list(range(1, 49))}] * 2
    loop = Loop(host, "default", rows, Training(batch_size=2, steps=1))
    loop.run()
    state = [v for held in loop._raw.state.values() for v in held.values() if isinstance(v, torch.Tensor)]
    assert trace.resting[STATE] == sum(value.untyped_storage().nbytes() for value in state)
    assert trace.resting[ADAPTER] == sum(p.untyped_storage().nbytes() for p in host.parameters("default"))
    assert trace.trainable == sum(p.numel() for p in host.parameters("default"))
    buffers = trace.resting[BASE] - sum(base.values())
    assert 0 <= buffers < 4096  # rotary frequencies, which no state dict holds


def test_activations_are_told_by_layer_and_shrink_with_recomputation() -> None:
    kept, again = (simulate(setup(recompute=how, sizes={"num_hidden_layers": 3})) for how in ("none", "full"))
    per_layer = [kept.peak.parts[f"{ACTIVATIONS}, layer {i}"] for i in range(3)]
    assert max(per_layer[1:]) == min(per_layer[1:])
    assert again.peak.parts[f"{ACTIVATIONS}, layer 1"] < per_layer[1] / 4
    assert sum(kept.peak.parts.values()) == kept.peak.total


def test_planning_leaves_the_random_numbers_alone() -> None:
    before = called(rng.state)
    simulate(setup())
    after = called(rng.state)
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    assert after == before


def test_a_copy_without_contents_keeps_its_mode() -> None:
    """A mode that was copied, too, gives back the memory of its tensors twice."""
    with contentless() as mode:
        made = copy.deepcopy(torch.nn.Linear(2, 3))
    assert all(getattr(parameter, "fake_mode", None) is mode for parameter in made.parameters())


def test_packed_weights_take_what_bitsandbytes_allocates() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    given = setup("lora", quantize="nf4", sizes={"hidden_size": 128, "intermediate_size": 320})
    made = build(dataclasses.replace(given, quantize=None), real=True)
    wanted, codes = 0, set()
    for path, module in made.named_modules():
        if type(module) is not torch.nn.Linear or path == "lm_head":
            continue
        packed = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to("cpu")
        state = packed.quant_state
        tensors = [packed.data, state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in codes:
                wanted += storage.nbytes()
                codes.add(storage.data_ptr())
        made.get_submodule(path)._kept = (packed, state)

    def base(quantize: str | None) -> int:
        with contentless() as fake, Tracker(fake) as tracker:
            model = build(dataclasses.replace(given, quantize=quantize))
            plain = sum(
                m.weight.untyped_storage().nbytes()
                for path, m in model.named_modules()
                if isinstance(m, torch.nn.Linear) and path != "lm_head" and quantize is None
            )
            return tracker.total - plain

    assert base("nf4") - base(None) == wanted

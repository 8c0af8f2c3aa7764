"""Whether `adapterlab plan` is right for every language model class of transformers: simulated against real steps.

    python benchmarks/plan_classes.py [CLASS ...]

A tiny random model is made of each model type that can generate text, causal or encoder-decoder. Two real steps of LoRA
run under the planner's tracker, and the simulation of one. Compared are the largest number of live bytes, the
floating-point operations, and how the loss is computed. Types whose default configuration cannot be made tiny by the
sizes below are listed as not made: they say nothing about the planner.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import _bench as bench

RESULTS = Path(__file__).parent / "results" / "plan_classes.json"
_PATIENCE = 120  # seconds for one class
_SPACE = 9 << 30  # bytes of address space for one class: the default sizes of some parts are huge
_TOLERANCE = 0.01
_LAYERS, _WIDTH, _INNER, _HEADS = 4, 64, 96, 4
_LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
                 "decoder_layers")  # fmt: skip
_WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model")
_INNER_FIELDS = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
_HEAD_FIELDS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                "decoder_attention_heads")  # fmt: skip
_SIZES: dict[str, int] = {
    **dict.fromkeys(_LAYER_FIELDS, _LAYERS), **dict.fromkeys(_WIDTH_FIELDS, _WIDTH),
    **dict.fromkeys(_INNER_FIELDS, _INNER), **dict.fromkeys(_HEAD_FIELDS, _HEADS),
    "vocab_size": 512, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "rotary_dim": 8, "v_head_dim": 16,
    "max_position_embeddings": 256, "n_positions": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "moe_intermediate_size": 32, "num_local_experts": 4, "n_routed_experts": 4, "num_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    "num_nextn_predict_layers": 0, "o_groups": 2, "o_lora_rank": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}  # fmt: skip


def types() -> list[str]:
    """Return the model types that the automatic classes know."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted({*causal, *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES})


def tiny(kind: str) -> Any:
    """Make a small configuration of a model type."""
    from transformers import AutoConfig

    usual = AutoConfig.for_model(kind).to_dict()
    changed: dict[str, Any] = {
        name: size for name, size in _SIZES.items() if name in usual and isinstance(usual[name], int | None)
    }
    if "qk_rope_head_dim" in usual:  # latent attention has its own widths
        changed.pop("head_dim", None)
        changed["num_key_value_heads"] = _HEADS
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(usual.get(name), list):
            changed[name] = [*usual[name][: _LAYERS - 1], usual[name][-1]]
    if usual.get("is_encoder_decoder"):
        changed["decoder_start_token_id"] = 2
    return AutoConfig.for_model(kind, **changed)


def compare(kind: str, answer: Any) -> None:
    """Send what came out for one model type."""
    import resource
    import warnings

    import torch
    from transformers.utils import logging

    from adapterlab.errors import ConfigError
    from adapterlab.plan.planning import setup_of, trace_of
    from adapterlab.plan.simulate import simulate

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_SPACE, _SPACE))
    found: dict[str, Any] = {"state": "not made"}
    try:
        setup = setup_of(tiny(kind), "lora", batch=2, length=32, precision="fp32")
        real = simulate(setup, real=True, steps=2)
        found = {"state": "failed", "live": real.peak.total, "loss": real.loss}
        planned = trace_of(setup, None)
        found["predicted"] = planned.peak.total
        apart = planned.peak.total / real.peak.total - 1, planned.flops / real.flops - 1
        agree = max(map(abs, apart)) <= _TOLERANCE and planned.loss == real.loss
        found |= {"state": "right" if agree else "off", "bytes": round(apart[0], 4), "flops": round(apart[1], 4)}
    except ConfigError as error:
        found |= {"state": "refused" if "live" in found else "not made", "why": str(error)[:300]}
    except Exception as error:  # foreign code fails in any way
        found["why"] = f"{type(error).__name__}: {error}"[:300]
    answer.send(found)


def measure(kind: str, context: Any) -> dict[str, Any]:
    """Compare in a process of its own."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=compare, args=(kind, there))
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv() if here.poll(_PATIENCE) else {"state": "failed", "why": "took too long"}
    except EOFError:
        found = {"state": "failed", "why": "the process died"}
    process.kill()
    process.join()
    return found


def main() -> None:
    """Go through the model types, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="model types; all by default, and only then results are kept")
    given = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "adapterlab.plan.simulate"])
    found = {}
    for kind in given.classes or types():
        found[kind] = measure(kind, context)
        print(f"{kind}: {json.dumps(found[kind])}", flush=True)
    counts = Counter(entry["state"] for entry in found.values())
    print(dict(counts))
    if given.classes:
        return
    kept = {"conditions": bench.circumstances(), "counts": counts, "classes": found}
    bench.write(RESULTS, json.dumps(kept, indent=1) + "\n")
    others = [
        [kind, entry["state"], f"{entry.get('bytes', 0):+.1%}" if "bytes" in entry else "", entry.get("why", "")]
        for kind, entry in found.items()
        if entry["state"] in ("off", "refused", "failed")
    ]
    made = len(found) - counts["not made"]
    text = (
        f"Of {len(found)} model types {made} were made tiny and trained; live bytes and operations were predicted "
        f"within {_TOLERANCE:.0%}, and the way to compute the loss rightly, for {counts['right']}.\n\n"
    )
    bench.write(RESULTS.with_suffix(".md"), text + bench.markdown(["model type", "", "live bytes", "why"], others))


if __name__ == "__main__":
    main()

"""How far `adapterlab plan` is off on a CPU: predicted against measured peak memory of training processes.

    python benchmarks/plan_error.py [--fresh]

Every case trains three steps in a process of its own, on a model loaded from disk, and is simulated by the planner.
From these pairs the constants of `src/adapterlab/plan/process.json` are computed, and the errors: each case is
predicted with constants that were fitted without it. The cases vary model, method, batch, length, precision, packing,
recomputation, the share of tokens that bear a loss, and how it is computed: in chunks, or by the model itself (encoder
and decoder; experts with a loss of their own). Cases that are in benchmarks/results/plan_error.json already are not
measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench

RESULTS = Path(__file__).parent / "results" / "plan_error.json"
CONSTANTS = Path(__file__).parent.parent / "src" / "adapterlab" / "plan" / "process.json"
_KEYS = ("model", "method", "batch", "length", "precision", "quantize", "recompute", "labelled")
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
        "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "wide": {
        "model_type": "qwen2", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2304,
        "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "capped": {
        "model_type": "gemma2", "vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    },
    "seq2seq": {
        "model_type": "t5", "vocab_size": 16000, "d_model": 512, "d_kv": 64, "d_ff": 1536, "num_layers": 6,
        "num_decoder_layers": 6, "num_heads": 8, "tie_word_embeddings": True, "decoder_start_token_id": 0,
    },
    "experts": {
        "model_type": "mixtral", "vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "output_router_logits": True, "tie_word_embeddings": True,
    },
}  # fmt: skip


def _cases() -> list[dict[str, Any]]:
    def case(model: str, method: str, batch: int, length: int, **more: Any) -> dict[str, Any]:
        settings = {"precision": "fp32", "quantize": None, "recompute": "none", "labelled": 1.0, **more}
        return {"model": model, "method": method, "batch": batch, "length": length, **settings}

    return [
        case("small", "lora", 1, 64),
        case("small", "lora", 4, 512),
        case("small", "lora", 1, 4096),
        case("small", "lora", 1, 6144),
        case("small", "lora", 1, 4096, recompute="full"),
        case("small", "lora", 2, 1024, recompute="cheap"),
        case("small", "full", 4, 256),
        case("small", "full", 2, 1024, precision="bf16"),
        case("small", "dora", 2, 1024),
        case("small", "ia3", 2, 1024),
        case("small", "prefix_tuning", 2, 1024),
        case("small", "adapter_houlsby", 2, 1024),
        case("small", "lora", 2, 1024, precision="bf16"),
        case("wide", "lora", 1, 128),
        case("wide", "lora", 4, 256),
        case("wide", "lora", 1, 1024, recompute="full"),
        case("wide", "full", 1, 256),
        case("wide", "full", 1, 256, precision="bf16"),
        case("wide", "bitfit", 2, 512),
        case("wide", "vera", 2, 512),
        case("wide", "lora", 2, 512, quantize="nf4"),
        case("wide", "lora", 2, 512, quantize="nf4", precision="bf16"),
        case("wide", "galore", 1, 256),
        case("wide", "lora", 4, 512, labelled=0.1),
        case("wide", "lora", 4, 512, labelled=0.5, precision="bf16"),
        case("wide", "prompt_tuning", 2, 512),
        case("seq2seq", "lora", 4, 256),
        case("seq2seq", "full", 2, 512, recompute="full"),
        case("seq2seq", "lora", 2, 512, labelled=0.25),
        case("experts", "lora", 2, 512),
        case("experts", "dora", 4, 256, precision="bf16"),
        case("capped", "prompt_tuning", 2, 512),
        case("smollm2-135m", "lora", 4, 256, labelled=0.25, precision="bf16"),
        case("capped", "lora", 2, 512),
        case("capped", "lora", 1, 2048),
        case("capped", "dora", 2, 512, recompute="full"),
        case("smollm2-135m", "lora", 2, 256),
        case("smollm2-135m", "lora", 2, 256, precision="bf16"),
        case("smollm2-135m", "lora", 1, 1024, recompute="full"),
        case("smollm2-135m", "dora", 1, 256),
        case("smollm2-135m", "full", 1, 128),
        case("smollm2-135m", "lora", 4, 512, recompute="cheap"),
    ]


# ---------------------------------------------------------------------- one case, in a process of its own


def train(case: dict[str, Any]) -> dict[str, int]:
    """Load the model, train three steps, and say what the process took."""
    import resource

    import datasets  # noqa: F401  (a training run has it loaded)
    from accelerate import Accelerator

    from adapterlab.data import Collator
    from adapterlab.foreign.process_memory import resident
    from adapterlab.hosts import attach
    from adapterlab.plan.planning import make_method
    from adapterlab.train import run  # noqa: F401
    from adapterlab.train.config import Training
    from adapterlab.train.loop import Loop

    imported = resident()
    model = _load(case)
    loaded = resident()
    host = attach(model, make_method(case["method"]))
    count, length = case["batch"], case["length"]
    ids = [i % model.config.vocab_size for i in range(1, length + 1)]
    bare = round((1 - case["labelled"]) * length)
    rows = [{"input_ids": ids, "labels": [-100] * bare + ids[bare:]}] * count
    training = Training(batch_size=count, steps=3, recompute=case["recompute"], shared_openings=False)
    collate = Collator(0, seq2seq=case["model"] == "seq2seq")
    Loop(host, "default", rows, training, collate=collate, accelerator=Accelerator(cpu=True)).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"imported": imported, "loaded": loaded, "peak": peak}


def _load(case: dict[str, Any]) -> Any:
    import torch

    from adapterlab.models import load_model
    from adapterlab.models.loading import PRECISIONS, _quantization

    if case["model"] not in SHAPES:
        return load_model(case["model"], precision=case["precision"], quantize=case["quantize"], device="cpu")[0]
    dtype = PRECISIONS[case["precision"]]
    options = _quantization(case["quantize"], dtype, torch.device("cpu"))
    return _class(case["model"]).from_pretrained(case["folder"], dtype=dtype, **options)


def _class(model: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if model == "seq2seq" else AutoModelForCausalLM


# ---------------------------------------------------------------------- all cases


def _write_models(folder: Path) -> None:
    import torch
    from transformers import AutoConfig

    for name, shape in SHAPES.items():
        fields = {**shape, **_TOKENS}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        _class(name).from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)


def _predict() -> None:
    """Simulate the measured cases that have no prediction yet."""
    from transformers import AutoConfig

    from adapterlab.plan.child import apart
    from adapterlab.plan.planning import setup_of, trace_of

    done = json.loads(RESULTS.read_text())
    for case in done["cases"]:
        if "live" in case:
            continue
        shape = {**SHAPES.get(case["model"], {}), **_TOKENS}
        model = AutoConfig.for_model(**shape) if case["model"] in SHAPES else case["model"]
        began = time.perf_counter()
        setup = setup_of(model, case["method"], **{key: case[key] for key in _KEYS[2:]})
        with apart():
            trace = trace_of(setup)
        case |= {
            "live": trace.peak.total,
            "resting": sum(trace.resting.values()),
            "base": trace.base,
            "loss": trace.loss,
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(f"simulated in {case['seconds']} s: {_short(case)}", flush=True)
        bench.write(RESULTS, json.dumps(done, indent=1) + "\n")


def _same(case: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(case[key] == other.get(key) for key in _KEYS)


def _short(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in (*_KEYS, "live", "resting", "peak", "imported")}


def _measure() -> None:
    """Measure what has not been measured."""
    with tempfile.TemporaryDirectory() as folder:
        _write_models(Path(folder))
        for case in _cases():
            done = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": []}
            if any(_same(case, other) for other in done["cases"]):
                continue
            given = {**case, "folder": str(Path(folder) / case["model"])}
            ended = subprocess.run(
                [sys.executable, __file__, "--case", json.dumps(given)], capture_output=True, text=True
            )
            if ended.returncode:
                raise SystemExit(f"{case} failed:\n{ended.stderr[-1500:]}")
            record = {**case, **json.loads(ended.stdout.splitlines()[-1])}
            done["cases"].append(record)
            done["conditions"] = bench.circumstances()
            bench.write(RESULTS, json.dumps(done, indent=1) + "\n")
            print(f"measured: {json.dumps(record)}", flush=True)


def _fit() -> None:
    """Least squares of the relative error; each case's own error comes from constants fitted without it."""
    done = json.loads(RESULTS.read_text())
    cases = done["cases"]
    errors = []
    for case in cases:
        constants = _constants([other for other in cases if other is not case])
        case["predicted"] = round(_process(case, constants))
        case["error"] = round(case["predicted"] / case["peak"] - 1, 4)
        errors.append(abs(case["error"]))
        print(f"{case['error']:+.3f}", _short(case))
    constants = _constants(cases)
    summary = {"median": sorted(errors)[len(errors) // 2], "worst": max(errors), "cases": len(errors)}
    done |= {"constants": constants, "errors": summary}
    bench.write(RESULTS, json.dumps(done, indent=1) + "\n")
    bench.write(CONSTANTS, json.dumps({"constants": constants, "errors": summary}, indent=1) + "\n")
    print(summary, constants)


def _columns(case: dict[str, Any]) -> dict[str, float]:
    return {
        "libraries": 1.0,
        "packed": float(case["quantize"] is not None),
        "resting": case["resting"],
        "working": case["live"] - case["resting"],
        "holes": case["live"] - case["resting"] if case["recompute"] == "full" else 0,
    }


def _process(case: dict[str, Any], constants: dict[str, float]) -> float:
    return sum(constants[key] * value for key, value in _columns(case).items())


def _constants(cases: list[dict[str, Any]]) -> dict[str, float]:
    import numpy as np

    names = list(_columns(cases[0]))
    rows = np.array([[_columns(case)[name] / case["peak"] for name in names] for case in cases])
    found = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    return {name: round(float(value), 4) for name, value in zip(names, found, strict=True)}


def main() -> None:
    """Measure, simulate, fit; or measure one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget the cases that are done")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(train(json.loads(given.case))))
        return
    if given.fresh:
        RESULTS.unlink(missing_ok=True)
    _measure()
    _predict()
    _fit()


if __name__ == "__main__":
    main()

"""How far `adapterlab plan` is off on a CPU: predicted against measured peak memory of training processes.

    python benchmarks/plan_error.py [--part 0/3] | --predict | --fit

Every case trains three steps in a process of its own, on a model loaded from disk. Results are added to
benchmarks/results/plan_error.json; `--fit` computes the constants of `src/adapterlab/plan/process.json` from them, and
the errors: each case is predicted with constants that were fitted without it.
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

RESULTS = Path(__file__).parent / "results" / "plan_error.json"
CONSTANTS = Path(__file__).parent.parent / "src" / "adapterlab" / "plan" / "process.json"
_KEYS = ("model", "method", "batch", "length", "precision", "quantize", "recompute")
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
}  # fmt: skip


def _cases() -> list[dict[str, Any]]:
    def case(model: str, method: str, batch: int, length: int, **more: Any) -> dict[str, Any]:
        settings = {"precision": "fp32", "quantize": None, "recompute": "none", **more}
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
    import psutil
    from accelerate import Accelerator

    from adapterlab.core.host import attach
    from adapterlab.plan.planning import make_method
    from adapterlab.train import run  # noqa: F401
    from adapterlab.train.config import Training
    from adapterlab.train.loop import Loop

    resident = lambda: int(psutil.Process().memory_info().rss)  # noqa: E731
    imported = resident()
    model = _load(case)
    loaded = resident()
    host = attach(model, make_method(case["method"]))
    count, length = case["batch"], case["length"]
    ids = [i % model.config.vocab_size for i in range(1, length + 1)]
    training = Training(batch_size=count, steps=3, recompute=case["recompute"])
    Loop(
        host, "default", [{"input_ids": ids, "labels": ids}] * count, training, accelerator=Accelerator(cpu=True)
    ).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"imported": imported, "loaded": loaded, "peak": peak}


def _load(case: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from adapterlab.models import load_model
    from adapterlab.models.loading import PRECISIONS, _quantization

    if case["model"] not in SHAPES:
        return load_model(case["model"], precision=case["precision"], quantize=case["quantize"], device="cpu")[0]
    dtype = PRECISIONS[case["precision"]]
    options = _quantization(case["quantize"], dtype, torch.device("cpu"))
    return AutoModelForCausalLM.from_pretrained(case["folder"], dtype=dtype, **options)


# ---------------------------------------------------------------------- all cases


def _write_models(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, shape in SHAPES.items():
        fields = {**shape, **_TOKENS}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)


def _predict() -> None:
    """Simulate the measured cases that have no prediction yet."""
    from transformers import AutoConfig

    from adapterlab.plan.planning import setup_of, trace_of

    done = json.loads(RESULTS.read_text())
    for case in done["cases"]:
        if "live" in case:
            continue
        shape = {**SHAPES.get(case["model"], {}), **_TOKENS}
        model = AutoConfig.for_model(**shape) if case["model"] in SHAPES else case["model"]
        keys = ("batch", "length", "precision", "quantize", "recompute")
        began = time.perf_counter()
        trace = trace_of(setup_of(model, case["method"], **{key: case[key] for key in keys}))
        case |= {
            "live": trace.peak.total,
            "resting": sum(trace.resting.values()),
            "base": trace.base,
            "loss": trace.loss,
            "seconds": round(time.perf_counter() - began, 1),
        }
        print({**_short(case), "seconds": case["seconds"]}, flush=True)
        now = json.loads(RESULTS.read_text())  # another part may have measured meanwhile
        now["cases"] = [case if _same(case, other) else other for other in now["cases"]]
        RESULTS.write_text(json.dumps(now, indent=1) + "\n")


def _same(case: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(case[key] == other[key] for key in _KEYS)


def _short(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in (*_KEYS, "live", "resting", "peak", "imported")}


def _measure(part: int, parts: int) -> None:
    """Measure what has not been measured."""
    with tempfile.TemporaryDirectory() as folder:
        _write_models(Path(folder))
        for case in _cases()[part::parts]:
            done = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": []}
            if any(_same(case, other) for other in done["cases"]):
                continue
            given = {**case, "folder": str(Path(folder) / case["model"])}
            ended = subprocess.run(
                [sys.executable, __file__, "--case", json.dumps(given)], capture_output=True, text=True
            )
            if ended.returncode:
                print("failed:", case, ended.stderr[-600:], flush=True)
                continue
            record = {**case, **json.loads(ended.stdout.splitlines()[-1])}
            done = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": []}
            done["cases"].append(record)
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
            print(json.dumps(record), flush=True)


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
    RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    CONSTANTS.write_text(json.dumps({"constants": constants, "errors": summary}, indent=1) + "\n")
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
    """Measure a part of the cases, or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="such as 0/3: every third case, from the first on")
    parser.add_argument("--predict", action="store_true", help="simulate what was measured")
    parser.add_argument("--fit", action="store_true", help="compute constants and errors from what was measured")
    parser.add_argument("--case", help="used by the program itself")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(train(json.loads(given.case))))
    elif given.predict:
        _predict()
    elif given.fit:
        _fit()
    else:
        _measure(*map(int, given.part.split("/")))


if __name__ == "__main__":
    main()

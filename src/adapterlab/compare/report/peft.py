"""Runs in the shape of HF PEFT's method comparison results: `run_info`, `train_info`, `meta_info`.

Field names are those that PEFT's tools read. What PEFT has no name for is added beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterlab.compare.results import Comparison, Run

_STATUS = {"finished": "success", "failed": "failed"}
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return one record for each run that ended, in the order of the comparisons.

    PEFT wants three figures of memory. The 99th percentile is not measured here: the peak, which is never below it,
    stands in its place.
    """
    return [_record(c, run) for c in comparisons for run in c.runs if run.status in _STATUS]


def _record(comparison: Comparison, run: Run) -> dict[str, Any]:
    return {
        "run_info": {
            "created_at": comparison.started,
            "total_time": run.wall_seconds or 0.0,
            "experiment_name": f"{run.method}/{run.key}--seed{run.seed}",
            "peft_branch": "main",
            "train_config": {
                "model_id": comparison.model.get("name"),
                "dtype": comparison.model.get("precision"),
                "max_steps": run.steps or 0,
                "seed": run.seed,
                "optimizer_kwargs": {"lr": run.lr},
                "adapterlab": comparison.config,
            },
            "peft_config": _peft_config(run),
            "error_msg": run.reason,
            "comparison": comparison.name,
            "label": run.label,
        },
        "train_info": _train_info(comparison, run),
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {
                str(comparison.data.get("source")): {"sha": comparison.data.get("fingerprint"), "created_at": None}
            },
            "package_info": _packages(comparison),
            "system_info": {"system": comparison.platform, "accelerator": str(comparison.conditions.get("device"))},
            "pytorch_info": "",
        },
    }


def _peft_config(run: Run) -> dict[str, Any] | None:
    # PEFT knows full tuning by the absence of a configuration.
    return None if run.share == 1.0 else {"peft_type": run.method.upper(), **run.settings}


def _train_info(comparison: Comparison, run: Run) -> dict[str, Any]:
    memory = run.memory
    return {
        "accelerator_memory_reserved_avg": memory.mean if memory else 0,
        "accelerator_memory_max": run.peak_memory or 0,
        "accelerator_memory_reserved_99th": run.peak_memory or 0,
        "train_time": run.train_seconds or 0.0,
        "file_size": run.adapter_bytes or 0,
        "num_trainable_params": run.trainable,
        "num_total_params": run.total,
        "status": _STATUS[run.status],
        "metrics": _metrics(run, int(comparison.conditions.get("rows in a step", 0))),
        "best_step": run.best_step,
        "best_valid_loss": run.best_loss,
        "forgetting": run.forgetting,
        "flops": run.flops,
        "inference": run.inference.model_dump() if run.inference else None,
    }


def _metrics(run: Run, batch: int) -> list[dict[str, Any]]:
    train = dict(run.train_curve)
    found: list[dict[str, Any]] = [
        {"step": step, "valid loss": loss, "train loss": train.get(step)} for step, loss in run.eval_curve
    ]
    if run.status == "finished":
        final, best = run.final, run.best
        found.append(
            {
                "step": run.steps or 0,
                "test accuracy": final.score if final else None,
                "test accuracy, best checkpoint": best.score if best else None,
                "test loss": final.loss if final else None,
                "train loss": run.train_loss,
                "train samples": batch * (run.steps or 0),
                "train total tokens": run.tokens or 0,
            }
        )
    return found


def _packages(comparison: Comparison) -> dict[str, str | None]:
    known: dict[str, str | None] = {f"{name}-version": comparison.versions.get(name) for name in _PACKAGES}
    known |= {f"{name}-commit-hash": None for name in _PACKAGES}
    known |= {f"{name}-version": version for name, version in comparison.versions.items()}
    return {**known, "adapterlab-commit-hash": comparison.git}

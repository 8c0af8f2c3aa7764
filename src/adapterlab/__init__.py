"""adapterlab: every parameter-efficient fine-tuning method under one interface.

    import adapterlab as al

    model, tokenizer = al.load_model("smollm2-135m")
    host = al.attach(model, al.LoRA(r=16, targets="all-linear"))
    ...
    host.save("my-adapter")

Names are imported on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from adapterlab import methods
from adapterlab.version import __version__

# On a CPU, oneDNN and torch's layer over it keep a thousand kernels each, with their buffers, one for every number of
# tokens they have met. Packed batches all differ, so hundreds of MiB fill with kernels that are never used again. Both
# read these limits when they compute for the first time; what the user has set stays.
for _limit in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_limit, "128")

# transformers imports torchao where it is installed, which then writes about kernels of other machines and torch's
# registrations. These messages alone are left out, by their beginnings; everything else those loggers say stays.
_NOISE = ("Failed to load ", "Warning: Detected no triton", "Skipping import of cpp extensions", "<enum '")
for _logger in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree"):
    logging.getLogger(_logger).addFilter(lambda record: not record.getMessage().startswith(_NOISE))

# public name -> module that defines it. Method classes (al.LoRA, ...) are found by file, not listed here.
_PUBLIC = {
    "attach": "adapterlab.hosts",
    "host": "adapterlab.hosts",
    "Host": "adapterlab.hosts",
    "Method": "adapterlab.core.method",
    "LayerMethod": "adapterlab.core.method",
    "Adapter": "adapterlab.core.adapter",
    "Delta": "adapterlab.core.adapter",
    "Site": "adapterlab.core.site",
    "Targets": "adapterlab.core.targets",
    "State": "adapterlab.core.state",
    "Stack": "adapterlab.core.composition",
    "Average": "adapterlab.core.composition",
    "Split": "adapterlab.core.composition",
    "Parallel": "adapterlab.core.composition",
    "register": "adapterlab.registry",
    "method": "adapterlab.registry",
    "Loss": "adapterlab.engine.loss",
    "fast_attention": "adapterlab.engine.attention",
    "fast_products": "adapterlab.engine.float_products",
    "load": "adapterlab.hosts",
    "load_model": "adapterlab.models",
    "pull": "adapterlab.models",
    "fit": "adapterlab.train",
    "fit_many": "adapterlab.train",
    "TrainConfig": "adapterlab.train",
    "AdapterlabCallback": "adapterlab.train",
    "hf_trainable": "adapterlab.train",
    "reference_model": "adapterlab.train",
    "score": "adapterlab.evaluate",
    "combine": "adapterlab.convert",
    "merge_into_base": "adapterlab.convert",
    "extract_lora": "adapterlab.convert",
    "export_lora": "adapterlab.convert",
    "export_peft": "adapterlab.convert",
    "AdapterlabError": "adapterlab.errors",
}

__all__ = ["__version__", "methods", *_PUBLIC]


def __getattr__(name: str) -> Any:
    value: Any
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name.startswith("_"):
        raise AttributeError(f"module 'adapterlab' has no attribute {name!r}")
    else:
        from adapterlab.registry import method_class

        value = method_class(name)
        if value is None:
            raise AttributeError(f"module 'adapterlab' has no attribute {name!r}, and no method class has that name")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from adapterlab.registry import class_names

    return sorted([*__all__, *class_names()])

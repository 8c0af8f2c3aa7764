"""Data: from the user's rows to token batches, and from generated answers to scores.

    splits = load_data(DataConfig(path="rows.jsonl"))
    encoded = encode(splits.train, tokenizer, cfg, window=2048)
    batch = Collator(tokenizer.pad_token_id)(encoded.rows[:8])

Names are imported on first use: `DataConfig` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from adapterlab.lazy import lazy

# public name -> module that defines it
_PUBLIC = {
    "DataConfig": "config",
    "Example": "formats",
    "FORMATS": "formats",
    "Splits": "splits",
    "load_data": "splits",
    "fingerprint": "splits",
    "Encoded": "report",
    "Report": "report",
    "encode": "encoding",
    "prompt_and_unshown": "encoding",
    "prompt_of": "encoding",
    "Collator": "batching",
    "PackingCollator": "batching",
    "placed": "batching",
    "render_sample": "batching",
    "Scorer": "scoring",
    "scorer_for": "scoring",
    "number_in": "scoring",
    "wilson": "scoring",
}

__all__ = [*_PUBLIC]

__getattr__, __dir__ = lazy(__name__, _PUBLIC)

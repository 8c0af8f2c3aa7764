"""What HF PEFT has to be told about a model: the type of its task, which decides what PEFT's own `forward` hands on."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from adapterlab.foreign.model import config_of, is_encoder_decoder, plain_class

CAUSAL, SEQ2SEQ, FEATURES = "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"
CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

# Task of PEFT's -> the automatic class of transformers that PEFT makes such a model with, and the table that it reads.
_AUTO = {
    CAUSAL: ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    SEQ2SEQ: ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    FEATURES: ("AutoModel", "MODEL_MAPPING"),
}
# What PEFT's model of any task hands to the base by name, given or not, and what that of one task adds; beside flags.
_READ = ("input_ids", "attention_mask", "inputs_embeds")
_MORE = {
    SEQ2SEQ: ("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    "QUESTION_ANS": ("start_positions", "end_positions"),
    FEATURES: (),
}


def task_of(model: Any) -> str | None:
    """Return PEFT's type of the task that a model is for.

    None is a type as well: PEFT hands everything on as it is given then, which is right for speech, images and
    whatever else has no type of its own, and reads the class to load from `class_of`.
    """
    cls, config = plain_class(model), config_of(model)
    for task, (auto, known) in _AUTO.items():
        if _is_made_by(cls, config, auto, known) and _takes(cls, (*_READ, *_MORE.get(task, ("labels",)))):
            return task
    return None


def class_of(model: Any) -> dict[str, str]:
    """Return what PEFT writes for models without a task: which class to load, and from which module."""
    cls = plain_class(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def computes_prompts(model: Any, task: str | None) -> bool:
    """Say whether PEFT's model of a task puts virtual tokens before what this one reads.

    Without a task it wraps modules and nothing else. The heads that classify what an encoder-decoder read look for its
    last token by id, which PEFT has replaced by embeddings.
    """
    return task is not None and not (task in CLASSIFYING and is_encoder_decoder(model))


def _is_made_by(cls: Any, config: Any, auto: str, known: str) -> bool:
    """Say whether an automatic class makes models of a class, or of one that it was derived from."""
    by_config = getattr(config, "auto_map", None) or {}
    if auto in by_config:  # code that came with the weights
        return str(by_config[auto]).rpartition(".")[2] == cls.__name__
    try:
        made = getattr(transformers, known)[type(config)]
    except KeyError:
        return False
    return issubclass(cls, made)


def _takes(cls: Any, names: tuple[str, ...]) -> bool:
    """Say whether a model itself takes arguments of these names: what it passes on may meet a part that takes none."""
    return inspect.signature(cls.forward).parameters.keys() >= set(names)

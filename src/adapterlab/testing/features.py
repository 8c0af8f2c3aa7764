"""What users do with an adapted model beyond training it; a method that cannot refuses with a typed error."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterlab.core.method import LayerMethod
from adapterlab.core.targets import ALL_LINEAR, Targets
from adapterlab.errors import AttachError, ConfigError, FormatError, MergeError
from adapterlab.foreign.model import is_encoder_decoder
from adapterlab.hosts import Host, load
from adapterlab.testing import models
from adapterlab.testing.case import (
    Case,
    NotApplicable,
    base_tensors,
    changed,
    close,
    gradients,
    logits,
    optimizer,
    perturb,
    require,
    same,
)  # fmt: skip
from adapterlab.testing.checks import _UNFIT, check_smoke
from adapterlab.testing.suite import check

_EXACT = {"fp32": 1e-4, "nf4": 1e-4}  # of the largest logit; where the merged weight is not rounded to a half


def _merge(case: Case) -> None:
    model = case.model()
    batch = models.batch(model)
    base = logits(model, batch)
    found = case.attach(model=model)
    perturb(found, "one", seed=7, size=0.3)  # large beside the rounding of half precision
    live, before = logits(model, batch), base_tensors(found)
    packed = case.precision in models.PACKED
    try:
        found.merge(quantized="dequantize" if packed else "error")
    except MergeError:
        same(base_tensors(found), before, "base tensors after a refused merge")
        same({"logits": logits(model, batch)}, {"logits": live}, "answers after a refused merge")
        raise
    effect, merged = float((live - base).norm()), logits(model, batch)
    if case.precision in _EXACT:
        tolerance = _EXACT[case.precision]
        require(effect > 10 * tolerance * float(live.norm()), "the adapter changes too little to compare")
        close(merged, live, "merged and live", tolerance)
    else:
        error = float((merged - live).norm())  # rounding gives up to 0.13 of the effect, a wrong merge 0.5 and more
        require(error < effect / 4, f"merged and live differ by {error:.3g}, the adapter's effect is {effect:.3g}")
    found.restore()
    same(base_tensors(found), before, "base tensors after restore")
    same({"logits": logits(model, batch)}, {"logits": live}, "answers after restore")


@check(refuses=(*_UNFIT, MergeError))
def check_merge(case: Case) -> None:
    """Merged into the weights the adapter answers as it did live, and restoring brings back every bit."""
    _merge(case)


@check(refuses=(*_UNFIT, MergeError))
def check_merge_bf16(case: Case) -> None:
    """Merging and restoring hold in bfloat16."""
    _merge(Case(case.method, case.family, "bf16"))


@check(refuses=(*_UNFIT, MergeError))
def check_merge_fp16(case: Case) -> None:
    """Merging and restoring hold in float16."""
    _merge(Case(case.method, case.family, "fp16"))


@check(refuses=_UNFIT)
def check_bf16(case: Case) -> None:
    """The method works on a bfloat16 base."""
    check_smoke(Case(case.method, case.family, "bf16"))


@check(refuses=_UNFIT)
def check_nf4(case: Case) -> None:
    """The method works on a base in 4 bits."""
    _packed(case, "nf4")


@check(refuses=_UNFIT)
def check_int8(case: Case) -> None:
    """The method works on a base in 8 bits."""
    _packed(case, "int8")


def _packed(case: Case, precision: str) -> None:
    _needs_package("bitsandbytes")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
        check_smoke(Case(case.method, case.family, precision))


@check(refuses=(AttachError,))
def check_together(case: Case) -> None:
    """Two adapters that are live at once both have a share in the answer."""
    found = case.attach("one", "two")
    perturb(found, "two", seed=5)
    batch = models.batch(found.model)
    answers = []
    for names in (("one",), ("two",), ("one", "two")):
        with found.using(*names):
            answers.append(logits(found.model, batch))
    close(answers[2], answers[2], "answers of both")
    for name, alone in zip(("two", "one"), answers, strict=False):
        require(not torch.equal(alone, answers[2]), f"with both live, {name!r} has no effect")


@check(refuses=(AttachError,))
def check_rows(case: Case) -> None:
    """In a batch whose rows have different adapters each row is answered as in a batch of its own."""
    found = case.attach("one", "two")
    perturb(found, "two", seed=5)
    batch = models.batch(found.model, rows=3)
    names = ["two", None, "one"]
    with found.rows(names):
        mixed = logits(found.model, batch)
    for i, name in enumerate(names):
        with found.using(*([name] if name else [])):
            close(mixed[i], logits(found.model, batch)[i], f"row of {name!r} in a mixed batch", case.tolerance)


def _generate(found: Host, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    chosen = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    found.model.eval()
    return [found.model.generate(**given, use_cache=cache, **chosen) for cache in (True, False)]


@check(families=("llama", "mistral-window", "t5"), refuses=(AttachError,))
def check_generate(case: Case) -> None:
    """The scores of each step of generation, with a growing cache and one of fixed size, are those of a full pass."""
    found = case.attach()
    ids = models.batch(found.model, padding=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # on the left, as generation has it
    for cache in ("dynamic", "static"):
        made = found.model.generate(
            ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0,
            cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        for step, scores in enumerate(made.logits):
            wanted, short = (_next_scores(found.model, mask, made.sequences, ids, step, last=n) for n in (None, 1))
            close(scores, wanted, f"scores of step {step} with a {cache} cache and of a full pass", case.tolerance)
            told = float((wanted - short).abs().max()) > 100 * case.tolerance * max(1.0, float(wanted.abs().max()))
            require(told, f"the scores of step {step} hardly depend on the tokens before: nothing could be told")


@torch.no_grad()
def _next_scores(model: Any, mask: Tensor, sequences: Tensor, ids: Tensor, step: int, last: int | None) -> Tensor:
    """Scores of the next token by one pass without a cache over all tokens so far, or over the last ones alone."""
    if is_encoder_decoder(model):
        so_far = sequences[:, : 1 + step]
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": so_far}
        if last is not None:  # the first step of a decoder has one token, and what it reads is the encoder's
            given |= {"input_ids": ids[:, -last:], "attention_mask": mask[:, -last:]}
    else:
        so_far = sequences[:, : ids.shape[1] + step]
        seen = torch.cat([mask, mask.new_ones(len(mask), step)], 1)
        places = (seen.cumsum(1) - 1).clamp(min=0)
        whole = {"input_ids": so_far, "attention_mask": seen, "position_ids": places}
        given = whole if last is None else {key: value[:, -last:] for key, value in whole.items()}
    found: Tensor = model(**given, use_cache=False).logits[:, -1]
    return found.float()


@check(refuses=(AttachError,))
def check_beam_search(case: Case) -> None:
    """Beam search with a key-value cache gives the tokens that it gives without."""
    found = case.attach()
    cached, plain = _generate(found, models.batch(found.model, padding=False), num_beams=3)
    require(torch.equal(cached, plain), f"with cache {cached.tolist()}, without {plain.tolist()}")


@check(refuses=(AttachError,))
def check_padding(case: Case) -> None:
    """A row is answered alike without padding, with padding on the right and on the left, and so is it continued."""
    found = case.attach()
    row = models.batch(found.model, rows=2, length=6, padding=False)["input_ids"][:1]
    other = models.batch(found.model, rows=1, length=9, padding=False, seed=4)["input_ids"]
    alone = logits(found.model, {"input_ids": row})
    blank, real = torch.zeros(1, 3, dtype=row.dtype), torch.ones_like(row)
    for side in ("right", "left"):
        left = side == "left"
        ids = torch.cat([other, torch.cat([blank, row] if left else [row, blank], 1)])
        mask = torch.cat([torch.ones_like(other), torch.cat([blank, real] if left else [real, blank], 1)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found_here = logits(found.model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        part = found_here[1:, 3:] if left else found_here[1:, :6]
        close(part, alone, f"padding on the {side} and none", case.tolerance)
    plain = _generate(found, {"input_ids": row, "attention_mask": real})[0][0, 6:]
    padded = _generate(found, {"input_ids": ids, "attention_mask": mask})[0][1, 9:]
    require(torch.equal(plain, padded), f"continued by {plain.tolist()}, with padding by {padded.tolist()}")


@check("trains", "!own_gradient")
def check_checkpointing(case: Case) -> None:
    """Recomputing activations changes no gradient, also with two forward passes before one backward pass."""
    found = case.attach()
    batches = [case.batch(found.model), case.batch(found.model, rows=3, length=7, seed=3)]
    for given in (batches[:1], batches):
        wanted = gradients(found, "one", given)
        for mode in ("full", "cheap"):
            found.recompute(mode)
            got = gradients(found, "one", given)
            found.recompute("none")
            for key, grad in wanted.items():
                other = got[key]
                require((grad is None) == (other is None), f"{key} has a gradient only one way")
                if grad is not None and other is not None:
                    close(other, grad, f"{key}, {len(given)} forward passes: gradient with recompute={mode} and none")


@check()
def check_compile(case: Case) -> None:
    """`torch.compile` makes one graph of the model that answers as the model does."""
    model = models.tiny(f"{case.family}-1", case.precision)  # one layer: tracing is slow
    # What would be at all linear layers is at a square one and at one that is not: each is traced alike.
    method = case.make(model)
    everywhere = isinstance(method, LayerMethod) and method.targets == Targets(include=(ALL_LINEAR,))
    settings: dict[str, Any] = {"targets": ("q", "down")} if everywhere else {}
    found = case.attach(model=model, **settings)
    batch = models.batch(found.model)
    found.model.eval()
    torch.compiler.reset()
    try:
        compiled = torch.compile(found.model, fullgraph=True, backend="eager")
        close(compiled(**batch).logits.detach(), logits(found.model, batch), "compiled and eager")
    finally:
        torch.compiler.reset()


@check("trains", refuses=(ConfigError,))
def check_trainer(case: Case) -> None:
    """`transformers.Trainer` trains the adapter and nothing else."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from adapterlab.train import AdapterlabCallback

    found = case.attach()
    shared = base_tensors(found)
    began = found.state_dict("one")
    events = case.method.capabilities()["has_events"] or bool(found.part_methods("one"))
    callbacks = [AdapterlabCallback(found, "one")] if events else []
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        made = optimizer(found, "one")
        rows = [{key: torch.tensor(v) for key, v in row.items()} for row in models.token_rows()]
        trainer = Trainer(
            found.model, arguments, train_dataset=rows, callbacks=callbacks, optimizers=(made, None)  # type: ignore
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    after = found.state_dict("one")
    require(changed(after, began), "Trainer changed no tensor of the adapter")
    require(all(bool(v.isfinite().all()) for v in after.values()), "Trainer left numbers that are not finite")
    owned = any(found.patches[key] for key in found.parts("one"))  # some methods decide it by training
    if not owned:  # what may change of an owned base is checked with our own loop
        same(base_tensors(found), shared, "base tensors after Trainer")


@check("peft_format", families=("llama", "gpt2"), refuses=_UNFIT)
def check_peft(case: Case) -> None:
    """HF PEFT loads what we save and answers the same, and we load what PEFT saves."""
    _needs_package("peft")
    from peft import PeftModel

    found = case.attach()
    batch = models.batch(found.model)
    wanted = _answered(found.model, batch)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        found.save(ours)
        if not (ours / "adapter_config.json").is_file():
            raise NotApplicable("PEFT has no form for the example settings")
        require("peft_type" in json.loads((ours / "adapter_config.json").read_text()), "the PEFT config has no type")
        plain = case.model()
        plain.config.use_cache = False  # what runs the model twice in PEFT asks for that
        peft: Any = PeftModel.from_pretrained(plain, ours)
        close(_answered(peft, batch), wanted, "PEFT and ours", 1e-4)
        peft.save_pretrained(theirs)
        try:
            again = load(case.model(), theirs)
        except (*_UNFIT, FormatError) as error:  # only attaching may be refused, and what PEFT itself has lost
            plain = case.model()
            plain.config.use_cache = False
            whole = torch.equal(_answered(PeftModel.from_pretrained(plain, theirs), batch), _answered(peft, batch))
            require(not whole, f"what PEFT saved is not loaded here: {error}")
            return
        close(_answered(again.model, batch), wanted, "loaded from PEFT and ours", 1e-4)


def _answered(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits at real tokens: what is computed at padding, and at PEFT's virtual tokens, is nobody's answer."""
    found, mask = logits(model, batch), batch.get("attention_mask")
    return found if mask is None or found.ndim < 3 else found[:, -mask.shape[1] :][mask.bool()]


def _needs_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise NotApplicable(f"the package {name!r} is not installed")

"""Multitask prompt tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapterlab.core.carrier import Carrier
from adapterlab.core.codec import HFCodec
from adapterlab.core.method import Batches
from adapterlab.engine.modes import evaluating
from adapterlab.errors import AttachError, ConfigError, FormatError
from adapterlab.foreign.model import input_table, is_causal, is_encoder_decoder, output_head
from adapterlab.methods.prompt._input_prompt import InputPrompt, codec, first_rows, layer_of, peft_has, sizes
from adapterlab.methods.prompt._sources import Batch, descend, mixed, opened, training
from adapterlab.methods.prompt._virtual_tokens import PROMPT, peft_prompt, word_ids
from adapterlab.registry import register

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"  # PEFT's names


@register
class MPT(InputPrompt):
    """Share one prompt among tasks, and give each task a matrix of low rank that it is multiplied with by entries.

    E_k = E ∘ (U_k V_k), E `[P, d]` shared, U_k `[P, r]` and V_k `[r, d]` of task k, r = 1 in the paper.

    Where it attaches: around the backbone, or the encoder of an encoder-decoder, as prompt tuning; poolers, padding and
    caches as there.

    It has two phases. In the first, `host.learn_from({"teacher": batches, ...}, steps=...)`, one adapter with as many
    `tasks` as there are teachers learns from trained adapters of single tasks: each step has a batch of one task, drawn
    in proportion to its number of batches, and the loss L = CE + λ (KL(teacher ‖ student) + mean((h_teacher −
    h_student)²)), with the logits where labels are and the last hidden states of real tokens. In the second an adapter
    for another task starts from `source`, the first one: E with the mean of all U and V, or those of `source_task`, and
    is trained as usual. With `share` it keeps E as it is there, trains and saves U and V alone, and needs the source
    again when it is loaded: one folder of the shared part, and a small one of each task.

    One adapter with several tasks computes the first; `MPT.choosing(host, name, [0, 2, 1])` says whose rows are in a
    batch. A run trains one task, so an adapter of several is trained by the first phase or inside `choosing`. What it
    computes for one task is a plain prompt, and so HF PEFT gets it.

    Start: not the base's output: E = rows of the embedding table, as in prompt tuning, U V = 1.

    Trainable parameters: P d + K r (P + d) with K tasks; with `share` r (P + d). U and V without weight decay.

    Inference: not mergeable; P more positions.

    Rate: 1e-2 as prompt tuning with Adam; U and V train at `ratio` times that. The authors take 0.3 and 0.4 with
    Adafactor.

    Reference: "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv 2303.02861.

    Example:
        >>> from adapterlab.methods.prompt.mpt import MPT
        >>> MPT(length=8, tasks=3).rank
        1
    """

    formula: ClassVar[str] = "P d + K r (P + d)"

    tasks: int = Field(1, ge=1, description="number of tasks K in this adapter")
    rank: int = Field(1, ge=1, description="rank r of the matrix of each task")
    init: Literal["vocab", "words"] = Field("vocab", description="what the shared prompt starts from")
    words: tuple[int, ...] = Field((), description="token ids of the text for init='words', cut or tiled to the length")
    source: str | None = Field(None, description="adapter of this method to start from: its name here, or its folder")
    source_task: int | None = Field(
        None, ge=0, description="task of the source to start from; default: the mean of all"
    )
    share: bool = Field(False, description="leave the source's shared prompt as it is, and do not save it again")
    ratio: float = Field(4 / 3, gt=0, description="learning rate of the tasks' factors over that of the shared prompt")
    distil: float = Field(0.9, ge=0, description="weight λ of the teachers in the first phase")

    hf: ClassVar[HFCodec | None] = codec(
        "MULTITASK_PROMPT_TUNING",
        "num_ranks", "num_tasks", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
        pack=lambda host, name: _pack(host, name),
        unpack=lambda host, name, tensors: _unpack(host, name, tensors),
        derived=lambda config: {"rank": config.get("num_ranks", 1), "tasks": config.get("num_tasks", 1)},
    )  # fmt: skip

    @model_validator(mode="after")
    def _source_agrees(self) -> Self:
        if bool(self.words) != (self.init == "words"):
            raise ValueError(f"init={self.init!r} and words={self.words!r} disagree: give words with init='words'")
        if self.source is None and (self.share or self.source_task is not None):
            raise ValueError(
                "share and source_task need a source: the name of an adapter of this method, or its folder"
            )
        return self

    def attach(self, host: Carrier, name: str) -> None:
        """Make the tensors and fill them from words, or from the source."""
        layer = self.Layer(self, host, name)
        if self.source is None:
            ids = word_ids(host, self.words, self.length)
            with torch.no_grad():
                layer.shared.copy_(input_table(host.model)(ids))
        else:
            self.take_from_source(host, name, layer, factors=True)
        self.put(host, name, layer)

    def attach_saved(self, host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Attach without looking for a start; what is shared comes from the source again."""
        layer = self.Layer(self, host, name)
        if self.share:
            self.take_from_source(host, name, layer, factors=False)
        self.put(host, name, layer)

    @torch.no_grad()
    def take_from_source(self, host: Carrier, name: str, layer: MPT.Layer, factors: bool) -> None:
        """Copy the shared prompt of the source, and the factors of one of its tasks or their mean."""
        assert self.source is not None
        with opened(host, self.source, name) as key:
            other = next((a for a in host.adapters(key).values() if isinstance(a, MPT.Layer)), None)
            mine, theirs = ((x and (*x.shared.shape, x.cols.shape[2])) for x in (layer, other))
            if other is None or mine != theirs:
                raise AttachError(
                    f"source={self.source!r} should be an {self.id} adapter with length, width and rank {mine}, and "
                    f"is {host.methods[key].id} with {theirs}. Name another, or change length and rank."
                )
            if self.source_task is not None and self.source_task >= len(other.cols):
                raise AttachError(f"source_task={self.source_task}: {self.source!r} has {len(other.cols)} tasks.")
            layer.shared.copy_(other.shared)
            for to, of in ((layer.cols, other.cols), (layer.rows, other.rows)) if factors else ():
                to.copy_(of.mean(0) if self.source_task is None else of[self.source_task])

    def tensor_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Another rate for the factors, and no decay: they begin at one."""
        return {leaf: {"lr_factor": self.ratio, "weight_decay": 0.0} for leaf in ("cols", "rows")}

    @staticmethod
    @contextlib.contextmanager
    def choosing(host: Carrier, name: str, tasks: int | Sequence[int]) -> Iterator[None]:
        """Compute a task, or one for each row of the batch, inside the context.

        Args:
            host: of the model.
            name: of the adapter.
            tasks: numbers below the method's `tasks`.

        Raises:
            ConfigError: there is no such task.
        """
        layer = layer_of(host, name)
        assert isinstance(layer, MPT.Layer)
        chosen = torch.tensor([tasks] if isinstance(tasks, int) else list(tasks), device=layer.cols.device)
        if wrong := [task for task in chosen.tolist() if not 0 <= task < len(layer.cols)]:
            raise ConfigError(f"{name!r} has tasks 0 to {len(layer.cols) - 1}, and {wrong[0]} is asked for.")
        before = layer.chosen, layer.said
        layer.chosen, layer.said = chosen, True
        try:
            yield
        finally:
            layer.chosen, layer.said = before

    def begin(self, host: Carrier, name: str, steps: int) -> None:
        """Refuse a run that would train the first of several tasks and leave the others as they are."""
        layer = layer_of(host, name)
        assert isinstance(layer, MPT.Layer)
        if self.tasks > 1 and not layer.said:
            raise ConfigError(
                f"{name!r} has tasks={self.tasks}, and a run trains one. Learn them together by host.learn_from or "
                "adapterlab learn, then train an adapter with tasks=1 that has this one as its source; or choose the "
                "rows' tasks by MPT.choosing around the run."
            )

    def learn_from(
        self, host: Carrier, name: str, tasks: Mapping[str, Batches], *, steps: int, lr: float | None = None
    ) -> list[float]:
        """Distil the teachers, one for each task, into the shared prompt and the tasks' factors."""
        if len(tasks) != self.tasks:
            raise ConfigError(
                f"{name!r} has tasks={self.tasks} and there are {len(tasks)} teachers: one for each task. Attach it "
                f"with tasks={len(tasks)}."
            )

        def loss(task: int, teacher: str, batch: Batch) -> Callable[[], Tensor]:
            return lambda: self.distilled(host, name, task, teacher, batch)

        found: list[Any] = []
        self.optimizer(host, name, found.extend)  # type: ignore[arg-type]
        with training(host.model):
            each = (loss(*step) for step in mixed(tasks, steps))
            return descend(found, each, steps, lr=lr or type(self).typical_lr)

    def distilled(self, host: Carrier, name: str, task: int, teacher: str, batch: Batch) -> Tensor:
        """CE + λ (KL + mean squared distance of the hidden states) on a batch of one task."""
        with host.using(teacher), evaluating(host.model):
            wanted = host.model(**batch, output_hidden_states=True)
        with host.using(name), MPT.choosing(host, name, task):
            out = host.model(**batch, output_hidden_states=True)
        found: Tensor = out.loss
        return found + self.distil * (self.of_logits(host, out, wanted, batch) + self.of_states(out, wanted, batch))

    @staticmethod
    def of_logits(host: Carrier, out: Any, wanted: Any, batch: Batch) -> Tensor:
        """KL(teacher ‖ student), the mean over what has labels."""
        student, teacher = out.logits, wanted.logits
        if student.dim() == 3:
            labels = batch["labels"]
            if output_head(host.model) is not None and is_causal(host.backbone) and not is_encoder_decoder(host.model):
                student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
            student, teacher = student[labels != -100], teacher[labels != -100]
        p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean")

    @staticmethod
    def of_states(out: Any, wanted: Any, batch: Batch) -> Tensor:
        """The mean of (h_teacher − h_student)² over the last hidden states of real tokens."""
        decoders = getattr(out, "decoder_hidden_states", None) is not None
        student, teacher = ((x.decoder_hidden_states if decoders else x.hidden_states)[-1] for x in (out, wanted))
        square = (student - teacher).float().square()
        mask = batch["labels"] != -100 if decoders else batch.get("attention_mask")
        return square.mean() if mask is None else square[mask.bool()].mean()

    class Layer(InputPrompt.Layer):
        """`shared` `[P, d]`, and the factors of each task: `cols` `[K, P, r]` and `rows` `[K, r, d]`.

        Attributes:
            chosen: the task, or that of each row of the batch.
            said: somebody chose it.
        """

        said: bool = False

        def __init__(self, method: MPT, host: Carrier, name: str):
            super().__init__(method, host, name)
            width, tasks, rank = self.table.embedding_dim, method.tasks, method.rank
            prompt = self.site.parameter(method.length, width)
            if method.share:
                self.register_buffer("shared", prompt.detach(), persistent=False)
            else:
                self.shared = prompt
            self.cols, self.rows = (
                self.site.parameter(tasks, method.length, rank),
                self.site.parameter(tasks, rank, width),
            )
            with torch.no_grad():
                # The product is 1, and no factor of a further rank is stuck beside one that is zero as well.
                nn.init.normal_(self.rows, std=0.02)
                self.cols[..., 0], self.rows[:, 0] = 1, 1
            self.chosen = torch.zeros(1, dtype=torch.long, device=self.site.device)

        def products(self, tasks: Tensor) -> Tensor:
            """The matrices of tasks, U_k V_k `[tasks, P, d]`."""
            return self.cols[tasks] @ self.rows[tasks]

        def prompts(self) -> Tensor:
            """The prompts of the chosen tasks, `[1 or rows, P, d]`."""
            return self.shared * self.products(self.chosen)

        def vectors(self) -> Tensor:
            """The prompt of the first chosen task, `[P, d]`."""
            return self.prompts()[0]

        def for_rows(self, x: Tensor) -> Tensor:
            """The prompt of each row; beams are runs of rows.

            Raises:
                ConfigError: tasks are chosen for another number of rows.
            """
            made = self.prompts().to(x.dtype)
            if len(x) % len(made):
                raise ConfigError(f"Tasks are chosen for {len(made)} rows, and the batch has {len(x)}.")
            return made.repeat_interleave(len(x) // len(made), 0) if len(made) > 1 else made.expand(len(x), -1, -1)


def _pack(host: Carrier, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Of one task PEFT gets the plain prompt that it is, of several the shared one and the factors."""
    method, layer = host.methods[name], layer_of(host, name)
    assert isinstance(method, MPT)
    assert isinstance(layer, MPT.Layer)
    if method.share or not peft_has(host, name):
        return None
    options = sizes(host, *layer.shared.shape)
    if method.tasks == 1:
        plain = layer.vectors().detach()
        return {**options, "peft_type": "PROMPT_TUNING"}, {**host.tensors(name), PROMPT: plain}
    factors = {COLS: layer.cols.detach(), ROWS: layer.rows.detach()}
    return {**options, "num_ranks": method.rank, "num_tasks": method.tasks}, {PROMPT: layer.shared.detach(), **factors}


def _unpack(host: Carrier, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read PEFT's three tensors; of an encoder-decoder they have as many rows again, which it does not use."""
    layer = layer_of(host, name)
    assert isinstance(layer, MPT.Layer)
    if missing := [key for key in (COLS, ROWS) if key not in tensors]:
        raise FormatError(
            f"The file of a PEFT prompt of several tasks holds {missing[0]!r}, and this one has: "
            f"{', '.join(list(tensors)[:5]) or 'none'}. Save the adapter again with PEFT."
        )
    length, width = layer.shared.shape
    lead = f"adapter.{layer.site.path}."
    return {
        f"{lead}shared": first_rows(host, peft_prompt(tensors), length, width),
        f"{lead}cols": tensors[COLS][:, :length],
        f"{lead}rows": tensors[ROWS],
    }

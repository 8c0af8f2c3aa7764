from __future__ import annotations

from pathlib import Path

import pytest
import torch
from templates_chatml import MARKED_CHATML, PLAIN_CHATML, TIGHT_CHATML

from adapterlab.data import Collator, DataConfig, Example, PackingCollator, encode, prompt_of, render_sample
from adapterlab.errors import DataError

CFG = DataConfig(path="rows.jsonl")
END = "<|im_end|>"
HARD = ["42", " leading", "two\nlines\n\n", "\n first", "naïve 你好 🙂🙂", "4", "ends with spaces  ", "????"]


def trained_text(row, tokenizer):
    """Runs of trained tokens, decoded one by one."""
    runs, run = [], []
    for token, label in [*zip(row["input_ids"], row["labels"], strict=True), (0, -100)]:
        if label != -100:
            assert label == token
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("trim", [False, True], ids=["offsets", "trimmed offsets"])
@pytest.mark.parametrize(
    ("template", "way"),
    [
        (PLAIN_CHATML, "prefix diffing"),
        (MARKED_CHATML, "template markers"),
        (TIGHT_CHATML, "template markers"),
        (None, "prefix diffing"),
    ],
    ids=["diffed", "marked", "tight", "no template"],
)
def test_exactly_the_answers_and_their_end_are_trained(make_tokenizer, chat, template, way, trim):
    tokenizer = make_tokenizer(template, trim_offsets=trim)
    rows = [chat(f"4 Q{text}", text, row=i) for i, text in enumerate(HARD)]
    rows += [chat("Hi", a, "and 42?", b, "so?", a, system="Be brief.") for a, b in zip(HARD, HARD[::-1], strict=True)]
    encoded = encode(rows, tokenizer, CFG, window=None)
    assert encoded.report.mask_by == way
    assert ("plain text" in encoded.report.template) == (template is None)
    for example, row in zip(rows, encoded.rows, strict=True):
        answers = [m["content"] + END for m in example.messages if m["role"] == "assistant"]
        assert trained_text(row, tokenizer) == answers


def test_both_ways_give_the_same_rows(make_tokenizer, chat):
    rows = [chat("Q", text, "R", text, system="S") for text in HARD]
    plain, marked, tight = (
        encode(rows, make_tokenizer(t), CFG, window=None).rows for t in (PLAIN_CHATML, MARKED_CHATML, TIGHT_CHATML)
    )
    assert plain == marked == tight


def test_tokens_are_those_of_the_chat_template(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    example = chat("How many?", "12 apples", system="Be brief.")
    row = encode([example], tokenizer, CFG, window=None).rows[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(list(example.messages))["input_ids"]
    assert row["labels"][-1] == -100, "the line break after the end token is not to be learnt"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [PLAIN_CHATML, MARKED_CHATML, None])
def test_the_prompt_is_what_precedes_the_last_answer(make_tokenizer, chat, template, bos):
    tokenizer = make_tokenizer(template, bos=bos)
    example = chat("Q", "A", "R?", "B", system="S")
    row = encode([example], tokenizer, CFG, window=None).rows[0]
    prompt = prompt_of(example, tokenizer, CFG)
    assert row["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode([i for i in row["labels"][len(prompt) :] if i != -100]) == "B" + END
    assert (prompt[0] == tokenizer.bos_token_id) == (bos and template is None)


def test_a_template_without_an_end_gets_the_end_token(make_tokenizer, chat):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(template)
    row = encode([chat("Q", "A")], tokenizer, CFG, window=None).rows[0]
    assert trained_text(row, tokenizer)[-1].replace("\n", "").endswith("A" + END)


def test_a_template_that_opens_answers_differently_is_located(make_tokenizer, chat):
    # As of templates that open a reply with a block that training text does not have.
    template = PLAIN_CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(template)
    row = encode([chat("4 or 5?", "4", "4 again?", "4")], tokenizer, CFG, window=None).rows[0]
    assert trained_text(row, tokenizer) == ["4" + END, "4" + END]


def test_a_template_that_rewrites_answers_is_refused(make_tokenizer, chat):
    template = PLAIN_CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '(removed)' }}")
    with pytest.raises(DataError, match=r"row 7 cannot be located.*rewrites turn 2.*data\.train_on=all"):
        encode([chat("Q", "A", "R", "B", row=7)], make_tokenizer(template), CFG, window=None)


def test_a_template_that_refuses_a_role_names_the_row(make_tokenizer, chat):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN_CHATML
    )
    rows = [chat("Q", "A", row=1), chat("Q", "A", system="S", row=2)]
    with pytest.raises(DataError, match=r"cannot render row 2 \(roles: system, user.*no system role"):
        encode(rows, make_tokenizer(template), CFG, window=None)


def test_training_on_everything_leaves_only_the_first_token(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    encoded = encode([chat("Q", "A")], tokenizer, CFG.model_copy(update={"train_on": "all"}), window=None)
    ids, labels = encoded.rows[0]["input_ids"], encoded.rows[0]["labels"]
    assert labels == [-100, *ids[1:]]
    assert encoded.report.mask_by == "whole text"


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_ends_with_the_end_token(make_tokenizer, bos):
    tokenizer = make_tokenizer(bos=bos)
    encoded = encode([Example(text="naïve 🙂"), Example(text="ab" + END)], tokenizer, CFG, window=None)
    begin = "<s>" if bos else ""
    decoded = [tokenizer.decode(row["input_ids"]) for row in encoded.rows]
    assert decoded == [begin + "naïve 🙂" + END, begin + "ab" + END]
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in encoded.rows)
    assert (encoded.report.mask_by, encoded.report.template) == ("whole text", "none")


def test_report_counts(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    rows = [chat("Q", "A" * n, row=n) for n in (1, 5, 40)]
    full = encode(rows, tokenizer, CFG, window=None)
    lengths = [len(r["input_ids"]) for r in full.rows]
    limit = lengths[1] + 3
    cut = encode(rows, tokenizer, CFG, window=limit)
    assert [r["input_ids"] for r in cut.rows] == [r["input_ids"][:limit] for r in full.rows]
    assert [r["labels"] for r in cut.rows] == [r["labels"][:limit] for r in full.rows]
    report, kept = cut.report, [*lengths[:2], limit]
    assert (report.rows, report.dropped, report.truncated, report.limit) == (3, 0, 1, limit)
    assert (report.tokens, report.max_length, report.mean_length) == (sum(kept), max(kept), sum(kept) / 3)
    trained = sum(label != -100 for r in cut.rows for label in r["labels"])
    assert (report.trained_tokens, report.trained_share) == (trained, trained / sum(kept))


def test_prompts_that_fill_the_limit_are_an_error_with_counts(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    rows = [chat("Q", "A", row=1)] + [chat("Q" * 50, "A", row=r) for r in (2, 3)]
    length = len(encode(rows[1:2], tokenizer, CFG, window=None).rows[0]["input_ids"])
    room = len(prompt_of(rows[1], tokenizer, CFG))
    small = CFG.model_copy(update={"max_length": room})
    with pytest.raises(DataError) as error:
        encode(rows, tokenizer, small, window=2048)
    message = str(error.value)
    assert message.startswith(f"2 of 3 rows have no trained token within {room} tokens: row 2: {length} tokens")
    assert f"{room} before the first trained one; row 3" in message
    assert "window is 2048" in message
    assert "data.too_long=drop" in message
    with pytest.raises(DataError, match=f"The model's window is {room}, so data.max_length=1024 cannot help"):
        encode(rows, tokenizer, CFG, window=room)
    dropped = encode(rows, tokenizer, small.model_copy(update={"too_long": "drop"}), window=None)
    assert (dropped.report.rows, dropped.report.dropped) == (1, 2)
    with pytest.raises(DataError, match="2 of 2 rows") as error:
        encode(rows[1:], tokenizer, small.model_copy(update={"too_long": "drop"}), window=None)
    assert "too_long=drop" not in str(error.value)
    one_more = encode(rows, tokenizer, small.model_copy(update={"max_length": room + 1}), window=None)
    assert (one_more.report.dropped, one_more.report.truncated) == (0, 2)


def test_nothing_to_encode_or_answer(make_tokenizer):
    with pytest.raises(DataError, match=r"no rows to encode"):
        encode([], make_tokenizer(), CFG, window=None)
    with pytest.raises(DataError, match="Row 3 is plain text"):
        prompt_of(Example(text="x", row=3), make_tokenizer(), CFG)
    bare = make_tokenizer(None)
    bare.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor an end token"):
        encode([Example(text="x")], bare, CFG, window=None)


def test_a_tokenizer_without_offsets_compares_prefixes(make_tokenizer, chat):
    class Slow:
        is_fast = False

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *args, **kwargs):
            assert "return_offsets_mapping" not in kwargs
            return self.inner(*args, **kwargs)

    rows = [chat("Q", text, "R", text) for text in HARD]
    tokenizer = make_tokenizer()
    assert encode(rows, Slow(tokenizer), CFG, window=None).rows == encode(rows, tokenizer, CFG, window=None).rows


def test_seq2seq_rows_split_prompt_and_answer(make_tokenizer, chat):
    tokenizer = make_tokenizer(None, bos=True)
    rows = [chat("Q", "A", "R", "longer answer", row=1), chat("Q" * 30, "B", row=2)]
    encoded = encode(rows, tokenizer, CFG, window=None, seq2seq=True)
    first = encoded.rows[0]
    assert tokenizer.decode(first["input_ids"]) == f"<s>Q\nA{END}R\n"
    assert tokenizer.decode(first["labels"]) == f"<s>longer answer{END}"
    assert prompt_of(rows[0], tokenizer, CFG, seq2seq=True) == first["input_ids"]
    assert encoded.report.mask_by == "decoder labels"
    with pytest.raises(DataError, match="1 of 2 rows have no trained token within 16 tokens: row 2"):
        encode(rows, tokenizer, CFG.model_copy(update={"max_length": 16}), window=None, seq2seq=True)
    with pytest.raises(DataError, match="plain text"):
        encode([Example(text="x")], tokenizer, CFG, window=None, seq2seq=True)


@pytest.mark.parametrize("multiple", [None, 4])
def test_collator_pads_on_the_right(multiple):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9, 1, 2, 3], "labels": [-100] * 4 + [3]},
    ]
    batch = Collator(0, pad_to_multiple_of=multiple)(rows)
    width = 8 if multiple else 5
    assert all(t.shape == (2, width) and t.dtype == torch.int64 for t in batch.values())
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [0] * (width - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
        assert batch["labels"][i].tolist() == row["labels"] + [-100] * (width - n)


def test_further_columns_of_tensors_are_stacked_over_the_rows_that_have_them():
    rows = [{"input_ids": [5, 6], "labels": [5, 6]} for _ in range(3)]
    rows[0]["pixels"], rows[2]["pixels"] = torch.zeros(3, 2), torch.ones(3, 2)
    batch = Collator(0)(rows)
    assert torch.equal(batch["pixels"], torch.stack([torch.zeros(3, 2), torch.ones(3, 2)]))
    assert set(Collator(0)(rows[1:2])) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(DataError, match=r"pixels.*\(2, 2\), \(3, 2\)"):
        Collator(0)([*rows, {**rows[0], "pixels": torch.zeros(2, 2)}])
    with pytest.raises(DataError, match=r"pixels.*packing to false"):
        PackingCollator()(rows)


def test_seq2seq_labels_have_their_own_length():
    rows = [{"input_ids": [5, 6, 7], "labels": [1]}, {"input_ids": [8], "labels": [2, 3]}]
    batch = Collator(0, seq2seq=True)(rows)
    assert batch["labels"].tolist() == [[1, -100], [2, 3]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]


def test_rendered_samples_show_the_exact_text(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    for text in HARD:
        row = encode([chat("🙂 Q", text)], tokenizer, CFG, window=None).rows[0]
        legend, _, body = render_sample(row, tokenizer).plain.partition("\n")
        assert legend == "trained | not trained | special token"
        assert body == tokenizer.decode(row["input_ids"])


def test_rendered_samples_mark_trained_tokens_and_split_characters(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    row = encode([chat("Q", "so 🙂 it")], tokenizer, CFG, window=None).rows[0]
    shown = render_sample(row, tokenizer)
    styled = [(shown.plain[s.start : s.end], str(s.style)) for s in shown.spans][3:]
    assert str(shown.style) == "", "a style of the whole text would show everything as trained"
    assert "".join(text for text, _ in styled) == tokenizer.decode(row["input_ids"])
    assert "".join(text for text, style in styled if "bold" in style) == "so 🙂 it" + END
    assert all("magenta" in style for text, style in styled if text in (END, "<|im_start|>"))
    # A character whose tokens differ in training is shown once and whole.
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert len(ids) >= 4
    labels = [-100, -100, *ids[2:]]
    split = render_sample({"input_ids": ids, "labels": labels}, tokenizer)
    assert split.plain.endswith("\na🙂b")
    assert [split.plain[s.start : s.end] for s in split.spans if "bold" in str(s.style)][1:] == ["🙂b"]


@pytest.mark.model
def test_the_default_model_learns_answers_and_their_end(chat):
    from transformers import AutoTokenizer

    folder = Path.home() / ".cache" / "adapterlab" / "models" / "smollm2-135m"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the default model is not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [chat("4 Q?", text) for text in HARD] + [chat("Q", a, "R", "B", system="S") for a in HARD]
    encoded = encode(rows, tokenizer, CFG, window=None)
    for example, row in zip(rows, encoded.rows, strict=True):
        prompt = prompt_of(example, tokenizer, CFG)
        early = [m["content"] for m in example.messages[:-1] if m["role"] == "assistant"]
        if not any(text.startswith("\n") for text in early):
            assert row["input_ids"][: len(prompt)] == prompt
        if not any(m["content"].startswith("\n") for m in example.messages):
            assert row["input_ids"] == tokenizer.apply_chat_template(list(example.messages))["input_ids"]
        assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(
            list(example.messages), tokenize=False
        )
        answers = [m["content"] + END for m in example.messages if m["role"] == "assistant"]
        assert trained_text(row, tokenizer) == answers


@pytest.mark.parametrize("trim", [False, True], ids=["offsets", "trimmed offsets"])
@pytest.mark.parametrize("template", [PLAIN_CHATML, MARKED_CHATML], ids=["diffed", "marked"])
def test_a_token_over_the_end_of_the_prompt_is_cut_as_in_generation(make_tokenizer, chat, template, trim):
    tokenizer = make_tokenizer(template, trim_offsets=trim)
    example = chat("Q", "A", "R", "\n\nB")
    text = tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    assert "\n\n" in [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]], "the premise: line breaks merge"
    row = encode([example], tokenizer, CFG, window=None).rows[0]
    prompt = prompt_of(example, tokenizer, CFG)
    assert row["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode(row["input_ids"]) == text
    assert trained_text(row, tokenizer) == ["A" + END, "\n\nB" + END]

"""The verbs evaluate, generate and chat, run in this process on folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterlab.cli import main
from adapterlab.evaluate.generation import chat_ids, generate
from adapterlab.evaluate.opening import locate, open_target

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("verb", ..., stdin="...")` gives the exit code, stdout and stderr."""

    def call(*args: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def answer_of(target: Path, *texts: str, system: str | None = None, tokens: int = 8) -> list[str]:
    """What a target says to each text, asked by itself; turns that go before are given in order."""
    opened = open_target(locate(target), device="cpu", precision="fp32")
    before = [{"role": "system", "content": system}] if system else []
    ids = [chat_ids(opened.tokenizer, [*before, {"role": "user", "content": text}]) for text in texts]
    return generate(opened.model, opened.tokenizer, ids, max_new_tokens=tokens)


def test_evaluate_prints_a_table_or_json(run: Run, run_folder: Path) -> None:
    code, out, _ = run("evaluate", run_folder, "--base", "--limit", 4, "--max-new-tokens", 3)
    assert code == 0
    assert "4 examples" in out
    assert "95 % interval" in out
    assert "answers fixed" in out
    assert "Columns: question, answer used; not used: none." in out
    code, out, _ = run(
        "evaluate", run_folder, "--checkpoint", "last", "--json", "--max-new-tokens", 2, "--data", "system=short"
    )
    found = json.loads(out)
    assert found["n"] == 6
    assert found["columns"] == {"used": ["question", "answer"], "unused": []}
    assert found["target"].endswith("last")
    assert Path(found["answers"]).is_file()
    plain = json.loads(run("evaluate", run_folder, "--checkpoint", "last", "--json", "--max-new-tokens", 2)[1])
    assert plain["loss"] != found["loss"]


def test_evaluate_replaces_only_evaluations_of_the_same_target(run: Run, run_folder: Path, tmp_path: Path) -> None:
    options = ["--limit", 2, "--max-new-tokens", 2, "--json", "--output", tmp_path / "out"]
    for _ in range(2):
        assert run("evaluate", run_folder, *options)[0] == 0
    (file,) = (tmp_path / "out").glob("*.json")
    figures = json.loads(file.read_text())
    others = {"somebody's": {"a": 1}, "not an object": [], "of another": {**figures, "target": "elsewhere"}}
    for text in [*map(json.dumps, others.values()), "half {"]:
        file.write_text(text)
        code, _, err = run("evaluate", run_folder, *options)
        assert code == 2
        assert "Choose another output" in err
        assert file.read_text() == text


def test_generate_answers_as_the_library_does(run: Run, adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    options = ["--precision", "fp32", "--max-new-tokens", 8]
    (expected,) = answer_of(adapter, "hello")
    (plain,) = answer_of(base_folder, "hello")
    assert expected != plain
    assert run("generate", adapter, "hello", *options)[1] == expected + "\n"
    assert run("generate", base_folder, "hello", *options)[1] == plain + "\n"
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n\nwho is it?\n")
    _, out, _ = run("generate", adapter, "--file", file, "--base", "--json", *options)
    assert json.loads(out)[0] == {"prompt": "hello", "answer": expected, "base_answer": plain}
    assert [row["answer"] for row in json.loads(out)] == answer_of(adapter, "hello", "who is it?")
    _, out, _ = run("generate", adapter, "hello", "--system", "be kind", *options)
    assert out == answer_of(adapter, "hello", system="be kind")[0] + "\n"


def test_a_run_brings_its_system_message(run: Run, run_folder: Path) -> None:
    facts = json.loads((run_folder / "run.json").read_text())
    facts["config"]["data"]["system"] = "be kind"
    (run_folder / "run.json").write_text(json.dumps(facts))
    _, out, _ = run("generate", run_folder, "hello", "--max-new-tokens", 8)
    assert out == answer_of(run_folder / "best", "hello", system="be kind")[0] + "\n"
    _, out, _ = run("generate", run_folder, "hello", "--max-new-tokens", 8, "--system", "")
    assert out == answer_of(run_folder / "best", "hello")[0] + "\n"


def test_chat_switches_adapters(run: Run, adapter: Path, other_adapter: Path, base_folder: Path) -> None:
    lines = [
        "hi", "/reset", "/adapter south", "hi", "/reset", "/base", "hi", "/reset", "/adapter north", "hi",
        "/adapters", "/system be kind", "hi", "/quit", "never read",
    ]  # fmt: skip
    code, out, _ = run(
        "chat", adapter, other_adapter, "--precision", "fp32", "--max-new-tokens", 8, stdin="\n".join(lines)
    )
    assert code == 0
    north, south, base = (answer_of(folder, "hi")[0] for folder in (adapter, other_adapter, base_folder))
    kind = answer_of(adapter, "hi", system="be kind")[0]
    assert len({north, south, base, kind}) == 4
    said = [line for line in out.splitlines() if line in (north, south, base, kind)]
    assert said == [north, south, base, north, kind]
    assert "Adapters: north (live), south." in out
    assert "none" not in out
    assert out.endswith("Bye.\n")


def test_chat_keeps_its_history_and_forgets_on_reset(run: Run, base_folder: Path) -> None:
    options = ("--precision", "fp32", "--max-new-tokens", 8)
    _, out, _ = run("chat", base_folder, *options, stdin="hi\nand now?\n/reset\nand now?\n")
    said = out.splitlines()
    opened = open_target(locate(base_folder), device="cpu", precision="fp32")
    first = answer_of(base_folder, "hi")[0]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}]
    ids = chat_ids(opened.tokenizer, [*turns, {"role": "user", "content": "and now?"}])
    second = generate(opened.model, opened.tokenizer, [ids], max_new_tokens=8)[0]
    alone = answer_of(base_folder, "and now?")[0]
    assert second != alone
    assert said[2:] == [first, second, "The conversation starts anew.", alone, "Bye."]


def test_chat_drops_the_oldest_turns_when_the_window_is_full(run: Run, base_folder: Path) -> None:
    # A question takes 168 of the 512 positions and an answer 19: three of them do not fit, two do.
    lines = [letter * 160 for letter in "abc"]
    options = ("--precision", "fp32", "--max-new-tokens", 8)
    code, out, _ = run("chat", base_folder, *options, stdin="\n".join([*lines, "d" * 600, "hi"]))
    said = out.splitlines()[2:]
    assert code == 0
    opened = open_target(locate(base_folder), device="cpu", precision="fp32")

    def expected(*turns: str) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return generate(opened.model, opened.tokenizer, [chat_ids(opened.tokenizer, messages)], max_new_tokens=8)[0]

    assert said[1] == expected(lines[0], said[0], lines[1])
    assert said[2] == expected(lines[1], said[1], lines[2])
    assert "does not fit into the model's window of 512" in said[3]
    assert said[4] == expected(lines[1], said[1], lines[2], said[2], "hi")
    assert said[5:] == ["Bye."]


def test_chat_explains_wrong_commands_and_goes_on(run: Run, adapter: Path) -> None:
    code, out, _ = run(
        "chat", adapter, "--max-new-tokens", 2, stdin="/adaptr x\n/adapter nort\n/adapter\n/help\n/adapters\n"
    )
    assert code == 0
    assert "There is no command /adaptr. Nearest: adapter" in out
    assert "There is no adapter 'nort'" in out
    assert "/adapter needs the name of an adapter. Attached: north" in out
    assert "/system" in out
    assert out.endswith("Adapters: north (live).\nBye.\n")


def test_chat_leaves_politely_on_ctrl_c(run: Run, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    code, out, _ = run("chat", base_folder)
    assert (code, out.splitlines()[-1]) == (0, "Bye.")


def test_chat_wants_one_base(run: Run, adapter: Path, base_folder: Path) -> None:
    code, _, err = run("chat", adapter, "smollm2-135m")
    assert code == 2
    assert "share one base model" in err
    code, _, err = run("chat", adapter, base_folder)
    assert code == 2
    assert "after the first name give runs or adapters only" in err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["generate", "{adapter}"], "There is nothing to answer"),
        (["generate", "{base}", "hi", "--base"], "is a base model. Leave it out"),
        (["generate", "{adapter}", "--file", "no.txt"], "no.txt cannot be read"),
        (["generate", "{adapter}", "hi", "--temperature", "-1"], "temperature must be 0"),
        (["generate", "no/such/folder", "hi"], "There is no model 'no/such/folder'"),
        (["evaluate", "{adapter}"], "--data eval_path=FILE"),
        (["evaluate", "{adapter}", "--data", "eval_path"], "Write key=value, such as --data eval_size=50"),
        (["evaluate", "{adapter}", "--data", "eval_path=gone.jsonl"], "gone.jsonl"),
        (["evaluate", "{run}", "--checkpoint", "lats"], "Nearest: last"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    run: Run, adapter: Path, base_folder: Path, run_folder: Path, args: list[str], named: str
) -> None:
    code, _, err = run(*(arg.format(adapter=adapter, base=base_folder, run=run_folder) for arg in args))
    assert code == 2
    assert named in err
    assert "Traceback" not in err

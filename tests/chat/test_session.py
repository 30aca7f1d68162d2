"""The commands of a chat session, tested with fast fake models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.chat.options import Conversation, Options
from launcher.chat.session import Session
from launcher.config.schema.data import DataConfig
from launcher.errors import UserError
from tests.helpers.chat import typed


class Echo:
    """Repeat the question as the answer, and record the arguments."""

    def __init__(self) -> None:
        self.given: list[Conversation] = []
        self.options = Options()

    def stream(self, conversation: Conversation, options: Options) -> Iterator[str]:
        self.given.append(conversation)
        self.options = options
        yield "you said "
        question = conversation[-1]["content"]
        if question == "interrupt":
            raise KeyboardInterrupt
        if question == "fail":
            raise UserError("that is too long")
        yield question


def test_every_question_includes_the_conversation_so_far() -> None:
    echo = Echo()
    Session([echo], Options(), "be brief").converse(typed("one\\", "more", "two", "/exit", "three"))
    assert [message["content"] for message in echo.given[-1]] == [
        "be brief", "one\nmore", "you said one\nmore", "two",
    ]  # fmt: skip
    assert len(echo.given) == 2


def test_an_interrupted_or_failed_answer_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    Session([echo], Options()).converse(typed("interrupt", "fail", "two"))
    assert echo.given[-1] == [{"role": "user", "content": "two"}]
    assert "that is too long" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_ends_the_chat() -> None:
    def line(prompt: str) -> str:
        raise KeyboardInterrupt

    Session([Echo()], Options()).converse(line)


def test_session_commands_change_the_session(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    session = Session([echo], Options())
    session.converse(typed(
        "/system be kind", "/set temperature 0.5", "/set seed=4", "one", "/clear", "two",
        "/system", "/system -", "/set", "three", "/help",
    ))  # fmt: skip
    assert echo.options == Options(temperature=0.5, seed=4)
    assert [m["content"] for m in echo.given[1]] == ["be kind", "two"]
    assert [m["content"] for m in echo.given[2]] == ["two", "you said two", "three"]
    said = capsys.readouterr().out
    assert "system: be kind\n" in said
    assert "temperature 0.5  top_p 1.0  seed 4" in said
    assert "/save FILE" in said


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("/quit", "/quit is not a command"),
        ("/", "/ is not a command"),
        ("/set heat 9", "heat is not an option"),
        ("/set temperature", "temperature='' is not a number"),
        ("/save", "needs the name of a new file"),
        ("/save x.jsonl", "nothing was answered yet"),
    ],
)
def test_an_invalid_command_is_not_sent_to_the_model(
    command: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    Session([echo], Options()).converse(typed(command))
    assert sentence in capsys.readouterr().err
    assert not echo.given


def test_a_saved_conversation_can_be_trained_on(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.data.dataset import load_data
    from launcher.model.tokenizer import load_tokenizer

    file = tmp_path / "talk.jsonl"
    session = Session([Echo()], Options(), "be brief")
    session.converse(typed("one ünd", '"""a', 'b"""', f"/save {file}", f"/save {file}"))
    assert f"{file} exists and is not overwritten" in capsys.readouterr().err
    (line,) = file.read_text().splitlines()
    assert len(json.loads(line)["messages"]) == 5
    config = DataConfig(path=str(file), format="messages", max_length=512)
    tokenizer = load_tokenizer(tiny, False)
    ((ids, trained),) = load_data(config, tokenizer).rows
    assert "you said one ünd" in tokenizer.decode(ids[trained])


def test_an_impossible_save_gives_a_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session([Echo()], Options())
    names = (tmp_path / "gone/x", tmp_path, "~nobody-of-that-name/x", "a\0b")
    session.converse(typed("hi", *(f"/save {name}" for name in names)))
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == len(names)
    assert list(tmp_path.iterdir()) == []


def test_two_models_answer_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = Echo(), Echo()
    Session([one, two], Options()).converse(typed("hi", f"/save {tmp_path / 'talk.jsonl'}"))
    assert capsys.readouterr().out.startswith("A: you said hi\nB: you said hi\n")
    assert len((tmp_path / "talk.jsonl").read_text().splitlines()) == 2
    assert len(one.given) == len(two.given) == 1


def test_an_answer_cannot_send_control_codes_to_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Session([Echo()], Options()).ask("\x1b[2J\x9bred\ttab")
    assert capsys.readouterr().out == "you said \ufffd[2J\ufffdred\ttab\n"

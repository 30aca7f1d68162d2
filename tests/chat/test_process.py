"""The process that runs a model for the page: its protocol, tested with fast fake models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.chat import remote
from launcher.chat.options import Options
from launcher.chat.remote import RemoteModel
from launcher.errors import UserError
from tests.helpers.commands import PATIENCE_SECONDS

HI = [{"role": "user", "content": "hi"}]

# A child process whose model prints to both kinds of stdout and does what the question asks.
CHILD = """
import os, sys, time
from types import SimpleNamespace
from launcher.chat import process
from launcher.errors import UserError

class ChatModel:
    tokens = 0
    def stream(self, conversation, options, should_stop):
        question = conversation[-1]["content"]
        print("printed by a library"); os.write(1, b"written by a library\\n")
        if question == "break":
            raise ZeroDivisionError("by the model")
        if question == "refuse":
            raise UserError("too long")
        if question == "die":
            print("the last words", file=sys.stderr); os._exit(7)
        for self.tokens in range(1, 3 if question == "hi" else 10**6):
            yield f"{self.tokens} \\u00fc\\n"
            if should_stop():
                return
            time.sleep(0.001)

def load_model(message, send):
    print("loading")
    path = message["load"]["path"]
    if path.endswith("gone"):
        raise UserError("there is no such model")
    if path.endswith("slow"):
        time.sleep(600)
    send({"ready": {"description": path, "notes": ["a note"]}})
    return ChatModel()

process.load_model = load_model
process.main()
"""


@pytest.fixture
def opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], RemoteModel]]:
    """Create remote models that run the fake model above, and close them afterward."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(remote, "COMMAND", (sys.executable, str(tmp_path / "child.py")))
    made: list[RemoteModel] = []

    def open_one(name: str = "model") -> RemoteModel:
        made.append(RemoteModel(tmp_path / name))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited for {PATIENCE_SECONDS} s"
        time.sleep(0.01)


def ready(one: RemoteModel) -> RemoteModel:
    assert one.wait(PATIENCE_SECONDS) == "ready", one.error
    return one


def test_library_output_does_not_break_the_protocol(
    opened: Callable[..., RemoteModel], tmp_path: Path
) -> None:
    one = ready(opened())
    assert (one.description, one.notes) == (str(tmp_path / "model"), ("a note",))
    assert list(one.stream(HI, Options())) == ["1 ü\n", "2 ü\n"]
    assert one.last_answer is not None
    assert (one.last_answer.tokens, one.last_answer.stopped, one.state) == (2, False, "ready")


def test_one_answer_at_a_time_and_stop_ends_it(opened: Callable[..., RemoteModel]) -> None:
    one = ready(opened())
    pieces = one.stream([{"role": "user", "content": "count"}], Options())
    next(pieces)
    with pytest.raises(UserError, match="is answering"):
        one.stream(HI, Options())
    one.stop()
    list(pieces)
    assert one.last_answer is not None
    assert one.last_answer.stopped
    one.stop()  # no answer is running; the next answer must not be stopped
    assert len(list(one.stream(HI, Options()))) == 2


def test_an_answer_is_stopped_when_its_iterator_is_closed(
    opened: Callable[..., RemoteModel],
) -> None:
    one = ready(opened())
    pieces = one.stream([{"role": "user", "content": "count"}], Options())
    next(pieces)
    pieces.close()
    wait_until(lambda: one.state == "ready")
    assert len(list(one.stream(HI, Options()))) == 2


@pytest.mark.parametrize(
    ("question", "sentence"), [("break", "ZeroDivisionError: by the model"), ("refuse", "too long")]
)
def test_errors_reach_the_caller_and_the_process_keeps_running(
    opened: Callable[..., RemoteModel], question: str, sentence: str
) -> None:
    one = ready(opened())
    with pytest.raises(UserError, match=sentence):
        list(one.stream([{"role": "user", "content": question}], Options()))
    assert len(list(one.stream(HI, Options()))) == 2


def test_a_killed_process_is_reported_with_its_signal(opened: Callable[..., RemoteModel]) -> None:
    one = ready(opened())
    pieces = one.stream([{"role": "user", "content": "count"}], Options())
    next(pieces)
    os.kill(one.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="SIGKILL; often the machine ran out of memory"):
        list(pieces)
    assert one.state == "failed"
    with pytest.raises(UserError, match="SIGKILL"):
        one.stream(HI, Options())


def test_a_process_that_exits_is_reported_with_its_last_output(
    opened: Callable[..., RemoteModel],
) -> None:
    one = ready(opened())
    with pytest.raises(UserError, match="status 7: the last words"):
        list(one.stream([{"role": "user", "content": "die"}], Options()))


def test_a_model_that_cannot_be_loaded_fails(opened: Callable[..., RemoteModel]) -> None:
    one = opened("gone")
    assert one.wait(PATIENCE_SECONDS) == "failed"
    assert one.error == "there is no such model"


def test_closing_while_loading_ends_the_process(opened: Callable[..., RemoteModel]) -> None:
    one = opened("slow")
    with pytest.raises(UserError, match="still being loaded"):
        one.stream(HI, Options())
    one.close()
    assert one.state == "closed"
    assert one._child.returncode is not None
    with pytest.raises(UserError, match="was closed"):
        one.stream(HI, Options())
    one.close()


def test_a_process_that_hangs_is_killed(
    opened: Callable[..., RemoteModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "EXIT_TIMEOUT", 0.2)
    one = ready(opened())
    os.kill(one.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(one.pid).status() == psutil.STATUS_STOPPED)
    one.close()
    assert one._child.returncode == -signal.SIGKILL


def test_closing_during_an_answer_ends_it(opened: Callable[..., RemoteModel]) -> None:
    one = ready(opened())
    pieces = one.stream([{"role": "user", "content": "count"}], Options())
    next(pieces)
    one.close()
    with pytest.raises(UserError, match="was closed"):
        list(pieces)


def test_invalid_protocol_lines_get_error_messages(tmp_path: Path) -> None:
    """Lines are written directly to the process; closing stdin ends it during an answer."""
    (tmp_path / "child.py").write_text(CHILD)
    lines = [
        '{"load": {"path": "x"}}', "no json", "[1]", "[" * 99_999, '{"fly": 1}', '{"ask": 3}',
        '{"ask": {"conversation": [{"role": "user", "content": "hi"}], "options": {"top_k": 1}}}',
        '{"stop": true}',
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n".join(lines) + "\n")
        child.stdin.flush()
        said = [json.loads(child.stdout.readline()) for _ in range(7)]
        errors = [each["error"] for each in said if "error" in each]
        assert len(errors) == 6
        assert any("unknown options: top_k" in each for each in errors)
        count = {"conversation": [{"role": "user", "content": "count"}], "options": {}}
        child.stdin.write(json.dumps({"ask": count}) + "\n")
        child.stdin.flush()
        assert "piece" in json.loads(child.stdout.readline())
        child.stdin.close()
        child.stdout.read()
        assert child.wait(PATIENCE_SECONDS) == 0


def test_a_real_model_answers_in_its_process(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.chat.model import ChatModel
    from launcher.chat.target import find_target

    short = Options(max_new_tokens=12)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # spinning threads slow busy cores down
    one = RemoteModel(adapter)
    try:
        assert one.wait(PATIENCE_SECONDS) == "ready", one.error
        assert "".join(one.stream(HI, short)).strip() == ChatModel(find_target(adapter)).answer(
            HI, short
        )
        with pytest.raises(UserError, match="512 positions"):
            list(one.stream([{"role": "user", "content": "x" * 600}], short))
    finally:
        one.close()

"""`shardway chat` as a user types it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.commands import chat
from launcher.errors import UserError
from tests.helpers.commands import SHARDWAY, shardway


def arguments(*words: object) -> object:
    return chat._parser().parse_args([str(word) for word in words])


def test_a_piped_conversation_is_answered_and_saved(
    adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    """Two models, a block, a command, invalid UTF-8, and the saved file at the end."""
    command = [*SHARDWAY, "chat", adapter, "--against", tiny, "--base", tiny]
    command += ["--temperature", "1.5", "--seed", "1"]  # greedy output is only blanks
    lines = b'/set max_new_tokens 8\n"""\nhi\nyou\n"""\n/nothing\ncaf\xe9\n/save talk.jsonl\n'
    done = subprocess.run(
        [*map(str, command)],
        input=lines,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # spinning threads slow busy cores down
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode().splitlines()
    assert said[:2] == [f"A: adapter {adapter} on base {tiny}", f"B: model {tiny}"]
    assert b"/nothing is not a command" in done.stderr
    assert b"Traceback" not in done.stderr
    assert len((tmp_path / "talk.jsonl").read_text().splitlines()) == 2


def test_errors_are_one_line_and_exit_with_status_2(tiny: Path, tmp_path: Path) -> None:
    done = shardway("chat", tmp_path, "--question", "hi", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--temperature", "9"), "temperature=9.0 must be"),
        (("--max-new-tokens", "0"), "max_new_tokens=0 must be"),
        (("--top-p", "0"), "top_p=0.0 must be"),
        (("--seed", "-1"), "seed=-1 must be"),
        (("--question", " "), "--question is empty"),
        (("--base", "."), "leave --base . out"),
        (("--against", "gone"), "gone is not a folder"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(
    tiny: Path, words: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        chat.chat(arguments(tiny, *words))


def test_base_option_applies_to_the_adapters(adapter: Path, tiny: Path, tiny_untied: Path) -> None:
    one, two = chat._targets(tiny, adapter, tiny_untied)
    assert (one.model, two.model) == (tiny, tiny_untied)

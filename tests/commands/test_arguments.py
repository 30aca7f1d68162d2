"""Command-line arguments that several verbs share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from launcher.commands.arguments import number, parse_size, picture_path
from launcher.errors import UserError
from tests.helpers.commands import in_process


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("5GB", 5 * 10**9), ("100MB", 10**8), ("1.5 kb", 1500), ("2GiB", 2 * 2**30), ("77B", 77)),
        *((" 5 gb ", 5 * 10**9), ("５ＧＢ", 5 * 10**9), ("5\u00a0gib", 5 * 2**30)),
        *(("0.3GB", 3 * 10**8), ("9007199254740993B", 9007199254740993)),
    ],
)
def test_sizes_are_decimal_unless_written_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0GB", "-1GB", "5XB", "5 G B", "1e9B", "1e9", "infGB", "1_0GB"]
)
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a size → 5GB, 500MB or 5GiB$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        *(("5,5GB", "5.5GB, with a point, or 55GB"), ("5GBs", "5GB or 5GiB")),
        *(("80G", "80GB or 80GiB"), ("5gi", "5GB or 5GiB"), ("0.1B", "5GB, 500MB or 5GiB")),
    ],
)
def test_a_size_that_is_nearly_right_says_what_may_be_meant(text: str, way_out: str) -> None:
    with pytest.raises(UserError, match=f"^--memory {text} is .* → {re.escape(way_out)}$"):
        parse_size(text, "--memory")


@pytest.mark.parametrize("option", ["--max-shard-size", "--memory"])
@pytest.mark.parametrize("size", ["-1GB", "0GB", "5GBs", "1e9"])
def test_a_wrong_size_is_refused_before_anything_is_read(
    option: str, size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["consolidate", "absent", "--output", "absent-too", option, size]
    assert in_process(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert f"{option} {size} is not a size" in said or f"{option} {size} has no unit" in said


def test_too_little_memory_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["consolidate", "absent", "--output", "out", "--memory", "5kb"]
    assert in_process(monkeypatch, *words) == 2
    assert "--memory 5000 bytes: one file at a time needs" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--max-shard-size", "--memory"])
def test_a_size_without_a_unit_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"^{option} 5 has no unit → 5GB[?] For bytes, 5B$"):
        parse_size("5", option)


def test_a_picture_without_a_name_gets_the_next_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a-2.png", "a-3.png"):
        assert picture_path(None, "a.png", overwrite=False) == Path(name)
        Path(name).touch()


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (number(int, 1), "1", 1),
        (number(int, 0, 65535), "65535", 65535),
        (number(float, 0), "0.5", 0.5),
    ],
)
def test_a_number_within_its_bounds_is_parsed(
    parse: Callable[[str], float], text: str, value: float
) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "sentence"),
    [
        (number(int, 1), "0", "0 is not a whole number of at least 1"),
        (number(int, 0), "-1", "-1 is not a whole number of at least 0"),
        (number(int, 0), "1.5", "1.5 is not a whole number of at least 0"),
        (number(int, 0, 65535), "65536", "65536 is not a whole number 0 to 65535"),
        (number(float, 0), "nan", "nan is not a number of at least 0"),
        (number(float, 0), "inf", "inf is not a number of at least 0"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused(
    parse: Callable[[str], float], text: str, sentence: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        parse(text)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    "words",
    [
        ("logs", "runs/x", "--attempt", "0"),
        ("logs", "runs/x", "--rank", "-1"),
        ("consolidate", "runs/x", "--output", "y", "--workers", "-1"),
        ("consolidate", "runs/x", "--output", "y", "--progress-seconds", "-1"),
    ],
)
def test_every_verb_refuses_such_a_number_by_the_name_of_its_option(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert re.search(
        f"argument {words[-2]}: {words[-1]} is not a (whole )?number of at least", said
    )


def test_the_version_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"shardway {metadata.version('shardway')}\n"
    in_process(monkeypatch, "--help")
    assert "shardway --version" in capsys.readouterr().out


def test_resume_names_the_command_that_changes_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process(monkeypatch, "resume", "runs/x", "training.max_steps=500") == 2
    assert capsys.readouterr().err.endswith(
        f"→ shardway train --config-path {tmp_path}/runs/x --config-name config resume=auto "
        "training.max_steps=500\n"
    )
    assert in_process(monkeypatch, "resume", "runs/x", "--force") == 2
    assert "unrecognized arguments: --force" in capsys.readouterr().err

"""Rows of text: read a file, recognise its format, turn each row into chat messages. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import UserError

Message = dict[str, str]  # role, content

ROLES = ("system", "user", "assistant")
CHECKED_AT_SUBMIT_BYTES = 32_000_000  # about a third of a second of reading


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a .jsonl or .json file with its place (`file:line` or `file[index]`).

    Raises UserError when the file is missing, empty, or not JSON.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(
            f"data.path={path} ends in neither .json nor .jsonl; rename or convert it"
            + ("; raw text is data=pretrain" if path.suffix == ".txt" else "")
        )
    try:
        text = path.open(encoding="utf-8-sig")  # some editors put a byte order mark first
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from error
    with text:
        rows = _json_lines(path, text) if path.suffix == ".jsonl" else _json_array(path, text)
        empty = True
        try:
            for place_and_row in rows:
                empty = False
                yield place_and_row
        except UnicodeDecodeError as error:
            raise UserError(f"data.path={path} is not UTF-8 ({error}); convert it") from error
    if empty:
        raise UserError(f"data.path={path} holds no rows; give it at least one")


def read_messages(path: Path, format: str) -> Iterator[tuple[str, list[Message]]]:
    """Each row as chat messages with its place. Raises UserError for the first row that is bad."""
    for place, row in read_rows(path):
        yield place, to_messages(place, row, format)


def read_texts(path: Path, by_line: bool) -> Iterator[tuple[str, str]]:
    """Each raw text with its place: a .txt file whole or (`by_line`) its lines, or the field text
    of .json and .jsonl rows. Raises UserError for the first row that is bad."""
    if path.suffix != ".txt":
        for place, row in read_rows(path):
            if not isinstance(row, dict):
                raise UserError(f"{place} is {type(row).__name__}, not an object with a field text")
            yield place, _text(place, row, "text")
        return
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path} is not UTF-8 ({error}); convert it") from error
    if not whole.strip():
        raise UserError(f"data.path={path} holds no text; give it some")
    if not by_line:
        yield str(path), whole
        return
    for number, line in enumerate(whole.splitlines(), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def problems(path: Path, format: str) -> list[str]:
    """What is wrong with a data file, as far as a short look tells. Large files are only opened;
    the rest of their rows is checked, with the same sentences, when they are tokenised."""
    rows: Iterator[Any] = (
        read_texts(path, by_line=False) if format == "text" else read_messages(path, format)
    )
    try:
        next(rows) if path.is_file() and path.suffix == ".jsonl" else None
        if not path.is_file() or path.stat().st_size <= CHECKED_AT_SUBMIT_BYTES:
            for _ in rows:
                pass
    except UserError as error:
        return [str(error)]
    return []


def to_messages(place: str, row: Any, format: str) -> list[Message]:
    """One row as `[{"role", "content"}, …]` that ends with, or contains, an answer.

    alpaca: instruction, input, output, system, history ([[question, answer], …]).
    messages: {"messages": [{"role", "content"}, …]}.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place} is {type(row).__name__}, not an object with named fields")
    if format == "auto":
        format = _recognise(place, row)
    messages = _from_alpaca(place, row) if format == "alpaca" else _from_messages(place, row)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{place} has no answer to learn; add an assistant message or drop the row")
    return messages


def _recognise(place: str, row: dict[str, Any]) -> str:
    if "messages" in row:
        return "messages"
    if "instruction" in row:
        return "alpaca"
    raise UserError(
        f"{place} has the fields {', '.join(row) or '(none)'}; "
        "needed are messages, or instruction and output"
        + ("; raw text is data=pretrain" if "text" in row else "")
    )


def _from_alpaca(place: str, row: dict[str, Any]) -> list[Message]:
    system, history = row.get("system"), row.get("history") or []
    question = _text(place, row, "instruction")
    if row.get("input"):
        question = f"{question}\n{_text(place, row, 'input')}"
    answer = _text(place, row, "output")
    messages = [{"role": "system", "content": _text(place, row, "system")}] if system else []
    if not isinstance(history, list):
        raise UserError(f"{place}: history must be pairs of question and answer")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise UserError(f"{place}: history must be pairs of question and answer")
        pair = {"question": turn[0], "answer": turn[1]}
        where = f"{place} history"
        messages.append({"role": "user", "content": _text(where, pair, "question")})
        messages.append({"role": "assistant", "content": _text(where, pair, "answer")})
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _from_messages(place: str, row: dict[str, Any]) -> list[Message]:
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise UserError(f"{place}: messages must be a list with at least one message")
    messages = []
    for index, message in enumerate(given):
        where = f"{place} messages[{index}]"
        if not isinstance(message, dict):
            raise UserError(f"{where} is not an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
        messages.append({"role": role, "content": _text(where, message, "content")})
    return messages


def _text(place: str, row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        what = "missing" if value is None else "empty" if isinstance(value, str) else "no text"
        raise UserError(f"{place}: {field} is {what}; write one or drop the row")
    return value


def _json_lines(path: Path, text: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place} is not JSON: {error}") from error


def _json_array(path: Path, text: Any) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.load(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}; one object a line is .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of rows, not {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row

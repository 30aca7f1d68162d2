"""`python -m launcher.chat.process`: a process that owns a model and answers over its pipes.

One JSON object a line. In: {"load": {"path", "base"}} first, then {"ask": {"conversation",
"options"}} and {"stop": true}. Out: {"ready": {"description", "notes"}}, {"piece": text},
{"end": {"tokens", "seconds", "stopped"}}, {"error": sentence}. The end of stdin ends the process
at once. `launcher.chat.remote` speaks to it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from launcher.chat.options import options_of
from launcher.chat.subject import find
from launcher.errors import UserError

Say = Callable[[dict[str, Any]], None]
UNUSABLE = 2  # the exit status when the model cannot be loaded


@dataclass
class Request:
    """A line of stdin, and whether its answer is to end early."""

    what: dict[str, Any]
    stopped: threading.Event = field(default_factory=threading.Event)


def main() -> None:
    say = speaker(private_stdout())
    requests: queue.Queue[Request] = queue.Queue()
    listener = threading.Thread(target=listen, args=(sys.stdin, requests, say), daemon=True)
    listener.start()
    try:
        talk = load(requests.get().what, say)
    except Exception as error:
        say({"error": sentence(error)})
        sys.exit(UNUSABLE)
    while True:
        request = requests.get()
        try:
            answer(talk, request, say)
        except Exception as error:
            say({"error": sentence(error)})


def private_stdout() -> IO[str]:
    """The stdout of this process for its own use; what libraries print goes to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def speaker(out: IO[str]) -> Say:
    """Writes one line; two threads never mix theirs."""
    lock = threading.Lock()

    def say(what: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(what) + "\n")
            out.flush()

    return say


def listen(lines: Iterable[str], requests: queue.Queue[Request], say: Say) -> None:
    """Queue what is asked; a stop is meant for what was asked last. Ends the process with stdin."""
    last = Request({})
    try:
        for line in lines:
            try:
                what = _object(line)
            except UserError as error:
                say({"error": str(error)})
                continue
            if "stop" in what:
                last.stopped.set()
            else:
                last = Request(what)
                requests.put(last)
    finally:
        os._exit(0)  # the page is gone, and an answer under way may take minutes


def load(what: dict[str, Any], say: Say) -> Any:
    """The model that the first line names. Raises UserError."""
    wanted = what.get("load")
    if not isinstance(wanted, dict) or not isinstance(wanted.get("path"), str):
        raise UserError('the first line names a model: {"load": {"path": DIR, "base": null}}')
    base = wanted.get("base")
    subject = find(Path(wanted["path"]), Path(base) if isinstance(base, str) else None)

    from launcher.chat.model import Talk  # after the folder was found to be one

    talk = Talk(subject)
    say({"ready": {"description": subject.describe(), "notes": list(subject.notes)}})
    return talk


def answer(talk: Any, request: Request, say: Say) -> None:
    """Say the pieces of one answer and its end. Raises UserError for what is no question."""
    asked = request.what.get("ask")
    if not isinstance(asked, dict):
        raise UserError(f"{', '.join(request.what) or 'nothing'} is asked; there are ask and stop")
    options = options_of(asked.get("options", {}))
    began = time.monotonic()
    for piece in talk.stream(asked.get("conversation"), options, request.stopped.is_set):
        say({"piece": piece})
    seconds = round(time.monotonic() - began, 3)
    ended = {"tokens": talk.tokens, "seconds": seconds, "stopped": request.stopped.is_set()}
    say({"end": ended})


def sentence(error: Exception) -> str:
    """What a person is told; the traceback of the unexpected goes to stderr."""
    if isinstance(error, UserError):
        return str(error)
    import traceback

    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _object(line: str) -> dict[str, Any]:
    try:
        what = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a line is no JSON: {error}") from error
    if not isinstance(what, dict):
        raise UserError(f"a line is a JSON {type(what).__name__}, expected an object")
    return what


if __name__ == "__main__":
    main()

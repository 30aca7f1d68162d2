"""`python -m launcher.chat.process`: a process that owns a model and answers through pipes.

Each line is one JSON object. Input: {"load": {"path", "base"}} first, then {"ask": {"conversation",
"options"}} and {"stop": true}. Output: {"ready": {"description", "notes"}}, {"piece": text},
{"end": {"tokens", "seconds", "stopped"}}, {"error": message}. The process exits as soon as its
stdin ends. `launcher.chat.remote` is the other side.
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
from typing import IO, TYPE_CHECKING, Any

from launcher.chat.options import options_from_json
from launcher.chat.target import find_target
from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.chat.model import ChatModel

Message = dict[str, Any]  # one line of a pipe
Send = Callable[[Message], None]
LOAD_FAILED = 2  # exit status if the model cannot be loaded


@dataclass
class Request:
    """A line of stdin, and whether its answer should end early."""

    message: Message
    stopped: threading.Event = field(default_factory=threading.Event)


def main() -> None:
    """Load the model that the first line names, then answer until stdin ends."""
    send = message_sender(take_stdout())
    requests: queue.Queue[Request] = queue.Queue()
    reader = threading.Thread(target=read_requests, args=(sys.stdin, requests, send), daemon=True)
    reader.start()
    try:
        model = load_model(requests.get().message, send)
    except Exception as error:
        send({"error": error_message(error)})
        sys.exit(LOAD_FAILED)
    while True:
        request = requests.get()
        try:
            answer(model, request, send)
        except Exception as error:
            send({"error": error_message(error)})


def take_stdout() -> IO[str]:
    """The original stdout. Everything else that this process prints goes to stderr from now on."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stdout


def message_sender(out: IO[str]) -> Send:
    """A function that writes one message as a line. Threads may share it."""
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock:
            out.write(json.dumps(message) + "\n")
            out.flush()

    return send


def read_requests(lines: Iterable[str], requests: queue.Queue[Request], send: Send) -> None:
    """Put each request into the queue. A stop applies to the newest request.

    Exits the process when the lines end.
    """
    newest = Request({})
    try:
        for line in lines:
            try:
                message = _parse_line(line)
            except UserError as error:
                send({"error": str(error)})
                continue
            if "stop" in message:
                newest.stopped.set()
            else:
                newest = Request(message)
                requests.put(newest)
    finally:
        os._exit(0)  # the page has ended, and the current answer may take minutes


def load_model(message: Message, send: Send) -> ChatModel:
    """Load the model named in the first message and send "ready". Raises UserError."""
    load = message.get("load")
    if not isinstance(load, dict) or not isinstance(load.get("path"), str):
        raise UserError('the first line must name a model: {"load": {"path": DIR, "base": null}}')
    base = load.get("base")
    target = find_target(Path(load["path"]), Path(base) if isinstance(base, str) else None)

    from launcher.chat.model import ChatModel  # slow; only once the folder is known to be a model

    model = ChatModel(target)
    send({"ready": {"description": target.describe(), "notes": list(target.notes)}})
    return model


def answer(model: ChatModel, request: Request, send: Send) -> None:
    """Send the pieces of one answer, then "end". Raises UserError for an invalid request."""
    ask = request.message.get("ask")
    if not isinstance(ask, dict):
        keys = ", ".join(request.message) or "an empty object"
        raise UserError(f"{keys} is not a request; the requests are ask and stop")
    options = options_from_json(ask.get("options", {}))
    conversation: Any = ask.get("conversation")  # the model checks it
    start = time.monotonic()
    for piece in model.stream(conversation, options, request.stopped.is_set):
        send({"piece": piece})
    seconds = round(time.monotonic() - start, 3)
    stopped = request.stopped.is_set()
    send({"end": {"tokens": model.tokens, "seconds": seconds, "stopped": stopped}})


def error_message(error: Exception) -> str:
    """The message for the user. The traceback of an unexpected error goes to stderr."""
    if isinstance(error, UserError):
        return str(error)
    import traceback

    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _parse_line(line: str) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a line is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise UserError(f"a line is a JSON {type(message).__name__}, expected an object")
    return message


if __name__ == "__main__":
    main()

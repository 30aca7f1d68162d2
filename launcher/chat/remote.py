"""A model in a separate process, as the web page uses it. Imports neither torch nor transformers.

remote = RemoteModel(Path("runs/first"))
remote.wait()
for piece in remote.stream([{"role": "user", "content": "hi"}], Options()):
    ...
remote.close()
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.chat.options import Conversation, Options
from launcher.errors import UserError

LOADING, READY, ANSWERING, FAILED, CLOSED = "loading", "ready", "answering", "failed", "closed"
COMMAND = (sys.executable, "-m", "launcher.chat.process")
EXIT_TIMEOUT = 5.0  # seconds that the process has to exit by itself
STDERR_TAIL_BYTES = 2000  # of its stderr, read after an unexpected exit

Message = dict[str, Any]  # one line of a pipe; launcher/chat/process.py lists the keys


@dataclass(frozen=True)
class AnswerStats:
    """How the last answer ended."""

    tokens: int
    seconds: float
    stopped: bool


class RemoteModel:
    """A model in a separate process. Thread-safe; it generates one answer at a time.

    `state` is loading, ready, answering, failed or closed; `error` says why it failed.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.state = LOADING
        self.description = ""
        self.notes: tuple[str, ...] = ()
        self.error = ""
        self.last_answer: AnswerStats | None = None
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._replies: queue.Queue[Message] = queue.Queue()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._child = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the page's terminal must not reach it
        )
        threading.Thread(target=self._read_messages, name="remote", daemon=True).start()
        paths = {"path": str(path.absolute()), "base": str(base.absolute()) if base else None}
        self._send({"load": paths})

    @property
    def pid(self) -> int:
        """The ID of the process."""
        return self._child.pid

    def wait(self, timeout: float | None = None) -> str:
        """Wait until loading has ended, or for `timeout` seconds, and return the state."""
        with self._changed:
            self._changed.wait_for(lambda: self.state != LOADING, timeout)
            return self.state

    def stream(self, conversation: Conversation, options: Options) -> Iterator[str]:
        """An iterator over pieces of the answer, as they are generated.

        Raises UserError at once if the model is not ready, and while iterating if the answer fails.
        """
        with self._changed:
            if self.state != READY:
                raise UserError(self._not_ready_message())
            self.state, self.last_answer = ANSWERING, None
            replies = self._replies = queue.Queue()
        self._send({"ask": {"conversation": conversation, "options": dataclasses.asdict(options)}})
        return self._pieces(replies)

    def stop(self) -> None:
        """End the current answer early. The pieces generated so far are still delivered."""
        with self._changed:
            answering = self.state == ANSWERING
        if answering:
            self._send({"stop": True})

    def close(self) -> None:
        """End the process, and with it the current answer."""
        with self._changed:
            if self.state == CLOSED:
                return
            self.state = CLOSED
            self._changed.notify_all()
        # A process that hangs does not read its stdin, so another thread may hold this lock.
        if self._sending.acquire(timeout=EXIT_TIMEOUT):
            with contextlib.suppress(OSError):
                assert self._child.stdin is not None
                self._child.stdin.close()
            self._sending.release()
        try:
            self._child.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _pieces(self, replies: queue.Queue[Message]) -> Iterator[str]:
        try:
            while True:
                reply = replies.get()
                if "piece" in reply:
                    yield reply["piece"]
                elif "error" in reply:
                    raise UserError(reply["error"])
                else:
                    return
        except GeneratorExit:  # the caller does not want the rest
            if replies is self._replies:
                self.stop()
            raise

    def _read_messages(self) -> None:
        """In a thread: handle the messages of the process until it ends."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with contextlib.suppress(ValueError):
                self._handle(json.loads(line))
        status = self._child.wait()
        with self._changed:
            if self.state != CLOSED:
                self.error = self.error or self._exit_message(status)
                self.state = FAILED
            self._changed.notify_all()
        self._replies.put({"error": self.error or "the model was closed"})
        self._log.close()

    def _handle(self, message: Message) -> None:
        with self._changed:
            if self.state == CLOSED:
                return
            if "ready" in message:
                self.description = message["ready"]["description"]
                self.notes = tuple(message["ready"]["notes"])
                self.state = READY
            elif self.state == LOADING:
                self.error, self.state = message["error"], FAILED
            elif "piece" not in message:
                self.last_answer = AnswerStats(**message["end"]) if "end" in message else None
                self.state = READY
            self._replies.put(message)  # under the lock: the next answer gets a new queue
            self._changed.notify_all()

    def _exit_message(self, status: int) -> str:
        if status < 0:
            name = signal.Signals(-status).name
            hint = "; often the machine ran out of memory" if -status == signal.SIGKILL else ""
            return f"the model's process was ended by signal {name}{hint}"
        self._log.seek(max(0, self._log.seek(0, 2) - STDERR_TAIL_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        last_line = lines[-1] if lines else "no output"
        return f"the model's process ended with status {status}: {last_line}"

    def _not_ready_message(self) -> str:
        return {
            LOADING: "the model is still being loaded",
            ANSWERING: "the model is answering; stop the answer first, or wait for its end",
            FAILED: self.error,
            CLOSED: "the model was closed; load one again",
        }[self.state]

    def _send(self, message: Message) -> None:
        """Does nothing if the process has ended; the reader thread reports why it did."""
        with self._sending, contextlib.suppress(OSError, ValueError):
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()

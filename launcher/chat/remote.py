"""A model in a process of its own, as the web page uses it. Imports neither torch nor transformers.

remote = Remote(Path("runs/first"))
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
PATIENCE = 5.0  # seconds for the process to end by itself
TAIL = 2000  # bytes of its stderr that are looked at


@dataclass(frozen=True)
class Ended:
    """How the last answer ended."""

    tokens: int
    seconds: float
    stopped: bool


class Remote:
    """Any thread may call any of it; one answer is made at a time.

    `state` is loading, ready, answering, failed or closed; `sentence` says why it failed.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.state = LOADING
        self.description = ""
        self.notes: tuple[str, ...] = ()
        self.sentence = ""
        self.ended: Ended | None = None
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._replies: queue.Queue[dict[str, Any]] = queue.Queue()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._child = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the page's terminal is the page's
        )
        threading.Thread(target=self._listen, name="remote", daemon=True).start()
        named = {"path": str(path.absolute()), "base": str(base.absolute()) if base else None}
        self._send({"load": named})

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait(self, seconds: float | None = None) -> str:
        """The state once it is no longer loading, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.state != LOADING, seconds)
            return self.state

    def stream(self, conversation: Conversation, options: Options) -> Iterator[str]:
        """The answer in pieces as they come.

        Raises UserError at once when the model is not ready, and later when no answer comes of it.
        """
        with self._changed:
            if self.state != READY:
                raise UserError(self._why_not())
            self.state, self.ended = ANSWERING, None
            replies = self._replies = queue.Queue()
        asked = {"conversation": conversation, "options": dataclasses.asdict(options)}
        self._send({"ask": asked})
        return self._pieces(replies)

    def stop(self) -> None:
        """End the answer under way early; what was said so far stays."""
        with self._changed:
            answering = self.state == ANSWERING
        if answering:
            self._send({"stop": True})

    def close(self) -> None:
        """End the process, and an answer under way with it."""
        with self._changed:
            if self.state == CLOSED:
                return
            self.state = CLOSED
            self._changed.notify_all()
        if self._sending.acquire(timeout=PATIENCE):  # else a process that hangs reads nothing
            with contextlib.suppress(OSError):
                assert self._child.stdin is not None
                self._child.stdin.close()
            self._sending.release()
        try:
            self._child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _pieces(self, replies: queue.Queue[dict[str, Any]]) -> Iterator[str]:
        try:
            while True:
                reply = replies.get()
                if "piece" in reply:
                    yield reply["piece"]
                elif "error" in reply:
                    raise UserError(reply["error"])
                else:
                    return
        except GeneratorExit:  # nobody listens to the rest
            if replies is self._replies:
                self.stop()
            raise

    def _listen(self) -> None:
        """In a thread: what the process says, until it has ended."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with contextlib.suppress(ValueError):
                self._hear(json.loads(line))
        status = self._child.wait()
        with self._changed:
            if self.state != CLOSED:
                self.sentence = self.sentence or self._epitaph(status)
                self.state = FAILED
            self._changed.notify_all()
        self._replies.put({"error": self.sentence or "the model was closed"})
        self._log.close()

    def _hear(self, said: dict[str, Any]) -> None:
        with self._changed:
            if self.state == CLOSED:
                return
            if "ready" in said:
                self.description = said["ready"]["description"]
                self.notes = tuple(said["ready"]["notes"])
                self.state = READY
            elif self.state == LOADING:
                self.sentence, self.state = said["error"], FAILED
            elif "piece" not in said:
                self.ended = Ended(**said["end"]) if "end" in said else None
                self.state = READY
            self._replies.put(said)  # before the next answer has a queue of its own
            self._changed.notify_all()

    def _epitaph(self, status: int) -> str:
        if status < 0:
            name = signal.Signals(-status).name
            why = "; often the machine ran out of memory" if -status == signal.SIGKILL else ""
            return f"the model's process was ended by signal {name}{why}"
        self._log.seek(max(0, self._log.seek(0, 2) - TAIL))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the model's process ended with status {status}: {lines[-1] if lines else 'silent'}"

    def _why_not(self) -> str:
        return {
            LOADING: "the model is still being loaded",
            ANSWERING: "the model is answering; stop that first, or wait for it",
            FAILED: self.sentence,
            CLOSED: "the model was closed; load one again",
        }[self.state]

    def _send(self, what: dict[str, Any]) -> None:
        """To a process that has ended nothing is sent; the listener says why it did."""
        with self._sending, contextlib.suppress(OSError, ValueError):
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(what) + "\n")
            self._child.stdin.flush()

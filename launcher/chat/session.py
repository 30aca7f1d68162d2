"""A conversation in the terminal: user input, commands and answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from launcher.chat.conversation import ChatHistory, save
from launcher.chat.line_reader import read_entry
from launcher.chat.options import Conversation, Options
from launcher.errors import UserError

HELP = """\
/system TEXT       set the system prompt from now on; /system shows it, /system - removes it, and
                   then the chat template's own system prompt applies
/set NAME VALUE    set max_new_tokens, temperature, top_p or seed; /set shows them
/clear             forget the conversation; the system prompt stays
/save FILE         write the conversation to a new file, as a row to train on (data=messages)
/exit              exit; so do Ctrl-D and Ctrl-C. Ctrl-C during an answer ends only the answer
A line that ends in \\ continues on the next line. Three quotes start and end a multi-line text.
To ask a question that starts with /, put a space before it."""

# A terminal executes escape sequences, and an answer may contain any.
CONTROL = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
REPLACE_CONTROL = dict.fromkeys(CONTROL, "\ufffd")


class StreamingModel(Protocol):
    """A model that streams its answer."""

    def stream(self, conversation: Conversation, options: Options) -> Iterator[str]:
        """Yield pieces of the answer as they are generated."""
        ...


class Session:
    """One conversation per model. Two models are A and B, and each sees only its own answers."""

    def __init__(
        self, models: Sequence[StreamingModel], options: Options, system: str | None = None
    ) -> None:
        self.models, self.options = models, options
        self.histories = [ChatHistory(system) for _ in models]
        self.labels = ["A: ", "B: "] if len(models) == 2 else [""]

    def converse(self, read_line: Callable[[str], str]) -> None:
        """Answer the user's input until /exit, the end of the input, or Ctrl-C at the prompt."""
        self.labels = ["model: "] if len(self.models) == 1 else self.labels
        while True:
            try:
                entry = read_entry(read_line)
            except (EOFError, KeyboardInterrupt):
                print()
                return
            except UserError as error:
                _print_error(error)
                return
            if entry.command and entry.text == "/exit":
                return
            try:
                if entry.command:
                    self._run_command(entry.text)
                elif entry.text:
                    self._answer(entry.text)
            except UserError as error:
                _print_error(error)

    def ask(self, question: str) -> list[str]:
        """Print each model's answer while it is generated. Return all answers. Raises UserError."""
        answers = []
        for model, history, label in zip(self.models, self.histories, self.labels, strict=True):
            print(label, end="", flush=True)
            pieces = []
            try:
                for piece in model.stream(history.with_question(question), self.options):
                    pieces.append(piece)
                    print(piece.translate(REPLACE_CONTROL), end="", flush=True)
            finally:
                print(flush=True)
            answers.append("".join(pieces).strip())
        return answers

    def _answer(self, question: str) -> None:
        """After Ctrl-C neither the question nor the partial answer stays in the conversation."""
        try:
            answers = self.ask(question)
        except KeyboardInterrupt:
            return
        for history, answer in zip(self.histories, answers, strict=True):
            history.add(question, answer)

    def _run_command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        commands = {
            "/system": self._system,
            "/set": self._set,
            "/clear": self._clear,
            "/save": self._save,
            "/help": lambda argument: print(HELP),
        }
        if name not in commands:
            raise UserError(
                f"{name} is not a command; the commands are {', '.join(commands)}, /exit. To send "
                "it as a question, put a space before it"
            )
        commands[name](argument.strip())

    def _system(self, text: str) -> None:
        if text:
            for history in self.histories:
                history.system = None if text == "-" else text
        print(f"system: {self.histories[0].system or '(the one of the chat template, if any)'}")

    def _set(self, text: str) -> None:
        if text:
            name, _, value = text.replace("=", " ", 1).partition(" ")
            self.options = self.options.with_text(name, value.strip())
        print(self.options.describe())

    def _clear(self, text: str) -> None:
        for history in self.histories:
            history.turns = []

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save needs the name of a new file: /save talk.jsonl")
        save(self.histories, Path(text))
        print(f"saved; to train on it: shardway train data=messages data.path={text} …")


def _print_error(error: UserError) -> None:
    sys.stdout.flush()
    print(error, file=sys.stderr, flush=True)

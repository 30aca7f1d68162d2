"""A conversation in the terminal: what is typed, the commands, and who answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from launcher.chat import lines
from launcher.chat.conversation import Said, save
from launcher.chat.options import Conversation, Options
from launcher.errors import UserError

HELP = """\
/system TEXT       say what the system prompt is, from now on; /system shows it, /system - takes
                   it away, and the template's own comes back
/set NAME VALUE    max_new_tokens, temperature, top_p or seed; /set shows them
/clear             forget what was said; the system prompt stays
/save FILE         write the conversation into a new file, as a row to train on (data=messages)
/exit              end; so do Ctrl-D and Ctrl-C. Ctrl-C during an answer ends the answer
A line that ends in \\ goes on in the next one. Three quotes begin and end a text of many lines.
A question that begins with / is asked with a space before it."""

# A terminal obeys escape sequences, and an answer may hold any.
CONTROL = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
HARMLESS = dict.fromkeys(CONTROL, "\ufffd")


class Answers(Protocol):
    def stream(self, conversation: Conversation, options: Options) -> Iterator[str]: ...


class Session:
    """One conversation a model. Two models are A and B, and each knows its own answers alone."""

    def __init__(self, models: list[Answers], options: Options, system: str | None = None) -> None:
        self.models, self.options = models, options
        self.said = [Said(system) for _ in models]
        self.names = ["A: ", "B: "] if len(models) == 2 else [""]

    def converse(self, line: Callable[[str], str]) -> None:
        """Answer what is typed until /exit, the end of input or Ctrl-C at the prompt."""
        self.names = ["model: "] if len(self.models) == 1 else self.names
        while True:
            try:
                entry = lines.read(line)
            except (EOFError, KeyboardInterrupt):
                print()
                return
            except UserError as error:
                _complain(error)
                return
            if entry.command and entry.text == "/exit":
                return
            try:
                if entry.command:
                    self._obey(entry.text)
                elif entry.text:
                    self._answer(entry.text)
            except UserError as error:
                _complain(error)

    def ask(self, question: str) -> list[str]:
        """Print the answer of each model as it comes; all of them. Raises UserError."""
        answers = []
        for model, said, name in zip(self.models, self.said, self.names, strict=True):
            print(name, end="", flush=True)
            pieces = []
            try:
                for piece in model.stream(said.asking(question), self.options):
                    pieces.append(piece)
                    print(piece.translate(HARMLESS), end="", flush=True)
            finally:
                print(flush=True)
            answers.append("".join(pieces).strip())
        return answers

    def _answer(self, question: str) -> None:
        """Nothing of an answer that was ended is kept, nor its question."""
        try:
            answers = self.ask(question)
        except KeyboardInterrupt:
            return
        for said, answer in zip(self.said, answers, strict=True):
            said.keep(question, answer)

    def _obey(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        commands = {
            "/system": self._system,
            "/set": self._set,
            "/clear": self._clear,
            "/save": self._save,
            "/help": lambda rest: print(HELP),
        }
        if word not in commands:
            raise UserError(
                f"{word} is no command; there are {', '.join(commands)}, /exit. To ask it, begin "
                "with a space"
            )
        commands[word](rest.strip())

    def _system(self, text: str) -> None:
        if text:
            for said in self.said:
                said.system = None if text == "-" else text
        print(f"system: {self.said[0].system or '(the template has its own, or none)'}")

    def _set(self, text: str) -> None:
        if text:
            name, _, value = text.replace("=", " ", 1).partition(" ")
            self.options = self.options.with_text(name, value.strip())
        print(self.options.describe())

    def _clear(self, text: str) -> None:
        for said in self.said:
            said.turns = []

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save needs the name of a new file: /save talk.jsonl")
        save(self.said, Path(text))
        print(f"saved; to train on it: shardway train data=messages data.path={text} …")


def _complain(error: UserError) -> None:
    sys.stdout.flush()
    print(error, file=sys.stderr, flush=True)

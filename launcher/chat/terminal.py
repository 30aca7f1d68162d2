"""`shardway chat PATH`: talk to a model in the terminal.

    shardway chat runs/first/export                                a conversation; /help, /exit
    shardway chat runs/first/export --question "Who are you?"      one answer
    shardway chat runs/first --against runs/second/export          two models, both answer
    shardway chat path/to/adapter --base path/to/model             an adapter on its base

PATH is an exported folder or any model folder, a PEFT adapter, a checkpoint of a run that trains an
adapter, or such a run (its newest checkpoint). Answers are greedy unless --temperature is given.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

from launcher.chat.options import Options
from launcher.chat.session import Session
from launcher.chat.subject import Subject, find, takes_base
from launcher.errors import UserError


def main() -> None:
    arguments = _parser().parse_args()
    try:
        chat(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def chat(arguments: argparse.Namespace) -> None:
    """Answer the question, or converse. Raises UserError."""
    options = Options(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    question = arguments.question
    if question is not None and not question.strip():
        raise UserError("--question is empty; ask something, or leave it out")
    _tolerate_any_bytes()
    subjects = _subjects(arguments.path, arguments.against, arguments.base)

    from launcher.chat.model import Talk  # after the folders were found to be models

    session = Session([Talk(subject) for subject in subjects], options, arguments.system)
    for subject in subjects:
        print(*subject.notes, sep="\n", end="\n" * bool(subject.notes), file=sys.stderr)
    if question is not None:
        session.ask(question)
        return
    for name, subject in zip(session.names, subjects, strict=True):
        print(f"{name}{subject.describe()}")
    session.converse(_line())


def _subjects(path: Path, against: Path | None, base: Path | None) -> list[Subject]:
    """--base is said of those that are adapters, or of PATH, which then refuses it."""
    paths = [path] if against is None else [path, against]
    adapters = [each for each in paths if takes_base(each)] or [path]
    return [find(each, base if each in adapters else None) for each in paths]


def _line() -> Callable[[str], str]:
    """Reads a line: with editing and a prompt in a terminal, silently from a pipe."""
    if not sys.stdin.isatty():
        return lambda prompt: input()
    import readline  # noqa: F401 (it teaches input() the arrow keys)

    print("/help lists the commands, /exit ends")
    return input


def _tolerate_any_bytes() -> None:
    """A pipe may hold what is no UTF-8, and a terminal may not show what a model writes."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="what to talk to")
    add("--base", type=Path, metavar="DIR", help="the model that an adapter belongs to")
    add("--against", type=Path, metavar="PATH2", help="a second model that answers, too")
    add("--question", metavar="TEXT", help="ask this, print the answer and end")
    add("--system", metavar="TEXT", help="the system prompt; without it the template's own")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="(default %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest P of tokens")
    add("--seed", type=int, metavar="N", help="of every answer that is sampled")
    return parser


if __name__ == "__main__":
    main()

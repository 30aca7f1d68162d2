"""`shardway chat PATH`: chat with a model in the terminal.

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
from launcher.chat.target import ChatTarget, find_target, takes_base
from launcher.commands.arguments import command_parser
from launcher.errors import UserError


def main() -> None:
    """The command line. Ctrl-C exits with status 130."""
    arguments = _parser().parse_args()
    try:
        chat(arguments)
    except KeyboardInterrupt:
        sys.exit(130)


def chat(arguments: argparse.Namespace) -> None:
    """Answer --question, or start a conversation. Raises UserError."""
    options = Options(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    question = arguments.question
    if question is not None and not question.strip():
        raise UserError("--question is empty; ask something, or leave it out")
    _replace_invalid_text()
    targets = _targets(arguments.path, arguments.against, arguments.base)

    from launcher.chat.model import ChatModel  # slow; only once the folders are known to be models

    session = Session([ChatModel(target) for target in targets], options, arguments.system)
    for target in targets:
        print(*target.notes, sep="\n", end="\n" * bool(target.notes), file=sys.stderr)
    if question is not None:
        session.ask(question)
        return
    for label, target in zip(session.labels, targets, strict=True):
        print(f"{label}{target.describe()}")
    session.converse(_line_reader())


def _targets(path: Path, against: Path | None, base: Path | None) -> list[ChatTarget]:
    """--base applies to the adapters. If there are none, PATH gets it and refuses it."""
    paths = [path] if against is None else [path, against]
    adapters = [each for each in paths if takes_base(each)] or [path]
    return [find_target(each, base if each in adapters else None) for each in paths]


def _line_reader() -> Callable[[str], str]:
    """A function that reads a line: with a prompt and editing in a terminal, silently in a pipe."""
    if not sys.stdin.isatty():
        return lambda prompt: input()
    import readline  # noqa: F401 (adds line editing and history to input())

    print("/help lists the commands, /exit ends")
    return input


def _replace_invalid_text() -> None:
    """A pipe may contain invalid UTF-8, and a terminal may not support what a model writes."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("chat", __doc__)
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="the model to chat with")
    add("--base", type=Path, metavar="DIR", help="the base model of an adapter")
    add("--against", type=Path, metavar="PATH2", help="a second model that also answers")
    add("--question", metavar="TEXT", help="ask this, print the answer and exit")
    add("--system", metavar="TEXT", help="the system prompt (default: the chat template's)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="(default %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that make up P",
    )
    add("--seed", type=int, metavar="N", help="seed of every sampled answer")
    return parser

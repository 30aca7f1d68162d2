"""docs/communication.md: what a step sends, generated from steps on a device that does not exist.

python -m tests.helpers.fake_cuda.page --write docs/communication.md
python -m tests.helpers.fake_cuda.page --check docs/communication.md
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.fake_cuda import Seen, run
from tests.helpers.fake_cuda.cells import METHODS, STRATEGIES, Cell, options_of, write_models
from tests.helpers.fake_cuda.rows import Sent, Waited, sent, waited

PAGE = Path(__file__).parents[3] / "docs/communication.md"
HEAD = Path(__file__).with_name("communication.md")
Choice = tuple[str, str]  # method, option
Options = tuple[str, ...]
EVERY = "every"
Line = Sent | Waited


@dataclass
class Section:
    """The lines of a strategy, in their order, and the choices to which each applies."""

    sent: dict[Line, set[Choice]] = field(default_factory=dict)
    waited: dict[Line, set[Choice]] = field(default_factory=dict)

    def of(self, cell: Cell) -> tuple[list[Line], list[Line]]:
        """What a step of `cell` sends, and where the host waits in it."""
        choice = (cell.method, "plain" if cell.option == "packed" else cell.option)
        sent, waited = (
            [line for line, choices in lines.items() if choice in choices]
            for lines in (self.sent, self.waited)
        )
        return sent, waited


def main() -> None:
    """Write the page, or exit with status 1 if it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.fake_cuda.page")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", type=Path, metavar="FILE", help="write the page")
    choice.add_argument("--check", type=Path, metavar="FILE", help="fail when FILE is out of date")
    parser.add_argument("--processes", type=int, default=2, help="steps at the same time")
    arguments = parser.parse_args()
    text = page(arguments.processes)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    elif arguments.check.read_text(encoding="utf-8") != text:
        print(f"{arguments.check} is out of date: run it with --write", file=sys.stderr)
        sys.exit(1)


def page(processes: int) -> str:
    """The page, from a step of Llama with every strategy, method and option. Takes minutes."""
    cells = [
        Cell(strategy, method, option)
        for strategy in STRATEGIES
        for method, option in itertools.product(METHODS, shown_of(strategy))
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        cases = [cell.case(Path(folder)) for cell in cells]
        seen = dict(zip(cells, run(cases, processes), strict=True))
    text = [HEAD.read_text(encoding="utf-8")]
    for strategy in STRATEGIES:
        section = section_of({c: s for c, s in seen.items() if c.strategy == strategy})
        shown = shown_of(strategy)
        text += [f"## {strategy}\n", _table(Sent, section.sent, shown) or "Nothing is sent.\n"]
        text.append(_table(Waited, section.waited, shown) or "The host does not wait.\n")
    return "\n".join(text)


def shown_of(strategy: str) -> Options:
    """The options in the tables of a strategy: packed rows send what plain ones do."""
    return tuple(option for option in options_of(strategy) if option != "packed")


def section_of(seen: dict[Cell, Seen]) -> Section:
    """The lines of one strategy."""
    lines = {(cell.method, cell.option): lines_of(cell, each) for cell, each in seen.items()}
    sent, waited = (_merged({c: both[kind] for c, both in lines.items()}) for kind in (0, 1))
    return Section(sent, waited)


def lines_of(cell: Cell, seen: Seen) -> tuple[list[Line], list[Line]]:
    """What a step sent, and where the host waited."""
    assert not seen.error, f"{cell}: {seen.error}"
    return [*sent(seen, in_buckets=cell.strategy.startswith("zero"))], [*waited(seen)]


def _merged(lines: dict[Choice, list[Line]]) -> dict[Line, set[Choice]]:
    """All `lines`, each once, in an order that keeps that of every choice."""
    earlier: dict[Line, set[Line]] = {}
    for each in lines.values():
        for at, line in enumerate(each):
            earlier.setdefault(line, set()).update(each[:at])
    order: list[Line] = []
    while len(order) < len(earlier):
        free = (line for line in earlier if line not in order and earlier[line] <= set(order))
        following = next(free, None)
        assert following, f"no order keeps that of every choice: {lines}"
        order.append(following)
    return {line: {choice for choice, each in lines.items() if line in each} for line in order}


def _table(kind: Any, lines: dict[Line, set[Choice]], shown: Options) -> str:
    if not lines:
        return ""
    rows: Iterable[Sequence[Any]] = [
        (words(choices, shown), *line) for line, choices in lines.items()
    ]
    table = [("for", *kind._fields), ["---"] * (len(kind._fields) + 1), *rows]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in table)


def words(choices: set[Choice], shown: Options) -> str:
    """`choices` as text: methods that share their options are one part of it."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for method in METHODS:
        options = tuple(option for option in shown if (method, option) in choices)
        if options:
            parts.setdefault(options, []).append(method)
    said = []
    for options, methods in parts.items():
        name = EVERY if len(methods) == len(METHODS) else ", ".join(methods)
        said.append(name if len(options) == len(shown) else f"{name} with {', '.join(options)}")
    return "; ".join(said)


def choices_in(words: str, shown: Options) -> set[Choice]:
    """The inverse of `words`."""
    choices: set[Choice] = set()
    for part in words.split("; "):
        methods, _, options = part.partition(" with ")
        names = METHODS if methods == EVERY else methods.split(", ")
        choices |= set(itertools.product(names, options.split(", ") if options else shown))
    return choices


def read(text: str) -> dict[str, Section]:
    """Strategy → its section of the page `text`."""
    sections: dict[str, Section] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            name = line.removeprefix("## ")
            section, shown = sections.setdefault(name, Section()), shown_of(name)
        elif sections and line.startswith("|") and cells[0] not in ("for", "---"):
            said, *values = cells
            choices = choices_in(said, shown)
            if len(values) == len(Sent._fields):
                section.sent[Sent(*values)] = choices
            else:
                section.waited[Waited(*values)] = choices
    return {name: section for name, section in sections.items() if name in STRATEGIES}


if __name__ == "__main__":
    main()

"""How large a value is that one operation of a chat template makes, checked before it is made.

Raises jinja's SecurityError, as the sandbox does for what a template may not do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NoReturn

from jinja2 import runtime
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_CHARACTERS = 1 << 26  # of a text, or elements of a list: a million tokens are about 5 million
MAX_PIECES = 1 << 24  # that are joined to a text
MAX_BITS = 1 << 16  # of an integer
MAX_SEARCHED = 1 << 20  # characters for filters that use regular expressions
MAX_INDENT = 100  # characters
SMALL = 64  # characters that a value which is neither text nor a container may have
WIDE = re.compile(r"%(\([^)]*\))?[-#0 +]*(\d*\.)?\d{6}|\{[^{}]*[:!][^{}]*\d{6}")
COMPUTED_WIDTH = re.compile(r"%(\([^)]*\))?[-#0 +]*(\d*\.)?\*|\{[^{}]*\{")
CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    set,
    frozenset,
    dict,
    *map(type, ({}.keys(), {}.values(), {}.items())),
)


def refuse(what: str) -> NoReturn:
    raise SecurityError(f"{what} is too large for a chat template")


def _check_size(size: int, what: str) -> None:
    if size > MAX_CHARACTERS:
        refuse(what)


def size_of(value: Any, seen: dict[int, int] | None = None) -> int:
    """About the characters of `value` as text, also if it contains a list many times over."""
    if isinstance(value, str | bytes):
        return len(value)
    seen = {} if seen is None else seen
    if isinstance(value, Namespace):
        value = value._Namespace__attrs  # what its text consists of
    if not isinstance(value, CONTAINERS):
        return value.bit_length() // 3 if isinstance(value, int) else SMALL
    if (known := seen.get(id(value))) is not None:
        return known
    seen[id(value)] = 0  # a container in itself is written as ...
    parts = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
    seen[id(value)] = total = sum(size_of(part, seen) + 2 for part in parts)
    return total


def _sized(value: Any) -> Any:
    """`value`. Raises SecurityError if its text would be too long."""
    if not isinstance(value, str):
        _check_size(size_of(value), "a value")
    return value


def text(value: Any) -> str:
    return value if value.__class__ is str else str(_sized(value))


def escape(value: Any) -> Any:
    return runtime.escape(_sized(value))


def concat(pieces: Iterable[str]) -> str:
    some = list(islice(pieces, MAX_PIECES + 1))
    if len(some) > MAX_PIECES:
        refuse("the text")
    _check_size(sum(map(len, some)), "the text")
    return "".join(some)


def str_join(values: Iterable[Any]) -> str:
    joined = "".join(map(text, values))
    _check_size(len(joined), "a text")
    return joined


def markup_join(values: Iterable[Any]) -> Any:
    texts = [value if hasattr(value, "__html__") else text(value) for value in values]
    _check_size(sum(map(len, texts)), "the text")
    return runtime.markup_join(texts)


def check_sum(value: Any) -> Any:
    if hasattr(value, "__len__") and len(value) > MAX_CHARACTERS:  # a number has none
        refuse("a sum")
    return value


def multiply(left: Any, right: Any) -> Any:
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(value, "__len__"):
            _check_size(size_of(value) * max(times, 0), "a product")
            _check_size(len(value) * max(times, 0), "a product")
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    return left * right


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))
    return left**right


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        refuse("a number")


def modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str | bytes):
        check_format(left, right)
    return left % right


def check_format(text: str | bytes, values: Any) -> None:
    pattern = text.decode("latin-1") if isinstance(text, bytes) else text
    if WIDE.search(pattern):
        refuse("a width")
    parts = values if isinstance(values, tuple) else (values,)
    if COMPUTED_WIDTH.search(pattern):
        check_numbers(parts, 100_000)
    fields = pattern.count("%") + pattern.count("{")
    _check_size(fields * size_of(values), "a formatted text")


def check_numbers(values: Iterable[Any], limit: int = MAX_CHARACTERS) -> None:
    if any(isinstance(value, int) and abs(value) > limit for value in values):
        refuse("a number")


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    if isinstance(_sized(text), str) and len(text) * size_of(new) > MAX_CHARACTERS:
        _check_size(len(text) + text.count(str(old)) * size_of(new), "a replacement")


def check_join(values: Any, separator: Any = "", *_: Any) -> None:
    if isinstance(values, CONTAINERS):
        _check_size(size_of(values) + len(values) * size_of(separator), "a joined text")


def _check_indent(text: Any, width: Any = 4, *_: Any) -> None:
    each = width if isinstance(width, int) else size_of(width)
    if isinstance(_sized(text), str):
        _check_size((text.count("\n") + 1) * each, "an indented text")


def _check_tabs(text: str, width: int = 8) -> None:
    _check_size(text.count("\t") * width, "a text with tabs")


def _check_translate(text: str, table: Any) -> None:
    values = table.values() if isinstance(table, dict) else ()
    _check_size(len(text) * max(map(size_of, values), default=1), "a translated text")


def _check_searched(text: Any, *_: Any) -> None:
    if size_of(text) > MAX_SEARCHED:
        refuse("a text")


def check_json(
    nests: bool,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> None:
    """`nests`: whether the value may contain a container many times over. The tools of a row, as a
    usual template writes them, do not, and are not measured."""
    if (indent if isinstance(indent, int) else size_of(indent)) > MAX_INDENT:
        refuse("an indent")
    if size_of(separators) > MAX_INDENT:
        refuse("a separator")
    if nests:
        _check_size(size_of(value), "a value as JSON")


def _check_center(text: Any, width: int = 80) -> None:
    _sized(text)
    check_numbers((width,))


# What is checked before a method of a text, with the text as the first argument.
METHODS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "expandtabs": _check_tabs,
    "translate": _check_translate,
    "join": lambda separator, values: check_join(values, separator),
}
FILTERS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "join": check_join,
    "indent": _check_indent,
    "center": _check_center,
    "format": lambda form, *values, **named: check_format(text(form), (*values, *named.values())),
    "batch": lambda values, count, *_: check_numbers((count,)),
    "slice": lambda values, count, *_: check_numbers((count,), MAX_SEARCHED),
    "round": lambda value, precision=0, *_: check_numbers((precision,), 1000),
    **dict.fromkeys(
        ("urlize", "striptags", "wordwrap", "xmlattr", "title", "truncate", "pprint"),
        _check_searched,
    ),
    # They write their value as text.
    **dict.fromkeys(
        ("string", "upper", "lower", "trim", "capitalize", "escape", "e", "forceescape", "safe"),
        lambda value, *_, **__: _sized(value) and None,
    ),
    **dict.fromkeys(("urlencode", "wordcount"), lambda value, *_, **__: _sized(value) and None),
}

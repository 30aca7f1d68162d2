"""What an event of the page does when something is wrong: a sentence, never a traceback."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import gradio as gr

from launcher.errors import UserError
from launcher.ui.words import Words

log = logging.getLogger("shardway.ui")


def polite(words: Words) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: what a person can mend is shown on the page, what they cannot goes to the
    server's terminal, and the page says where to look."""

    def decorate(event: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(event)
        def answered(*values: Any) -> Any:
            try:
                return event(*values)
            except Exception as error:
                _tell(error, words)

        @functools.wraps(event)
        def streamed(*values: Any) -> Iterator[Any]:
            try:
                yield from event(*values)
            except Exception as error:
                _tell(error, words)

        return streamed if inspect.isgeneratorfunction(event) else answered

    return decorate


def _tell(error: Exception, words: Words) -> NoReturn:
    if isinstance(error, gr.Error):
        raise error
    if isinstance(error, UserError):
        sentence = str(error)
    else:
        log.exception("an event of the page failed")
        sentence = words("Something went wrong here; the terminal of shardway ui says what.")
    raise gr.Error(html.escape(sentence), print_exception=False, title=words("Not done"))

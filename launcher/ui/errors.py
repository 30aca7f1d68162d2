"""Error handling of the page's events: the page shows a message, never a traceback."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import gradio as gr

from launcher.errors import UserError
from launcher.ui.i18n import Translations

log = logging.getLogger("shardway.ui")


def show_errors(translate: Translations) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for event handlers.

    The page shows the message of a UserError. Any other error is logged with its traceback in the
    server's terminal, and the page refers to the terminal.
    """

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def call(*values: Any) -> Any:
            try:
                return handler(*values)
            except Exception as error:
                _raise_page_error(error, translate)

        @functools.wraps(handler)
        def iterate(*values: Any) -> Iterator[Any]:
            try:
                yield from handler(*values)
            except Exception as error:
                _raise_page_error(error, translate)

        return iterate if inspect.isgeneratorfunction(handler) else call

    return decorate


def _raise_page_error(error: Exception, translate: Translations) -> NoReturn:
    if isinstance(error, gr.Error):
        raise error
    if isinstance(error, UserError):
        message = str(error)
    else:
        log.exception("an event of the page failed")
        message = translate("Something went wrong. See the terminal of shardway ui.")
    raise gr.Error(html.escape(message), print_exception=False, title=translate("Error"))

"""The Chat tab: one model, or two side by side that answer the same question."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from launcher.chat.options import Conversation, Options
from launcher.chat.remote import RemoteModel
from launcher.errors import UserError
from launcher.ui import chat_models
from launcher.ui.chat_models import SIDES
from launcher.ui.context import PageContext, TabLinks
from launcher.ui.errors import show_errors
from launcher.ui.i18n import Translations

POLL_SECONDS = 1.0  # between updates of the models' states
Pieces = queue.Queue[tuple[int, str | Exception | None]]  # index of the side, piece of its answer


class Side:
    """The widgets of one model."""

    def __init__(self, name: str, translate: Translations) -> None:
        self.name = name
        self.model = gr.Dropdown(
            [],
            allow_custom_value=True,
            label=f"{translate('Model')} {name}",
            info=translate(
                "An export, a checkpoint with an adapter, or a model folder. Choose from the list "
                "or type a path."
            ),
            elem_id=f"subject-{name}",
        )
        self.base = gr.Textbox(
            label=translate("Base model of an adapter"),
            info=translate("If empty: the base model that the adapter names."),
            elem_id=f"base-{name}",
        )
        with gr.Row():
            self.load = gr.Button(translate("Load"), size="sm", elem_id=f"load-{name}")
            self.unload = gr.Button(translate("Unload"), size="sm", elem_id=f"unload-{name}")
        self.state = gr.HTML(elem_id=f"model-state-{name}")
        self.chatbot = gr.Chatbot(
            label=name, height=380, elem_id=f"talk-{name}", buttons=["copy", "copy_all"]
        )


class ChatTab:
    """The widgets of the tab and their event handlers."""

    def __init__(self, context: PageContext, translate: Translations) -> None:
        self.context, self.translate = context, translate
        with gr.Row():
            self.sides = []
            for name in SIDES:
                with gr.Column():
                    self.sides.append(Side(name, translate))
        with gr.Row():
            self.question = gr.Textbox(
                label=translate("Question"),
                info=translate(
                    "Every loaded model answers. Enter sends, Shift+Enter starts a new line."
                ),
                lines=2,
                max_lines=12,
                scale=5,
                elem_id="question",
            )
            with gr.Column(scale=1, min_width=120):
                self.send = gr.Button(translate("Send"), variant="primary", elem_id="send")
                self.stop = gr.Button(translate("Stop"), elem_id="stop-answer")
                self.clear = gr.Button(translate("Clear"), elem_id="clear")
        with gr.Accordion(translate("Generation options"), open=False), gr.Row():
            self.system = gr.Textbox("", label=translate("System prompt"), lines=2, scale=3)
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature")
            self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top_p")
            self.max_new_tokens = gr.Slider(1, 4096, 256, step=1, label="max_new_tokens")
            self.seed = gr.Textbox(
                "", label="seed", info=translate("If empty: a different seed each time.")
            )
        self.timer = gr.Timer(POLL_SECONDS, active=False)  # active while the tab is visible

    def connect(self, page: gr.Blocks, links: TabLinks) -> None:
        """Connect the events to their handlers."""
        guard = show_errors(self.translate)
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 8}
        states = [side.state for side in self.sides]
        chatbots: list[Any] = [side.chatbot for side in self.sides]
        gr.on([self.timer.tick, page.load], guard(self._states), None, states, **quick)
        models = [side.model for side in self.sides]
        gr.on([page.load, links.tabs.change], guard(self._update_choices), None, models, **quick)
        for side in self.sides:
            load, unload = partial(self._load, side.name), partial(self._unload, side.name)
            side.load.click(guard(load), [side.model, side.base], states, **quick)
            side.unload.click(guard(unload), None, states, **quick)
        options = [self.temperature, self.top_p, self.max_new_tokens, self.seed]
        answering = gr.on(
            [self.send.click, self.question.submit],
            guard(self._ask),
            [self.question, self.system, *options, *chatbots],
            [self.question, *chatbots],
            show_progress="hidden",
            concurrency_limit=8,
        )
        self.stop.click(self._stop, None, None, **quick)
        self.clear.click(self._stop, None, None, cancels=[answering], **quick).then(
            lambda: ([], []), None, chatbots, **quick
        )

    def _update_choices(self) -> list[Any]:
        choices = chat_models.chat_choices(self.context.roots)
        return [gr.update(choices=choices) for _ in self.sides]

    def _load(self, side: str, path: str | None, base: str | None) -> list[str]:
        if not path:
            raise UserError(self.translate("Choose a model first."))
        self.context.models.load(side, path, base or "")
        return self._states()

    def _unload(self, side: str) -> list[str]:
        self.context.models.unload(side)
        return self._states()

    def _states(self) -> list[str]:
        """A line of HTML per side: the state of its model, and which model it is."""
        lines = []
        for side in SIDES:
            remote = self.context.models.get(side)
            if remote is None:
                lines.append(f"<p>{html.escape(self.translate('No model is loaded.'))}</p>")
                continue
            text = remote.error if remote.state == "failed" else remote.description
            text = html.escape(text.replace(f"{self.context.roots.home}/", ""))
            state = html.escape(self.translate(remote.state))
            lines.append(f'<p><em class="sw-state {remote.state}">{state}</em> {text}</p>')
        return lines

    def _ask(
        self,
        question: str | None,
        system: str | None,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        seed: str,
        *chats: list[dict[str, Any]],
    ) -> Iterator[list[Any]]:
        """Yield the question's box and the conversations while the answers grow."""
        question, system = (question or "").strip(), (system or "").strip()
        models = {index: self.context.models.get(side) for index, side in enumerate(SIDES)}
        loaded = {index: remote for index, remote in models.items() if remote is not None}
        if not question:
            return
        if not loaded:
            raise UserError(self.translate("No model is loaded."))
        options = Options(int(max_new_tokens), float(temperature), float(top_p))
        options = options.with_text("seed", (seed or "").strip() or "none")
        conversations: list[Conversation] = [
            [{"role": turn["role"], "content": _text(turn)} for turn in chat] for chat in chats
        ]
        start = [{"role": "system", "content": system}] if system else []
        pieces: Pieces = queue.Queue()
        window_closed = threading.Event()
        for index, remote in loaded.items():
            conversation = conversations[index]
            conversation.append({"role": "user", "content": question})
            messages = [*start, *conversation]
            arguments = (remote, messages, options, index, pieces, window_closed)
            threading.Thread(target=_answer, args=arguments, daemon=True).start()
            conversation.append({"role": "assistant", "content": ""})
        try:
            yield from _collect(conversations, pieces, len(loaded), question)
        finally:  # the window may close before the answers end
            window_closed.set()

    def _stop(self) -> None:
        for side in SIDES:
            if (remote := self.context.models.get(side)) is not None:
                remote.stop()


def _collect(
    conversations: list[Conversation], pieces: Pieces, unfinished: int, question: str
) -> Iterator[list[Any]]:
    """Yield the question's box and all conversations until `unfinished` answers have ended.

    A question without an answer goes back into its box.
    """
    box = ""
    yield [box, *conversations]
    while unfinished:
        batch = [pieces.get()]
        while not pieces.empty():
            batch.append(pieces.get())
        for index, piece in batch:
            if isinstance(piece, str):
                conversations[index][-1]["content"] += piece
                continue
            unfinished -= 1
            if piece is not None:
                gr.Warning(html.escape(str(piece)))
                conversations[index], box = conversations[index][:-2], question
        yield [box or gr.skip(), *conversations]


def _answer(
    remote: RemoteModel,
    messages: Conversation,
    options: Options,
    index: int,
    pieces: Pieces,
    window_closed: threading.Event,
) -> None:
    """Put the pieces of an answer into the queue. None or an error marks the end.

    The answer ends early once the window is closed.
    """
    try:
        for piece in remote.stream(messages, options):
            pieces.put((index, piece))
            if window_closed.is_set():
                return  # leaving the iterator stops the answer
        pieces.put((index, None))
    except Exception as error:
        pieces.put((index, error))


def _text(turn: dict[str, Any]) -> str:
    """A turn's text. Gradio may return it in parts."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)

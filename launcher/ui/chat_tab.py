"""The chat tab: one model, or two side by side on the same question."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from launcher.chat.options import Options
from launcher.chat.remote import Remote
from launcher.errors import UserError
from launcher.ui import models
from launcher.ui.models import SIDES
from launcher.ui.polite import polite
from launcher.ui.words import Words

if TYPE_CHECKING:
    from launcher.ui.page import House, Links

SECONDS = 1.0  # between looks at what is loading
Turns = list[dict[str, str]]
Pieces = queue.Queue[tuple[int, str | Exception | None]]  # side, piece of its answer


class Side:
    """The widgets of one model."""

    def __init__(self, name: str, words: Words) -> None:
        self.name = name
        self.subject = gr.Dropdown(
            [],
            allow_custom_value=True,
            label=f"{words('Model')} {name}",
            info=words(
                "An export, a checkpoint with an adapter, a model folder: from the list, or a path."
            ),
            elem_id=f"subject-{name}",
        )
        self.base = gr.Textbox(
            label=words("Base model of an adapter"),
            info=words("Empty: the one it names."),
            elem_id=f"base-{name}",
        )
        with gr.Row():
            self.load = gr.Button(words("Load"), size="sm", elem_id=f"load-{name}")
            self.unload = gr.Button(words("Unload"), size="sm", elem_id=f"unload-{name}")
        self.state = gr.HTML(elem_id=f"model-state-{name}")
        self.talk = gr.Chatbot(
            label=name, height=380, elem_id=f"talk-{name}", buttons=["copy", "copy_all"]
        )


class Tab:
    """Its widgets, and what they do."""

    def __init__(self, house: House, words: Words) -> None:
        self.house, self.words = house, words
        with gr.Row():
            self.sides = []
            for name in SIDES:
                with gr.Column():
                    self.sides.append(Side(name, words))
        with gr.Row():
            self.question = gr.Textbox(
                label=words("Question"),
                info=words("Every loaded model answers. Enter sends, Shift+Enter is a new line."),
                lines=2,
                max_lines=12,
                scale=5,
                elem_id="question",
            )
            with gr.Column(scale=1, min_width=120):
                self.send = gr.Button(words("Send"), variant="primary", elem_id="send")
                self.stop = gr.Button(words("Stop"), elem_id="stop-answer")
                self.clear = gr.Button(words("Clear"), elem_id="clear")
        with gr.Accordion(words("How it answers"), open=False), gr.Row():
            self.system = gr.Textbox("", label=words("System prompt"), lines=2, scale=3)
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature")
            self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top_p")
            self.longest = gr.Slider(1, 4096, 256, step=1, label="max_new_tokens")
            self.seed = gr.Textbox("", label="seed", info=words("Empty: another each time."))
        self.clock = gr.Timer(SECONDS, active=False)  # while the tab is seen

    def connect(self, page: gr.Blocks, links: Links) -> None:
        """Say which event does what."""
        say = polite(self.words)
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 8}
        states = [side.state for side in self.sides]
        talks: list[Any] = [side.talk for side in self.sides]
        gr.on([self.clock.tick, page.load], say(self._states), None, states, **quick)
        subjects = [side.subject for side in self.sides]
        gr.on([page.load, links.tabs.change], say(self._list), None, subjects, **quick)
        for side in self.sides:
            load, unload = partial(self._load, side.name), partial(self._unload, side.name)
            asked = [side.subject, side.base]
            side.load.click(say(load), asked, states, **quick)
            side.unload.click(say(unload), None, states, **quick)
        asked = [
            *(self.question, self.system, self.temperature, self.top_p, self.longest, self.seed),
            *talks,
        ]
        asking = gr.on(
            [self.send.click, self.question.submit],
            say(self._ask),
            asked,
            [self.question, *talks],
            show_progress="hidden",
            concurrency_limit=8,
        )
        self.stop.click(self._stop, None, None, **quick)
        self.clear.click(self._stop, None, None, cancels=[asking], **quick).then(
            lambda: ([], []), None, talks, **quick
        )

    def _list(self) -> list[Any]:
        found = models.subjects(self.house.places)
        return [gr.update(choices=found) for _ in self.sides]

    def _load(self, name: str, path: str | None, base: str | None) -> list[str]:
        if not path:
            raise UserError(self.words("Choose a model first."))
        self.house.models.load(name, path, base or "")
        return self._states()

    def _unload(self, name: str) -> list[str]:
        self.house.models.unload(name)
        return self._states()

    def _states(self) -> list[str]:
        """A line for each side: which model, and whether it can be asked."""
        told = []
        for name in SIDES:
            remote = self.house.models.get(name)
            if remote is None:
                told.append(f"<p>{html.escape(self.words('No model is loaded.'))}</p>")
                continue
            what = remote.sentence if remote.state == "failed" else remote.description
            state = (
                f'<em class="sw-state {remote.state}">{html.escape(self.words(remote.state))}</em>'
            )
            shown = what.replace(f"{self.house.places.home}/", "")
            told.append(f"<p>{state} {html.escape(shown)}</p>")
        return told

    def _ask(
        self,
        question: str | None,
        system: str | None,
        temperature: float,
        top_p: float,
        longest: float,
        seed: str,
        *talks: Turns,
    ) -> Iterator[list[Any]]:
        """The conversations as they grow."""
        question, system = (question or "").strip(), (system or "").strip()
        loaded = {at: self.house.models.get(name) for at, name in enumerate(SIDES)}
        asked = {at: remote for at, remote in loaded.items() if remote is not None}
        if not question:
            return
        if not asked:
            raise UserError(self.words("No model is loaded."))
        options = Options(int(longest), float(temperature), float(top_p))
        options = options.with_text("seed", (seed or "").strip() or "none")
        said = [[{"role": t["role"], "content": _text(t)} for t in talk] for talk in talks]
        start = [{"role": "system", "content": system}] if system else []
        pieces: Pieces = queue.Queue()
        gone = threading.Event()
        for at, remote in asked.items():
            said[at].append({"role": "user", "content": question})
            told = (remote, [*start, *said[at]], options, at, pieces, gone)
            threading.Thread(target=_answer, args=told, daemon=True).start()
            said[at].append({"role": "assistant", "content": ""})
        try:
            yield from _grow(said, pieces, len(asked), question)
        finally:  # the window may be gone before the answer is there
            gone.set()

    def _stop(self) -> None:
        for name in SIDES:
            if (remote := self.house.models.get(name)) is not None:
                remote.stop()


def _grow(said: list[Turns], pieces: Pieces, left: int, question: str) -> Iterator[list[Any]]:
    """The question's box and both conversations, as `left` models answer. A question that was not
    answered goes back into its box."""
    box = ""
    yield [box, *said]
    while left:
        batch = [pieces.get()]
        while not pieces.empty():
            batch.append(pieces.get())
        for at, piece in batch:
            if isinstance(piece, str):
                said[at][-1]["content"] += piece
                continue
            left -= 1
            if piece is not None:
                gr.Warning(html.escape(str(piece)))
                said[at], box = said[at][:-2], question
        yield [box or gr.skip(), *said]


def _answer(
    remote: Remote,
    conversation: Turns,
    options: Options,
    at: int,
    pieces: Pieces,
    gone: threading.Event,
) -> None:
    """Put the pieces of an answer into the queue; None, or what was wrong, ends them. With nobody
    to read it the answer ends early."""
    try:
        for piece in remote.stream(conversation, options):
            pieces.put((at, piece))
            if gone.is_set():
                return  # a stream that is left is stopped
        pieces.put((at, None))
    except Exception as error:
        pieces.put((at, error))


def _text(turn: Any) -> str:
    """A turn's text. Gradio gives it back in parts."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "".join(each if isinstance(each, str) else str(each.get("text", "")) for each in content)

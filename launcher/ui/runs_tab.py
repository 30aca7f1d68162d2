"""The runs tab: where runs stand, their curves and logs; stop, resume, compare."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from launcher import runs
from launcher.errors import UserError
from launcher.ui.polite import polite
from launcher.ui.words import Words

if TYPE_CHECKING:
    from launcher.ui.page import House, Links

SECONDS = 2.0  # between looks
CONSOLE = "console"


@dataclass(frozen=True)
class Seen:
    """What a window shows already."""

    names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    curves: str = ""
    log: str = ""


class Tab:
    """Its widgets, and what they do."""

    def __init__(self, house: House, words: Words) -> None:
        self.house, self.words = house, words
        with gr.Row():
            # Choices change under a request that is on its way: else Gradio refuses that one.
            listed: dict[str, Any] = {"choices": [], "allow_custom_value": True}
            self.run = gr.Dropdown(label=words("Run"), elem_id="run", scale=3, **listed)
            self.stop = gr.Button(words("Stop, with a checkpoint"), elem_id="stop", scale=1)
            self.resume = gr.Button(words("Resume"), elem_id="resume", scale=1)
        self.facts = gr.HTML(elem_id="facts")
        self.charts = gr.HTML(elem_id="curves", elem_classes="sw-charts")
        self.label = gr.Dropdown(
            value=CONSOLE,
            label=words("Log"),
            elem_id="log-name",
            **{**listed, "choices": [CONSOLE]},
        )
        self.log = gr.HTML(elem_id="log")
        with gr.Accordion(words("Compare runs"), open=False):
            self.several = gr.Dropdown(
                multiselect=True, label=words("Runs"), elem_id="several", **listed
            )
            self.compare = gr.Button(words("Compare"), size="sm")
            self.comparison = gr.HTML(elem_id="comparison", elem_classes="sw-charts")
        self.clock = gr.Timer(SECONDS, active=False)  # while the tab is seen
        self.seen = gr.State(Seen())

    def connect(self, page: gr.Blocks, links: Links) -> None:
        """Say which event does what."""
        say = polite(self.words)
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 8}
        look: Any = {
            "fn": say(self._look),
            "trigger_mode": "always_last",
            "inputs": [self.run, self.label, self.seen],
            "outputs": [
                *(self.run, self.several, self.facts, self.charts, self.log, self.seen),
                *(self.label, self.stop, self.resume),
            ],
            **quick,
        }
        for event in (self.clock.tick, page.load, self.run.change, self.label.input):
            event(**look)
        self.stop.click(say(self._stop), [self.run], None, **quick)
        self.resume.click(say(self._resume), [self.run], None, **quick)
        self.compare.click(say(self._compare), [self.several], [self.comparison], **quick)

    def _look(self, name: str | None, label: str | None, seen: Seen) -> list[Any]:
        """What has changed since this window looked last. The choices of a person are never sent
        back: an answer that comes late would undo them."""
        self.house.processes.reap()
        names = self.house.viewer.names()
        if name and name not in names and self.house.processes.job(name).facts.is_file():
            names = [name, *names]  # only just being started
        if name is None and not names:
            nothing = f"<p>{html.escape(self.words('No run yet: the train tab starts one.'))}</p>"
            off = gr.update(interactive=False)
            return [gr.skip(), gr.skip(), nothing, "", "", Seen(), gr.skip(), off, off]
        chosen: dict[str, Any] = {} if name in names else {"value": names[0]}
        name = names[0] if chosen else str(name)
        shown = self.house.viewer.show(name, self.words)
        labels = list(self.house.viewer.logs(name)) or [CONSOLE]
        log = self.house.viewer.log(name, label or CONSOLE)
        now = Seen(tuple(names), tuple(labels), self.house.viewer.curves(shown), log)
        several = tuple(names) != seen.names
        return [
            gr.update(choices=names, **chosen) if several or chosen else gr.skip(),
            gr.update(choices=names) if several else gr.skip(),
            shown.html,
            now.curves if now.curves != seen.curves else gr.skip(),
            f'<div class="sw-log"><pre>{html.escape(log)}</pre></div>'
            if log != seen.log
            else gr.skip(),
            now,
            _labels(labels, label) if now.labels != seen.labels else gr.skip(),
            gr.update(interactive=shown.lives),
            gr.update(interactive=not shown.lives),
        ]

    def _stop(self, name: str | None) -> None:
        shown = self.house.viewer.show(self._named(name), self.words)
        if shown.state == "starting":  # no ranks yet: what starts them is asked
            self.house.processes.job(shown.name).stop()
            return
        said = list(runs.ask_to_stop(self.house.viewer.run(shown.name).path))
        gr.Info(html.escape("\n".join(said)), title=self.words("Stop"))

    def _resume(self, name: str | None) -> None:
        run = self.house.viewer.run(name := self._named(name))
        self.house.processes.start(name, ["resume", str(run.path)])

    def _compare(self, names: list[str]) -> str:
        if not names:
            raise UserError(self.words("Choose runs to compare first."))
        return self.house.viewer.compare(names)

    def _named(self, name: str | None) -> str:
        if not name:
            raise UserError(self.words("Choose a run first."))
        return name


def _labels(labels: list[str], chosen: str | None) -> Any:
    """The logs to choose from; another is chosen only where that one is gone."""
    other: dict[str, Any] = {} if chosen in labels else {"value": labels[0]}
    return gr.update(choices=labels, **other)

"""The runs tab: where runs stand, their curves and logs; stop, resume, compare."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import gradio as gr

from launcher import runs
from launcher.errors import UserError
from launcher.ui import viewer
from launcher.ui.polite import polite
from launcher.ui.words import Words

if TYPE_CHECKING:
    from launcher.ui.page import House, Links

SECONDS = 2.0  # between looks
CONSOLE = "console"


class Tab:
    """Its widgets, and what they do."""

    def __init__(self, house: House, words: Words) -> None:
        self.house, self.words = house, words
        with gr.Row():
            self.run = gr.Dropdown([], label=words("Run"), elem_id="run", scale=3)
            self.stop = gr.Button(words("Stop, with a checkpoint"), elem_id="stop", scale=1)
            self.resume = gr.Button(words("Resume"), elem_id="resume", scale=1)
        self.facts = gr.HTML(elem_id="facts")
        self.charts = gr.HTML(elem_id="curves", elem_classes="sw-charts")
        self.label = gr.Dropdown([CONSOLE], value=CONSOLE, label=words("Log"), elem_id="log-name")
        self.log = gr.HTML(elem_id="log")
        with gr.Accordion(words("Compare runs"), open=False):
            self.several = gr.Dropdown([], multiselect=True, label=words("Runs"), elem_id="several")
            self.compare = gr.Button(words("Compare"), size="sm")
            self.comparison = gr.HTML(elem_id="comparison", elem_classes="sw-charts")
        self.clock = gr.Timer(SECONDS)
        self.seen = gr.State(("", ""))  # what charts and log show: only what changes is sent

    def connect(self, page: gr.Blocks, links: Links) -> None:
        """Say which event does what."""
        say = polite(self.words)
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 8}
        look: Any = {
            "fn": say(self._look),
            "inputs": [self.run, self.label, self.seen],
            "outputs": [
                *(self.run, self.several, self.facts, self.charts, self.log, self.seen),
                *(self.label, self.stop, self.resume),
            ],
            **quick,
        }
        gr.on([self.clock.tick, page.load, self.run.change, self.label.input], **look)
        self.stop.click(say(self._stop), [self.run], None, **quick).then(**look)
        self.resume.click(say(self._resume), [self.run], None, **quick).then(**look)
        self.compare.click(say(self._compare), [self.several], [self.comparison], **quick)

    def _look(self, name: str | None, label: str, seen: tuple[str, str]) -> list[Any]:
        self.house.processes.reap()
        names = self.house.viewer.names()
        if name and name not in names and self.house.processes.job(name).facts.is_file():
            names = [name, *names]  # only just being started
        name = name if name in names else next(iter(names), None)
        runs_now = gr.update(choices=names, value=name)
        if name is None:
            nothing = f"<p>{html.escape(self.words('No run yet: the train tab starts one.'))}</p>"
            off = gr.update(interactive=False)
            return [runs_now, gr.update(choices=[]), nothing, "", "", ("", ""), gr.skip(), off, off]
        shown = self.house.viewer.show(name, self.words)
        drawn = f"{name} {shown.records[-1] if shown.records else ''}"
        labels = list(self.house.viewer.logs(name)) or [CONSOLE]
        label = label if label in labels else labels[0]
        log = self.house.viewer.log(name, label)
        return [
            runs_now,
            gr.update(choices=names),
            shown.facts,
            viewer.curves(shown.records) if drawn != seen[0] else gr.skip(),
            f'<div class="sw-log"><pre>{html.escape(log)}</pre></div>'
            if log != seen[1]
            else gr.skip(),
            (drawn, log),
            gr.update(choices=labels, value=label),
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

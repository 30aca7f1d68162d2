"""The Runs tab: state, charts and logs of runs; stop, resume, compare."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import gradio as gr

from launcher.cluster.control import request_stop
from launcher.errors import UserError
from launcher.ui.context import PageContext, TabLinks
from launcher.ui.errors import show_errors
from launcher.ui.i18n import Translations

POLL_SECONDS = 2.0
CONSOLE = "console"


@dataclass(frozen=True)
class WindowState:
    """What a window currently shows."""

    names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    charts: str = ""
    log: str = ""


class RunsTab:
    """The widgets of the tab and their event handlers."""

    def __init__(self, context: PageContext, translate: Translations) -> None:
        self.context, self.translate = context, translate
        with gr.Row():
            # The choices may change while a request is under way. Without allow_custom_value Gradio
            # would then refuse that request.
            no_choices: dict[str, Any] = {"choices": [], "allow_custom_value": True}
            self.run = gr.Dropdown(label=translate("Run"), elem_id="run", scale=3, **no_choices)
            self.stop = gr.Button(translate("Stop and save a checkpoint"), elem_id="stop", scale=1)
            self.resume = gr.Button(translate("Resume"), elem_id="resume", scale=1)
        self.facts = gr.HTML(elem_id="facts")
        self.charts = gr.HTML(elem_id="curves", elem_classes="sw-charts")
        self.label = gr.Dropdown(
            value=CONSOLE,
            label=translate("Log"),
            elem_id="log-name",
            **{**no_choices, "choices": [CONSOLE]},
        )
        self.log = gr.HTML(elem_id="log")
        with gr.Accordion(translate("Compare runs"), open=False):
            self.compared_runs = gr.Dropdown(
                multiselect=True, label=translate("Runs"), elem_id="several", **no_choices
            )
            self.compare = gr.Button(translate("Compare"), size="sm")
            self.comparison = gr.HTML(elem_id="comparison", elem_classes="sw-charts")
        self.timer = gr.Timer(POLL_SECONDS, active=False)  # active while the tab is visible
        self.window_state = gr.State(WindowState())

    def connect(self, page: gr.Blocks, links: TabLinks) -> None:
        """Connect the events to their handlers."""
        guard = show_errors(self.translate)
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 8}
        update: Any = {
            "fn": guard(self._update),
            "trigger_mode": "always_last",
            "inputs": [self.run, self.label, self.window_state],
            "outputs": [
                *(self.run, self.compared_runs, self.facts, self.charts, self.log),
                *(self.window_state, self.label, self.stop, self.resume),
            ],
            **quick,
        }
        for event in (self.timer.tick, page.load, self.run.change, self.label.input):
            event(**update)
        self.stop.click(guard(self._stop), [self.run], None, **quick)
        self.resume.click(guard(self._resume), [self.run], None, **quick)
        self.compare.click(guard(self._compare), [self.compared_runs], [self.comparison], **quick)

    def _update(self, name: str | None, label: str | None, shown: WindowState) -> list[Any]:
        """What has changed since the last update of this window.

        Never sends the user's choices back: a late response would undo a newer choice.
        """
        self.context.jobs.reap()
        names = self.context.viewer.names()
        if name and name not in names and self.context.jobs.job(name).record.is_file():
            names = [name, *names]  # it is starting and has no folder yet
        if name is None and not names:
            text = self.translate("No runs yet. Start one in the Train tab.")
            off = gr.update(interactive=False)
            empty = [f"<p>{html.escape(text)}</p>", "", "", WindowState()]
            return [gr.skip(), gr.skip(), *empty, gr.skip(), off, off]
        new_choice: dict[str, Any] = {} if name in names else {"value": names[0]}
        name = names[0] if new_choice else str(name)
        view = self.context.viewer.view(name, self.translate)
        labels = list(self.context.viewer.logs(name)) or [CONSOLE]
        log = self.context.viewer.log(name, label or CONSOLE)
        new = WindowState(tuple(names), tuple(labels), self.context.viewer.charts(view), log)
        names_changed = new.names != shown.names
        log_html = f'<div class="sw-log"><pre>{html.escape(log)}</pre></div>'
        return [
            gr.update(choices=names, **new_choice) if names_changed or new_choice else gr.skip(),
            gr.update(choices=names) if names_changed else gr.skip(),
            view.html,
            new.charts if new.charts != shown.charts else gr.skip(),
            log_html if log != shown.log else gr.skip(),
            new,
            _update_labels(labels, label) if new.labels != shown.labels else gr.skip(),
            gr.update(interactive=view.can_stop),
            gr.update(interactive=not view.can_stop),
        ]

    def _stop(self, name: str | None) -> None:
        view = self.context.viewer.view(self._check_name(name), self.translate)
        if view.state == "starting":  # there are no ranks yet: stop the process that starts them
            self.context.jobs.job(view.name).stop()
            return
        messages = list(request_stop(self.context.viewer.run(view.name).path))
        gr.Info(html.escape("\n".join(messages)), title=self.translate("Stop"))

    def _resume(self, name: str | None) -> None:
        run = self.context.viewer.run(name := self._check_name(name))
        self.context.roots.check_tree(run.checkpoints)
        self.context.jobs.start(name, ["resume", str(run.path)])

    def _compare(self, names: list[str]) -> str:
        if not names:
            raise UserError(self.translate("Choose runs to compare first."))
        return self.context.viewer.compare(names)

    def _check_name(self, name: str | None) -> str:
        if not name:
            raise UserError(self.translate("Choose a run first."))
        return name


def _update_labels(labels: list[str], chosen: str | None) -> Any:
    """The logs to choose from. Changes the choice only if that log no longer exists."""
    new_choice: dict[str, Any] = {} if chosen in labels else {"value": labels[0]}
    return gr.update(choices=labels, **new_choice)

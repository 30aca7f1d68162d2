"""What the tabs of the page share."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from launcher.ui.chat_models import LoadedModels
from launcher.ui.jobs import Jobs
from launcher.ui.roots import Roots
from launcher.ui.viewer import Viewer


class PageContext:
    """The state that all windows of the page share."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.jobs = Jobs(roots)
        self.viewer = Viewer(roots, self.jobs)
        self.models = LoadedModels(roots)


@dataclass(frozen=True)
class TabLinks:
    """Widgets that one tab sets to lead to another tab."""

    tabs: gr.Tabs
    run: gr.Dropdown  # in the Runs tab
    export: gr.Dropdown  # the source in the Export tab
    chat: gr.Dropdown  # model A in the Chat tab

"""The page: four tabs over one set of folders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from launcher import paths
from launcher.ui import chat_tab, export_tab, runs_tab, train_tab
from launcher.ui.models import Models
from launcher.ui.places import Places
from launcher.ui.processes import Processes
from launcher.ui.viewer import Viewer
from launcher.ui.words import Words

STYLE = paths.bundled("ui/page.css")


class House:
    """What all windows of the page share."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.processes = Processes(places)
        self.viewer = Viewer(places, self.processes)
        self.models = Models(places)


@dataclass(frozen=True)
class Links:
    """Widgets through which one tab leads to another."""

    tabs: gr.Tabs
    run: gr.Dropdown  # of the runs tab
    export: gr.Dropdown  # what is exported
    chat: gr.Dropdown  # whom one talks to


def theme() -> Any:
    """Gradio's own with the fonts of the machine: nothing is fetched from elsewhere."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def build(house: House, words: Words) -> gr.Blocks:
    """The page in one language."""
    page: gr.Blocks
    with gr.Blocks(title="Shardway", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f'<div style="text-align:right"><a href="{words.other}">{words.other_name}</a></div>'
        )
        opened: dict[str, gr.Tab] = {}
        with gr.Tabs() as tabs:
            with gr.Tab(words("Train"), id="train") as opened["train"]:
                trains = train_tab.Tab(house, words)
            with gr.Tab(words("Runs"), id="runs") as opened["runs"]:
                runs = runs_tab.Tab(house, words)
            with gr.Tab(words("Chat"), id="chat") as opened["chat"]:
                chats = chat_tab.Tab(house, words)
            with gr.Tab(words("Export"), id="export") as opened["export"]:
                exports = export_tab.Tab(house, words)
        clocks = {"runs": runs.clock, "chat": chats.clock, "export": exports.clock}
        for name, seen in opened.items():  # a tab that nobody sees does not look
            ticking = partial(_ticking, name, tuple(clocks))
            seen.select(ticking, None, [*clocks.values()], show_progress="hidden")
        links = Links(tabs, runs.run, exports.source, chats.sides[0].subject)
        for tab in (trains, runs, chats, exports):
            tab.connect(page, links)
    return page


def _ticking(seen: str, clocks: tuple[str, ...]) -> list[Any]:
    """Each tab's clock, running where the tab is seen."""
    return [gr.Timer(active=each == seen) for each in clocks]

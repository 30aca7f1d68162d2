"""The page: four tabs over one set of folders."""

from __future__ import annotations

from functools import partial

import gradio as gr

from launcher.folders import paths
from launcher.ui.context import PageContext, TabLinks
from launcher.ui.i18n import Translations
from launcher.ui.tabs.chat import ChatTab
from launcher.ui.tabs.export import ExportTab
from launcher.ui.tabs.runs import RunsTab
from launcher.ui.tabs.train import TrainTab

STYLE = paths.bundled("ui/page.css")


def theme() -> gr.themes.Base:
    """Gradio's default theme with system fonts: the page fetches nothing from other servers."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def build(context: PageContext, translate: Translations) -> gr.Blocks:
    """The page in one language."""
    page: gr.Blocks
    with gr.Blocks(title="Shardway", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f'<div style="text-align:right">'
            f'<a href="{translate.other_path}">{translate.other_name}</a></div>'
        )
        containers: dict[str, gr.Tab] = {}
        with gr.Tabs() as tabs:
            with gr.Tab(translate("Train"), id="train") as containers["train"]:
                train_tab = TrainTab(context, translate)
            with gr.Tab(translate("Runs"), id="runs") as containers["runs"]:
                runs_tab = RunsTab(context, translate)
            with gr.Tab(translate("Chat"), id="chat") as containers["chat"]:
                chat_tab = ChatTab(context, translate)
            with gr.Tab(translate("Export"), id="export") as containers["export"]:
                export_tab = ExportTab(context, translate)
        timers = {"runs": runs_tab.timer, "chat": chat_tab.timer, "export": export_tab.timer}
        for name, container in containers.items():  # only the visible tab polls
            activate = partial(_activate_timer, name, tuple(timers))
            container.select(activate, None, [*timers.values()], show_progress="hidden")
        links = TabLinks(tabs, runs_tab.run, export_tab.source, chat_tab.sides[0].model)
        for tab in (train_tab, runs_tab, chat_tab, export_tab):
            tab.connect(page, links)
    return page


def _activate_timer(visible_tab: str, timer_tabs: tuple[str, ...]) -> list[gr.Timer]:
    """The timers of all tabs; only the one of the visible tab is active."""
    return [gr.Timer(active=tab == visible_tab) for tab in timer_tabs]

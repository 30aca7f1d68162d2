"""The train tab: settings, the rules that they break, the command, and Start."""

from __future__ import annotations

import functools
import html
import json
from typing import TYPE_CHECKING, Any

import gradio as gr

from launcher import charts, curve, paths, run_dir
from launcher.charts import Curve
from launcher.config import Config
from launcher.config.scheduler import PlateauConfig
from launcher.config.setting import limits
from launcher.errors import UserError
from launcher.ui import experiment, form, grammar
from launcher.ui.form import ACCUMULATION, CHOSEN, GROUPS, Look, Values
from launcher.ui.polite import polite
from launcher.ui.words import Words

if TYPE_CHECKING:
    from launcher.ui.page import House, Links

OPEN = ("Model and data", "Method", "Length, batch and saving")
STEPS_DRAWN = 1000  # of the curve, where epochs alone are known
POINTS_DRAWN = 500
LONGEST = 4000  # characters of a setting
PREVIEW_SECONDS = 300


class Tab:
    """Its widgets, and what they do."""

    def __init__(self, house: House, words: Words) -> None:
        self.house, self.words = house, words
        self.fields: dict[str, Any] = {}
        self.said: dict[str, gr.HTML] = {}  # beside each group
        start = form.begun()
        with gr.Row():
            with gr.Column(scale=3):
                for group, keys in GROUPS.items():
                    self._group(group, keys, start)
                with gr.Accordion(words("More settings"), open=False):
                    self.more = gr.Textbox(
                        label=words("Overrides, one a line"),
                        info=words("Every setting of docs/configuration.md, as in a terminal."),
                        placeholder="checkpoint.save_best=true",
                        lines=3,
                        elem_id="more",
                    )
            with gr.Column(scale=2, elem_classes="sw-side"):
                self._side()

    def _group(self, group: str, keys: tuple[str, ...], start: Values) -> None:
        with gr.Accordion(self.words(group), open=group in OPEN):
            self.said[group] = gr.HTML(visible=False, elem_classes="sw-problems")
            with gr.Row(elem_classes="sw-grid"):
                for key in keys:
                    self.fields[key] = _widget(key, start, self.words)
            if group == OPEN[0]:
                self.look_at = gr.Button(self.words("Look at the data"), size="sm")
                self.preview = gr.HTML(elem_id="preview")
            if "scheduler" in keys:
                self.curve = gr.HTML(elem_classes="sw-charts")

    def _side(self) -> None:
        words = self.words
        self.summary = gr.HTML(elem_id="summary", elem_classes="sw-problems")
        self.mend = gr.Button(words("Mend what can be mended"), size="sm", visible=False)
        self.command = gr.Textbox(
            label=words("The same in a terminal"),
            lines=4,
            buttons=["copy"],
            interactive=False,
            elem_id="command",
            elem_classes="sw-mono",
        )
        self.name = gr.Textbox(
            label=words("Name of the run"),
            info=words("A folder in runs/. Empty: the time, the model and the method."),
            elem_id="run-name",
        )
        self.start = gr.Button(words("Start"), variant="primary", elem_id="start")
        with gr.Accordion(words("Experiment files"), open=False):
            found = experiment.names(self.house.places)
            self.known = gr.Dropdown(found, label=words("Load"), value=None, elem_id="load-name")
            self.load = gr.Button(words("Load into the page"), size="sm")
            self.saved = gr.Textbox(label=words("Save as"), elem_id="save-name")
            self.save = gr.Button(words("Save"), size="sm")

    def connect(self, page: gr.Blocks, links: Links) -> None:
        """Say which event does what."""
        say = polite(self.words)
        everything = [*self.fields.values(), self.more, self.name]
        shown = [
            *(self.summary, self.command, self.mend, self.start, self.curve),
            *self.said.values(),
        ]
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 4}
        look: Any = {"fn": say(self._look), "inputs": everything, "outputs": shown, **quick}
        typed = [widget.change for key, widget in self.fields.items() if key not in CHOSEN]
        gr.on(
            [*typed, self.more.change, self.name.change, page.load],
            trigger_mode="always_last",
            **look,
        )
        widgets = list(self.fields.values())
        for group in CHOSEN:
            switch = functools.partial(self._switch, group)
            self.fields[group].input(say(switch), everything, widgets, **quick).then(**look)
        filled = [*widgets, self.more]
        self.mend.click(say(self._mend), everything, filled, **quick).then(**look)
        self.load.click(say(self._load), [self.known], filled, **quick).then(**look)
        self.save.click(say(self._save), [*everything, self.saved], [self.known], **quick)
        self.look_at.click(say(self._preview), everything, [self.preview], concurrency_limit=4)
        self.start.click(say(self._start), everything, [links.tabs, links.run], **quick)

    def _values(self, typed: tuple[Any, ...]) -> tuple[Values, str, str]:
        """(the fields, further overrides, name of the run) out of what Gradio passes."""
        *values, more, name = typed
        return dict(zip(self.fields, values, strict=True)), more or "", (name or "").strip()

    def _found(self, typed: tuple[Any, ...]) -> tuple[Look, str]:
        values, more, name = self._values(typed)
        return form.look(values, more, self.house.places), name

    def _look(self, *typed: Any) -> list[Any]:
        found, name = self._found(typed)
        problems = [*found.problems, *self._name_problems(name)]
        beside = {group: [p for p in problems if form.group_of(p) == group] for group in GROUPS}
        return [
            self._summary(found, problems),
            found.command(name or None),
            gr.update(visible=bool(form.fixes(problems))),
            gr.update(interactive=not problems),
            _curve(found.config, self.words) if found.config else gr.skip(),
            *(gr.update(value=_paragraphs(said), visible=bool(said)) for said in beside.values()),
        ]

    def _name_problems(self, name: str) -> list[str]:
        if "/" in name:
            return [f"{name} is no name of a run → one without a slash, those are of sweeps"]
        try:
            if name and self.house.places.run(name).exists():
                return [f"runs/{name} exists, and nothing is overwritten → another name"]
        except UserError as error:
            return [str(error)]
        return []

    def _summary(self, found: Look, problems: list[str]) -> str:
        if problems:
            return _paragraphs(problems)
        assert found.config
        assert found.world
        training, words = found.config.training, self.words
        gpus = words("{0} GPUs").format(found.world.gpus) if found.world.gpus else "CPU"
        text = words("{0} ranks on {1} machine(s), {2}. Global batch: {3} rows a step.").format(
            found.world.size, found.world.nodes, gpus, training.global_batch_size
        )
        return f'<p class="sw-fine">✓ {html.escape(text)}</p>'

    def _switch(self, group: str, *typed: Any) -> list[Any]:
        values, _, _ = self._values(typed)
        return self._shown(form.switched(values, group))

    def _mend(self, *typed: Any) -> list[Any]:
        values, more, _ = self._values(typed)
        fixes = form.fixes(form.look(values, more, self.house.places).problems)
        changed, lines = form.apply(values, more, fixes)
        return [*self._shown(changed), lines]

    def _load(self, name: str | None) -> list[Any]:
        if not name:
            raise UserError(self.words("Choose an experiment file first."))
        values, more = experiment.load(self.house.places, name)
        return [*self._shown(values), more]

    def _save(self, *typed: Any) -> Any:
        *values, name = typed
        found, _ = self._found(tuple(values))
        path = experiment.save(self.house.places, (name or "").strip(), found)
        gr.Info(
            html.escape(f"{path.relative_to(self.house.places.home)}"), title=self.words("Save")
        )
        return gr.update(choices=experiment.names(self.house.places), value=path.stem)

    def _shown(self, values: Values) -> list[Any]:
        """Every field with its value, those of files that are not chosen out of sight."""
        has = form.begun({group: str(values[group]) for group in CHOSEN})
        return [
            gr.update(value=values[key], visible=True) if key in has else gr.update(visible=False)
            for key in self.fields
        ]

    def _preview(self, *typed: Any) -> str:
        found, _ = self._found(typed)
        if found.config is None:
            raise UserError("\n".join(found.problems))
        words = ["data", "preview", "--json", "--rows", "5", *found.overrides]
        done = self.house.processes.ask(words, PREVIEW_SECONDS)
        return _rows(json.loads(done.stdout))

    def _start(self, *typed: Any) -> list[Any]:
        found, name = self._found(typed)
        if problems := [*found.problems, *self._name_problems(name)]:
            raise UserError("\n".join(problems))
        assert found.config is not None
        if not name:
            name = run_dir.unused(f"{found.config.model.name}-{found.config.method.name}").name
        words = ["train", *found.overrides, f"run_dir=runs/{name}"]
        self.house.processes.start(name, words)
        choices = [name, *(each for each in self.house.viewer.names() if each != name)]
        return [gr.update(selected="runs"), gr.update(choices=choices, value=name)]


def _widget(key: str, start: Values, words: Words) -> Any:
    """The widget of a setting: a list to choose from, a tick, or a line of text."""
    value, declared = start.get(key), grammar.field_of(key)
    common: dict[str, Any] = {
        "label": words(key) if key == ACCUMULATION else key,
        "value": value,
        "visible": key in start,
        "elem_id": key.replace(".", "-"),
        "min_width": 150,
    }
    if key in CHOSEN:
        return gr.Dropdown(form.choices(key), **{**common, "visible": True})
    if declared is None:
        return gr.Textbox(info=words("Forwards of every rank in one step."), **common)
    bounds = "" if declared.metadata["choices"] else limits(declared)  # they are listed
    common["info"] = f"{words(declared.metadata['help'])}{f' ({bounds})' if bounds else ''}"
    if grammar.kind_of(key) == "bool":
        return gr.Checkbox(**{**common, "value": bool(value)})
    if declared.metadata["choices"]:
        listed = [str(each) for each in declared.metadata["choices"]]
        return gr.Dropdown(listed, **{**common, "value": value if value in listed else listed[0]})
    if key == "data.template":
        listed = ["", *sorted(paths.templates())]
        return gr.Dropdown(listed, allow_custom_value=True, **{**common, "value": value or ""})
    if key in form.OURS:
        common["placeholder"] = words("as the chosen file says")
    return gr.Textbox(max_length=LONGEST, **{**common, "value": value or ""})


def _paragraphs(sentences: list[str]) -> str:
    return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)


def _rows(told: dict[str, Any]) -> str:
    """What `shardway data preview --json` says, learnt tokens marked."""
    rows = []
    for row in told["rows"]:
        pieces = [
            f'<span class="sw-learnt">{html.escape(text)}</span>' if learnt else html.escape(text)
            for text, learnt in row["parts"]
        ]
        rows.append(f'<div class="sw-row"><b>{row["row"]}</b> {"".join(pieces)}</div>')
    lines = "\n".join(filter(None, (told["lengths"], "", *told["efficiency"])))
    return f'{"".join(rows)}<div class="sw-plain">{html.escape(lines)}</div>'


def _curve(config: Config, words: Words) -> str:
    """The learning rate over the steps, as an SVG."""
    if isinstance(config.scheduler, PlateauConfig):
        return f"<p>{html.escape(words('The rate follows the evaluation loss.'))}</p>"
    steps, peak = config.training.max_steps or STEPS_DRAWN, config.optimizer.learning_rate
    title = "learning rate" if config.training.max_steps else "learning rate, as if of 1,000 steps"
    points = tuple(
        (step + 1, peak * curve.factor(config.scheduler, peak, steps, step))
        for step in range(0, steps, -(-steps // POINTS_DRAWN))
    )
    return _drawn(title, points)


@functools.lru_cache(maxsize=32)
def _drawn(title: str, points: tuple[charts.Point, ...]) -> str:
    """At most keys it stays as it is."""
    return charts.chart(title, [Curve(list(points), [])])

"""The Train tab: settings, the problems of their combination, the command, and Start."""

from __future__ import annotations

import functools
import html
import json
from typing import Any

import gradio as gr

from launcher.config import Config
from launcher.config.schema.scheduler import PlateauConfig
from launcher.config.schema.setting import limits
from launcher.errors import UserError
from launcher.folders import paths
from launcher.folders.run import new_run_path
from launcher.tracking import svg
from launcher.tracking.svg import Curve
from launcher.training import lr_curve
from launcher.ui import experiment, form, override_syntax
from launcher.ui.context import PageContext, TabLinks
from launcher.ui.errors import show_errors
from launcher.ui.form import ACCUMULATION, GROUPS, HYDRA_GROUPS, FormCheck, Values
from launcher.ui.i18n import Translations
from launcher.ui.implied import IMPLYING_FIELDS, with_implied

OPEN_GROUPS = ("Model and data", "Method", "Length, batch and saving")
EXAMPLE_STEPS = 1000  # of the learning rate chart, if only the number of epochs is known
CHART_POINTS = 500
MAX_FIELD_LENGTH = 4000  # characters of a setting
PREVIEW_TIMEOUT = 300  # seconds


class TrainTab:
    """The widgets of the tab and their event handlers."""

    def __init__(self, context: PageContext, translate: Translations) -> None:
        self.context, self.translate = context, translate
        self.fields: dict[str, Any] = {}
        self.group_problems: dict[str, gr.HTML] = {}
        initial = form.initial_values()
        with gr.Row():
            with gr.Column(scale=3):
                for group, keys in GROUPS.items():
                    self._add_group(group, keys, initial)
                with gr.Accordion(translate("More settings"), open=False):
                    self.more = gr.Textbox(
                        label=translate("Overrides, one per line"),
                        info=translate(
                            "Any setting of docs/configuration.md, written as in a terminal."
                        ),
                        placeholder="checkpoint.save_best=true",
                        lines=3,
                        elem_id="more",
                    )
            with gr.Column(scale=2, elem_classes="sw-side"):
                self._add_side_column()

    def _add_group(self, group: str, keys: tuple[str, ...], initial: Values) -> None:
        with gr.Accordion(self.translate(group), open=group in OPEN_GROUPS):
            self.group_problems[group] = gr.HTML(visible=False, elem_classes="sw-problems")
            with gr.Row(elem_classes="sw-grid"):
                for key in keys:
                    self.fields[key] = _widget(key, initial, self.translate)
            if group == OPEN_GROUPS[0]:
                self.preview = gr.Button(self.translate("Preview the data"), size="sm")
                self.preview_html = gr.HTML(elem_id="preview")
            if "scheduler" in keys:
                self.rate_chart = gr.HTML(elem_classes="sw-charts")

    def _add_side_column(self) -> None:
        translate = self.translate
        self.summary = gr.HTML(elem_id="summary", elem_classes="sw-problems")
        self.fix = gr.Button(translate("Apply the suggested fixes"), size="sm", visible=False)
        self.command = gr.Textbox(
            label=translate("The same in a terminal"),
            lines=4,
            buttons=["copy"],
            interactive=False,
            elem_id="command",
            elem_classes="sw-mono",
        )
        self.run_name = gr.Textbox(
            label=translate("Run name"),
            info=translate("A folder in runs/. If empty: the time, the model and the method."),
            elem_id="run-name",
        )
        self.start = gr.Button(translate("Start"), variant="primary", elem_id="start")
        with gr.Accordion(translate("Experiment files"), open=False):
            names = experiment.names(self.context.roots)
            self.experiment = gr.Dropdown(
                names, label=translate("Load"), value=None, elem_id="load-name"
            )
            self.load = gr.Button(translate("Load into the page"), size="sm")
            self.save_name = gr.Textbox(label=translate("Save as"), elem_id="save-name")
            self.save = gr.Button(translate("Save"), size="sm")

    def connect(self, page: gr.Blocks, links: TabLinks) -> None:
        """Connect the events to their handlers."""
        guard = show_errors(self.translate)
        inputs = [*self.fields.values(), self.more, self.run_name]
        outputs = [
            *(self.summary, self.command, self.fix, self.start, self.rate_chart),
            *self.group_problems.values(),
        ]
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 4}
        check: Any = {"fn": guard(self._check), "inputs": inputs, "outputs": outputs, **quick}
        changes = [field.change for key, field in self.fields.items() if key not in HYDRA_GROUPS]
        gr.on(
            [*changes, self.more.change, self.run_name.change, page.load],
            trigger_mode="always_last",
            **check,
        )
        fields = list(self.fields.values())
        for group in HYDRA_GROUPS:
            switch = functools.partial(self._switch_file, group)
            self.fields[group].input(guard(switch), inputs, fields, **quick).then(**check)
        leaving = [self.fields[key].blur for key in IMPLYING_FIELDS]
        gr.on(leaving, guard(self._show_implied), inputs, fields, **quick).then(**check)
        settings = [*fields, self.more]
        self.fix.click(guard(self._fix), inputs, settings, **quick).then(**check)
        self.load.click(guard(self._load), [self.experiment], settings, **quick).then(**check)
        self.save.click(guard(self._save), [*inputs, self.save_name], [self.experiment], **quick)
        self.preview.click(guard(self._preview), inputs, [self.preview_html], concurrency_limit=4)
        self.start.click(guard(self._start), inputs, [links.tabs, links.run], **quick)

    def _parse_inputs(self, inputs: tuple[Any, ...]) -> tuple[Values, str, str]:
        """(fields, additional overrides, run name) from the values that Gradio passes."""
        *values, more, name = inputs
        return dict(zip(self.fields, values, strict=True)), more or "", (name or "").strip()

    def _check_inputs(self, inputs: tuple[Any, ...]) -> tuple[FormCheck, str]:
        """(result of the check, run name)."""
        values, more, name = self._parse_inputs(inputs)
        return form.check_form(values, more, self.context.roots), name

    def _check(self, *inputs: Any) -> list[Any]:
        check, name = self._check_inputs(inputs)
        problems = [*check.problems, *self._name_problems(name)]
        by_group = {group: [p for p in problems if form.group_of(p) == group] for group in GROUPS}
        return [
            self._format_summary(check, problems),
            check.command(name or None),
            gr.update(visible=bool(form.fixes(problems))),
            gr.update(interactive=not problems),
            _rate_chart(check.config, self.translate) if check.config else gr.skip(),
            *(
                gr.update(value=_paragraphs(found), visible=bool(found))
                for found in by_group.values()
            ),
        ]

    def _name_problems(self, name: str) -> list[str]:
        if "/" in name:
            return [f"{name} is not a valid run name → no slash, which is only for runs of sweeps"]
        try:
            if name and self.context.roots.run_folder(name).exists():
                return [f"runs/{name} exists and is not overwritten → another name"]
        except UserError as error:
            return [str(error)]
        return []

    def _format_summary(self, check: FormCheck, problems: list[str]) -> str:
        if problems:
            return _paragraphs(problems)
        assert check.config
        assert check.world
        training, translate = check.config.training, self.translate
        gpus = translate("{0} GPUs").format(check.world.gpus) if check.world.gpus else "CPU"
        text = translate(
            "{0} ranks on {1} machine(s), {2}. Global batch: {3} rows per step."
        ).format(check.world.size, check.world.nodes, gpus, training.global_batch_size)
        return f'<p class="sw-fine">✓ {html.escape(text)}</p>'

    def _switch_file(self, group: str, *inputs: Any) -> list[Any]:
        values, _, _ = self._parse_inputs(inputs)
        return self._field_updates(form.switch_file(values, group))

    def _show_implied(self, *inputs: Any) -> list[Any]:
        values, _, _ = self._parse_inputs(inputs)
        new = with_implied(values)
        # Only what is implied is replaced: another field may be edited before this answer comes.
        return [gr.skip() if new[k] == values[k] else new[k] for k in self.fields]

    def _fix(self, *inputs: Any) -> list[Any]:
        values, more, _ = self._parse_inputs(inputs)
        fixes = form.fixes(form.check_form(values, more, self.context.roots).problems)
        changed, lines = form.apply_overrides(values, more, fixes)
        return [*self._field_updates(changed), lines]

    def _load(self, name: str | None) -> list[Any]:
        if not name:
            raise UserError(self.translate("Choose an experiment file first."))
        values, more = experiment.load(self.context.roots, name)
        return [*self._field_updates(values), more]

    def _save(self, *inputs: Any) -> Any:
        *values, name = inputs
        check, _ = self._check_inputs(tuple(values))
        path = experiment.save(self.context.roots, (name or "").strip(), check)
        saved = html.escape(f"{path.relative_to(self.context.roots.home)}")
        gr.Info(saved, title=self.translate("Save"))
        return gr.update(choices=experiment.names(self.context.roots), value=path.stem)

    def _field_updates(self, values: Values) -> list[Any]:
        """An update for every field. Hides the fields that the chosen files do not have."""
        visible = form.initial_values({group: str(values[group]) for group in HYDRA_GROUPS})
        return [
            gr.update(value=values[key], visible=True)
            if key in visible
            else gr.update(visible=False)
            for key in self.fields
        ]

    def _preview(self, *inputs: Any) -> str:
        check, _ = self._check_inputs(inputs)
        if check.config is None:
            raise UserError("\n".join(check.problems))
        arguments = ["data", "preview", "--json", "--rows", "5", *check.overrides]
        done = self.context.jobs.run(arguments, PREVIEW_TIMEOUT)
        return _format_preview(json.loads(done.stdout))

    def _start(self, *inputs: Any) -> list[Any]:
        check, name = self._check_inputs(inputs)
        if problems := [*check.problems, *self._name_problems(name)]:
            raise UserError("\n".join(problems))
        assert check.config is not None
        if not name:
            name = new_run_path(f"{check.config.model.name}-{check.config.method.name}").name
        self.context.jobs.start(name, ["train", *check.overrides, f"run_dir=runs/{name}"])
        others = (other for other in self.context.viewer.names() if other != name)
        return [gr.update(selected="runs"), gr.update(choices=[name, *others], value=name)]


def _widget(key: str, initial: Values, translate: Translations) -> Any:
    """The widget of a setting: a dropdown, a checkbox or a text box."""
    value, field = initial.get(key), override_syntax.field_of(key)
    common: dict[str, Any] = {
        "label": translate(key) if key == ACCUMULATION else key,
        "value": value,
        "visible": key in initial,
        "elem_id": key.replace(".", "-"),
        "min_width": 150,
    }
    if key in HYDRA_GROUPS:
        return gr.Dropdown(form.choices(key), **{**common, "visible": True})
    if field is None:
        info = translate("Forward passes of each rank per step.")
        return gr.Textbox(info=info, **common)
    bounds = "" if field.metadata["choices"] else limits(field)  # a dropdown lists its choices
    common["info"] = f"{translate(field.metadata['help'])}{f' ({bounds})' if bounds else ''}"
    if override_syntax.type_of(key) == "bool":
        return gr.Checkbox(**{**common, "value": bool(value)})
    if field.metadata["choices"]:
        choices = [str(choice) for choice in field.metadata["choices"]]
        value = value if value in choices else choices[0]
        return gr.Dropdown(choices, **{**common, "value": value})
    if key == "data.template":
        choices = ["", *sorted(paths.templates())]
        return gr.Dropdown(choices, allow_custom_value=True, **{**common, "value": value or ""})
    if key in form.PATH_FIELDS:
        common["placeholder"] = translate("from the chosen file")
    return gr.Textbox(max_length=MAX_FIELD_LENGTH, **{**common, "value": value or ""})


def _paragraphs(messages: list[str]) -> str:
    return "".join(f"<p>{html.escape(message)}</p>" for message in messages)


def _format_preview(preview: dict[str, Any]) -> str:
    """The output of `shardway data preview --json`, with the tokens in the loss highlighted."""
    rows = []
    for row in preview["rows"]:
        pieces = [
            f'<span class="sw-learned">{html.escape(text)}</span>' if in_loss else html.escape(text)
            for text, in_loss in row["parts"]
        ]
        rows.append(f'<div class="sw-row"><b>{row["row"]}</b> {"".join(pieces)}</div>')
    lines = "\n".join(filter(None, (preview["lengths"], "", *preview["efficiency"])))
    return f'{"".join(rows)}<div class="sw-plain">{html.escape(lines)}</div>'


def _rate_chart(config: Config, translate: Translations) -> str:
    """The learning rate over the steps, as an SVG."""
    if isinstance(config.scheduler, PlateauConfig):
        text = translate("The learning rate follows the evaluation loss.")
        return f"<p>{html.escape(text)}</p>"
    max_steps = config.training.max_steps
    steps, peak = max_steps or EXAMPLE_STEPS, config.optimizer.learning_rate
    title = "learning rate" if max_steps else "learning rate, for an example of 1,000 steps"
    points = tuple(
        (step + 1, peak * lr_curve.lr_factor(config.scheduler, peak, steps, step))
        for step in range(0, steps, -(-steps // CHART_POINTS))
    )
    return _cached_chart(title, points)


@functools.lru_cache(maxsize=32)
def _cached_chart(title: str, points: tuple[svg.Point, ...]) -> str:
    """Cached because most keystrokes do not change the curve."""
    return svg.chart(title, [Curve(list(points), [])])

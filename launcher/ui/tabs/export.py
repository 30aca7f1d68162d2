"""The Export tab: makes a folder that servers can load from a run, a checkpoint or an adapter."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import gradio as gr

from launcher.errors import UserError
from launcher.export.writing.journal import journal_path, partial_folder
from launcher.folders.checkpoint import MANIFEST
from launcher.folders.run import RunDir
from launcher.tracking import report
from launcher.ui import chat_models
from launcher.ui.context import PageContext, TabLinks
from launcher.ui.errors import show_errors
from launcher.ui.i18n import Translations
from launcher.ui.jobs import Job

POLL_SECONDS = 1.0
PLAN_TIMEOUT = 600  # seconds
MAX_TENSOR_ROWS = 200
JOB_PREFIX = "export of "
MAX_NAME_LENGTH = 80
# A progress line of `shardway consolidate`.
PROGRESS = re.compile(
    r"^(writing|reading back|evaluating)(| .+) ([\d.,]+) of ([\d.,]+) (GB|tokens), (\S+ \S+/s),",
    re.MULTILINE,
)


class ExportTab:
    """The widgets of the tab and their event handlers."""

    def __init__(self, context: PageContext, translate: Translations) -> None:
        self.context, self.translate = context, translate
        self._add_inputs()
        with gr.Row():
            self.plan = gr.Button(translate("Show the plan"), elem_id="plan")
            self.start = gr.Button(translate("Export"), variant="primary", elem_id="export")
            self.stop = gr.Button(translate("Stop"), interactive=False, elem_id="stop-export")
            self.chat = gr.Button(translate("Chat with it"), interactive=False, elem_id="talk")
        self.plan_html = gr.HTML(elem_id="planned")
        self.status = gr.HTML(elem_id="exported")
        self.timer = gr.Timer(POLL_SECONDS, active=False)  # active while the tab is visible
        self.job_name = gr.State("")  # of the export that the window shows

    def _add_inputs(self) -> None:
        translate = self.translate
        with gr.Row():
            self.source = gr.Dropdown(
                [],
                allow_custom_value=True,
                label=translate("What to export"),
                info=translate(
                    "A run (its newest checkpoint), a checkpoint, an adapter or a model folder. "
                    "Choose from the list or type a path."
                ),
                elem_id="source",
            )
            self.base = gr.Textbox(
                label=translate("Base model"),
                info=translate("If empty: the base model that the source names."),
            )
            self.output = gr.Textbox(
                label=translate("Output folder"),
                info=translate("Must be new. If empty: export in the run's folder."),
                elem_id="output",
            )
        with gr.Row():
            self.max_shard_size = gr.Textbox(
                "5GB",
                label="max_shard_size",
                info=translate("2GB to 5GB suits servers and the hub; 5GB is 5·10⁹ bytes."),
                elem_id="max-shard-size",
            )
            self.dtype = gr.Dropdown(
                ["auto", "bf16", "fp16", "fp32"],
                value="auto",
                label="dtype",
                info=translate("auto: the dtype of the base model."),
            )
            self.device = gr.Dropdown(
                ["cpu", "auto"],
                value="cpu",
                label="device",
                info=translate("auto: a GPU merges adapters, if there is one."),
            )
        with gr.Row():
            self.evaluate = gr.Textbox(
                label="evaluate",
                info=translate(
                    "Rows to evaluate the export and its source on, as for data.path. If empty: "
                    "neither is evaluated."
                ),
                elem_id="evaluate",
            )
            self.overwrite = gr.Checkbox(
                label=translate("Start over"),
                info=translate("Replaces an existing or unfinished export in the output folder."),
                elem_id="anew",
            )

    def connect(self, page: gr.Blocks, links: TabLinks) -> None:
        """Connect the events to their handlers."""
        guard = show_errors(self.translate)
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 8}
        inputs = [
            *(self.source, self.base, self.output),
            *(self.max_shard_size, self.dtype, self.device, self.overwrite, self.evaluate),
        ]
        choices = guard(self._update_choices)
        gr.on([page.load, links.tabs.change], choices, None, [self.source], **quick)
        page.load(self._newest_job, None, [self.job_name], **quick)
        self.plan.click(guard(self._plan), inputs, [self.plan_html], concurrency_limit=4)
        self.start.click(guard(self._start), inputs, [self.job_name], **quick)
        gr.on(
            [self.timer.tick, self.job_name.change],
            guard(self._update),
            [self.job_name],
            [self.status, self.stop, self.chat],
            **quick,
        )
        self.stop.click(guard(self._stop), [self.job_name], None, **quick)
        self.chat.click(guard(self._open_chat), [self.job_name], [links.tabs, links.chat], **quick)

    def _update_choices(self) -> Any:
        return gr.update(choices=chat_models.export_choices(self.context.roots))

    def _newest_job(self) -> str:
        """The name of the export that was started last, so that a new window shows it."""
        records = sorted(
            self.context.jobs.folder.glob(f"{JOB_PREFIX}*.json"),
            key=lambda file: file.stat().st_mtime,
        )
        return records[-1].stem if records else ""

    def _arguments(
        self,
        source: str | None,
        base: str | None,
        output: str | None,
        max_shard_size: str,
        dtype: str,
        device: str,
        overwrite: bool,
        evaluate: str = "",
    ) -> tuple[list[str], Path]:
        """The arguments of `shardway consolidate`, and the output folder.

        Raises UserError for a path outside the roots and for pickles.
        """
        roots = self.context.roots
        source, base, output = ((text or "").strip() for text in (source, base, output))
        if not source:
            raise UserError(self.translate("Choose what to export first."))
        path = roots.check_tree(source)
        _refuse_pickles(path)
        for folder in chat_models.base_folders(path):
            roots.check_tree(folder)
        run_or_source = path.parents[1] if path.parent.name == "checkpoints" else path
        target = roots.to_write(output or run_or_source / "export")
        partial = partial_folder(target)
        for written in (target, partial):
            roots.check_tree(written)
        roots.check_record(journal_path(partial))
        arguments = [
            *("consolidate", str(path), "--output", str(target)),
            *(f"--max-shard-size={max_shard_size}", "--dtype", dtype, "--device", device),
            *("--json", "--progress-seconds", "0.5"),
            # A stopped export keeps its finished files unless the user starts over.
            "--overwrite" if overwrite else "--resume",
        ]
        if base:
            arguments += ["--base", str(roots.check_tree(base))]
        if rows := evaluate.strip():
            arguments += ["--evaluate", str(roots.check_tree(rows))]
        return arguments, target

    def _plan(self, *inputs: Any) -> str:
        *others, _ = inputs  # a plan writes nothing that could be evaluated
        arguments, _ = self._arguments(*others)
        done = self.context.jobs.run([*arguments, "--dry-run"], PLAN_TIMEOUT)
        return self._format_plan(self._shorten(done.stderr), json.loads(done.stdout))

    def _shorten(self, text: str) -> str:
        """`text` with paths relative to the first root."""
        return text.replace(f"{self.context.roots.home}/", "")

    def _format_plan(self, notes: str, plan: dict[str, Any]) -> str:
        tensors = plan["tensors"]
        sizes: dict[str, int] = {}
        for row in tensors:
            size = int(row["size"].removesuffix(" bytes").replace(",", ""))
            sizes[row["file"]] = sizes.get(row["file"], 0) + size
        head = self.translate("{0} tensors in {1} file(s), {2} GB; {3} GB are free.").format(
            f"{len(tensors):,}",
            len(sizes),
            f"{plan['bytes'] / 1e9:.2f}",
            f"{plan['free_bytes'] / 1e9:,.1f}",
        )
        keys = ("file", "tensor", "action", "dtype_and_shape", "size")
        rows = [[str(row[key]) for key in keys] for row in tensors[:MAX_TENSOR_ROWS]]
        more = len(tensors) - len(rows)
        rest = f"<p>{html.escape(self.translate('{0} more').format(more))}</p>" if more > 0 else ""
        files = _table(("file", "MB"), [[name, f"{n / 1e6:,.1f}"] for name, n in sizes.items()])
        return (
            f"<p><b>{html.escape(head)}</b></p>"
            f'<div class="sw-plain">{html.escape(notes.strip())}</div>'
            f"{files}<details><summary>{html.escape(self.translate('All tensors'))}</summary>"
            f"{_table(keys, rows)}{rest}</details>"
        )

    def _start(self, *inputs: Any) -> str:
        arguments, target = self._arguments(*inputs)
        name = self.context.roots.short_path(target).replace("/", "+")[-MAX_NAME_LENGTH:]
        digest = hashlib.sha256(str(target).encode()).hexdigest()[:8]
        job_name = f"{JOB_PREFIX}{name} {digest}"
        return self.context.jobs.start(job_name, arguments, separate_stdout=True).name

    def _update(self, job_name: str) -> list[Any]:
        on, off = gr.update(interactive=True), gr.update(interactive=False)
        if not job_name:
            return ["", off, off]
        job = self.context.jobs.job(job_name)
        if job.is_running:
            return [format_progress(job.log_tail(), self.translate), on, off]
        if result := self._read_result(job):
            return [self._format_result(result), off, on]
        output = html.escape(self._shorten(job.log_tail()).strip()[-4000:])
        head = html.escape(self.translate("The export failed. Its output:"))
        return [
            f'<p class="sw-problems">{head}</p><div class="sw-plain">{output}</div>',
            *(off, off),
        ]

    def _stop(self, job_name: str) -> None:
        self.context.jobs.job(job_name).stop()

    def _format_result(self, result: dict[str, Any]) -> str:
        output = self.context.roots.short_path(Path(result["output"]))
        head = self.translate("{0}: {1} tensors, {2} GB in {3} s at {4} MB/s, {5}.").format(
            output,
            f"{result['tensors']:,}",
            f"{result['bytes'] / 1e9:.2f}",
            f"{result['seconds']:.1f}",
            f"{result['bytes_per_second'] / 1e6:,.0f}",
            self.translate("verified" if result["verified"] else "not verified"),
        )
        rows = [[name, f"{size / 1e6:,.1f}"] for name, size in result["files"].items()]
        said = [*result["notes"], *self._describe_losses(result.get("evaluation"))]
        notes = "".join(f"<p>{html.escape(self._shorten(text))}</p>" for text in said)
        serve = f"shardway serve {shlex.quote(output)}"
        return (
            f"<p><b>✓ {html.escape(head)}</b></p>{notes}{_table(('file', 'MB'), rows)}"
            f'<div class="sw-plain">{html.escape(serve)}</div>'
        )

    def _describe_losses(self, losses: dict[str, Any] | None) -> list[str]:
        """Texts on what `--evaluate` found."""
        if losses is None:
            return []
        found = self.translate("Loss per token on {0} tokens: {1}.").format(
            f"{losses['tokens']:,}", f"{losses['result']:.4f}"
        )
        if losses["source"] is None:
            other = self.translate("The source was not evaluated: {0}")
            return [found, other.format(losses["compared_with"])]
        other = self.translate("{0} of {1}")
        return [found, other.format(f"{losses['source']:.4f}", losses["compared_with"])]

    def _open_chat(self, job_name: str) -> list[Any]:
        result = self._read_result(self.context.jobs.job(job_name))
        if result is None:
            raise UserError(self.translate("There is no finished export to chat with."))
        output = self.context.roots.short_path(Path(result["output"]))
        return [gr.update(selected="chat"), gr.update(value=output)]

    def _read_result(self, job: Job) -> dict[str, Any] | None:
        """The result that a finished export printed; None if it has not finished or has failed."""
        try:
            with self.context.roots.open(job.out) as file:
                result = json.load(file)
        except (OSError, ValueError, UserError):
            return None
        return result if isinstance(result, dict) else None


def _refuse_pickles(path: Path) -> None:
    """Raises UserError if the weights are neither safetensors nor written by Shardway."""
    by_shardway = RunDir(path).has_config or (path / MANIFEST).is_file()
    if path.is_dir() and not by_shardway and not any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} is neither a run nor a folder with safetensors, and the page opens nothing "
            f"else → shardway consolidate {shlex.quote(str(path))} --output DIR in a terminal"
        )


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """An HTML table of plain texts."""
    return report.render_table(
        [dict(zip(heads, map(html.escape, row), strict=True)) for row in rows]
    )


def format_progress(log: str, translate: Translations) -> str:
    """The newest progress line of `shardway consolidate` as a bar."""
    lines = PROGRESS.findall(log)
    if not lines:
        return f"<p>{html.escape(translate('reading the plan …'))}</p>"
    action, model, done, total, unit, rate = lines[-1]
    now, end = (float(each.replace(",", "")) for each in (done, total))
    percent = min(100.0, 100 * now / max(1e-9, end))
    text = f"{translate(action)}{model} {done} / {total} {unit}, {rate}"
    return (
        f'<div class="sw-bar" role="progressbar"><div style="width:{percent:.1f}%"></div></div>'
        f'<div class="sw-steps">{html.escape(text)}</div>'
    )

"""The export tab: a run or an adapter in, a folder that servers load out."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from launcher import report
from launcher.checkpoint import layout
from launcher.errors import UserError
from launcher.run_dir import RunDir
from launcher.ui import models
from launcher.ui.polite import polite
from launcher.ui.processes import Job
from launcher.ui.words import Words

if TYPE_CHECKING:
    from launcher.ui.page import House, Links

SECONDS = 1.0  # between looks
PLAN_SECONDS = 600
SHOWN_TENSORS = 200
PREFIX = "export of "
LONGEST_NAME = 80
LINE = re.compile(
    r"^(writing|reading back) ([\d.]+) of ([\d.]+) GB, ([\d,]+) MB/s.*$", re.MULTILINE
)


class Tab:
    """Its widgets, and what they do."""

    def __init__(self, house: House, words: Words) -> None:
        self.house, self.words = house, words
        with gr.Row():
            self.source = gr.Dropdown(
                [],
                allow_custom_value=True,
                label=words("What to export"),
                info=words(
                    "A run (its newest checkpoint), a checkpoint, an adapter or a model "
                    "folder: from the list, or a path."
                ),
                elem_id="source",
            )
            self.base = gr.Textbox(
                label=words("Base model"), info=words("Empty: the one that is named there.")
            )
            self.output = gr.Textbox(
                label=words("Folder to write"),
                info=words("Must be new. Empty: export in the run's folder."),
                elem_id="output",
            )
        with gr.Row():
            self.size = gr.Textbox(
                "5GB",
                label="max_shard_size",
                info=words("2GB to 5GB suits servers and the hub; 5GB is 5·10⁹ bytes."),
                elem_id="max-shard-size",
            )
            self.dtype = gr.Dropdown(["auto", "bf16", "fp16", "fp32"], value="auto", label="dtype",
                                     info=words("auto: the base model's."))  # fmt: skip
            self.device = gr.Dropdown(["cpu", "auto"], value="cpu", label="device",
                                      info=words("auto: a GPU multiplies adapters."))  # fmt: skip
        self.anew = gr.Checkbox(
            label=words("Begin anew"),
            info=words("Where an export stands already, or was stopped: replace it."),
            elem_id="anew",
        )
        with gr.Row():
            self.plan = gr.Button(words("Show the plan"), elem_id="plan")
            self.start = gr.Button(words("Export"), variant="primary", elem_id="export")
            self.stop = gr.Button(words("Stop"), interactive=False, elem_id="stop-export")
            self.talk = gr.Button(words("Chat with it"), interactive=False, elem_id="talk")
        self.planned = gr.HTML(elem_id="planned")
        self.told = gr.HTML(elem_id="exported")
        self.clock = gr.Timer(SECONDS, active=False)  # while the tab is seen
        self.job = gr.State("")  # the name of the export that is shown

    def connect(self, page: gr.Blocks, links: Links) -> None:
        """Say which event does what."""
        say = polite(self.words)
        quick: Any = {"show_progress": "hidden", "concurrency_limit": 8}
        asked = [self.source, self.base, self.output, self.size, self.dtype, self.device, self.anew]
        gr.on([page.load, links.tabs.change], say(self._list), None, [self.source], **quick)
        page.load(self._newest, None, [self.job], **quick)
        self.plan.click(say(self._plan), asked, [self.planned], concurrency_limit=4)
        self.start.click(say(self._start), asked, [self.job], **quick)
        gr.on(
            [self.clock.tick, self.job.change],
            say(self._look),
            [self.job],
            [self.told, self.stop, self.talk],
            **quick,
        )
        self.stop.click(say(self._stop), [self.job], None, **quick)
        self.talk.click(say(self._talk), [self.job], [links.tabs, links.chat], **quick)

    def _list(self) -> Any:
        return gr.update(choices=models.sources(self.house.places))

    def _newest(self) -> str:
        """The export that was begun last: a page that is opened anew finds it."""
        found = sorted(
            self.house.processes.folder.glob(f"{PREFIX}*.json"),
            key=lambda file: file.stat().st_mtime,
        )
        return found[-1].stem if found else ""

    def _words(self, source: str, base: str, output: str, *how: Any) -> tuple[list[str], Path]:
        """The words of `shardway consolidate`, and the folder. Raises UserError for what leads out
        of the roots."""
        places = self.house.places
        if not (source or "").strip():
            raise UserError(self.words("Choose what to export first."))
        path = places.to_read(source.strip())
        _refuse_pickles(path)
        for folder in models.bases_of(path):
            places.to_read(folder)
        beside = path.parents[1] if path.parent.name == "checkpoints" else path
        target = places.to_write((output or "").strip() or beside / "export")
        size, dtype, device, anew = how
        words = ["consolidate", str(path), "--output", str(target), f"--max-shard-size={size}"]
        words += ["--dtype", dtype, "--device", device, "--json", "--progress-seconds", "0.5"]
        # What an export that was stopped had finished stays, unless it is to be begun anew.
        words += ["--overwrite" if anew else "--resume"]
        if (base or "").strip():
            words += ["--base", str(places.to_read(base.strip()))]
        return words, target

    def _plan(self, *asked: Any) -> str:
        words, _ = self._words(*asked)
        done = self.house.processes.ask([*words, "--dry-run"], PLAN_SECONDS)
        return self._plan_html(self._short(done.stderr), json.loads(done.stdout))

    def _short(self, text: str) -> str:
        """Without the first root in front of paths."""
        return text.replace(f"{self.house.places.home}/", "")

    def _plan_html(self, said: str, plan: dict[str, Any]) -> str:
        tensors = plan["tensors"]
        sizes: dict[str, int] = {}
        for row in tensors:
            size = int(row["size"].removesuffix(" bytes").replace(",", ""))
            sizes[row["file"]] = sizes.get(row["file"], 0) + size
        head = self.words("{0} tensors in {1} file(s), {2} GB; {3} GB are free.").format(
            f"{len(tensors):,}",
            len(sizes),
            f"{plan['bytes'] / 1e9:.2f}",
            f"{plan['free_bytes'] / 1e9:,.1f}",
        )
        keys = ("file", "tensor", "action", "dtype_and_shape", "size")
        rows = [[str(row[key]) for key in keys] for row in tensors[:SHOWN_TENSORS]]
        more = len(tensors) - len(rows)
        rest = f"<p>{html.escape(self.words('{0} more').format(more))}</p>" if more > 0 else ""
        files = _table(("file", "MB"), [[name, f"{n / 1e6:,.1f}"] for name, n in sizes.items()])
        return (
            f"<p><b>{html.escape(head)}</b></p>"
            f'<div class="sw-plain">{html.escape(said.strip())}</div>'
            f"{files}<details><summary>{html.escape(self.words('Every tensor'))}</summary>"
            f"{_table(keys, rows)}{rest}</details>"
        )

    def _start(self, *asked: Any) -> str:
        words, target = self._words(*asked)
        name = self.house.places.typed(target).replace("/", "+")[-LONGEST_NAME:]
        digest = hashlib.sha256(str(target).encode()).hexdigest()[:8]
        job = self.house.processes.start(f"{PREFIX}{name} {digest}", words, apart=True)
        return job.name

    def _look(self, name: str) -> list[Any]:
        on, off = gr.update(interactive=True), gr.update(interactive=False)
        if not name:
            return ["", off, off]
        job = self.house.processes.job(name)
        if job.lives:
            return [self._progress(job), on, off]
        if result := _result(job):
            return [self._result_html(result), off, on]
        said = html.escape(self._short(job.said()).strip()[-4000:])
        head = html.escape(self.words("The export did not end well; this is what it said:"))
        return [
            f'<p class="sw-problems">{head}</p><div class="sw-plain">{said}</div>',
            *(off, off),
        ]

    def _stop(self, name: str) -> None:
        self.house.processes.job(name).stop()

    def _progress(self, job: Job) -> str:
        found = LINE.findall(job.said())
        if not found:
            return f"<p>{html.escape(self.words('reading the plan …'))}</p>"
        what, done, total, rate = found[-1]
        share = min(100.0, 100 * float(done) / max(1e-9, float(total)))
        text = f"{self.words(what)} {done} / {total} GB, {rate} MB/s"
        return (
            f'<div class="sw-bar" role="progressbar"><div style="width:{share:.1f}%"></div></div>'
            f'<div class="sw-steps">{html.escape(text)}</div>'
        )

    def _result_html(self, result: dict[str, Any]) -> str:
        head = self.words("{0}: {1} tensors, {2} GB in {3} s at {4} MB/s, {5}.").format(
            self.house.places.typed(Path(result["output"])),
            f"{result['tensors']:,}",
            f"{result['bytes'] / 1e9:.2f}",
            f"{result['seconds']:.1f}",
            f"{result['bytes_per_second'] / 1e6:,.0f}",
            self.words("verified" if result["verified"] else "not verified"),
        )
        rows = [[name, f"{size / 1e6:,.1f}"] for name, size in result["files"].items()]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in result["notes"])
        serve = f"shardway serve {shlex.quote(self.house.places.typed(Path(result['output'])))}"
        return (
            f"<p><b>✓ {html.escape(head)}</b></p>{notes}{_table(('file', 'MB'), rows)}"
            f'<div class="sw-plain">{html.escape(serve)}</div>'
        )

    def _talk(self, name: str) -> list[Any]:
        result = _result(self.house.processes.job(name))
        if result is None:
            raise UserError(self.words("There is no finished export to talk to."))
        output = self.house.places.typed(Path(result["output"]))
        return [gr.update(selected="chat"), gr.update(value=output)]


def _refuse_pickles(path: Path) -> None:
    """Raises UserError for a source whose weights are not ours and not safetensors."""
    ours = RunDir(path).config.is_file() or (path / layout.MANIFEST).is_file()
    if path.is_dir() and not ours and not any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} holds neither a run nor safetensors, and the page opens nothing else "
            f"→ shardway consolidate {shlex.quote(str(path))} --output DIR in a terminal"
        )


def _result(job: Job) -> dict[str, Any] | None:
    """What a finished export left on stdout; None while there is nothing, or if it failed."""
    try:
        found = json.loads(job.out.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """Rows of plain text under their heads."""
    return report.table([dict(zip(heads, map(html.escape, row), strict=True)) for row in rows])

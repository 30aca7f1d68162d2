"""The report page: its content, that it needs no other files, and that no run can break it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import report as verb
from launcher.config import store
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.run import sweep
from launcher.tracking import report, svg
from tests.helpers.commands import shardway
from tests.helpers.compose import composed_raw

HOSTILE = "<script>alert(\"1\")</script> & $\\frac{x$ 'quoted'"
VOID = {"meta", "br", "use", "path", "link"}


class Page(HTMLParser):
    """Closing tags, the cells of tables, and the resources that would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [
            value or "" for name, value in attributes if name in ("src", "href", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def make_run(folder: Path, steps: int = 4, base: float = 3.0, **sections: dict[str, Any]) -> Path:
    """A run folder as training leaves it, with an evaluation after every second step."""
    (folder / "logs/attempt-1").mkdir(parents=True)
    manifest.write_json(folder / "logs/attempt-1/status.json", {"state": "finished"})
    (folder / "config.yaml").write_text(store.dump(store.build(composed_raw(**sections))))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step, "loss": base - step / 10, "learning_rate": 1e-4, "grad_norm": 0.5,
                "tokens": 100 * step, "tokens_per_second": 50.0 + step % 2,
                "peak_memory_bytes": 2_500_000_000, "time": 1000.0 + step,
            }
        )  # fmt: skip
        if step % 2 == 0:
            lines.append({"step": step, "eval_loss": base + 0.25 * (step == 4)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def written(*paths: Path) -> str:
    return report.render_page(report.read_runs(list(paths)))


def test_the_table_shows_the_result_of_each_run(tmp_path: Path) -> None:
    rows = Page(written(make_run(tmp_path / "one"))).rows
    found = dict(zip(rows[0], rows[1], strict=True))
    seconds = 100 / 51 + 100 / 50 + 100 / 51 + 100 / 50
    assert found.items() >= {
        "run": "one", "state": "finished", "loss": "2.6000", "eval loss": "3.2500",
        "best": "3.0000", "tokens/s (median)": "50", "peak GB": "2.50",
        "time in steps": f"0:00:{round(seconds):02d}",
    }.items()  # fmt: skip
    assert found["steps"].startswith("4")
    assert found["strategy"] == composed_raw()["strategy"]["name"]


def test_several_runs_share_the_charts_and_show_differing_settings(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "low", optimizer={"learning_rate": 1e-5}),
        make_run(tmp_path / "high", base=2.0, optimizer={"learning_rate": 0.01}),
    ]
    text = written(*paths)
    rows = Page(text).rows
    assert [row[0] for row in rows[:3]] == ["run", "low", "high"]
    assert rows[3:] == [["setting", "low", "high"], ["optimizer.learning_rate", "1e-05", "0.01"]]
    drawn = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    titles = [title for title, _, _ in report.CHARTS]
    assert [sum(f">{title}</text>" in chart for chart in drawn) for title in titles] == [1] * 5
    for number in range(2):
        color, _ = svg.line_style(number)
        assert sum(color in chart for chart in drawn) == 1 + 5, "its sample and every chart"


def test_the_page_loads_no_other_files(tmp_path: Path) -> None:
    text = written(make_run(tmp_path / "one"), make_run(tmp_path / "two"))
    page = Page(text)
    assert all(target.startswith("#") for target in page.loads)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "image"})
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert all(url.startswith("#") for url in re.findall(r"url\(['\"]?([^)]*)", text))


def test_run_names_are_escaped(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "∕")
    hostile = make_run(tmp_path / name, model={"name": HOSTILE}, data={"path": f"{HOSTILE}.jsonl"})
    for paths in ([hostile], [hostile, make_run(tmp_path / "tame")]):
        page = Page(written(*paths))
        assert "script" not in page.tags
        assert [row[0] for row in page.rows].count(name) == 1
        assert any(HOSTILE in row for row in page.rows)


def test_a_name_that_is_not_utf8_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run\udcff")
    manifest.write_text(tmp_path / "report.html", written(run))
    assert "run\\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_sweep_shows_all_its_runs(tmp_path: Path) -> None:
    for number in range(3):
        make_run(tmp_path / str(number), training={"seed": number})
    manifest.write_json(tmp_path / sweep.INDEX, {"runs": 3})
    rows = Page(written(tmp_path, tmp_path / "1")).rows
    assert [row[0] for row in rows[:4]] == ["run", "0", "1", "2"], "and each run once"
    assert rows[-1] == ["training.seed", "0", "1", "2"]


def test_a_run_without_logs_is_shown_next_to_one_with_logs(tmp_path: Path) -> None:
    new = make_run(tmp_path / "new", steps=0)
    rows = Page(written(make_run(tmp_path / "old"), new)).rows
    assert dict(zip(rows[0], rows[2], strict=True))["steps"].startswith("0")


def report_of(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return shardway("report", *words, cwd=cwd)


def test_the_command_can_write_into_the_run_repeatedly(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for _ in range(2):
        done = report_of("run", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert (run / "report.html").read_text().startswith(report.HEADER)


def test_a_file_that_is_not_a_report_is_replaced_only_on_request(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    precious = tmp_path / "thesis.html"
    precious.write_text("precious")
    done = report_of(run, "--output", precious, cwd=tmp_path)
    assert done.returncode == 2
    assert "thesis.html is not a report → another --output, or --overwrite" in done.stderr
    assert precious.read_text() == "precious"
    assert report_of(run, "--output", precious, "--overwrite", cwd=tmp_path).returncode == 0
    assert precious.read_text().startswith(report.HEADER)


def test_a_damaged_run_is_reported_with_what_it_has_and_hides_no_other(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    (one / "logs/attempt-1/status.json").write_text("")
    (one / "config.yaml").write_text("model: {}\n")
    with (one / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"step": 5, "loss": null}\n{"step": 6, "loss": NaN}\n')
    text = written(one, two)
    head, first, second = Page(text).rows[:3]
    assert dict(zip(head, first, strict=True)).items() >= {
        "state": "damaged", "model": "", "steps": "6", "loss": "nan", "best": "3.0000",
    }.items()  # fmt: skip
    assert dict(zip(head, second, strict=True))["loss"] == "2.6000"
    assert "config.yaml cannot be read by this version" in text
    assert "metrics.jsonl: 1 lines are not records and left out" in text
    assert "inf" not in written(one).lower().replace("info", ""), "no broken curve"


@pytest.mark.parametrize(
    ("prepare", "words", "said"),
    [
        (lambda run: run, ["none"], "none is neither a run folder"),
        (
            lambda run: run,
            ["run", "other"],
            "a report of 2 runs has no default file → --output FILE",
        ),
        (lambda run: run, ["run", "--output", "no/x.html"], "the folder of --output no/x.html"),
        (lambda run: run, ["run", "--output", "other"], "other is a folder"),
        (lambda run: (run / "metrics.jsonl").unlink(), ["run"], "run: no step has been logged yet"),
    ],
)
def test_invalid_input_is_refused_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Any, words: list[str], said: str
) -> None:  # fmt: skip
    prepare(make_run(tmp_path / "run"))
    make_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shardway report", *words])
    with pytest.raises(UserError, match=re.escape(said)):
        verb.main()
    assert not (tmp_path / "run/report.html").exists()


def test_an_empty_sweep_is_refused(tmp_path: Path) -> None:
    manifest.write_json(tmp_path / sweep.INDEX, {"runs": 3})
    with pytest.raises(UserError, match="no run has started"):
        report.read_runs([tmp_path])

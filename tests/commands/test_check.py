"""`shardway check`: one line a fact, and an exit status that is not 0 if one is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.machines import doctor
from launcher.machines.doctor import Line
from tests.helpers.commands import in_process, shardway

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
STATUSES = ("ok", "warning", "refused")


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n" * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_machine_says_what_it_can_do(here: Path) -> None:
    """Each line has a status; torch, which is imported in another process, is the last."""
    done = shardway("check", "--json", cwd=here)
    lines = [Line(**each) for each in json.loads(done.stdout)]
    assert {line.status for line in lines} <= set(STATUSES)
    refused = [line for line in lines if line.status == "refused"]
    assert done.returncode == (2 if refused else 0)
    topics = {line.topic: line for line in lines}
    assert {"python", "host", "GPUs", "network", "open files", "cache", "Slurm"} <= set(topics)
    assert "gloo" in topics["messages"].text
    assert "cpu_adam" in topics["DeepSpeed"].text
    assert all(line.way_out for line in lines if line.status != "ok")
    assert list(here.iterdir()) == [here / "rows.jsonl"], "nothing is written"


@pytest.mark.parametrize(
    ("answer", "said"),
    [("import sys; sys.exit('no libcuda')", "no libcuda"), ("import time; time.sleep(60)", "1 s")],
    ids=["broken", "hanging"],
)
def test_a_torch_that_cannot_be_imported_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, answer: str, said: str
) -> None:
    (here / "torch.py").write_text(answer)
    monkeypatch.setenv("PYTHONPATH", f"{here}:{Path(doctor.__file__).parents[2]}")
    monkeypatch.setattr(doctor, "SECONDS", 1 if "sleep" in answer else 60)
    *_, last = doctor.inspect_host()
    assert (last.status, last.topic) == ("refused", "torch")
    assert said in last.text


def test_a_run_that_can_start_is_ok(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("model=tiny", "data=messages", "data.path=rows.jsonl", "run_dir=new")
    assert in_process(monkeypatch, "check", *words) == 0
    printed = capsys.readouterr().out
    topics = re.findall(r"^ok +(\w+)", printed, re.MULTILINE)
    assert [topic for topic in topics if topic != "chosen"] == [
        *("configuration", "first", "model", "data", "space"),
    ], printed  # fmt: skip
    assert "0 refused" in printed
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.path=nope.jsonl",), "data.path=nope.jsonl cannot be read"),
        (("model.name_or_path=./nope",), "model.name_or_path=./nope"),
        (("strategy=hsdp", "strategy.shard_size=3"), "strategy.shard_size=3"),
        (("method.rnak=3",), "method.rnak"),
        (("run_dir=.",), "run_dir=. exists"),
        pytest.param(("cluster.interface=ib7",), "cluster.interface=ib7", marks=pytest.mark.whole),
    ],
)
def test_a_run_that_cannot_start_is_refused(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    data = ("data=messages", "data.path=rows.jsonl")
    assert in_process(monkeypatch, "check", "model=tiny", *data, *words) == 2
    printed = capsys.readouterr().out
    refused = [line for line in printed.splitlines() if line.startswith("refused")]
    assert any(said in line for line in refused), printed


@pytest.mark.whole
def test_rows_that_the_template_refuses_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = here / "strict.jinja"
    template.write_text("{{ raise_exception('only in Latin') }}")
    words = ("model=tiny", "data=messages", "data.path=rows.jsonl", f"data.template={template}")
    assert in_process(monkeypatch, "check", *words) == 2
    assert "only in Latin" in capsys.readouterr().out


def test_importing_the_command_imports_no_torch() -> None:
    code = "import sys, launcher.commands.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""Ranks that are restarted, by torchrun or by the launcher, and two launches in one folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cluster import control, runs_table
from launcher.errors import UserError
from launcher.folders.run import RunDir
from tests.helpers.commands import (
    LONG,
    PATIENCE_SECONDS,
    SHORT,
    TRAIN_TINY,
    losses,
    metrics,
    shardway,
    start,
    status,
    wait_for_training,
    wait_until,
)

pytestmark = pytest.mark.slow

# As the run `finished`, with a checkpoint after each step.
AS_FINISHED = (*TRAIN_TINY[1:], *SHORT, "data.eval_rows=5", "training.eval_steps=2")
RESUMABLE = (*AS_FINISHED, "checkpoint.save_steps=1", "run_dir=run", "resume=auto")


def torchrun(*words: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_killed_rank_is_restarted_to_the_same_end(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 dies while the second checkpoint is written; `logs --follow` sees both attempts."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom tests.helpers.faults import die_at\n"
        f"is_first = not os.path.exists({str(tmp_path / 'run/logs/attempt-2')!r})\n"
        "if os.environ.get('RANK') == '1' and is_first:\n"
        "    die_at('os.scandir', r'\\.step-000002\\.partial')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    process = start(
        *("train", *AS_FINISHED, "checkpoint.save_steps=1", "run_dir=run"),
        "cluster.max_restarts=1",
        cwd=tmp_path,
    )
    wait_until(process, (tmp_path / "run/logs/attempt-1/console.log").is_file)
    followed = shardway("logs", "run", "--follow", cwd=tmp_path)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert status(tmp_path / "run", 2)["state"] == "finished"
    assert losses(tmp_path / "run") == losses(finished), "to the bit"
    for text in (output, followed.stdout):
        assert "attempt 2 goes on from the checkpoint of step 1" in text
        assert "finished with step 4" in text
    (line,) = (tmp_path / "run/logs/failures.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["attempt"], record["step"], record["saved"]) == (1, 2, 1)
    assert (record["kind"], record["exit_code"]) == ("killed", 137)
    assert len(record["rows"]) == 8


@pytest.mark.parametrize("agents", [pytest.param(1, marks=pytest.mark.whole), 2])
def test_ranks_that_torchrun_restarts_resume_and_finish(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agents: int
) -> None:
    """A rank is killed while the third checkpoint is written. With two agents, the one whose rank
    lives restarts it because the other one does, and counts that differently."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom tests.helpers.faults import die_at\n"
        f"is_first = not os.path.exists({str(tmp_path / 'run/logs/attempt-1')!r})\n"
        "if os.environ.get('RANK') == '1' and is_first:\n"
        "    die_at('os.scandir', r'\\.step-000003\\.partial')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    flags = ["--max-restarts=1", f"--nproc-per-node={2 // agents}", f"--nnodes={agents}"]
    flags += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=1"]
    started = [
        torchrun(*flags, "-m", "launcher.train", *RESUMABLE, cwd=tmp_path) for _ in range(agents)
    ]
    outputs = [agent.communicate(timeout=PATIENCE_SECONDS)[0] for agent in started]
    assert [agent.returncode for agent in started] == [0] * agents, "\n".join(outputs)
    run = tmp_path / "run"
    assert not (run / "logs/attempt-1/status.json").exists()
    assert (status(run, 2)["state"], status(run, 2)["step"]) == ("finished", 4)
    assert "resumed from step-000002" in "".join(outputs)
    assert losses(run) == losses(finished), "to the bit"


def test_ranks_of_torchrun_that_have_nothing_to_do_make_no_attempt(finished: Path) -> None:
    words = ("-m", "launcher.train", *AS_FINISHED, "run_dir=run", "resume=auto")
    process = torchrun("--standalone", "--nproc-per-node=2", *words, cwd=finished.parent)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert output.count("nothing to do: ") == 1, output
    assert RunDir(finished).newest_attempt().attempt == 1


@pytest.mark.parametrize(
    "delay", [0.0, *(pytest.param(each, marks=pytest.mark.whole) for each in (0.3, 1, 2, 4))]
)
def test_of_two_launches_in_one_folder_one_trains(
    finished: Path, tmp_path: Path, delay: float
) -> None:
    words = ("train", *RESUMABLE)
    first = start(*words, cwd=tmp_path)
    time.sleep(delay)
    second = start(*words, cwd=tmp_path)
    outputs = [each.communicate(timeout=PATIENCE_SECONDS)[0] for each in (first, second)]
    ended = [first.returncode, second.returncode]
    assert sorted(ended) == [0, 2], outputs
    refused = outputs[ended.index(2)]
    assert f"{tmp_path}/run is running; stop it first: shardway stop" in refused
    assert "Traceback" not in refused
    assert RunDir(tmp_path / "run").newest_attempt().attempt == 1, "no attempt was made"
    assert status(tmp_path / "run")["state"] == "finished"
    assert losses(tmp_path / "run") == losses(finished)


def test_an_attempt_that_another_replaces_while_it_starts_is_superseded(
    tiny: Path, tmp_path: Path
) -> None:
    """Slurm starts another attempt when it has lost a machine; the old one may still run there."""
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run folder: ")
    (tmp_path / "run/logs/attempt-2").mkdir()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, output
    assert f"attempt 2 of {tmp_path}/run has started: attempt 1 is superseded" in output
    assert status(tmp_path / "run")["state"] == "superseded"
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_run_of_torchrun_is_seen_stopped_and_resumed(tiny: Path, tmp_path: Path) -> None:
    """The command line of its ranks does not name the run."""
    run = tmp_path / "run"
    words = ("-m", "launcher.train", *TRAIN_TINY[1:], *LONG, "run_dir=run")
    process = torchrun("--standalone", "--nproc-per-node=2", *words, cwd=tmp_path)
    wait_for_training(process, run)
    assert "running" in runs_table.format_table(tmp_path)
    with pytest.raises(UserError, match=f"{run} is running; stop it first: shardway stop {run}"):
        control.resume_run(run)
    joined = shardway(*TRAIN_TINY, *LONG, "run_dir=run", "resume=auto", cwd=tmp_path)
    assert joined.returncode == 2
    assert joined.stderr.strip() == f"{run} is running; stop it first: shardway stop {run}"
    assert list(control.request_stop(run)) != []
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    ended = status(run)
    assert (ended["state"], ended["reason"]) == ("stopped", "shardway stop")
    assert metrics(run)[-1]["step"] == ended["step"]
    assert "stopped" in runs_table.format_table(tmp_path)
    assert json.loads((run / "launch.json").read_text())["argv"][0].endswith("train.py")

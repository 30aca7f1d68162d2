"""Stopping, crashing and resuming, through the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from launcher.folders import paths
from launcher.folders.checkpoint import finished_checkpoints, newest_checkpoint
from tests.helpers.commands import (
    LONG,
    PATIENCE_SECONDS,
    SHORT,
    TRAIN_TINY,
    losses,
    metrics,
    processes_of,
    shardway,
    start,
    status,
    the_agent,
    the_rank,
    wait_for_training,
    wait_until,
    wait_until_none_is_left,
    written,
)

pytestmark = pytest.mark.slow

AS_FINISHED = (*TRAIN_TINY, *SHORT, "data.eval_rows=5")  # the settings of `finished`


def tell(process: subprocess.Popen[str], number: int) -> None:
    if number == signal.SIGINT:  # a terminal signals the entire foreground group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.whole)]
)
def test_stopping_the_command_saves_a_checkpoint_and_the_run_resumes(
    tiny: Path, tmp_path: Path, number: int
) -> None:
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    wait_for_training(process, tmp_path / "run")
    assert len(processes_of(tmp_path / "run")) >= 3, "the agent and two ranks"
    tell(process, number)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert processes_of(tmp_path / "run") == []
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["reason"]) == ("stopped", signal.Signals(number).name)
    assert newest_checkpoint(tmp_path / "run/checkpoints").step == ended["step"]
    assert not (tmp_path / "run/stop").exists()
    more = f"training.stop_after_steps={ended['step'] + 2}"
    done = shardway(*TRAIN_TINY, *LONG, "run_dir=run", "resume=auto", more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [record["step"] for record in metrics(tmp_path / "run")]
    assert steps == list(range(1, ended["step"] + 3))


def test_a_signal_to_one_rank_while_rows_are_tokenized_stops_all(
    tiny: Path, tmp_path: Path
) -> None:
    """Tokenizing is aborted, and the other rank does not start it again."""
    row = json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 100_000)
    kept = set((paths.cache() / "tokens").glob("*.safetensors"))
    words = (*TRAIN_TINY, *LONG, "data=messages", f"data.path={tmp_path / 'rows.jsonl'}")
    process = start(*words, "run_dir=run", cwd=tmp_path)
    log = tmp_path / "run/logs/attempt-1/rank-01.log"
    wait_until(process, log.is_file)  # signal handlers are installed before the log opens
    the_rank(tmp_path / "run", 1).send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, output
    assert status(tmp_path / "run") == {
        "state": "stopped", "reason": "SIGUSR2", "step": 0, "exit_code": 75,
    }  # fmt: skip
    assert set((paths.cache() / "tokens").glob("*.safetensors")) == kept, "nothing was tokenized"


@pytest.mark.parametrize("processes", [1, 3], ids=["the agent starts", "two ranks just started"])
def test_a_second_signal_ends_every_rank_at_once(
    tiny: Path, tmp_path: Path, processes: int
) -> None:
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run folder: ")
    wait_until(process, lambda: len(processes_of(tmp_path / "run")) >= processes)
    process.send_signal(signal.SIGINT)
    wait_until(process, (tmp_path / "run/stop").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGINT
    wait_until_none_is_left(tmp_path / "run")


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero3", marks=pytest.mark.whole)])
def test_a_resumed_run_equals_an_uninterrupted_run(
    tiny: Path, tmp_path: Path, strategy: str
) -> None:
    words = (*TRAIN_TINY, *SHORT, f"strategy={strategy}", "method.dropout=0.1")
    for more in (["run_dir=whole"], ["run_dir=parts", "training.stop_after_steps=2"]):
        done = shardway(*words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert status(tmp_path / "parts")["reason"] == "training.stop_after_steps=2"
    done = shardway(*words, "run_dir=parts", "resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    done = shardway("consolidate", "parts", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.whole
def test_a_run_that_is_stopped_in_its_last_evaluation_has_not_finished(
    tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "eval.jsonl").write_text(rows_file.read_text() * 20)
    words = ("data.eval_path=eval.jsonl", "training.micro_batch_size=1", "run_dir=run")
    process = start(*TRAIN_TINY, *SHORT, *words, cwd=tmp_path)
    run = tmp_path / "run"
    wait_until(process, lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) == 4)
    (run / "stop").touch()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, output
    ended = status(run)
    assert (ended["state"], ended["step"]) == ("stopped", 4)
    assert "eval_loss" not in (run / "metrics.jsonl").read_text()
    done = shardway("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (status(run, 2)["state"], status(run, 2)["step"]) == ("finished", 4)
    assert "eval_loss" in (run / "metrics.jsonl").read_text()


def test_a_broken_checkpoint_is_reported_and_the_previous_one_is_used(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    damaged = tmp_path / "run/checkpoints/step-000004/optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    done = shardway(*AS_FINISHED, "run_dir=run", "resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-000004 is broken and skipped" in done.stdout
    assert "optimizer.safetensors has changed since" in done.stdout
    assert "resumed from step-000003" in done.stdout
    assert (tmp_path / "run/checkpoints/broken-1-step-000004").is_dir(), "nothing is lost"
    assert losses(tmp_path / "run") == losses(finished)


def test_a_changed_configuration_is_refused_with_the_changes(
    finished: Path, tmp_path: Path
) -> None:
    more = (f"resume={finished}", "optimizer.learning_rate=1e-2", "strategy=zero2")
    done = shardway(*AS_FINISHED, *more, cwd=tmp_path)
    assert done.returncode == 2
    assert "optimizer.learning_rate: 0.0001 → 0.01" in done.stderr
    assert "resume_force=true" in done.stderr
    assert "strategy.name" not in done.stderr, "the strategy may change"
    assert written(tmp_path) == []


def test_a_forced_change_is_shown_and_training_resumes(finished: Path, tmp_path: Path) -> None:
    longer = ("training.max_steps=6", "optimizer.learning_rate=1e-2")
    more = (f"resume={finished}", "resume_force=true", "run_dir=run")
    done = shardway(*AS_FINISHED, *longer, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  optimizer.learning_rate: 0.0001 → 0.01" in done.stdout.splitlines()
    assert "  training.max_steps: 4 → 6" in done.stdout.splitlines()
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [5, 6]


def test_incompatible_tensors_cannot_be_forced(finished: Path, tmp_path: Path) -> None:
    more = (f"resume={finished}", "resume_force=true", "method.rank=4", "run_dir=run")
    done = shardway(*AS_FINISHED, *more, cwd=tmp_path)
    assert done.returncode == 2
    assert "step-000004 contains other tensors (method.rank: 8 → 4)" in done.stderr
    assert written(tmp_path) == []


def test_last_and_best_checkpoints_are_kept_and_weights_only_cannot_resume(
    tiny: Path, tmp_path: Path
) -> None:
    words = (*TRAIN_TINY, *SHORT, "method=full", "run_dir=run")
    done = shardway(
        *(*words, "data.eval_rows=5", "training.eval_steps=1", "optimizer.learning_rate=0.3"),
        *("checkpoint.save_steps=1", "checkpoint.keep_last=2", "checkpoint.content=weights"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    evaluated = {m["eval_loss"]: m["step"] for m in metrics(tmp_path / "run") if "eval_loss" in m}
    best = evaluated[min(evaluated)]
    assert len(evaluated) == 4
    assert best < 3, "such a learning rate makes it worse"
    found = finished_checkpoints(tmp_path / "run/checkpoints")
    assert [each.step for each in found] == [4, 3, best]
    before = written(tmp_path)
    done = shardway(*words, "resume=auto", cwd=tmp_path)
    assert done.returncode == 2
    assert "contains only weights (checkpoint.content=weights)" in done.stderr
    assert written(tmp_path) == before


def test_a_rank_killed_during_a_save_loses_only_that_save(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is killed before it renames the third checkpoint to its final name."""
    fault = 'die_at("os.rename", r"\\.step-000003\\.partial")'
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom tests.helpers.faults import die_at\n"
        f"if os.environ.get('RANK') == '0':\n    {fault}\n"
    )
    more = ("run_dir=run", "checkpoint.save_steps=1", "resume=auto")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
        done = shardway(*AS_FINISHED, *more, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 0 failed: ended by signal SIGKILL" in done.stdout
    assert len(list((tmp_path / "run/checkpoints").glob(".step-000003.partial"))) == 1
    done = shardway(*AS_FINISHED, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from step-000002" in done.stdout
    assert losses(tmp_path / "run") == losses(finished)
    assert list((tmp_path / "run/checkpoints").glob(".*")) == []


def test_a_killed_rank_is_reported_and_the_others_end(tiny: Path, tmp_path: Path) -> None:
    process = start(*TRAIN_TINY, *LONG, "run_dir=run", cwd=tmp_path)
    wait_for_training(process, tmp_path / "run")
    the_rank(tmp_path / "run", 1).kill()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    lines = output.strip().splitlines()
    assert "rank 1 failed: ended by signal SIGKILL; often the machine ran out of memory" in lines
    assert lines[-1] == f"Log: {tmp_path}/run/logs/attempt-1/rank-01.log"
    assert processes_of(tmp_path / "run") == []


def test_a_killed_agent_leaves_no_orphan_processes(tiny: Path, tmp_path: Path) -> None:
    """Neither ranks nor the processes in which a rank tokenizes rows."""
    row = json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 100_000)
    words = (*TRAIN_TINY, *LONG, "data=messages", "data.path=rows.jsonl", "data.workers=2")
    process = start(*words, "run_dir=run", cwd=tmp_path)
    launcher = psutil.Process(process.pid)

    def pools() -> list[psutil.Process]:
        ours = launcher.children(recursive=True)
        return [each for each in ours if "spawn_main" in " ".join(each.cmdline())]

    wait_until(process, lambda: len(pools()) >= 2)
    everyone = launcher.children(recursive=True)
    the_agent(tmp_path / "run").kill()
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    _, left = psutil.wait_procs(everyone, timeout=60)
    assert left == []


STRAY = ("step-000009.bak", "step-abc", "step-000009 (copy)", "step-5", ".DS_Store")


def test_strays_and_damaged_files_do_not_stop_a_resume(
    finished: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint has a damaged configuration, the files of the last attempt and the
    token cache are damaged, and the run's folders contain what does not belong there."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(finished, run)
    shutil.copytree(Path(os.environ["SHARDWAY_CACHE"]) / "tokens", cache / "tokens")
    monkeypatch.setenv("SHARDWAY_CACHE", str(cache))
    for file in (cache / "tokens").glob("*.arrow"):
        file.write_bytes(b"\1" * file.stat().st_size)
    for name in STRAY:
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints/.step-000004.partial").write_text("a file")
    (run / "logs/attempt-x").mkdir()
    (run / "logs/attempt-1.bak").mkdir()
    (run / "checkpoints/step-000004/config.yaml").write_text("model: [")
    for name in ("logs/attempt-1/status.json", "logs/attempt-1/steps.json", "trackers.json"):
        (run / name).write_text("{")
    (run / "launch.json").write_text("")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "nonsense\n", *lines[1:]]))
    same = (*AS_FINISHED, f"model.name_or_path={tiny}", "run_dir=run", "resume=auto")
    done = shardway(*same, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-000004 is broken and skipped" in done.stdout
    assert "resumed from step-000003" in done.stdout
    assert ".arrow has changed since it was written; rebuilt" in done.stdout
    assert "metrics.jsonl: 1 lines are not records; moved to " in done.stdout
    assert "nonsense\n" in (run / "logs/attempt-2/lost-metrics.jsonl").read_text()
    assert losses(run) == losses(finished)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names >= {*STRAY, "broken-1-step-000004", "broken-1-.step-000004.partial"}
    (run / "checkpoints/step-000004/manifest.json").write_text('{"files": {}}')
    for words in (("consolidate", "run", "--output", "out", "--dry-run"), ("runs", ".")):
        done = shardway(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("step-000004 is damaged and not used" in done.stdout) == (words[0] != "runs")

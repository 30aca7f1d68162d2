"""From a configuration to an exported model that answers, with every launch method."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from launcher.config import store
from launcher.folders import manifest
from launcher.folders.checkpoint import newest_checkpoint
from tests.helpers.commands import (
    LONG,
    SHORT,
    TRAIN_TINY,
    losses,
    metrics,
    run,
    shardway,
    start,
    written,
)

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.slow


def test_the_run_folder_contains_the_expected_files(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml", "launch.json", "metrics.jsonl", "loss.png", "logs", "checkpoints",
    }  # fmt: skip
    assert {path.name for path in (finished / "logs/attempt-1").iterdir()} == {
        "torchrun.log", "rank-00.log", "rank-01.log", "status.json", "steps.json", "console.log",
    }  # fmt: skip
    listing = DOCS.joinpath("launching.md").read_text().split("```\nruns/try/")[1]
    listed = set(re.findall(r"[\w./-]+", listing.split("```")[0]))
    for path in [*finished.iterdir(), *(finished / "logs/attempt-1").iterdir()]:
        name = path.name.replace("rank-01", "rank-00")
        assert any(word.split("/")[0] == name for word in listed), name
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"step-000003", "step-000004"}
    assert newest_checkpoint(finished / "checkpoints").step == 4
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    launch = json.loads((finished / "launch.json").read_text())
    assert launch["versions"]["torch"]
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["run_dir"] == str(finished)


def test_metrics_have_one_line_per_step(finished: Path) -> None:
    records = metrics(finished)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert record.keys() == {
            "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
            "target_tokens_per_second", "samples_per_second", "step_seconds_p50",
            "step_seconds_p95", "data_wait", "padding", "peak_memory_bytes", "time",
        }  # fmt: skip
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4]
    assert steps[-1]["tokens"] > steps[0]["tokens"] > 0


def test_a_finished_run_is_exported_to_a_model_that_answers(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    done = shardway(
        "consolidate", finished, "--output", out, "--max-shard-size", "50KB", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.safetensors"))) > 1
    assert shardway("verify", out, cwd=tmp_path).returncode == 0
    asked = shardway("chat", out, "--question", "hi", "--max-new-tokens", "4", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    file = next(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    refused = shardway("verify", out, cwd=tmp_path)
    assert refused.returncode == 2
    assert file.name in refused.stderr


def test_the_consolidate_tool_works_like_the_command(finished: Path, tmp_path: Path) -> None:
    tools = Path(__file__).resolve().parents[2] / "tools"
    command = [sys.executable, str(tools / "consolidate.py"), str(finished), "--output", "out"]
    assert run(command, tmp_path).returncode == 0


def test_the_frozen_configuration_alone_reproduces_the_run(finished: Path, tmp_path: Path) -> None:
    done = shardway(
        *("train", "--config-path", finished, "--config-name", "config", "run_dir=again"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "again") == losses(finished)
    assert written(tmp_path)[0] == "again", "Hydra makes no folders of its own"


def test_a_full_run_can_be_consolidated(tiny: Path, tmp_path: Path) -> None:
    done = shardway(*TRAIN_TINY, *SHORT, "method=full", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = shardway("consolidate", "run", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 gathered" in done.stdout
    assert shardway("verify", "out", cwd=tmp_path).returncode == 0


def test_torchrun_on_one_host_makes_one_run_folder(tiny: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "launcher.train", *TRAIN_TINY[1:], *SHORT),
    ]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(losses(folder)) == 4
    console = (folder / "logs/attempt-1/console.log").read_text().splitlines()
    assert console[0] == f"run folder: {folder}"
    assert console[1] == "precision=auto: fp32, because the ranks run on CPU"
    assert console[2].startswith("strategy=auto: ddp, because a complete train state needs about")
    frozen = store.load(folder / "config.yaml")
    assert (frozen.precision.name, frozen.strategy.name) == ("fp32", "ddp")
    assert console[-2].startswith("step 4/4  loss ")
    assert console[-1] == f"finished with step 4; to export it: shardway consolidate {folder}"


def agents(
    tmp_path: Path, overrides: tuple[tuple[str, ...], ...], folders: tuple[str, ...] = (".", ".")
) -> list[subprocess.Popen[str]]:
    """Start one torchrun agent per entry of `overrides`, each in its own folder like a host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(overrides)}"),
                *(f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"),
                *("--nproc-per-node=1", "-m", "launcher.train", *TRAIN_TINY[1:], *SHORT, *words),
            ],
            cwd=tmp_path / folders[node],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, words in enumerate(overrides)
    ]


def test_torchrun_on_two_hosts_agrees_on_one_run_folder(tiny: Path, tmp_path: Path) -> None:
    words = ("cluster.preflight=true",)
    nodes = agents(tmp_path, (words, words))
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "preflight: 2 ranks on 2 machines" in outputs[0]
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(losses(folder)) == 4
    assert {path.name for path in (folder / "logs/attempt-1").iterdir()} == {
        "rank-00.log", "rank-01.log", "status.json", "steps.json", "console.log",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.whole)])
def test_without_a_shared_disk_checkpoints_are_saved_on_the_first_host(
    tiny: Path, tmp_path: Path, method: str
) -> None:
    folders = ("one", "two")
    for name in folders:
        (tmp_path / name).mkdir()

    def train(*more: str) -> None:
        words = ("run_dir=run", "launch.shared_disk=false", f"method={method}", *more)
        nodes = agents(tmp_path, (words, words), folders)
        outputs = [node.communicate(timeout=180)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs

    train("training.stop_after_steps=2", "cluster.preflight=true")
    one, two = (tmp_path / name / "run" for name in folders)
    assert newest_checkpoint(one / "checkpoints").step == 2
    assert manifest.check(one / "checkpoints/step-000002/manifest.json")
    assert list((two / "checkpoints").iterdir()) == []
    train("resume=auto")
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["step-000002"]
    assert manifest.check(two / "checkpoints/step-000002/manifest.json"), "it was brought there"
    whole = shardway(*TRAIN_TINY, *SHORT, f"method={method}", "run_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout
    assert losses(one) == losses(tmp_path / "whole")
    assert not (two / "metrics.jsonl").exists()
    assert shardway("consolidate", one, "--output", "out", cwd=tmp_path).returncode == 0


def test_shared_disk_false_is_refused_on_a_shared_disk(tiny: Path, tmp_path: Path) -> None:
    words = ("run_dir=run", "launch.shared_disk=false")
    nodes = agents(tmp_path, (words, words))
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    assert "launch.shared_disk=false: run_dir=run cannot be created: File exists" in outputs[1]


def test_a_dry_run_under_torchrun_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    nodes = agents(tmp_path, (("launch.dry_run=true",), ("launch.dry_run=true",)))
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert written(tmp_path) == []


def test_a_host_with_other_overrides_is_refused(tiny: Path, tmp_path: Path) -> None:
    nodes = agents(tmp_path, ((), ("method.rank=5",)))
    try:
        said = nodes[1].communicate(timeout=180)[0]
        assert "rank 1 has composed a different configuration than rank 0" in said
        assert nodes[1].returncode != 0
        assert nodes[0].wait(timeout=180) != 0
        assert written(tmp_path) == []
    finally:
        for node in nodes:
            node.kill()


def test_training_continues_after_its_console_closes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # each line is written as it comes
    process = start(*TRAIN_TINY, *SHORT, "run_dir=run", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run folder: ")
    process.stdout.close()  # as `| head -1` does
    process.wait(timeout=120)
    assert len(losses(tmp_path / "run")) == 4
    assert newest_checkpoint(tmp_path / "run/checkpoints").step == 4


def test_gpus_that_torch_cannot_use_are_an_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPUs of this machine")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    done = shardway(*TRAIN_TINY, *SHORT, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "the launcher found 2 GPU(s), but torch" in done.stdout


def test_the_error_of_a_rank_is_printed_last(tiny: Path, tmp_path: Path) -> None:
    done = shardway(
        *TRAIN_TINY,
        *LONG,
        "run_dir=run",
        "optimizer.learning_rate=1e30",
        "method=full",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    first, rows, last = done.stdout.strip().splitlines()[-3:]
    assert "gradient norm" in first
    assert re.match(r"Rows of step \d+: (\d+, ){7}\d+ \(", rows)
    assert (
        "training stops here. Every output is finite, but a gradient is not. Try a lower" in first
    )
    assert last.startswith("Log: ")
    assert Path(last.removeprefix("Log: ")).is_file()
    assert "Traceback" not in done.stdout + done.stderr


def test_errors_that_only_ranks_can_detect_are_reported(tiny: Path, tmp_path: Path) -> None:
    """The module names of a model are known only after it is built."""
    done = shardway(
        *TRAIN_TINY, *SHORT, "run_dir=run", "method.target_modules=[no_such_module]", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "no_such_module" in done.stdout
    assert "Traceback" not in done.stdout
    assert (tmp_path / "run/logs/attempt-1/console.log").read_text() == done.stdout

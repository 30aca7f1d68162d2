"""A sweep as one job array on a real Slurm."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.helpers.commands import losses
from tests.helpers.slurm import LONG, Slurm, out_of, submit, verb

OVER = ("COMPLETED", "FAILED")


def test_a_sweep_is_a_job_array_and_a_failed_job_does_not_stop_the_others(
    slurm: Slurm, tiny: Path, tmp_path: Path
) -> None:
    """One rate is so high that the loss is not finite; one job gets a signal and is requeued."""
    words = (*LONG, "cluster.array_limit=2")
    rates = "optimizer.learning_rate=1e-3,1e38,1e-4"
    job = submit(slurm, tmp_path, "--multirun", "run_dir=rates", rates, *words)
    rates_folder = tmp_path / "rates"
    first = rates_folder / "0"
    slurm.until(lambda: (first / "metrics.jsonl").is_file() and len(losses(first)) > 20, 120)
    slurm.ask("scancel", "--signal=USR2", f"{job}_0")
    slurm.until(lambda: all(slurm.state(f"{job}_{at}") in OVER for at in range(3)), 240)
    states = [slurm.state(f"{job}_{at}") for at in range(3)]
    assert states == ["COMPLETED", "FAILED", "COMPLETED"], out_of(rates_folder / "1")
    assert "not finite" in out_of(rates_folder / "1")
    table = (rates_folder / "summary.txt").read_text()
    assert table == verb(slurm, tmp_path, "runs", "rates").stdout
    head, *rows = (line.split() for line in table.splitlines())
    assert head[:5] == ["run", "optimizer.learning_rate", "state", "attempt", "step"]
    assert [row[:5] for row in rows] == [
        ["0", "0.001", "finished", "2", "120/120"],
        ["1", "1e+38", "failed", "1", rows[1][4]],
        ["2", "0.0001", "finished", "1", "120/120"],
    ]
    assert [json.loads((rates_folder / f"{n}/slurm.json").read_text())["job"] for n in "012"] == [
        f"{job}_{at}" for at in range(3)
    ]


def test_stopping_a_sweep_stops_all_its_jobs(slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    words = (*LONG, "training.max_steps=100000", "cluster.array_limit=1", "run_dir=rates")
    job = submit(slurm, tmp_path, "--multirun", "optimizer.learning_rate=1e-3,1e-4", *words)
    first = tmp_path / "rates/0"
    slurm.until(lambda: (first / "metrics.jsonl").is_file() and len(losses(first)) > 3, 120)
    done = verb(slurm, tmp_path, "stop", "rates")
    assert f"job {job}_1 was removed from the queue" in done.stdout
    slurm.until(lambda: slurm.state(f"{job}_0") == "COMPLETED", 60)
    assert re.search(r"^0 .* stopped", (tmp_path / "rates/summary.txt").read_text(), re.MULTILINE)
    assert "not started" in verb(slurm, tmp_path, "runs", "rates").stdout

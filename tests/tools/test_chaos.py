"""Random kills of a run, which ends as if there had been none; and the simulated goodput."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
KILLS = "kill,kill-first,kill-agent,killed-save,segfault"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "ranks"), [(5, 1), pytest.param(20, 2, marks=pytest.mark.whole)]
)
@pytest.mark.timeout(2400)
def test_a_run_that_is_killed_at_random_ends_as_if_it_had_not_been(
    tiny: Path, tmp_path: Path, faults: int, ranks: int
) -> None:
    """The seed is new each time; the message of a failure has it."""
    seed = random.SystemRandom().randrange(10_000)
    done = subprocess.run(
        [
            *(sys.executable, TOOLS / "chaos.py", "--minutes", "30", "--faults", str(faults)),
            *("--kinds", KILLS, "--seed", str(seed), "--json", tmp_path / "report.json"),
            *(f"cluster.cpu_processes={ranks}", "checkpoint.save_steps=5"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["equal"]
    results = report["results"]
    assert len(results) == faults
    assert {each["kind"] for each in results} == set(KILLS.split(","))
    assert all(each["notice"] is not None for each in results)
    assert {each["by"] for each in results} <= {"launcher", "command"}
    assert "losses, weights and optimizer state equal to the bit" in done.stdout


def test_the_schedule_is_that_of_the_seed_and_has_each_kind_as_often(tool: Any) -> None:
    schedule = tool("chaos").schedule
    kinds = ["a", "b", "c"]
    first = list(islice(schedule(kinds, random.Random(1)), 9))
    assert first == list(islice(schedule(kinds, random.Random(1)), 9))
    assert all(first.count(kind) == 3 for kind in kinds)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kinds", "kill,flood"], "--kinds flood is no fault → kill, "),
        (["--minuets=3"], "--minuets=3 is neither a flag nor an override"),
        (["now"], "now is neither a flag nor an override"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(words: list[str], said: str) -> None:
    command = [sys.executable, TOOLS / "chaos.py", *words]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_goodput_falls_with_ranks_and_costs_and_is_near_its_formula(tool: Any) -> None:
    goodput = tool("chaos_goodput")
    fast, slow = goodput.Costs(30, 10, 60), goodput.Costs(30, 600, 600)
    shares = [goodput.simulated_goodput(ranks, fast, 1) for ranks in (128, 1024, 16_384)]
    assert shares == sorted(shares, reverse=True)
    assert goodput.simulated_goodput(1024, slow, 1) < shares[1]
    mean, every = goodput.mean_seconds_between_failures(1024), goodput.best_interval(1024, 30)
    formula = 1 - 30 / every - (every / 2 + 60) / mean
    assert shares[1] == pytest.approx(formula, abs=0.002)
    assert shares[1] >= 0.97

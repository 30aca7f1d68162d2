"""The commands on GPUs: a run trains, is exported and answers; it resumes to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import losses, shardway
from tests.helpers.places import CPU, Place, placed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("enough_gpus")]


@pytest.fixture
def options(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The overrides of every run. On CPU, GPUs are hidden from the commands."""
    if not place.on_gpu:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return [
        *("model=tiny", "precision=bf16", f"cluster.nproc_per_node={place.ranks}"),
        *(f"training.global_batch_size={8 * place.ranks}", "training.epochs=null"),
        *("training.max_steps=6", "optimizer.learning_rate=1e-3", "tracking.plot=false"),
    ]


def train(cwd: Path, options: list[str], *words: str) -> str:
    done = shardway("train", *options, *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


STRATEGIES = ["ddp", "fsdp", "zero2", "zero3"]


@pytest.mark.parametrize(("place", "strategy"), placed(STRATEGIES, on_cpu=["zero2"]))
def test_a_run_trains_and_its_export_answers(
    tiny: Path, tmp_path: Path, options: list[str], place: Place, strategy: str
) -> None:
    said = train(tmp_path, options, f"strategy={strategy}", "run_dir=run")
    assert f"on {place.device}" in said
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    done = shardway("consolidate", "run", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = shardway("chat", "out", "--question", "hi", "--max-new-tokens", "2", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr


# On a CPU without it, too: tests/distributed/test_resume.py.
DETERMINISTIC = [
    pytest.param(CPU, ("full", "fsdp"), marks=pytest.mark.whole, id="cpu-1-full-fsdp"),
    *placed([("full", "fsdp"), ("lora", "zero3")]),
]


@pytest.mark.parametrize(("place", "cell"), DETERMINISTIC)
def test_a_deterministic_run_resumes_to_the_bit(
    tiny: Path, tmp_path: Path, options: list[str], place: Place, cell: tuple[str, str]
) -> None:
    words = [f"method={cell[0]}", f"strategy={cell[1]}", "training.deterministic=true"]
    train(tmp_path, options, *words, "run_dir=whole")
    train(tmp_path, options, *words, "run_dir=parts", "training.stop_after_steps=3")
    train(tmp_path, options, *words, "run_dir=parts", "resume=auto")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

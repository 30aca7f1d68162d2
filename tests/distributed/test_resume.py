"""A run that is saved and loaded continues as if it had not stopped."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import load
from launcher.config import store
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.checkpoint import Checkpoint
from launcher.io.readers.dcp import read_index
from launcher.run import resume
from launcher.training.state import Progress
from tests.helpers import checkpoints, parts
from tests.helpers.checkpoints import END, STOP, run_steps, save_every_step, six_steps
from tests.helpers.layouts import ONE_OF_EACH, pairwise
from tests.helpers.parts import Case

LAYOUTS = [
    pytest.param(*layout, marks=() if layout[0] in ("fsdp", "hsdp", "zero3") else pytest.mark.whole)
    for layout in ONE_OF_EACH
]


@pytest.mark.parametrize(("strategy", "world", "options"), LAYOUTS)
def test_dropout_resumes_where_it_stopped(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, world: int, options: Any
) -> None:
    """To the bit. test_matrix.py tests this for every method and precision, without dropout."""
    case = six_steps(tiny, rows_file, "lora", strategy, precision="bf16", strategy_options=options)
    whole = ranks.run(world, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(world, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(world, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(("zero3", 2), ("fsdp", 3)), (("fsdp", 3), ("zero2", 2)), (("zero1", 3), ("zero3", 2))],
)
def test_any_strategy_resumes_on_any_number_of_ranks(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    tmp_path: Path,
    method: str,
    before: tuple[str, int],
    after: tuple[str, int],
) -> None:
    case = dataclasses.replace(six_steps(tiny, rows_file, method, before[0]), method_options={})
    whole = ranks.run(before[1], run_steps, case, tmp_path / "whole", 0, END)[0]
    ranks.run(before[1], run_steps, case, tmp_path / "parts", 0, STOP)
    case = dataclasses.replace(case, strategy=after[0])
    found = ranks.run(after[1], run_steps, case, tmp_path / "parts", STOP, END)[0]
    assert found == pytest.approx(whole[STOP:], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "strategy", "world", "options"),
    pairwise(
        [("fsdp", 3, {}), ("ddp", 2, {}), ("zero1", 2, {}), ("zero3", 2, {})], ["full", "lora"]
    ),
)
def test_training_continues_while_a_checkpoint_is_written(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, method: str, strategy: str, world: int,
    options: Any,
) -> None:  # fmt: skip
    """What is written is the state of its step, whatever training has changed since."""
    case = six_steps(tiny, rows_file, method, strategy, strategy_options=options)
    whole = ranks.run(world, run_steps, case, tmp_path / "whole", 0, END)
    assert ranks.run(world, save_every_step, case, tmp_path / "parts") == whole
    for step in range(1, END + 1):
        manifest.check(tmp_path / f"parts/checkpoints/step-{step:06d}/manifest.json")
    for step in (STOP, END - 1):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(tmp_path / "parts" / name, tmp_path / f"from-{step}" / name)
        found = ranks.run(world, run_steps, case, tmp_path / f"from-{step}", step, END)
        assert found == [losses[step:] for losses in whole]


def patience_of_the_thread(rank_info: RankInfo, case: Case, folder: Path) -> float:
    """Seconds that the messages of a save in the background wait."""
    train_state, _ = parts.set_up(rank_info, case)
    config = case.config()
    launch = dataclasses.replace(config.launch, collective_minutes=7.0)
    config = dataclasses.replace(config, launch=launch)
    group: Any = checkpoints.saver(train_state, config, folder, async_save=True).group
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


def test_messages_of_a_save_in_the_background_wait_as_long_as_others(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = six_steps(tiny, rows_file, "lora", "ddp")
    assert ranks.run(1, patience_of_the_thread, case, tmp_path) == [7 * 60.0]


def fail_on_one_rank(rank_info: RankInfo, case: Case, folder: Path) -> str:
    train_state, loader = parts.set_up(rank_info, case)
    parts.train_step(train_state.strategy, loader.step_batch(0))
    saver = checkpoints.saver(train_state, case.config(), folder)
    if rank_info.rank == 1:
        saver._write_rank_files = broken  # type: ignore[method-assign]
    try:
        saver.save(1, 0, None)
    except UserError as error:
        return str(error)
    return "no error"


def broken(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_on_one_rank_fails_on_all_with_its_cause(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = six_steps(tiny, rows_file, "full", "fsdp")
    said = ranks.run(2, fail_on_one_rank, case, tmp_path)
    assert said == ["rank 1: OSError: [Errno 28] No space left on device"] * 2
    assert not list((tmp_path / "checkpoints").glob("step-*")), "half of one is none"


def resumed_on_other_rows(rank_info: RankInfo, case: Case, folder: Path) -> tuple[str, Progress]:
    """The refusal of the checkpoint of step 1, and where training resumes if it is forced."""
    checkpoint = Checkpoint(folder / "checkpoints/step-000001")
    train_state, _ = parts.set_up(rank_info, case)
    before = [each.local.clone() for each in train_state.strategy.weights().values()]
    with pytest.raises(UserError) as refused:
        load.restore(checkpoint, train_state, force=False)
    after = [each.local for each in train_state.strategy.weights().values()]
    assert all(map(torch.equal, before, after)), "nothing was restored"
    done = load.restore(checkpoint, train_state, force=True)
    assert not all(map(torch.equal, before, after)), "the weights were"
    return str(refused.value), done


def test_other_rows_are_refused_unless_resuming_is_forced(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = six_steps(tiny, rows_file, "lora", "single", scheduler="constant")
    ranks.run(1, run_steps, case, tmp_path, 0, 1)
    changed = tmp_path / "rows.jsonl"
    changed.write_text(rows_file.read_text().replace("answer", "Answer", 1))
    case = dataclasses.replace(case, data=changed)
    ((refusal, done),) = ranks.run(1, resumed_on_other_rows, case, tmp_path)
    assert refusal.startswith(f"the rows are not those of {tmp_path}/checkpoints/step-000001: ")
    assert "resume_force=true" in refusal
    assert done.step == 1
    assert done.tokens > 0


def test_a_weights_only_checkpoint_can_be_exported_but_not_resumed(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    case = six_steps(tiny, rows_file, "full", "zero2")
    ranks.run(2, weights_only, case, tmp_path)
    checkpoint = Checkpoint(tmp_path / "checkpoints/step-000001")
    names = {path.name for path in checkpoint.path.iterdir()}
    assert names >= {"model", "manifest.json"}
    assert not names & {"optimizer", "rng.safetensors"}
    assert not [name for name in read_index(checkpoint.path / "model").tensors if "exp_avg" in name]
    (problem,) = resume.find_problems(checkpoint, store.load(checkpoint.config))
    assert "contains only weights" in problem


def weights_only(rank_info: RankInfo, case: Case, folder: Path) -> None:
    run_steps(rank_info, case, folder, 0, 1, content="weights")

"""Rows that a chat template refuses are found before a run waits in a queue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import shardway

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
THOUGHT = {**ANSWER, "reasoning": "t"}


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([USER, THOUGHT], "rows.jsonl:2: the chat template leaves out reasoning_content"),
        ([USER, ANSWER], None),
    ],
)
def test_a_job_is_refused_before_it_is_queued(
    tiny: Path, tmp_path: Path, messages: list[dict[str, str]], sentence: str | None
) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": messages}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = shardway(
        "train", f"model.name_or_path={tiny}", "cluster=slurm", "launch.dry_run=true",
        "data=messages", f"data.path={path}", cwd=tmp_path,
    )  # fmt: skip
    if sentence is None:
        assert done.returncode == 0, done.stderr
        assert "#SBATCH" in done.stdout
    else:
        assert done.returncode == 2
        assert sentence in done.stderr

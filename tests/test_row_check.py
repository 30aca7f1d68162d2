"""Models and rows that the ranks would refuse are found before a run waits in a queue."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from launcher.config import Config
from launcher.errors import UserError
from launcher.row_check import check_rows
from tests.helpers.commands import shardway
from tests.helpers.parts import Case

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


MODELS = {
    "T5ForConditionalGeneration is an encoder-decoder": transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        architectures=["T5ForConditionalGeneration"],
    ),
    "bert with is_decoder=false reads both sides": transformers.BertConfig(
        architectures=["BertLMHeadModel"]
    ),
    "CLIPModel is not a causal language model": transformers.CLIPConfig(
        architectures=["CLIPModel"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", MODELS)
def test_a_model_that_the_ranks_would_refuse_is_refused_for_raw_text_too(
    tmp_path: Path, sentence: str
) -> None:
    MODELS[sentence].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=sentence):
        check_rows(raw_text(tmp_path))


def test_a_model_type_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "odd", "architectures": ["OddModel"]}')
    with pytest.raises(UserError, match="odd"):
        check_rows(raw_text(tmp_path))


def raw_text(model: Path) -> Config:
    """A run on raw text, whose rows need no chat template."""
    config = Case(model, model / "rows.txt").config()
    return replace(config, data=replace(config.data, format="text"))

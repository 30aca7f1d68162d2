"""Several kinds of data, from the command to the exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from launcher.folders import paths
from tests.helpers.commands import SHORT, TRAIN_TINY, losses, shardway

pytestmark = pytest.mark.slow

CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}


@pytest.fixture(scope="module")
def tools_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with tool calls in LLaMA-Factory's sharegpt format, one of them invalid."""
    path = tmp_path_factory.mktemp("data") / "tools.jsonl"
    lines = []
    for number in range(24):
        talk = [
            {"from": "human", "value": f"{number} + 1? " * (1 + number % 3)},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": str(number + 1)},
            {"from": "gpt", "value": f"It is {number + 1}."},
        ]
        tools = json.dumps([{"name": "add", "description": "adds", "parameters": {}}])
        lines.append(json.dumps({"conversations": talk, "tools": tools}))
    lines.insert(5, json.dumps({"conversations": []}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_streamed_run_resumes_exactly_and_its_template_is_exported(
    tiny: Path, tools_file: Path, tmp_path: Path
) -> None:
    train = (
        *TRAIN_TINY, "data=sharegpt", f"data.path={tools_file}", "data.template=hermes",
        "data.on_bad_row=skip", "data.streaming=true", "data.packing=true",
        "data.max_length=1024", "training.epochs=null", "training.max_steps=5",
    )  # fmt: skip
    assert shardway(*train, "run_dir=whole", cwd=tmp_path).returncode == 0
    stopped = shardway(*train, "run_dir=run", "training.stop_after_steps=2", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    went_on = shardway(*train, "run_dir=run", "resume=auto", cwd=tmp_path)
    assert "resumed from step-000002" in went_on.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), "to the bit, over two epochs"
    export = tmp_path / "export"
    done = shardway("consolidate", "run", "--output", export, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template == paths.templates()["hermes"].read_text()
    assert tokenizer.eos_token == "<|im_end|>"
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
    ):
        assert (export / name).read_bytes() == (tiny / name).read_bytes(), "it ends in EOS already"
    saved = json.loads((tmp_path / "run/checkpoints/step-000005/manifest.json").read_text())
    assert saved["end_tokens"] == [tokenizer.eos_token_id]


def test_a_dataset_listed_by_llama_factory_is_trained_on(
    tiny: Path, tools_file: Path, rows_file: Path, tmp_path: Path
) -> None:
    info = {
        "tools": {
            "file_name": tools_file.name,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "tools": "tools"},
        },
        "facts": {
            "file_name": str(paths.bundled("demo/train.jsonl")),
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
    }
    listed = tools_file.parent / "dataset_info.json"
    listed.write_text(json.dumps(info))
    train = (
        *TRAIN_TINY, *SHORT, "data=llamafactory", f"data.dataset_info={listed}",
        "data.template=hermes", "data.name=facts,tools", "data.max_length=2048",
    )  # fmt: skip
    refused = shardway(*train, cwd=tmp_path)
    assert refused.returncode == 2
    assert "conversations must be a list with at least one message" in refused.stderr
    done = shardway(
        *train, "data.on_bad_row=skip", "data.packing=true", "run_dir=run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "190 rows of 2 sources" in done.stdout
    assert "facts: 166 rows" in done.stdout
    assert "1 bad rows skipped" in done.stdout
    assert "packing: 190 rows in " in done.stdout
    assert len(losses(tmp_path / "run")) == 4
